"""The annotation formats that people have, each read into the content of COCO annotation files.

A reader takes a :class:`~cbam_mmdet.datasets.formats.folder.Folder` and returns what it holds as
:class:`~cbam_mmdet.datasets.formats.content.Found`: one COCO content for each split. `recognize.read_folder` chooses
the reader. Nothing here writes a file.

globox reads most of these formats, too. It is not used here, since it shifts VOC's boxes by a pixel and forgets their
`difficult`, takes images of one suffix only, keeps no folders (so that `train/1.jpg` and `valid/1.jpg` become one), and
ends in a KeyError or an AssertionError where a file is damaged. The tests compare the readers with it where both agree.
"""
