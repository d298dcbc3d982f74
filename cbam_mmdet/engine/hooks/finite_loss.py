"""A hook that stops a training when the loss is infinite or NaN."""

from __future__ import annotations

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from cbam_mmdet.errors import UserError


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Stop when a loss is infinite or NaN, before the weights that it spoilt are saved.

    The hook records the losses of every iteration, but checks the record only every `interval` iterations, at the end
    of an epoch and before a checkpoint is saved, because a check waits for the GPU.

    Args:
        interval: the number of iterations between two checks.

    Raises:
        UserError: for a loss that is not finite. The message names the losses and the iteration.
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
            self._check(runner)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self._check(runner)

    def _check(self, runner: Runner) -> None:
        names = [name for name, bad in self.bad.items() if bad]
        self.bad.clear()
        if names:
            raise UserError(
                f'the loss is not finite ({", ".join(names)}) in the iterations up to {runner.iter + 1}. '
                'Nothing was saved since. Usual causes: a learning rate too high for the batch size '
                '(lower optim_wrapper.optimizer.lr, or --auto-scale-lr), no warm-up, boxes of no size, or fp16 '
                '(try without --amp).'
            )
