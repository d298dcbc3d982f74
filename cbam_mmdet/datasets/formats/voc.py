"""Pascal VOC's XML files, with or without image sets (http://host.robots.ox.ac.uk/pascal/VOC/)."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

from cbam_mmdet.datasets.checks import voc_objects
from cbam_mmdet.datasets.formats.content import Found, LabelledImage, by_split, displayed_size, size_from
from cbam_mmdet.datasets.formats.folder import Folder, read_text, split_of
from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.text import brief

STYLE = 'Pascal VOC'


def read_voc_folder(folder: Folder, roots: dict[Path, ET.Element]) -> Found:
    """Read the XML files of a folder.

    A file's image is the one with the file's name, else the one that the file names. Image sets
    (`ImageSets/Main/train.txt`, ...) make the splits where there are any, else folders do that are called so.

    Args:
        folder: the folder.
        roots: its XML files in VOC's format, each with its root.

    Raises:
        UserError: for a malformed file, or if the image of none of them is there.
    """
    sets = _image_sets(folder)
    images, lost = [], []
    for path, root in roots.items():
        split = sets.get(path.stem) if sets else None
        if sets and split is None:
            continue
        name = folder.find_image(path.stem, path, split) or folder.find_image(root.findtext('filename') or '', path)
        if name is None:
            lost.append(path)
        else:
            images.append(_image(folder, path, root, name, split))
    if not images:
        raise UserError(f'{folder.root}: the images of its {len(roots)} .xml are not there ({folder.counts()})')
    classes = sorted({label for image in images for label, _, _ in image.objects})
    found = Found(STYLE, by_split(images, classes, split_of), [*roots])
    if sets:
        found.style += ' with image sets'
        unlisted = sum(path.stem not in sets for path in roots)
        if unlisted:
            found.notes.append(f'{unlisted} annotated images are in no image set, and are left out')
        absent = len(sets.keys() - {path.stem for path in roots})
        if absent:
            raise UserError(f'{folder.root}: {absent} images of the image sets have no .xml')
    if lost:
        found.notes.append(f'{len(lost)} .xml are left out, whose image is not there: the first is {lost[0]}')
    without = len(folder.images) - len(images) - len(lost)
    if without > 0 and not sets:
        found.notes.append(f'{without} images without an .xml are left out')
    return found


def _image(folder: Folder, path: Path, root: ET.Element, name: str, split: str | None) -> LabelledImage:
    try:
        width, height = root.findtext('size/width'), root.findtext('size/height')
        known = width and height and (float(width), float(height)) != (0, 0)  # some tools write 0
        size = size_from(width, height) if known else displayed_size(folder.root / name)
        # VOC's pixels count from 1, and the last one belongs to the box.
        objects = [(o.name, (o.box[0] - 1, o.box[1] - 1, o.box[2], o.box[3]), o.difficult) for o in voc_objects(root)]
    except (TypeError, ValueError) as error:
        raise UserError(f"annotation file {path} is not in Pascal VOC's format: {brief(error)}.") from error
    return LabelledImage(name, size, objects, path, split)


def _image_sets(folder: Folder) -> dict[str, str]:
    """The split of each image, by its name without suffix: trainval and test if both are there, else train and val."""
    files = {path.stem: path for path in folder.files['.txt'] if path.parent.name in ('Main', 'ImageSets')}
    if 'test' in files and ('trainval' in files or 'train' not in files):
        names = dict(train='trainval', val='test')
    else:
        names = dict(train='train' if 'train' in files else 'trainval', val='val', test='test')
    chosen = {split: files.get(name) for split, name in names.items()}
    splits: dict[str, str] = {}
    for split, path in chosen.items():
        for line in read_text(path).splitlines() if path else ():
            name = line.strip()
            if name and splits.setdefault(name, split) != split:
                raise UserError(f'{path}: image {name} is in the {splits[name]} set, too')
    return splits
