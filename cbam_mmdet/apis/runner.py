"""A Runner from a config that was checked, for training and test alike."""

from __future__ import annotations

import os.path as osp
from collections.abc import Sequence
from pathlib import Path

from mmdet.utils import setup_cache_size_limit_of_dynamo
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

import cbam_mmdet.compat.ssd_head  # mends SSD
import cbam_mmdet.engine.mixed_precision  # registers its optimizer wrapper
import cbam_mmdet.evaluation  # noqa: F401  (registers its metrics)
from cbam_mmdet.datasets.checks import check_data
from cbam_mmdet.datasets.image_folders import check_image_folders, is_classifier
from cbam_mmdet.datasets.pointing import point_at_data
from cbam_mmdet.engine.distributed import in_first_process, join_processes
from cbam_mmdet.errors import UserError
from cbam_mmdet.models.plugins.checks import check_plugins
from cbam_mmdet.utils.config import check_evaluators, check_optimizer, set_default_scope


def prepare(
    cfg: Config, data_root: str | None, classes: str | Sequence[str] | None, work_dir: str | None, launcher: str
) -> None:
    setup_cache_size_limit_of_dynamo()
    set_default_scope(cfg)
    cfg.launcher = launcher
    join_processes(cfg, launcher)
    if work_dir:
        cfg.work_dir = work_dir
    elif not cfg.get('work_dir'):
        cfg.work_dir = osp.join('work_dirs', Path(cfg.filename).stem)
    point_at_data(cfg, data_root, classes)
    check_plugins(cfg)
    check_optimizer(cfg)
    check_evaluators(cfg)


def build_runner(cfg: Config, hooks: list[Hook]) -> Runner:
    try:
        Path(cfg.work_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'--work-dir {cfg.work_dir}: cannot be made ({error.strerror})') from error
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    for hook in hooks:
        runner.register_hook(hook)
    return runner


def check_splits(cfg: Config, splits: list[str]) -> None:
    if is_classifier(cfg):
        return in_first_process(lambda: check_image_folders(cfg, splits))
    keys = [f'{split}_dataloader' for split in splits]
    # The check may set a filter: every process must use the same data set.
    checked = in_first_process(lambda: (check_data(cfg, splits), {key: cfg[key] for key in keys})[1])
    for key, loader in checked.items():
        cfg[key] = loader
