"""Training and testing from a config, with MMEngine's Runner: what tools/train.py and tools/test.py call."""

from __future__ import annotations

import copy
import logging
import os.path as osp
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmdet.evaluation import DumpDetResults
from mmdet.utils import setup_cache_size_limit_of_dynamo
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.evaluator import DumpResults
from mmengine.hooks import Hook
from mmengine.registry import RUNNERS, init_default_scope
from mmengine.runner import Runner

from cbam_mmdet import evaluation  # noqa: F401  (they register what they hold; SSD is mended)
from cbam_mmdet.compat import ssd_head  # noqa: F401  (they register what they hold; SSD is mended)
from cbam_mmdet.datasets.checks import check_data
from cbam_mmdet.datasets.image_folders import check_image_folders, is_classifier
from cbam_mmdet.datasets.pointing import point_at_data
from cbam_mmdet.engine import mixed_precision  # noqa: F401  (they register what they hold; SSD is mended)
from cbam_mmdet.engine.checkpoint.content import meta_of
from cbam_mmdet.engine.checkpoint.files import find_checkpoint, newest_checkpoint, write_whole_files
from cbam_mmdet.engine.checkpoint.loading import load_checkpoint, use_safe_loading
from cbam_mmdet.engine.checkpoint.missing_cbam import say_missing_cbam_in_one_line
from cbam_mmdet.engine.distributed import in_first_process, join_processes
from cbam_mmdet.engine.hooks.check_images import CheckImagesHook
from cbam_mmdet.engine.hooks.checkpoint_fit import CheckpointFitHook
from cbam_mmdet.engine.hooks.finite_loss import FiniteLossHook
from cbam_mmdet.engine.hooks.gate_statistics import GateStatisticsHook
from cbam_mmdet.engine.hooks.resume_exactly import ResumeExactlyHook
from cbam_mmdet.engine.hooks.safe_checkpoint import KeepOldUntilNewHook
from cbam_mmdet.engine.hooks.stop_signal import StopSignalHook
from cbam_mmdet.engine.record import write_record
from cbam_mmdet.errors import Stopped, UserError, is_dead_worker
from cbam_mmdet.utils.config import check_evaluators, check_optimizer, check_plugins
from cbam_mmdet.utils.files import remove_unfinished
from cbam_mmdet.utils.logging import is_first_process, log


def train(
    cfg: Config,
    *,
    data_root: str | None = None,
    classes: str | Sequence[str] | None = None,
    work_dir: str | None = None,
    amp: str | bool = False,
    auto_scale_lr: bool = False,
    resume: str | bool = False,
    trust_checkpoint: bool = False,
    launcher: str = 'none',
) -> Runner:
    """Check a config and its data, then train.

    Args:
        cfg: the config.
        data_root: re-points every dataloader and evaluator (see config.set_data_root and datasets.voc.fit_layout).
        classes: class names, or 'auto' to read them from the training annotations (see datasets.classes.set_classes).
        work_dir: for logs and checkpoints; by default the config's, else work_dirs/NAME.
        amp: mixed precision: 'fp16' (or True; needs a GPU) or 'bf16'.
        auto_scale_lr: scale the learning rate to the batch size of all processes together.
        resume: a checkpoint to go on from; True for the newest in work_dir that is whole; 'auto' for that if there is one.
        trust_checkpoint: load checkpoints by full unpickling, which runs code from the file (see checkpoints.load_checkpoint).
        launcher: 'none', 'pytorch', 'slurm' or 'mpi'.

    Returns:
        The Runner, after training.

    Raises:
        UserError: for whatever in config, data or checkpoint would end in a failure later.
    """
    _prepare(cfg, data_root, classes, work_dir, launcher)
    use_safe_loading(trust_checkpoint)
    say_missing_cbam_in_one_line()
    write_whole_files()
    if amp:
        _use_amp(cfg, 'fp16' if amp is True else amp)
    if auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise UserError(
                '--auto-scale-lr: the config must say for which batch size its lr is: auto_scale_lr.base_batch_size=16'
            )
        cfg.auto_scale_lr.enable = True
    if resume in (True, 'auto'):
        newest = _newest(cfg, trust_checkpoint)
        if resume is True and not newest:
            raise UserError(
                f'--resume: no checkpoint in {cfg.work_dir} to go on from; leave --resume out to start anew, or give --resume auto'
            )
        resume = newest
    if resume:
        cfg.resume, cfg.load_from = True, resume
    if cfg.get('load_from'):
        cfg.load_from = find_checkpoint(cfg.load_from)
    if resume:
        # MMEngine takes the seed of the run that it resumes, but only after the data's order has been drawn.
        seed = in_first_process(lambda: _seed_of(cfg.load_from, trust_checkpoint))
        given = cfg.setdefault('randomness', ConfigDict()).get('seed')
        if seed is not None and given not in (None, seed):
            log(f'--resume: seed {seed} of the run that is resumed, in place of {given}', logging.WARNING)
        cfg.randomness.seed = given if seed is None else seed
    _check_data(cfg, ['train', 'val'] if cfg.get('val_dataloader') else ['train'])
    hooks = [
        FiniteLossHook(),
        CheckpointFitHook(strict=bool(resume)),
        CheckImagesHook(cfg.get('broken_images', 'skip')),
        ResumeExactlyHook(),
        stop := StopSignalHook(),
    ]
    if cfg.get('gate_statistics', True):
        hooks.append(GateStatisticsHook())
    runner = _build_runner(cfg, hooks)
    KeepOldUntilNewHook.replace_in(runner)
    if is_first_process():
        for folder in _checkpoint_folders(cfg):
            remove_unfinished(folder)
        write_record(cfg, runner.log_dir)
    try:
        runner.train()
    except RuntimeError as error:
        if stop.received and is_dead_worker(error):  # one that was still starting, and got the same signal
            raise Stopped(stop.received, None) from error
        raise
    finally:
        stop.restore()
    return runner


