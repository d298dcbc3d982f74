"""Hooks that stop a run which has gone wrong, with a message, before it costs days, keep its checkpoints, and log what the gates do.

The tools put them on the Runner, not into the config: the copy that a work dir keeps works without them too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from mmcv.transforms import LoadImageFromFile
from mmengine.dist import is_main_process
from mmengine.fileio import BaseStorageBackend
from mmengine.hooks import CheckpointHook, Hook, LoggerHook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from cbam_mmdet.checkpoints import compare_state_dicts, run_state_lacking
from cbam_mmdet.datasets.transforms.loading import LoadCheckedImage
from cbam_mmdet.errors import UserError
from cbam_mmdet.models.gates import find_cbams, gate_figures, record_gates


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Stop when a loss is infinite or NaN, before the weights that it spoilt are saved.

    The losses are looked at every `interval` iterations and before every epoch's end, so the GPU is not made to wait in each;
    every iteration's losses count.

    Args:
        interval: iterations between two looks.

    Raises:
        UserError: that names the losses and the iteration.
    """

    def __init__(self, interval: int = 10) -> None:
        self.interval = interval
        self.bad: dict[str, torch.Tensor] = {}

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs: dict | None = None) -> None:
        for name, value in (outputs or {}).items():
            if isinstance(value, torch.Tensor) and 'loss' in name:
                bad = ~torch.isfinite(value.detach()).all()
                self.bad[name] = self.bad[name] | bad if name in self.bad else bad
        if self.every_n_train_iters(runner, self.interval) or self.end_of_epoch(runner.train_dataloader, batch_idx):
            self._look(runner)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self._look(runner)

    def _look(self, runner: Runner) -> None:
        names = [name for name, bad in self.bad.items() if bad]
        self.bad.clear()
        if names:
            raise UserError(
                f'the loss is not finite ({", ".join(names)}) in the iterations up to {runner.iter + 1}. Nothing was saved since. '
                'Usual causes: a learning rate too high for the batch size (lower optim_wrapper.optimizer.lr, or --auto-scale-lr), '
                'no warm-up, boxes of no size, or fp16 (try without --amp).'
            )


@HOOKS.register_module()
class CheckpointFitHook(Hook):
    """Refuse a checkpoint that does not fit the model, where MMEngine would go on with random weights.

    Args:
        strict: every key must fit, as for a test or a resumed run. Otherwise (`load_from`, to fine-tune) heads and new layers
            may differ, and only a checkpoint of which nothing fits is refused.

    Raises:
        UserError: that names keys which are missing, left over or of another shape.
    """

    priority = 'VERY_HIGH'

    def __init__(self, strict: bool = True) -> None:
        self.strict = strict

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        model = _unwrapped(runner.model)
        name = str(runner._load_from or runner.work_dir)
        compare_state_dicts(checkpoint, model, self.strict, name)
        lacking = run_state_lacking(checkpoint)
        if runner._resume and lacking:
            raise UserError(
                f'--resume: {name} holds weights, but not the state of a training run ({", ".join(lacking)}). To start from '
                f'these weights: --cfg-options load_from={name}'
            )


@HOOKS.register_module()
class CheckImagesHook(Hook):
    """Let every pipeline name the image that it cannot read, in place of MMCV's loader, which fails inside OpenCV.

    In validation and test a broken image always raises: leaving it out would change the score.

    Args:
        broken_images: for training images: 'skip' (name it, and take another) or 'raise'.

    Raises:
        UserError: if broken_images is neither; in the run, for a broken image.
    """

    def __init__(self, broken_images: str = 'skip') -> None:
        if broken_images not in ('skip', 'raise'):
            raise UserError(f"broken_images={broken_images!r} in the config: expected 'skip' or 'raise'")
        self.broken_images = broken_images

    def before_train(self, runner: Runner) -> None:
        _check_images(runner.train_dataloader.dataset, self.broken_images)

    def before_val(self, runner: Runner) -> None:
        _check_images(runner.val_dataloader.dataset, 'raise')

    def before_test(self, runner: Runner) -> None:
        _check_images(runner.test_dataloader.dataset, 'raise')


def _check_images(dataset: object, on_error: str) -> None:
    for inner in [getattr(dataset, 'dataset', None), *getattr(dataset, 'datasets', [])]:
        if inner is not None:
            _check_images(inner, on_error)
    transforms = getattr(getattr(dataset, 'pipeline', None), 'transforms', [])
    for i, transform in enumerate(transforms):
        if type(transform) is LoadImageFromFile:
            transforms[i] = LoadCheckedImage.like(transform, on_error)


