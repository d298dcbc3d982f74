"""VOC configs on folders that do not hold all of VOC2007/ and VOC2012/."""

from __future__ import annotations

import os.path as osp

from mmdet.datasets import XMLDataset
from mmdet.registry import DATASETS
from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log

from ..config import SPLITS, split_datasets


def fit_voc_folders(cfg: Config) -> None:
    """Leave out the parts of VOC that a --data-root lacks, and find one without a VOC2007/ level; print what was done.

    A training set of several folders (VOC2007/ and VOC2012/) keeps those that are there. A folder with JPEGImages/, Annotations/ and
    ImageSets/ directly in it takes the place of VOC2007/. Where neither is found, nothing is changed: the check of the data says what
    is missing.
    """
    for split in SPLITS:
        for dataset in split_datasets(cfg, split):
            if (
                _is_voc(dataset)
                and not osp.isdir(_folder(dataset))
                and osp.isdir(osp.join(dataset.data_root, 'ImageSets/Main'))
            ):
                prefix = dataset.data_prefix.sub_data_root
                dataset.data_prefix.sub_data_root = ''
                dataset.ann_file = dataset.ann_file.removeprefix(prefix)
                print_log(f'--data-root: {split} data set {prefix} is {dataset.data_root} itself', logger='current')
    _leave_out((cfg.get('train_dataloader') or {}).get('dataset'))


def _is_voc(dataset: ConfigDict) -> bool:
    kind = DATASETS.get(dataset['type']) if isinstance(dataset['type'], str) else dataset['type']
    return (
        isinstance(kind, type)
        and issubclass(kind, XMLDataset)
        and bool((dataset.get('data_prefix') or {}).get('sub_data_root'))
    )


def _folder(dataset: ConfigDict) -> str:
    return osp.join(dataset.get('data_root') or '', dataset.data_prefix.sub_data_root)


def _leave_out(dataset: ConfigDict | None) -> None:
    """Take parts that are not there, or there already, out of a concatenated data set."""
    while dataset and dataset.get('dataset'):
        dataset = dataset.dataset
    parts = (dataset or {}).get('datasets')
    if not parts:
        return
    kept, seen = [], set()
    for part in parts:
        place = (part.get('data_root'), part.get('ann_file'))
        if place not in seen and not (_is_voc(part) and not osp.isdir(_folder(part))):
            kept.append(part)
            seen.add(place)
        elif place not in seen:
            left_out = _folder(part)
            if len(parts) > 1:
                print_log(
                    f'--data-root: no folder {left_out}: that part of the training set is left out', logger='current'
                )
    if kept:
        dataset.datasets = kept
