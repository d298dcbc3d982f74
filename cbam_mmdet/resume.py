"""Training that goes on after a stop as if there had been none: the same batches, the same random numbers, the same losses.

What is random in an iteration depends on the seed, the rank and the number of the iteration alone, and what is random in an image on
its place in the run's sequence of images. So nothing of it needs saving, and a run can be taken up in the middle of an epoch, with
another number of workers, too. MMEngine, left alone, repeats the epoch from its start, and with other random numbers.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_reduce, barrier, get_rank, get_world_size, is_main_process
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.logging import print_log
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.utils.data import DataLoader

from cbam_mmdet.checkpoints import meta_of
from cbam_mmdet.errors import Stopped

# Streams of random numbers that must not meet.
IN_ITERATION, IN_IMAGE = 0, 1

# In a checkpoint's meta: batches of its epoch that are done, and batches of an epoch.
EPOCH_PROGRESS = 'epoch_progress'


def seed_all(*key: int) -> None:
    """Seed Python, numpy and torch (the CPU, and the GPU if one is in use) by several numbers."""
    words = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))


class PlacedIndex(int):
    """The index of an image, and the key of the random numbers that its transforms draw."""

    key: tuple[int, ...]

    def __new__(cls, index: int, key: tuple[int, ...]) -> PlacedIndex:
        made = super().__new__(cls, index)
        made.key = key
        return made

    def __reduce__(self) -> tuple:
        return PlacedIndex, (int(self), self.key)  # to the workers


class PlacedBatches:
    """A batch sampler whose indices know their place in the run; it can begin behind the batches that are done.

    Args:
        batches: the batch sampler of a data loader.
        seed: the run's.
        rank: of this process.
    """

    def __init__(self, batches: Any, seed: int, rank: int) -> None:
        self.batches, self.seed, self.rank = batches, seed, rank
        self.skip = 0
        self.first = 0  # the number of the next batch, where the sampler itself has passed over the others
        self.epoch = 0  # counted here, unless a loop of epochs sets it

    def __iter__(self) -> Iterator[list[PlacedIndex]]:
        skip, self.skip, first, self.first = self.skip, 0, self.first, 0
        epoch, self.epoch = self.epoch, self.epoch + 1
        for number, batch in enumerate(self.batches, start=first):
            if number >= skip:
                key = (IN_IMAGE, self.seed, self.rank, epoch, number)
                yield [PlacedIndex(index, (*key, i)) for i, index in enumerate(batch)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getattr__(self, name: str) -> Any:
        if name == 'batches':  # not there yet while a copy is being made
            raise AttributeError(name)
        return getattr(self.batches, name)


class PlacedImages:
    """A data set that seeds the random numbers before it loads an image, by the image's place in the run."""

    def __init__(self, dataset: Any) -> None:
        vars(self).update(placed=dataset)

    def __getitem__(self, index: int) -> Any:
        if isinstance(index, PlacedIndex):
            seed_all(*index.key)
        return self.placed[int(index)]

    def __len__(self) -> int:
        return len(self.placed)

    def __getattr__(self, name: str) -> Any:
        if name == 'placed':
            raise AttributeError(name)
        return getattr(self.placed, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.placed, name, value)  # e.g. the pipeline, by MMDetection's PipelineSwitchHook


class ResumeExactlyHook(Hook):
    """Make a training run one that can be taken up anywhere; see this module's docstring.

    The data loader is changed in place, when it is there. Loaders without a batch sampler are left as they are.
    """

    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self.batches: PlacedBatches | None = None
        self.seed = 0
        self.told = False
        self.resumed: dict | None = None  # how far into its epoch the run was that goes on
        self.epoch = self.epoch_began_at = 0  # the present epoch, and the iteration of its first batch

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self.resumed = meta_of(checkpoint).get(EPOCH_PROGRESS)

    def before_train(self, runner: Runner) -> None:
        loader = runner.train_dataloader
        self.seed = runner.seed or 0
        if isinstance(loader, DataLoader) and loader.batch_sampler is not None:
            self.batches = PlacedBatches(loader.batch_sampler, self.seed, get_rank())
            # A DataLoader refuses new attributes of these names, for the sake of workers that run; none does yet.
            vars(loader)['batch_sampler'] = self.batches
            vars(loader)['dataset'] = PlacedImages(loader.dataset)
            if isinstance(runner.train_loop, EpochBasedTrainLoop):
                self.batches.skip = self._batches_done(runner, len(loader))
                self.epoch, self.epoch_began_at = runner.epoch, runner.iter - self.batches.skip
                if self.batches.skip:
                    print_log(
                        f'going on behind the first {self.batches.skip} batches of epoch {runner.epoch + 1}',
                        logger='current',
                    )
            elif hasattr(runner.train_loop, 'dataloader_iterator'):
                # A loop of iterations may have begun to load. It will pass over the batches that are done by itself: by drawing
                # them, or (MMEngine 0.10.12) by telling the sampler, and then they are not counted here.
                loader._iterator = None
                iterator = type(runner.train_loop.dataloader_iterator)(loader)
                runner.train_loop.dataloader_iterator = iterator
                if hasattr(iterator, '_resolve_sampler') and iterator._resolve_sampler() is not None:
                    self.batches.first = runner.iter

    def before_train_epoch(self, runner: Runner) -> None:
        if self.batches and isinstance(runner.train_loop, EpochBasedTrainLoop):
            self.batches.epoch = runner.epoch
            if runner.epoch != self.epoch:
                self.epoch, self.epoch_began_at = runner.epoch, runner.iter

    def _batches_done(self, runner: Runner, length: int) -> int:
        """Batches of the present epoch, which has length of them, that were trained before the run was stopped.

        Where an epoch had another number of batches then (batch size, processes or data), it is the same share of the epoch.
        """
        if runner.iter == 0:  # not resumed, though weights may have been loaded
            return 0
        if self.resumed:
            done, before = self.resumed['done'], self.resumed['batches']
        else:  # a checkpoint of MMEngine's own
            done, before = runner.iter - runner.epoch * length, length
            if not 0 <= done <= length:
                print_log(
                    f'the checkpoint does not say how far into epoch {runner.epoch + 1} it was, and {runner.iter} iterations are not '
                    f'{runner.epoch} epochs of {length}: the epoch is trained from its start',
                    logger='current',
                    level=logging.WARNING,
                )
                return 0
        if before != length:
            print_log(
                f'an epoch had {before} batches, and now has {length} (other batch size, processes or data): what goes on is not the same run. '
                'Of an epoch that was begun, the share that is done is passed over; schedules counted in iterations keep their lengths.',
                logger='current',
                level=logging.WARNING,
            )
        return done * length // before

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if self.batches and isinstance(runner.train_loop, EpochBasedTrainLoop):
            meta = checkpoint['meta']
            done = meta['iter'] - self.epoch_began_at if meta['epoch'] == self.epoch else 0
            meta[EPOCH_PROGRESS] = dict(done=done, batches=len(runner.train_dataloader))
        if not self.told and not between_steps(runner):
            self.told = True
            print_log(
                'this checkpoint falls between two steps of the optimizer (accumulative_counts): gradients that are gathered by now are not in it, '
                'and a run that goes on from it will differ. Let the checkpoint interval be a multiple of accumulative_counts.',
                logger='current',
                level=logging.WARNING,
            )

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        seed_all(IN_ITERATION, self.seed, get_rank(), runner.iter)


