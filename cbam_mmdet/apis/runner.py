"""A Runner from a config that was checked, for training and test alike."""

from __future__ import annotations

import os.path as osp
from collections.abc import Sequence
from pathlib import Path

from mmdet.utils import setup_cache_size_limit_of_dynamo
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, RUNNERS
from mmengine.runner import Runner

import cbam_mmdet.compat.ssd_head  # mends SSD
import cbam_mmdet.engine.mixed_precision  # registers its optimizer wrapper
import cbam_mmdet.evaluation  # noqa: F401  (registers its metrics)
from cbam_mmdet.compat.mmengine import config_not_dumped, config_not_printed
from cbam_mmdet.datasets.checks import check_data
from cbam_mmdet.datasets.class_order import follow_class_order
from cbam_mmdet.datasets.image_folders import check_image_folders, class_folders, is_classifier
from cbam_mmdet.datasets.pointing import point_at_data
from cbam_mmdet.engine.checkpoint.content import classes_of
from cbam_mmdet.engine.checkpoint.files import is_onnx
from cbam_mmdet.engine.checkpoint.loading import load_checkpoint
from cbam_mmdet.engine.distributed import in_first_process, join_processes
from cbam_mmdet.errors import UserError
from cbam_mmdet.models.plugins.checks import check_plugins
from cbam_mmdet.utils.config import SPLITS, check_evaluators, check_optimizer, set_default_scope, split_datasets
from cbam_mmdet.utils.logging import log
from cbam_mmdet.utils.numbers import check_numbers
from cbam_mmdet.utils.text import abridge


def prepare(
    cfg: Config,
    data_root: str | None,
    classes: str | Sequence[str] | None,
    work_dir: str | None,
    launcher: str,
    train_ann: str | None = None,
    val_ann: str | None = None,
) -> None:
    setup_cache_size_limit_of_dynamo()
    set_default_scope(cfg)
    cfg.launcher = launcher
    join_processes(cfg, launcher)
    cfg.work_dir = work_dir or default_work_dir(cfg)
    _require_lists_of_classes(cfg)
    point_at_data(cfg, data_root, classes, train_ann, val_ann, once=in_first_process)
    check_plugins(cfg)
    check_numbers(cfg)
    _keep_no_workers(cfg)
    check_optimizer(cfg)
    check_evaluators(cfg)


def default_work_dir(cfg: Config) -> str:
    return cfg.get('work_dir') or osp.join('work_dirs', Path(cfg.filename).stem)


def _require_lists_of_classes(cfg: Config) -> None:
    """Refuse classes=('circle') with a forgotten comma, of which MMDetection makes the classes c, i, r, ...

    MMEngine takes a text for the path of a file that lists the classes, if there is one.
    """
    for split in SPLITS:
        for dataset in split_datasets(cfg, split):
            names = (dataset.get('metainfo') or {}).get('classes')
            if isinstance(names, str) and not osp.isfile(names):
                raise UserError(
                    f'the {split} data set says metainfo.classes={names!r}, which is a text. Expected a tuple, '
                    f'with a comma also behind one name: classes=({names!r},)'
                )


def _keep_no_workers(cfg: Config) -> None:
    """Without worker processes there are none to keep: torch refuses a config in which only num_workers was changed."""
    for split in SPLITS:
        loader = cfg.get(f'{split}_dataloader') or {}
        if loader.get('num_workers') == 0:
            loader.persistent_workers = False
            loader.pop('prefetch_factor', None)


def follow_checkpoint(
    cfg: Config, path: str, splits: Sequence[str], trust_checkpoint: bool, others: bool = False
) -> None:
    """Number the classes of the data sets as a checkpoint does (see datasets.class_order.follow_class_order).

    Those of a classifier are numbered by their folders, and have to be the checkpoint's.
    """
    if '://' in path:
        return

    def follow() -> dict:
        classes = _classes_in(path, trust_checkpoint)
        if classes is None:
            log(f'checkpoint {path} does not say its classes: they are taken for those of the config, in its order')
        elif is_classifier(cfg):
            _require_classes_of_folders(cfg, splits, classes, path, others)
        else:
            make_work_dir(cfg)
            follow_class_order(cfg, splits, classes, path, cfg.work_dir, others)
        return {
            key: cfg[key] for split in splits for key in (f'{split}_dataloader', f'{split}_evaluator') if key in cfg
        }

    for key, value in in_first_process(follow).items():
        cfg[key] = value


def _require_classes_of_folders(
    cfg: Config, splits: Sequence[str], classes: tuple[str, ...], path: str, others: bool
) -> None:
    for split in splits:
        for dataset in split_datasets(cfg, split):
            named = DATASETS.build(dict(dataset, lazy_init=True)).metainfo.get('classes')
            here = tuple(named or class_folders(dataset, split))
            if here == classes:
                continue
            same = sorted(here) == sorted(classes)
            if others and not same:
                if len(here) == len(classes):
                    log(f'{path} was trained on other classes ({abridge(classes, 8)}): its head starts with theirs')
                return
            raise UserError(
                f'{path} knows the classes [{abridge(classes, 8, quoted=True)}], and the {split} data set has '
                f'[{abridge(here, 8, quoted=True)}]{", another order" if same else ""}: a classifier knows them by '
                'their place, so the scores would be those of other classes. Give the folders that it was trained '
                'with; if they have other names here, say the old ones by metainfo=dict(classes=...) of the data set'
            )


def _classes_in(path: str, trust_checkpoint: bool) -> tuple[str, ...] | None:
    if is_onnx(path):
        from cbam_mmdet.deploy.onnx_file import facts_of, open_session

        return tuple(facts_of(open_session(path), path)['classes'])
    return classes_of(load_checkpoint(path, 'cpu', trust_checkpoint))


def make_work_dir(cfg: Config) -> None:
    try:
        Path(cfg.work_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'--work-dir {cfg.work_dir}: cannot be made ({error.strerror})') from error


def build_runner(cfg: Config, hooks: list[Hook]) -> Runner:
    make_work_dir(cfg)
    with config_not_dumped(), config_not_printed():
        runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    log(f'the config and the list of hooks are in the log of {runner.log_dir}')
    for hook in hooks:
        runner.register_hook(hook)
    return runner


def check_splits(cfg: Config, splits: list[str]) -> None:
    if is_classifier(cfg):
        return in_first_process(lambda: check_image_folders(cfg, splits))
    keys = [key for split in splits for key in (f'{split}_dataloader', f'{split}_evaluator') if key in cfg]
    # The check may set a filter, or complete an annotation file: every process must use the same data set.
    checked = in_first_process(lambda: (check_data(cfg, splits), {key: cfg[key] for key in keys})[1])
    for key, value in checked.items():
        cfg[key] = value
