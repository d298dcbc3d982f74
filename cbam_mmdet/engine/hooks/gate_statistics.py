"""A hook that logs statistics of the gates during a training."""

from __future__ import annotations

import contextlib

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook, LoggerHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from cbam_mmdet.engine.distributed import unwrapped
from cbam_mmdet.models.gates import RecordedGates, find_cbams, gate_figures, record_gates


@HOOKS.register_module()
class GateStatisticsHook(Hook):
    """Log statistics of the gates of each CBAM whenever the losses are logged, to the same visualizer backends.

    For each CBAM these are `gates/NAME/channel_mean`, `..._spread`, `..._saturated` and `..._distance`, and the same
    for `spatial`, as models.gates.gate_figures defines them. They cover the images of that iteration with their
    padding, and with several processes those of the first process. In other iterations the model has no hook. In a
    model without CBAMs nothing is logged.
    """

    priority = 'LOW'  # after LoggerHook, so that the losses are logged first

    def __init__(self) -> None:
        self.losses_logger: LoggerHook | None = None
        self.recording = contextlib.ExitStack()
        self.gates: dict[str, RecordedGates] | None = None

    def before_train(self, runner: Runner) -> None:
        if is_main_process() and find_cbams(unwrapped(runner.model)):
            self.losses_logger = next((hook for hook in runner.hooks if isinstance(hook, LoggerHook)), None)
        else:
            self.losses_logger = None

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        if self._is_logged(runner, batch_idx):
            self.gates = self.recording.enter_context(record_gates(unwrapped(runner.model)))

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
        scalars: dict[str, float] = {}
        # All figures are transferred at once, to wait for the GPU only once.
        for name, (mean, spread, closed, opened, distance) in zip(names, torch.stack(figures).tolist(), strict=True):
            scalars |= {f'{name}_mean': mean, f'{name}_spread': spread}
            scalars |= {f'{name}_saturated': closed + opened, f'{name}_distance': distance}
        runner.visualizer.add_scalars(scalars, step=runner.iter + 1)

    def after_train(self, runner: Runner) -> None:
        self.recording.close()
        self.gates = None
