"""Train a detector from a config, with MMEngine's Runner: what tools/train.py calls."""

from __future__ import annotations

import contextlib
import logging
import os.path as osp
from collections.abc import Iterator, Mapping, Sequence

from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import Runner
from torch import nn

from cbam_mmdet.apis.runner import (
    build_runner,
    check_splits,
    default_work_dir,
    follow_checkpoint,
    make_work_dir,
    prepare,
)
from cbam_mmdet.apis.schedule import warn_of_another_length
from cbam_mmdet.apis.smoke import make_small
from cbam_mmdet.compat.mmcv_ops import unserved_layers
from cbam_mmdet.compat.mmengine import hooks_of_class, local_files_written_by
from cbam_mmdet.compat.patches import replaced
from cbam_mmdet.engine.checkpoint.content import meta_of
from cbam_mmdet.engine.checkpoint.files import find_checkpoint, newest_checkpoint
from cbam_mmdet.engine.checkpoint.loading import load_checkpoint, safe_loading
from cbam_mmdet.engine.checkpoint.missing_cbam import summarize_missing_cbam
from cbam_mmdet.engine.distributed import in_first_process
from cbam_mmdet.engine.hooks.annotated_frame import AnnotatedFrameHook
from cbam_mmdet.engine.hooks.check_images import CheckImagesHook
from cbam_mmdet.engine.hooks.checkpoint_fit import CheckpointFitHook
from cbam_mmdet.engine.hooks.finite_loss import FiniteLossHook
from cbam_mmdet.engine.hooks.gate_statistics import GateStatisticsHook
from cbam_mmdet.engine.hooks.keep_record import KeepRecordHook
from cbam_mmdet.engine.hooks.mark_smoke import SMOKE, MarkSmokeHook
from cbam_mmdet.engine.hooks.one_model import ValidateOneModelHook
from cbam_mmdet.engine.hooks.resume_exactly import ResumeExactlyHook
from cbam_mmdet.engine.hooks.safe_checkpoint import SafeCheckpointHook
from cbam_mmdet.engine.hooks.stop_signal import StopSignalHook
from cbam_mmdet.engine.hooks.validate_resumed import ValidateResumedHook
from cbam_mmdet.errors import Stopped, UserError, is_dead_worker
from cbam_mmdet.utils.config import type_name
from cbam_mmdet.utils.files import AtomicLocalBackend, remove_unfinished
from cbam_mmdet.utils.lock import locked
from cbam_mmdet.utils.logging import is_first_process, log

IN_USE = (
    'the logs and checkpoints of two trainings would mix. Wait until that one has ended, or give another --work-dir'
)


