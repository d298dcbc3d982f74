"""Training that goes on after a stop as if there had been none: the same batches, the same random numbers, the same losses.

What is random in an iteration depends on the seed, the rank and the number of the iteration alone, and what is random in an image on
its place in the run's sequence of images. So nothing of it needs saving, and a run can be taken up in the middle of an epoch, with
another number of workers, too. MMEngine, left alone, repeats the epoch from its start, and with other random numbers.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.utils.data import DataLoader

from cbam_mmdet.compat.torch import loader_parts
from cbam_mmdet.engine.checkpoint.content import meta_of
from cbam_mmdet.engine.hooks.between_steps import between_steps

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
        self.changes = contextlib.ExitStack()  # of the loader, for the training's time

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self.resumed = meta_of(checkpoint).get(EPOCH_PROGRESS)

    def before_train(self, runner: Runner) -> None:
        loader = runner.train_dataloader
        self.seed = runner.seed or 0
        if isinstance(loader, DataLoader) and loader.batch_sampler is not None:
            self.batches = PlacedBatches(loader.batch_sampler, self.seed, get_rank())
            parts = dict(batch_sampler=self.batches, dataset=PlacedImages(loader.dataset))
            self.changes.enter_context(loader_parts(loader, **parts))
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

    def after_train(self, runner: Runner) -> None:
        self.changes.close()

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