class KeepOldUntilNewHook(CheckpointHook):
    """MMEngine's CheckpointHook, but an old checkpoint goes when the new one is there, not before.

    With max_keep_ckpts=1, or save_best, a kill or a full disk between the two would leave none.
    """

    @classmethod
    def replace_in(cls, runner: Runner) -> None:
        """Change the hooks of a Runner that are MMEngine's own, in place; its config keeps the usual name."""
        for hook in runner.hooks:
            if type(hook) is CheckpointHook:
                hook.__class__ = cls

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        limit = self.max_keep_ckpts
        if limit <= 0:
            return super()._save_checkpoint_with_step(runner, step, meta)
        before = list(self.keep_ckpt_ids)
        if step not in before:
            self.keep_ckpt_ids.append(step)  # and forgets its first, if it is full
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
        self.max_keep_ckpts = -1  # for MMEngine: remove nothing
        try:
            super()._save_checkpoint_with_step(runner, step, meta)
        finally:
            self.max_keep_ckpts = limit
        if is_main_process():
            for old in set(before) - set(self.keep_ckpt_ids):
                path = self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(old))
                if self.file_backend.isfile(path):
                    self.file_backend.remove(path)
                elif self.file_backend.isdir(path):  # DeepSpeed's are folders
                    self.file_backend.rmtree(path)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        backend = self.file_backend
        self.file_backend = late = RemovesLater(backend)
        try:
            super()._save_best_checkpoint(runner, metrics)
        finally:
            self.file_backend = backend
        best = {getattr(self, 'best_ckpt_path', None), *getattr(self, 'best_ckpt_path_dict', {}).values()}
        late.remove_all(but=best)


class RemovesLater:
    """A file backend of MMEngine that removes nothing before remove_all."""

    def __init__(self, backend: BaseStorageBackend) -> None:
        self.backend = backend
        self.removals: list[tuple[Callable[[str], None], str]] = []

    def remove(self, path: str) -> None:
        self.removals.append((self.backend.remove, path))

    def rmtree(self, path: str) -> None:
        self.removals.append((self.backend.rmtree, path))

    def remove_all(self, but: set[str | None]) -> None:
        """Remove what was to be removed, but not the paths that have been written anew."""
        for remove, path in self.removals:
            if path not in but:
                remove(path)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)


@HOOKS.register_module()
class GateStatisticsHook(Hook):
    """Log what the gates of each CBAM do, in the iterations in which the losses are logged, to the same places (TensorBoard, scalars.json).

    For each CBAM and gate: `gates/NAME/channel_mean`, `..._spread`, `..._saturated`, `..._distance`, and the same for `spatial`, as
    gates.gate_figures defines them, over the images of that iteration, their padding included. With several processes it is the first
    one's images. Other iterations run without any hook on the model, and without CBAMs it does nothing.
    """

    priority = 'LOW'  # after LoggerHook: the losses' line comes first

    def __init__(self) -> None:
        self.losses_logger: LoggerHook | None = None
        self.recording = contextlib.ExitStack()
        self.gates = None

    def before_train(self, runner: Runner) -> None:
        serves = is_main_process() and find_cbams(_unwrapped(runner.model))
        self.losses_logger = next((h for h in runner.hooks if isinstance(h, LoggerHook)), None) if serves else None

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        if self._is_logged(runner, batch_idx):
            self.gates = self.recording.enter_context(record_gates(_unwrapped(runner.model)))

    def _is_logged(self, runner: Runner, batch_idx: int) -> bool:
        """Whether MMEngine's LoggerHook will log the losses of this iteration."""
        logger = self.losses_logger
        if logger is None:
            return False
        if self.every_n_inner_iters(batch_idx, logger.interval):
            return True
        loader = runner.train_dataloader
        return self.end_of_epoch(loader, batch_idx) and not (logger.ignore_last and len(loader) > logger.interval)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs: dict | None = None) -> None:
        if self.gates is None:
            return
        self.recording.close()
        names, figures = [], []
        for name, gates in self.gates.items():
            for branch in ('channel', 'spatial'):
                images = getattr(gates, branch)
                if images:
                    names.append(f'gates/{name}/{branch}')
                    figures.append(gate_figures(torch.cat([image.flatten() for image in images]), gates.upper))
        self.gates = None
        if not figures:
            self.losses_logger = None
            runner.logger.warning('no gate statistics: a compiled model (torch.compile) runs no hooks')
            return
        scalars = {}
        # One transfer for all, so a GPU is waited for once.
        for name, (mean, spread, closed, opened, distance) in zip(names, torch.stack(figures).tolist(), strict=True):
            scalars |= {f'{name}_mean': mean, f'{name}_spread': spread}
            scalars |= {f'{name}_saturated': closed + opened, f'{name}_distance': distance}
        runner.visualizer.add_scalars(scalars, step=runner.iter + 1)

    def after_train(self, runner: Runner) -> None:
        self.recording.close()
        self.gates = None


def _unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model