def train(
    cfg: Config,
    *,
    data_root: str | None = None,
    classes: str | Sequence[str] | None = None,
    train_ann: str | None = None,
    val_ann: str | None = None,
    work_dir: str | None = None,
    amp: str | bool = False,
    auto_scale_lr: bool = False,
    smoke: bool = False,
    resume: str | bool = False,
    trust_checkpoint: bool = False,
    launcher: str = 'none',
) -> Runner:
    """Check a config and its data, then train.

    Args:
        cfg: the config.
        data_root: re-points every dataloader and evaluator (see datasets.pointing.point_at_data).
        classes: class names, or 'auto' to read them from the training annotations (see datasets.classes.set_classes).
        train_ann: the COCO annotation file to train on, in a data root that holds several.
        val_ann: that to validate and test on.
        work_dir: for logs and checkpoints; by default the config's, else work_dirs/NAME, with `_smoke` behind it for a
            first look.
        amp: mixed precision: 'fp16' (or True; needs a GPU) or 'bf16'.
        auto_scale_lr: scale the learning rate to the batch size of all processes together.
        smoke: for a first look, one epoch on a few small images (see apis.smoke.make_small).
        resume: a checkpoint to resume from; True for the newest intact one in work_dir; 'auto' for that if there is
            one.
        trust_checkpoint: load checkpoints by full unpickling, which runs code from the file (see
            engine.checkpoint.loading.load_checkpoint).
        launcher: 'none', 'pytorch', 'slurm' or 'mpi'.

    Returns:
        The Runner, after training.

    Raises:
        UserError: for whatever in config, data or checkpoint would end in a failure later.
    """
    lacking = [key for key in ('train_dataloader', 'train_cfg', 'optim_wrapper') if not cfg.get(key)]
    if lacking:
        raise UserError(f'the config has no {lacking[0]}: it cannot be trained')
    if smoke and not work_dir:
        work_dir = default_work_dir(cfg).rstrip('/').removesuffix('_smoke') + '_smoke'
    prepare(cfg, data_root, classes, work_dir, launcher, train_ann, val_ann)
    if smoke:
        make_small(cfg)
    else:
        warn_of_another_length(cfg)
    if amp:
        _use_amp(cfg, 'fp16' if amp is True else amp)
    elif type_name(cfg.optim_wrapper.get('type')) == 'AmpOptimWrapper' and get_device() == 'cpu':
        raise UserError(
            "optim_wrapper.type='AmpOptimWrapper' needs a GPU, and torch sees none here; --amp bf16 works on a CPU, too"
        )
    if auto_scale_lr:
        _scale_lr(cfg)
    with contextlib.ExitStack() as patches:
        in_first_process(lambda: (make_work_dir(cfg), patches.enter_context(locked(cfg.work_dir, IN_USE)))[1])
        patches.enter_context(safe_loading(trust_checkpoint))
        patches.enter_context(summarize_missing_cbam())
        patches.enter_context(local_files_written_by(AtomicLocalBackend))
        resume, otherwise = _asked(cfg, resume)
        given = cfg.get('load_from')
        resumes = _choose_checkpoint(cfg, resume, otherwise, trust_checkpoint, smoke)
        splits = ['train', 'val'] if cfg.get('val_dataloader') else ['train']
        if cfg.get('load_from'):
            follow_checkpoint(cfg, cfg.load_from, splits, trust_checkpoint, others=not resumes)
        check_splits(cfg, splits)
        stop = StopSignalHook()
        late = [stop, *([ValidateResumedHook()] if resumes else []), *([MarkSmokeHook()] if smoke else [])]
        runner = build_runner(cfg, [*_hooks(cfg, resumes), KeepRecordHook(given), *late])
        patches.enter_context(hooks_of_class(runner.hooks, CheckpointHook, SafeCheckpointHook))
        _warn_of_unserved_operators(runner.model)
        if resumes:
            patches.enter_context(_explained_resumption(runner))
        if is_first_process():
            for folder in _checkpoint_folders(cfg):
                remove_unfinished(folder)
        _run(runner, stop)
    return runner


@contextlib.contextmanager
def _explained_resumption(runner: Runner) -> Iterator[None]:
    """One message for a state of a run that MMEngine cannot take up."""
    original = runner.load_or_resume

    def load_or_resume() -> None:
        try:
            original()
        except UserError:
            raise
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f'the run cannot be resumed from {runner._load_from}: what it holds beside the weights is damaged, or '
                f'of another config ({type(error).__name__}: {error}). Resume from an earlier one, or take its weights '
                'alone: --cfg-options load_from=FILE'
            ) from error

    with replaced(runner, load_or_resume=load_or_resume):
        yield


def _warn_of_unserved_operators(model: nn.Module) -> None:
    lacking = unserved_layers(model)
    if lacking:
        name, operators = next(iter(lacking.items()))
        more = f', and {len(lacking) - 1} more such layers' if len(lacking) > 1 else ''
        log(
            f'{name} is a layer of mmcv.ops whose operators ({", ".join(operators)}) need a compiled mmcv, which is '
            f'not installed here{more}: the first call of one ends the program with a message. Without compiling, '
            'cbam_mmdet serves those that docs/install.md lists.',
            logging.WARNING,
        )


def _scale_lr(cfg: Config) -> None:
    if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
        raise UserError(
            '--auto-scale-lr: the config must say for which batch size its lr is: auto_scale_lr.base_batch_size=16'
        )
    cfg.auto_scale_lr.enable = True


def _asked(cfg: Config, resume: str | bool) -> tuple[str | bool, str | None]:
    """What to resume from, by --resume or else by the config, whose `resume` is then False.

    MMEngine's Runner would follow the config past all that is checked for --resume.

    Returns:
        What to resume from, and what in place of 'auto' where there is nothing.
    """
    by_config, cfg.resume = cfg.get('resume'), False
    if not by_config:
        return resume, None
    named, cfg.load_from = cfg.get('load_from'), None
    if not resume:
        resume = named or 'auto'
        log(
            f'resume=True in the config: as --resume {resume}. A new training needs resume=False and load_from=None '
            'there',
            logging.WARNING,
        )
    return resume, named


