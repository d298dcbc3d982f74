"""ImageNet-1K classification (the paper's section 4.2) by the same tools, with configs of mmpretrain.

Their default_scope is 'mmpretrain'. Each split has a folder, with a folder of images for each class in it, as in
torchvision's ImageFolder. The backbone is MMDetection's, so a detector can load its checkpoint as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config, ConfigDict

from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.config import SPLITS, evaluators_of, set_data_root, split_datasets
from cbam_mmdet.utils.logging import log
from cbam_mmdet.utils.text import abridge


def point_at_folders(cfg: Config, data_root: str | None, classes: str | Sequence[str] | None) -> None:
    """Apply --data-root and --classes to a classifier's config, in place.

    Args:
        cfg: the config.
        data_root: the folder that holds the folders of the splits. None keeps the config's own.
        classes: 'auto' takes as many classes as the training data have folders. Names must be those of the folders.
            None keeps the config's own.

    Raises:
        UserError: if the folders do not exist, or their names are not the classes.
    """
    if data_root:
        set_data_root(cfg, data_root)
    if not classes:
        return
    split = next(split for split in SPLITS if split_datasets(cfg, split))
    found = class_folders(split_datasets(cfg, split)[0], split)
    if classes != 'auto':
        names = sorted(classes.split(',') if isinstance(classes, str) else classes)
        if names != found:
            raise UserError(f'--classes {",".join(names)}: the class folders are {abridge(found)}')
    if cfg.model.head.num_classes != len(found):
        log(f'model.head.num_classes: {cfg.model.head.num_classes} -> {len(found)}, for the classes {abridge(found)}')
        cfg.model.head.num_classes = len(found)
    for split in ('val', 'test'):
        for metric in evaluators_of(cfg, split):
            if metric.get('topk'):
                metric.topk = tuple(k for k in metric.topk if k < len(found)) or (1,)


def check_image_folders(cfg: Config, splits: Sequence[str]) -> None:
    """Check the folders of every split, and log how many classes they hold.

    Raises:
        UserError: for a folder that is missing or empty, another number of classes than the head's, or splits with
            different classes.
    """
    known: list[str] | None = None
    for split in splits:
        for dataset in split_datasets(cfg, split):
            names = class_folders(dataset, split)
            if len(names) != cfg.model.head.num_classes:
                raise UserError(
                    f'{_folder(dataset)} has {len(names)} class folders ({abridge(names)}), model.head.num_classes is '
                    f'{cfg.model.head.num_classes}: give --classes auto to take the number from the data'
                )
            if known is not None and names != known:
                other = sorted(set(names) ^ set(known))
                raise UserError(f'the splits have different class folders: {abridge(other)} not in all of them')
            known = names
            log(f'{_folder(dataset)}: {len(names)} classes')


def class_folders(dataset: ConfigDict, split: str) -> list[str]:
    """The sorted names of a data set's class folders. Class i is the i-th.

    Raises:
        UserError: if there are none. The message shows the expected layout.
    """
    folder = _folder(dataset)
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not names:
        raise UserError(
            f'the {split} images: {folder} {"has no class folder" if folder.is_dir() else "does not exist"}; expected: '
            f'{folder}/CLASS/*.jpg (or .png, ...). Point --data-root at the folder that holds {folder.name}/'
        )
    return names


def _folder(dataset: ConfigDict) -> Path:
    prefix = dataset.get('data_prefix', '')
    return Path(dataset.get('data_root', ''), prefix if isinstance(prefix, str) else prefix.get('img_path', ''))


def is_classifier(cfg: Config) -> bool:
    """Whether this is a config of mmpretrain, the only case in which that package is imported."""
    return cfg.get('default_scope') == 'mmpretrain'