def test(
    cfg: Config,
    checkpoint: str,
    *,
    data_root: str | None = None,
    classes: str | Sequence[str] | None = None,
    work_dir: str | None = None,
    out: str | None = None,
    show: bool = False,
    show_dir: str | None = None,
    wait_time: float = 2,
    tta: bool = False,
    trust_checkpoint: bool = False,
    launcher: str = 'none',
) -> dict[str, float]:
    """Check a config, its data and a checkpoint, then evaluate.

    Args:
        cfg: the config.
        checkpoint: the weights: a file, or a work dir for its newest.
        data_root: re-points every dataloader and evaluator (see config.set_data_root and datasets.voc.fit_layout).
        classes: class names, or 'auto' to read them from the training annotations (see datasets.classes.set_classes).
        work_dir: for the log; by default the config's, else work_dirs/NAME.
        out: a .pkl file for the detections of all images.
        show: show each picture in a window.
        show_dir: a folder, below work_dir, for the pictures.
        wait_time: seconds that a window stays.
        tta: test-time augmentation (horizontal flip where the config has no `tta_pipeline`).
        trust_checkpoint: load it by full unpickling, which runs code from the file (see checkpoints.load_checkpoint).
        launcher: 'none', 'pytorch', 'slurm' or 'mpi'.

    Returns:
        The metrics, e.g. {'coco/bbox_mAP': 0.37, ...}.

    Raises:
        UserError: for whatever in config, data or checkpoint would end in a failure later.
    """
    if out and not out.endswith(('.pkl', '.pickle')):
        raise UserError(f'--out {out}: the detections are written as a pickle, the name must end with .pkl')
    use_safe_loading(trust_checkpoint)
    cfg.load_from, cfg.resume = find_checkpoint(checkpoint), False
    _prepare(cfg, data_root, classes, work_dir, launcher)
    if any(cfg.get(key) is None for key in ('test_dataloader', 'test_cfg', 'test_evaluator')):
        raise UserError('the config has no test split: it needs test_dataloader, test_cfg and test_evaluator')
    if is_classifier(cfg) and (show or show_dir or tta):
        raise UserError('--show, --show-dir and --tta are for detectors; this is the config of a classifier')
    if show or show_dir:
        _draw(cfg, show, show_dir, wait_time)
    if tta:
        _use_tta(cfg)
    _check_data(cfg, ['test'])
    # The checkpoint holds every weight: a pretrained backbone would be fetched for nothing.
    model = cfg.model.module if tta else cfg.model
    if model.get('backbone'):
        model.backbone.init_cfg = None
    runner = _build_runner(cfg, [CheckpointFitHook(strict=True), CheckImagesHook()])
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        dump = DumpResults if is_classifier(cfg) else DumpDetResults
        runner.test_evaluator.metrics.append(dump(out_file_path=out))
    return runner.test()


