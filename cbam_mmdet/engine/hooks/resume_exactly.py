"""Resume a training exactly: with the same batches, the same random numbers and the same losses as without a stop.

The random numbers of an iteration depend only on the seed, the rank and the number of the iteration. Those of an image
depend only on its place in the run's sequence of images. So a checkpoint needs no random state, and a run can resume in
the middle of an epoch, also with another number of workers. MMEngine on its own repeats the epoch from its start, with
other random numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
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

# Keys that keep the two streams of random numbers apart.
IN_ITERATION, IN_IMAGE = 0, 1

# The key in a checkpoint's meta for the number of finished batches of its epoch, and the number of batches of an epoch.
EPOCH_PROGRESS = 'epoch_progress'
# That for a hash of the training images and their boxes.
DATA = 'train_boxes'
IMAGES_HASHED = 1000  # at least, if there are as many


def between_steps(runner: Runner) -> bool:
    """Whether all gradients so far have been applied to the weights, so a gradient accumulation is not in progress."""
    wrapper = runner.optim_wrapper
    return not hasattr(wrapper, 'should_update') or wrapper.should_update()


def seed_all(*key: int) -> None:
    """Seed Python, NumPy and torch (the CPU, and the GPU if one is in use) with several numbers."""
    words = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))


def data_digest(dataset: Any) -> str | None:
    """A hash of the number of images, and of the names and boxes of some of them, evenly spread.

    Not of their folder, which may be another after a move. None for a data set that does not say them.
    """
    while hasattr(dataset, 'dataset'):  # that of a RepeatDataset and the like
        dataset = dataset.dataset
    if not hasattr(dataset, 'get_data_info'):
        return None
    count = len(dataset)
    infos = map(dataset.get_data_info, range(0, count, max(count // IMAGES_HASHED, 1)))
    seen = [(os.path.basename(str(info.get('img_path'))), _boxes_in(info)) for info in infos]
    return hashlib.sha256(repr((count, seen)).encode()).hexdigest()[:16]


def _boxes_in(info: dict) -> list[tuple]:
    """Each box's class, and its sides to a tenth of a pixel, as far as an image's information has them."""
    instances = info.get('instances') or ()
    return [(it.get('bbox_label'), [round(float(x), 1) for x in it.get('bbox') or ()]) for it in instances]


class PlacedIndex(int):
    """The index of an image, with the key of the random numbers that its transforms draw."""

    key: tuple[int, ...]

    def __new__(cls, index: int, key: tuple[int, ...]) -> PlacedIndex:
        made = super().__new__(cls, index)
        made.key = key
        return made

    def __reduce__(self) -> tuple:
        return PlacedIndex, (int(self), self.key)  # workers receive it by pickle


class PlacedBatches:
    """A batch sampler whose indices know their place in the run. It can start after the batches that are done.

    Args:
        batches: the batch sampler of a data loader.
        seed: the seed of the run.
        rank: the rank of this process.
    """

    def __init__(self, batches: Any, seed: int, rank: int) -> None:
        self.batches, self.seed, self.rank = batches, seed, rank
        self.skip = 0
        self.first = 0  # the number of the next batch, if the sampler itself has skipped the others
        self.epoch = 0  # counted here, unless an EpochBasedTrainLoop sets it

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
        if name == 'batches':  # it does not exist yet while a copy is made
            raise AttributeError(name)
        return getattr(self.batches, name)


class PlacedImages:
    """A data set that seeds the random numbers with an image's place in the run before it loads the image."""

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
    """Make a training resume exactly at any iteration, see this module's docstring.

    It changes the data loader in place for the time of the training. A loader without a batch sampler stays as it is.
    """

    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self.batches: PlacedBatches | None = None
        self.seed = 0
        self.warned = False
        self.resumed: dict | None = None  # the progress of the resumed run in its epoch
        self.data: str | None = None  # the hash of the images, of this run or of the one that it resumes
        self.epoch = self.epoch_began_at = 0  # the current epoch, and the iteration of its first batch
        self.changes = contextlib.ExitStack()  # undoes the changes of the loader after the training

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self.resumed = meta_of(checkpoint).get(EPOCH_PROGRESS)
        self.data = meta_of(checkpoint).get(DATA)

    def before_train(self, runner: Runner) -> None:
        loader = runner.train_dataloader
        before, self.data = self.data, data_digest(loader.dataset)
        if runner.iter and None not in (before, self.data) and before != self.data:
            print_log(
                'the training images are not those of the checkpoint (other names, another order or other '
                'boxes): the resumed run is not the same run',
                logger='current',
                level=logging.WARNING,
            )
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
                        f'resuming after the first {self.batches.skip} batches of epoch {runner.epoch + 1}',
                        logger='current',
                    )
            elif hasattr(runner.train_loop, 'dataloader_iterator'):
                # An IterBasedTrainLoop may have begun to load. It skips the batches that are done by itself: it draws
                # them, or (MMEngine 0.10.12) makes the sampler skip them, so that they are not counted here.
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
        """The number of batches of the current epoch that were trained before the run was stopped.

        An epoch has `length` batches. If it had another number before (other batch size, processes or data), the result
        is the same share of the epoch.
        """
        if runner.iter == 0:  # not resumed, though weights may have been loaded
            return 0
        if self.resumed:
            done, before = self.resumed['done'], self.resumed['batches']
        else:  # a checkpoint of MMEngine's own
            done, before = runner.iter - runner.epoch * length, length
            if not 0 <= done <= length:
                print_log(
                    f'the checkpoint does not say how far into epoch {runner.epoch + 1} it was, '
                    f'and {runner.iter} iterations are not {runner.epoch} epochs of {length}: '
                    'the epoch is trained from its start',
                    logger='current',
                    level=logging.WARNING,
                )
                return 0
        if before != length:
            print_log(
                f'an epoch had {before} batches, and now has {length} (other batch size, processes or data): '
                'the resumed run is not the same run. It skips the share of the current epoch that is done. '
                'Schedules counted in iterations keep their lengths.',
                logger='current',
                level=logging.WARNING,
            )
        return done * length // before

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if self.batches and isinstance(runner.train_loop, EpochBasedTrainLoop):
            meta = checkpoint['meta']
            done = meta['iter'] - self.epoch_began_at if meta['epoch'] == self.epoch else 0
            meta[EPOCH_PROGRESS] = dict(done=done, batches=len(runner.train_dataloader))
        checkpoint['meta'][DATA] = self.data
        if not self.warned and not between_steps(runner):
            self.warned = True
            print_log(
                'this checkpoint falls between two steps of the optimizer (accumulative_counts): it does not hold the '
                'gradients that are accumulated so far, and a run that resumes from it will differ. '
                'Let the checkpoint interval be a multiple of accumulative_counts.',
                logger='current',
                level=logging.WARNING,
            )

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        seed_all(IN_ITERATION, self.seed, get_rank(), runner.iter)
