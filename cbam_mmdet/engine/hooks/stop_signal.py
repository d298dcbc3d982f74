"""A hook that saves a checkpoint when the job gets SIGTERM or Ctrl-C, and then ends the training."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from mmengine.dist import all_reduce, barrier, get_world_size, is_main_process
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from cbam_mmdet.engine.hooks.resume_exactly import between_steps
from cbam_mmdet.errors import Stopped


class LeaveSignalsToMain:
    """A worker_init_fn that lets a data-loading worker ignore SIGTERM and Ctrl-C, which often go to all processes.

    Otherwise the workers would end before the main process has saved its checkpoint.

    Args:
        before: the loader's own worker_init_fn, or None.
        training: a value shared with the main process. When it is 0, SIGTERM ends the worker.
    """

    def __init__(self, before: Callable[[int], None] | None, training: Any) -> None:
        self.before, self.training = before, training

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._receive)
        if self.before:
            self.before(worker)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.training.value:
            os._exit(0)  # as PyTorch's own workers do when the main process ends them


class StopSignalHook(Hook):
    """On SIGTERM (a cluster's notice of preemption) or Ctrl-C finish the iteration, save a checkpoint, and end.

    The signal may go to the main process alone, to its group, or to every process of a job. Another signal after more
    than GRACE seconds ends the process immediately, without a checkpoint.

    Args:
        interval: with several processes, the number of iterations after which they ask each other for a signal.

    Raises:
        Stopped: when the checkpoint is saved. The exit code is 128 + the signal's number, as in a shell.
    """

    priority = 'LOWEST'
    # A process may get the same notice twice within moments: from Slurm, and from torchrun, which forwards its own.
    GRACE = 2.0

    def __init__(self, interval: int = 10) -> None:
        self.interval = interval
        self.received: int | None = None  # the signal that this process received
        self.received_at = 0.0
        self.agreed: int | None = None  # the signal that all processes know of
        self.before: dict[int, Any] = {}
        self.process = os.getpid()
        self.training = multiprocessing.RawValue('b', 0)
        self.validates_in_step = True

    def before_train(self, runner: Runner) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self.before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        self.training.value = 1
        for loop in filter(None, (runner.train_loop, runner.val_loop)):
            loader = loop.dataloader
            if isinstance(loader, DataLoader):
                loader.worker_init_fn = LeaveSignalsToMain(loader.worker_init_fn, self.training)

    def after_train(self, runner: Runner) -> None:
        self.restore()

    def restore(self) -> None:
        """Restore the earlier handlers. SIGTERM ends the workers again."""
        self.training.value = 0
        while self.before:
            signal.signal(*self.before.popitem())

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        if get_world_size() == 1 or self.every_n_train_iters(runner, self.interval):
            self._agree(runner)
        if self.agreed is not None and between_steps(runner):
            self._stop(self.agreed, runner, runner.iter + 1)

    def before_val_epoch(self, runner: Runner) -> None:
        if self.before and get_world_size() > 1:
            batches = len(runner.val_dataloader)
            most = torch.tensor([batches, -batches], device=next(runner.model.parameters()).device)
            all_reduce(most, 'max')
            self.validates_in_step = int(most[0]) == -int(most[1])

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        alone = get_world_size() == 1
        if self.before and (alone or (self.validates_in_step and self.every_n_inner_iters(batch_idx, self.interval))):
            self._agree(runner)
            if self.agreed is not None and between_steps(runner):
                for hook in runner.hooks:
                    if isinstance(hook, EMAHook):  # during a validation the model holds the averaged weights
                        hook.after_val_epoch(runner)
                self._stop(self.agreed, runner, runner.iter)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            return  # a worker before its worker_init_fn
        now = time.monotonic()
        if self.received is None:
            self.received, self.received_at = number, now
            if is_main_process():  # not with print, which the signal may have interrupted
                name = signal.Signals(number).name
                os.write(2, f'{name}: stopping at the end of this iteration, with a checkpoint\n'.encode())
        elif now - self.received_at > self.GRACE:
            os.write(2, b'ending at once, without a checkpoint\n')
            self.restore()
            os.kill(self.process, number)

    def _agree(self, runner: Runner) -> None:
        """Let every process know of a signal that one of them received."""
        number = self.received or 0  # a signal may come at any moment, so it is read once and never written here
        if get_world_size() > 1:
            highest = torch.tensor(number, device=next(runner.model.parameters()).device)
            all_reduce(highest, 'max')
            number = int(highest)
        if number and self.agreed is None:
            self.agreed, self.received_at = number, time.monotonic()

    def _stop(self, number: int, runner: Runner, iterations: int) -> None:
        path = Path(runner.work_dir, f'iter_{iterations}.pth')
        runner.save_checkpoint(
            runner.work_dir, path.name, meta=dict(epoch=runner.epoch, iter=iterations), by_epoch=False
        )
        if is_main_process():
            Path(runner.work_dir, 'last_checkpoint').write_text(str(path))
            hooks = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]
            if hooks and all(hook.by_epoch and hook.max_keep_ckpts > 0 for hook in hooks):
                for earlier in Path(runner.work_dir).glob('iter_*.pth'):  # checkpoints of earlier stops
                    if earlier != path:
                        earlier.unlink()
        barrier()  # torchrun ends all processes as soon as one ends
        raise Stopped(number, str(path))