def _prepare(
    cfg: Config, data_root: str | None, classes: str | Sequence[str] | None, work_dir: str | None, launcher: str
) -> None:
    setup_cache_size_limit_of_dynamo()
    cfg.setdefault('default_scope', 'mmdet')
    init_default_scope(cfg.default_scope)
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


def _build_runner(cfg: Config, hooks: list[Hook]) -> Runner:
    try:
        Path(cfg.work_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'--work-dir {cfg.work_dir}: cannot be made ({error.strerror})') from error
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    for hook in hooks:
        runner.register_hook(hook)
    return runner


def _newest(cfg: Config, trust_checkpoint: bool) -> str | None:
    """The newest checkpoint of a run that is whole, the same for every process."""
    hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    folders = _checkpoint_folders(cfg)
    templates = ['epoch_{}.pth', 'iter_{}.pth', *filter(None, [hook.get('filename_tmpl')])]
    path, passed_over = in_first_process(
        lambda: newest_checkpoint(*folders, trust=trust_checkpoint, templates=templates)
    )
    for reason in passed_over:
        log(f'--resume: passed over: {reason}', logging.WARNING)
    if not path and passed_over:
        raise UserError(
            f'--resume: there are {len(passed_over)} checkpoints, but no checkpoint in {" or ".join(folders)} can be gone on from '
            f'({passed_over[0]}) To start anew, move them away or take another --work-dir.'
        )
    if path:
        log(f'--resume: going on from {path}')
    return path


def _checkpoint_folders(cfg: Config) -> list[str]:
    hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    folders = [cfg.work_dir]
    if hook.get('out_dir') and '://' not in hook.out_dir:
        folders.append(osp.join(hook.out_dir, osp.basename(osp.normpath(cfg.work_dir))))  # as MMEngine makes it
    return folders


def _seed_of(path: str, trust_checkpoint: bool) -> int | None:
    checkpoint = load_checkpoint(path, 'cpu', trust_checkpoint)
    if not isinstance(checkpoint, Mapping):
        raise UserError(f'--resume: {path} holds a {type(checkpoint).__name__}, not the checkpoint of a training run')
    return meta_of(checkpoint).get('seed')


def _check_data(cfg: Config, splits: list[str]) -> None:
    if is_classifier(cfg):
        return in_first_process(lambda: check_image_folders(cfg, splits))
    keys = [f'{split}_dataloader' for split in splits]
    # The check may set a filter: every process must go on with the same data set.
    checked = in_first_process(lambda: (check_data(cfg, splits), {key: cfg[key] for key in keys})[1])
    for key, loader in checked.items():
        cfg[key] = loader


def _use_amp(cfg: Config, dtype: str) -> None:
    if dtype == 'bf16':
        cfg.optim_wrapper.type = 'BFloat16OptimWrapper'
    elif get_device() == 'cpu':
        raise UserError('--amp: fp16 training needs a GPU, and torch sees none here; --amp bf16 works on a CPU, too')
    else:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')


def _draw(cfg: Config, show: bool, show_dir: str | None, wait_time: float) -> None:
    hook = cfg.setdefault('default_hooks', ConfigDict()).setdefault(
        'visualization', ConfigDict(type='DetVisualizationHook')
    )
    hook.update(draw=True, show=show, wait_time=wait_time, test_out_dir=show_dir)


def _use_tta(cfg: Config) -> None:
    """As MMDetection's tools/test.py: flip horizontally, merge by NMS, unless the config says otherwise."""
    cfg.setdefault(
        'tta_model', dict(type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100))
    )
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    if 'tta_pipeline' not in cfg:
        pack = dict(
            type='PackDetInputs',
            meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction'),
        )
        # The merged sample keeps the boxes of the first view as its ground truth: not those of the flipped one.
        flips = [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)]
        cfg.tta_pipeline = [*copy.deepcopy(dataset.pipeline[:-1]), dict(type='TestTimeAug', transforms=[flips, [pack]])]
    dataset.pipeline = cfg.tta_pipeline
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
