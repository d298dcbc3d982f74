"""Pascal VOC's layout as people's own data have it: one year only, a flat folder, other splits, other image formats."""

from __future__ import annotations

import os
import os.path as osp
import re

from mmdet.datasets import VOCDataset
from mmdet.registry import DATASETS
from mmengine.config import Config, ConfigDict

from cbam_mmdet.datasets.inputs import IMAGES
from cbam_mmdet.utils.config import SPLITS, class_of, split_datasets
from cbam_mmdet.utils.logging import log


def voc_folder(dataset: ConfigDict) -> str:
    """The folder of a VOC data set that holds Annotations/, ImageSets/ and JPEGImages/."""
    return osp.join(dataset.get('data_root') or '', (dataset.get('data_prefix') or {}).get('sub_data_root', ''))


def voc_image_folder(dataset: ConfigDict) -> str:
    """The folder of a VOC data set's images."""
    return osp.join(voc_folder(dataset), dataset.get('img_subdir', 'JPEGImages'))


def image_names_by_stem(folder: str) -> dict[str, str]:
    """The names of the image files in a folder, by their names without suffix. A .jpg goes before other formats."""
    stems: dict[str, str] = {}
    for name in sorted(os.listdir(folder)):
        stem, suffix = osp.splitext(name)
        if suffix.lower() in IMAGES and (stem not in stems or suffix == '.jpg'):
            stems[stem] = name
    return stems


@DATASETS.register_module()
class AnySuffixVOCDataset(VOCDataset):
    """MMDetection's VOCDataset for images with any suffix. The original expects every image to be a .jpg."""

    def load_data_list(self) -> list[dict]:
        self.files = image_names_by_stem(osp.join(self.sub_data_root, self.img_subdir))
        return super().load_data_list()

    def parse_data_info(self, img_info: dict) -> dict:
        image_id = img_info['img_id']
        file_name = osp.join(self.img_subdir, self.files.get(image_id, f'{image_id}.jpg'))
        return super().parse_data_info({**img_info, 'file_name': file_name})


def fit_image_suffix(cfg: Config) -> None:
    """Let :class:`AnySuffixVOCDataset` read the VOC data sets that hold images with another suffix than .jpg."""
    changed = set()
    for split in SPLITS:
        for dataset in split_datasets(cfg, split):
            folder = voc_image_folder(dataset)
            if class_of(DATASETS, dataset['type']) is not VOCDataset or not osp.isdir(folder):
                continue
            others = {osp.splitext(name)[1] for name in image_names_by_stem(folder).values()} - {'.jpg'}
            if others:
                dataset['type'] = 'AnySuffixVOCDataset'
                changed.add((folder, ', '.join(sorted(others))))
    if changed:
        imports = cfg.setdefault('custom_imports', ConfigDict(imports=[]))
        imports['imports'] = [*imports['imports'], __name__]  # for programs that read the work dir's config
    for folder, suffixes in sorted(changed):
        log(f'{folder} holds {suffixes}: read by AnySuffixVOCDataset')


