"""A folder in any known format, brought into COCO files of a run and its config. The folder is never written to."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from mmengine.config import Config, ConfigDict

from cbam_mmdet.datasets.checks import annotation_file, annotation_format, dataset_classes
from cbam_mmdet.datasets.classes import set_metainfo
from cbam_mmdet.datasets.formats.content import Found
from cbam_mmdet.datasets.formats.recognize import read_folder
from cbam_mmdet.datasets.voc import fit_layout
from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.config import SPLITS, evaluators_of, set_data_root, split_datasets, type_name
from cbam_mmdet.utils.files import copies, write_by_content
from cbam_mmdet.utils.logging import log
from cbam_mmdet.utils.text import abridge

KEPT = ('pipeline', 'filter_cfg', 'backend_args', 'test_mode', 'indices', 'metainfo', 'serialize_data', 'lazy_init')


def coco_files(
    cfg: Config, data_root: str, train_ann: str | None = None, val_ann: str | None = None, folder: str | None = None
) -> dict[str, str] | None:
    """Write the annotations of a folder as COCO files, unless the config reads the folder as it is.

    The files go to `data/HASH/` in the config's work dir, by a hash of their content: what another start made is used
    again, and what a run was trained on is never overwritten.

    Args:
        cfg: the config. It is not changed.
        data_root: the folder.
        train_ann: the COCO annotation file to train on, in a folder with several.
        val_ann: that to validate and test on.
        folder: in place of the config's work dir.

    Returns:
        The file of each split, or None if the folder has the layout that the config expects.

    Raises:
        UserError: as formats.recognize.read_folder.
    """
    if not Path(data_root).is_dir() or not all(annotation_format(d) for s in SPLITS for d in split_datasets(cfg, s)):
        return None  # remote or missing, or data of another kind, which only the config knows
    if not (train_ann or val_ann) and _is_native(cfg, data_root):
        return None
    found = read_folder(data_root, train_ann, val_ann)
    log(f'--data-root {data_root}: recognized as {found.style}: {_counts(found)}')
    for note in (*found.notes, *duplicates(found, Path(data_root))):
        log(f'--data-root: {note}')
    return write_coco_files(found, Path(folder or cfg.get('work_dir') or 'work_dirs', 'data'))


def _is_native(cfg: Config, data_root: str) -> bool:
    """Whether an annotation file is where the config expects one in this folder."""
    there = copy.deepcopy(cfg)
    try:
        set_data_root(there, data_root)
    except UserError:  # its evaluator has a file elsewhere, such as one that was written for another folder
        return False
    fit_layout(there, quiet=True)
    files = [Path(annotation_file(dataset)).absolute() for split in SPLITS for dataset in split_datasets(there, split)]
    root = Path(data_root).absolute()
    return any(root in file.parents and file.is_file() for file in files)


def write_coco_files(found: Found, folder: Path) -> dict[str, str]:
    """Write each split as a COCO file to FOLDER/HASH/SPLIT.json, where it is not there yet.

    Returns:
        The absolute path of each split's file.
    """
    texts = {f'{split}.json': json.dumps(content).encode() for split, content in found.splits.items()}
    target = write_by_content(folder, texts)
    log(f'the annotations are in {target} ({", ".join(texts)})')
    return {split: str(target / f'{split}.json') for split in found.splits}


def use_coco_files(cfg: Config, data_root: str, files: dict[str, str]) -> None:
    """Let the data sets and evaluators of a config read these COCO files, in place.

    Data sets that a config concatenates become the one that the folder is. Pipelines, filters and wrappers stay, and so
    do evaluators of VOC, which score what the data set gives.

    Args:
        cfg: the config.
        data_root: the folder of the images.
        files: the annotation file of each split. A split that has none stays as it was.
    """
    root = str(Path(data_root).absolute()) + '/'
    for split in SPLITS:
        loader = cfg.get(f'{split}_dataloader')
        if not loader or split not in files:
            continue
        evaluator = cfg.get(f'{split}_evaluator')
        if isinstance(evaluator, dict) and type_name(evaluator.get('type')) == 'MultiDatasetsEvaluator':
            raise UserError(
                f'--data-root: {split}_evaluator (MultiDatasetsEvaluator) scores several data sets, and {data_root} is '
                'one: take a config that has one'
            )
        loader.dataset = _reading(loader.dataset, root, files[split])
        for metric in evaluators_of(cfg, split):
            if metric.get('ann_file'):
                metric.ann_file = files[split]
    if 'data_root' in cfg:
        cfg.data_root = root


def _reading(dataset: ConfigDict, root: str, ann_file: str) -> ConfigDict:
    if dataset.get('datasets'):
        return _reading(dataset.datasets[0], root, ann_file)
    if dataset.get('dataset'):
        dataset.dataset = _reading(dataset.dataset, root, ann_file)
        return dataset
    kept = {key: dataset[key] for key in KEPT if key in dataset}
    kind = dataset['type'] if annotation_format(dataset) == 'coco' else 'CocoDataset'
    coco = ConfigDict(type=kind, data_root=root, ann_file=ann_file, data_prefix=dict(img=''), **kept)
    set_metainfo(coco, dataset_classes(dataset))
    return coco


def duplicates(found: Found, root: Path) -> list[str]:
    """A line if the same file, or a copy of it, is in two splits: what is scored then was trained on."""
    splits = found.distinct()
    files = {
        split: [str(root / image['file_name']) for image in content['images']] for split, content in splits.items()
    }
    pairs = [
        f'{Path(copied).relative_to(root)} ({split}) is {Path(first).relative_to(root)} ({other})'
        for (split, copied), (other, first) in copies(files)
    ]
    if not pairs:
        return []
    return [f'{len(pairs)} images are in two splits, which makes the score too high: {abridge(pairs, 3)}']


def _counts(found: Found) -> str:
    return ', '.join(
        f'{len(content["images"])} images and {len(content["annotations"])} boxes ({split})'
        for split, content in found.distinct().items()
    )
