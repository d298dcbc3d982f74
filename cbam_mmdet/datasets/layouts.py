"""The folder layouts of COCO's and Pascal VOC's data sets.

This module does not import MMDetection, so the tools report a missing folder early.
"""

from __future__ import annotations

import os
import os.path as osp
from collections.abc import Callable

from mmengine.config import Config, ConfigDict

from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.config import split_datasets

COCO_LAYOUT = """\
    {root}/
        train2017/*.jpg   val2017/*.jpg
        annotations/instances_train2017.json   annotations/instances_val2017.json"""
VOC_LAYOUT = """\
    {root}/VOC2007/  (and VOC2012/ where the config names it)
        JPEGImages/*.jpg   Annotations/*.xml
        ImageSets/Main/trainval.txt   ImageSets/Main/test.txt
    or these three folders in {root}/ itself; a line of a .txt is the name of an image without its suffix"""
HELP = (
    'Point at another folder with --data-root DIR. docs/own_data.md shows how to bring other folders into this layout. '
    'To see everything work without a data set of your own: make demo'
)
LAYOUTS = {
    'CocoDataset': COCO_LAYOUT,
    'XMLDataset': VOC_LAYOUT,
    'VOCDataset': VOC_LAYOUT,
    'AnySuffixVOCDataset': VOC_LAYOUT,
}


def expected_layout(dataset: ConfigDict) -> str | None:
    """The expected layout of a data set's folder as text, or None for other kinds (LVIS, panoptic, ...)."""
    kind = dataset.get('type')
    name = kind.rpartition('.')[2] if isinstance(kind, str) else getattr(kind, '__name__', '')  # 'mmdet.CocoDataset'
    layout = LAYOUTS.get(name)
    root = (dataset.get('data_root') or '').rstrip('/') or '.'
    return layout and f'{layout.format(root=root)}\n{HELP}'


def require_data_root(dataset: ConfigDict, split: str) -> None:
    """Check that the folder of a data set exists, without reading it.

    Raises:
        UserError: if it does not exist. The message shows the expected layout.
    """
    root, layout = dataset.get('data_root') or '', expected_layout(dataset)
    if root and layout and '://' not in root and not osp.isdir(root):
        raise UserError(f'the {split} data set is not there: no folder {root} (in {os.getcwd()}). Expected:\n{layout}')


def require_data_roots(*splits: str) -> Callable[[Config], None]:
    """A check for utils.config.load_config: the folders of the data sets of these splits exist.

    The function that it returns raises a UserError for the first one that does not exist.
    """

    def check(cfg: Config) -> None:
        for split in splits:
            for dataset in split_datasets(cfg, split):
                require_data_root(dataset, split)

    return check