def fit_layout(cfg: Config, quiet: bool = False) -> None:
    """Fit a config's VOC data sets to the content of the folder that --data-root gave.

    Unless it is to be quiet, it logs a line for each change.

    - A flat folder (Annotations/, ImageSets/, JPEGImages/ directly in it) stands for any year. What it lacks of these
      is missed there.
    - A training set whose year does not exist is left out, if another year exists.
    - A validation or test set whose year does not exist is taken from the year that exists.
    - A year of which the config reads nothing stays unread.
    - Where ImageSets/Main has a val.txt but no test.txt, val.txt takes the place of test.txt, and train.txt that of
      trainval.txt. Where it has no trainval.txt, train.txt takes its place.

    `check_data` names what is still missing after that.
    """
    notes: dict[str, None] = {}
    for split in SPLITS:
        for dataset in _voc_datasets(cfg, split):
            if not osp.isdir(voc_folder(dataset)) and _is_flat(dataset.data_root):
                _point_at_folder(dataset, '')
                notes[f'{dataset.data_root} holds Annotations/ itself: read as one VOC data set'] = None
    if cfg.get('train_dataloader'):
        _prune(cfg.train_dataloader.dataset, notes)
    years = [d.data_prefix.sub_data_root for d in _voc_datasets(cfg, 'train') if osp.isdir(voc_folder(d))]
    for split in ('val', 'test'):
        for dataset in _voc_datasets(cfg, split):
            if years and not osp.isdir(voc_folder(dataset)):
                notes[f'no {voc_folder(dataset)}: validation and test use {years[0]}'] = None
                _point_at_folder(dataset, years[0])
    for root in {d.data_root for d in _voc_datasets(cfg, 'train')} if years else ():
        for year in sorted(name for name in os.listdir(root or '.') if re.fullmatch(r'VOC\d{4}', name)):
            if f'{year}/' not in years and _is_flat(osp.join(root, year)):
                notes[f'{osp.join(root, year)} is there, and the config does not read it'] = None
    _fit_image_sets(cfg, notes)
    for note in () if quiet else notes:
        log(f'--data-root: {note}')


def _voc_datasets(cfg: Config, split: str) -> list[ConfigDict]:
    return [d for d in split_datasets(cfg, split) if 'sub_data_root' in (d.get('data_prefix') or {})]


def _is_flat(root: str) -> bool:
    return osp.isdir(osp.join(root, 'Annotations'))


def _point_at_folder(dataset: ConfigDict, folder: str) -> None:
    """Point a data set at another folder below its root."""
    dataset.ann_file = folder + dataset.ann_file.removeprefix(dataset.data_prefix.sub_data_root)
    dataset.data_prefix.sub_data_root = folder


def _prune(node: ConfigDict, notes: dict[str, None]) -> None:
    """Remove data sets that do not exist or occur twice from a ConcatDataset, unless none would remain."""
    if node.get('dataset'):
        _prune(node.dataset, notes)
    if not node.get('datasets'):
        return
    kept, places = [], set()
    for dataset in node.datasets:
        is_voc = 'sub_data_root' in (dataset.get('data_prefix') or {})
        place = (voc_folder(dataset), dataset.get('ann_file')) if is_voc else id(dataset)
        if place not in places and not (is_voc and not osp.isdir(voc_folder(dataset))):
            kept.append(dataset)
            places.add(place)
    if kept:
        for dataset in node.datasets:
            if 'sub_data_root' in (dataset.get('data_prefix') or {}) and not osp.isdir(voc_folder(dataset)):
                notes[f'no {voc_folder(dataset)}: trained without it'] = None
        node.datasets = kept


def _fit_image_sets(cfg: Config, notes: dict[str, None]) -> None:
    def exists(dataset: ConfigDict, name: str) -> bool:
        return osp.isfile(osp.join(dataset.data_root, osp.dirname(dataset.ann_file), name))

    def replace(dataset: ConfigDict, name: str, why: str) -> None:
        notes[f'{why}: {name} in place of {osp.basename(dataset.ann_file)}'] = None
        dataset.ann_file = osp.join(osp.dirname(dataset.ann_file), name)

    held_out = set()
    for split in ('val', 'test'):
        for dataset in _voc_datasets(cfg, split):
            if (
                osp.basename(dataset.ann_file) == 'test.txt'
                and not exists(dataset, 'test.txt')
                and exists(dataset, 'val.txt')
            ):
                replace(dataset, 'val.txt', f'{voc_folder(dataset)} has no test.txt')
                held_out.add(voc_folder(dataset))
    for dataset in _voc_datasets(cfg, 'train'):
        if osp.basename(dataset.ann_file) != 'trainval.txt' or not exists(dataset, 'train.txt'):
            continue
        if voc_folder(dataset) in held_out:
            replace(dataset, 'train.txt', 'val.txt is tested on')
        elif not exists(dataset, 'trainval.txt'):
            replace(dataset, 'train.txt', f'{voc_folder(dataset)} has no trainval.txt')