def _choose_checkpoint(
    cfg: Config, resume: str | bool, otherwise: str | None, trust_checkpoint: bool, smoke: bool
) -> bool:
    """Set what the training starts from: load_from, resume, and the seed of a run that is resumed.

    Args:
        cfg: the config, changed in place.
        resume: as `train` takes it.
        otherwise: the checkpoint to resume from where 'auto' finds none.
        trust_checkpoint: as `train` takes it.
        smoke: whether this is a first look.

    Returns:
        Whether a run is resumed.
    """
    if resume in (True, 'auto'):
        newest = _newest(cfg, trust_checkpoint)
        if resume is True and not newest:
            raise UserError(
                f'--resume: no checkpoint in {cfg.work_dir} to resume from; leave --resume out to start anew, or give '
                '--resume auto'
            )
        resume = newest or otherwise
        if resume and not newest:
            log(f'--resume auto: resuming from {resume}, which the config names beside resume=True', logging.WARNING)
    if resume:
        cfg.resume, cfg.load_from = True, resume
    if cfg.get('load_from'):
        cfg.load_from = find_checkpoint(cfg.load_from)
    if resume:
        # MMEngine takes the seed of the run that it resumes, but only after the data's order has been drawn.
        seed = in_first_process(lambda: _seed_of(cfg.load_from, trust_checkpoint, smoke))
        given = cfg.setdefault('randomness', ConfigDict()).get('seed')
        if seed is not None and given not in (None, seed):
            log(f'--resume: seed {seed} of the run that is resumed, in place of {given}', logging.WARNING)
        cfg.randomness.seed = given if seed is None else seed
    return bool(resume)


def _hooks(cfg: Config, resumes: bool) -> list[Hook]:
    hooks = [
        FiniteLossHook(),
        CheckpointFitHook(strict=resumes),
        CheckImagesHook(cfg.get('broken_images', 'skip')),
        ResumeExactlyHook(),
        AnnotatedFrameHook(),
        ValidateOneModelHook(),
    ]
    if cfg.get('gate_statistics', True):
        hooks.append(GateStatisticsHook())
    return hooks


def _run(runner: Runner, stop: StopSignalHook) -> None:
    try:
        runner.train()
    except RuntimeError as error:
        if stop.received and is_dead_worker(error):  # one that was still starting, and got the same signal
            raise Stopped(stop.received, None) from error
        raise
    finally:
        stop.restore()


def _newest(cfg: Config, trust_checkpoint: bool) -> str | None:
    """The newest intact checkpoint of a run, the same for every process."""
    hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    folders = _checkpoint_folders(cfg)
    templates = ['epoch_{}.pth', 'iter_{}.pth', *filter(None, [hook.get('filename_tmpl')])]
    path, skipped = in_first_process(lambda: newest_checkpoint(*folders, trust=trust_checkpoint, templates=templates))
    for reason in skipped:
        log(f'--resume: skipped: {reason}', logging.WARNING)
    if not path and skipped:
        raise UserError(
            f'--resume: none of the {len(skipped)} checkpoints in {" or ".join(folders)} can be resumed from '
            f'({skipped[0]}) To start anew, move them away or take another --work-dir.'
        )
    if path:
        log(f'--resume: resuming from {path}')
    return path


def _checkpoint_folders(cfg: Config) -> list[str]:
    hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    folders = [cfg.work_dir]
    if hook.get('out_dir') and '://' not in hook.out_dir:
        folders.append(osp.join(hook.out_dir, osp.basename(osp.normpath(cfg.work_dir))))  # as MMEngine makes it
    return folders


def _seed_of(path: str, trust_checkpoint: bool, smoke: bool) -> int | None:
    """The seed of a run that is resumed, which must be a first look if this one is, and else none."""
    checkpoint = load_checkpoint(path, 'cpu', trust_checkpoint)
    if not isinstance(checkpoint, Mapping):
        raise UserError(f'--resume: {path} holds a {type(checkpoint).__name__}, not the checkpoint of a training run')
    meta = meta_of(checkpoint)
    if meta and bool(meta.get(SMOKE)) != smoke:
        made, now = ('a --smoke run', 'a whole training') if meta.get(SMOKE) else ('a whole training', 'a --smoke run')
        raise UserError(
            f'--resume: {path} was written by {made}, and {now} cannot go on from it: leave --resume out, and give '
            'another --work-dir'
        )
    return meta.get('seed')


def _use_amp(cfg: Config, dtype: str) -> None:
    if dtype == 'bf16':
        cfg.optim_wrapper.type = 'BFloat16OptimWrapper'
        for key in {'dtype', 'loss_scale'} & cfg.optim_wrapper.keys():  # MMEngine's AmpOptimWrapper takes them
            log(f'--amp bf16: without optim_wrapper.{key}={cfg.optim_wrapper.pop(key)!r}')
    elif get_device() == 'cpu':
        raise UserError('--amp: fp16 training needs a GPU, and torch sees none here; --amp bf16 works on a CPU, too')
    else:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