def between_steps(runner: Runner) -> bool:
    """Whether all gradients so far have gone into the weights: not in the middle of an accumulation."""
    wrapper = runner.optim_wrapper
    return not hasattr(wrapper, 'should_update') or wrapper.should_update()


class LeaveSignalsToMain:
    """What a data-loading worker does first: it leaves SIGTERM and Ctrl-C, which often go to all processes, to the main one.

    Otherwise the batches would end before the checkpoint is saved.

    Args:
        before: the loader's own worker_init_fn, or None.
        training: shared with the main process; when it is 0, SIGTERM ends the worker, as when the program ends.
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
            os._exit(0)  # as PyTorch's own workers do when the main process tells them to


class StopSignalHook(Hook):
    """On SIGTERM (a cluster's notice of preemption) or Ctrl-C: finish the iteration, save a checkpoint, end.

    The signal may go to the main process alone, to its group, or to every process of a job. Another one after GRACE seconds ends
    at once, without saving.

    Args:
        interval: with several processes, iterations between two looks whether one of them was told to stop.

    Raises:
        Stopped: that names the checkpoint; its exit code is 128 + the signal's number, as a shell has it.
    """

    priority = 'LOWEST'
    # The same notice comes by two ways within moments: from Slurm, and once more from torchrun, which passes its own on.
    GRACE = 2.0

    def __init__(self, interval: int = 10) -> None:
        self.interval = interval
        self.received: int | None = None  # by this process
        self.received_at = 0.0
        self.agreed: int | None = None  # by all
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
        """Put the handlers back that were there; the workers heed SIGTERM again."""
        self.training.value = 0
        while self.before:
            signal.signal(*self.before.popitem())

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        if get_world_size() == 1 or self.every_n_train_iters(runner, self.interval):
            self._agree(runner)
        if self.agreed is not None and between_steps(runner):
            self._stop(runner, runner.iter + 1)

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
                    if isinstance(hook, EMAHook):  # the model has the averaged weights during a validation
                        hook.after_val_epoch(runner)
                self._stop(runner, runner.iter)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            return  # a worker that has not begun to load
        now = time.monotonic()
        if self.received is None:
            self.received, self.received_at = number, now
            if is_main_process():  # not by print: the signal may have come in the middle of one
                name = signal.Signals(number).name
                os.write(2, f'{name}: stopping at the end of this iteration, with a checkpoint\n'.encode())
        elif now - self.received_at > self.GRACE:
            os.write(2, b'ending at once, without a checkpoint\n')
            self.restore()
            os.kill(self.process, number)

    def _agree(self, runner: Runner) -> None:
        """Let every process know of a signal that one of them received."""
        number = self.received or 0  # a signal may come at any moment: it is read once, and never written here
        if get_world_size() > 1:
            told = torch.tensor(number, device=next(runner.model.parameters()).device)
            all_reduce(told, 'max')
            number = int(told)
        if number and self.agreed is None:
            self.agreed, self.received_at = number, time.monotonic()

    def _stop(self, runner: Runner, iterations: int) -> None:
        path = Path(runner.work_dir, f'iter_{iterations}.pth')
        runner.save_checkpoint(
            runner.work_dir, path.name, meta=dict(epoch=runner.epoch, iter=iterations), by_epoch=False
        )
        if is_main_process():
            Path(runner.work_dir, 'last_checkpoint').write_text(str(path))
            hooks = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]
            if hooks and all(hook.by_epoch and hook.max_keep_ckpts > 0 for hook in hooks):
                for earlier in Path(runner.work_dir).glob('iter_*.pth'):  # of earlier stops
                    if earlier != path:
                        earlier.unlink()
        barrier()  # torchrun ends all processes when the first one ends
        raise Stopped(self.agreed, str(path))
