"""Apply --data-root and --classes to a config."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmdet.registry import DATASETS
from mmengine.config import Config

from cbam_mmdet.datasets.checks import check_data
from cbam_mmdet.datasets.classes import set_classes
from cbam_mmdet.datasets.formats.as_coco import coco_files, use_coco_files
from cbam_mmdet.datasets.image_folders import is_classifier, point_at_folders
from cbam_mmdet.datasets.voc import fit_image_suffix, fit_layout
from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.config import set_data_root, set_default_scope, split_datasets


def point_at_data(
    cfg: Config,
    data_root: str | None,
    classes: str | Sequence[str] | None,
    train_ann: str | None = None,
    val_ann: str | None = None,
    folder: str | None = None,
    once: Callable[[Callable[[], Any]], Any] = lambda function: function(),
) -> None:
    """Apply --data-root, --classes, --train-ann and --val-ann to a config, in place. None keeps the config's own.

    A folder in another format or layout than the config's is read by datasets.formats, and the config reads what that
    writes to its work dir.

    Args:
        cfg: the config, with its work dir, if it has one.
        data_root: the folder of the data set.
        classes: as datasets.classes.set_classes takes them.
        train_ann: the COCO annotation file to train on.
        val_ann: that to validate and test on.
        folder: for what is written, in place of the config's work dir.
        once: calls a function in one of several processes, and gives all of them its result.

    Raises:
        UserError: as utils.config.set_data_root, datasets.formats.recognize.read_folder and
            datasets.classes.set_classes, or for a classifier as datasets.image_folders.point_at_folders.
    """
    if is_classifier(cfg):
        return point_at_folders(cfg, data_root, classes)
    if (train_ann or val_ann) and not data_root:
        raise UserError('--train-ann and --val-ann choose among the files of a folder: give it by --data-root DIR')
    files = once(lambda: coco_files(cfg, data_root, train_ann, val_ann, folder)) if data_root else None
    if data_root and not files:
        set_data_root(cfg, data_root)
        fit_layout(cfg)
    elif files:
        if not {'train', 'val'} <= files.keys():  # the others are those of the config in this folder, if they are there
            with contextlib.suppress(UserError):  # an evaluator's file may be elsewhere, and is set next
                set_data_root(cfg, str(data_root))
                fit_layout(cfg)
        use_coco_files(cfg, str(data_root), files)
    fit_image_suffix(cfg)
    if classes:
        set_classes(cfg, classes)


def validation_images(cfg: Config, data_root: str | None = None) -> dict[Path, tuple[int, int] | None]:
    """The images of a config's validation set, in its order, each with its (height, width) if the data set says it.

    Args:
        cfg: the config. A data root changes it in place (see point_at_data).
        data_root: the folder of the data set, in place of the config's.

    Raises:
        UserError: if the config has no validation set, or its data do not pass the check.
    """
    if not split_datasets(cfg, 'val'):
        raise UserError('the config has no validation set (val_dataloader): give images or folders')
    set_default_scope(cfg)
    point_at_data(cfg, data_root, None)
    check_data(cfg, ['val'])
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    infos = map(dataset.get_data_info, range(len(dataset)))
    return {
        Path(info['img_path']): (info['height'], info['width']) if {'height', 'width'} <= info.keys() else None
        for info in infos
    }
