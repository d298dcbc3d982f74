"""A checkpoint hook that removes an old checkpoint only after the new one is written."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from mmengine.dist import is_main_process
from mmengine.fileio import BaseStorageBackend
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner


class SafeCheckpointHook(CheckpointHook):
    """MMEngine's CheckpointHook, except that it removes an old checkpoint after the new one is written, not before.

    And it removes only what lies in its own folder. What to remove later stands in a checkpoint, from which a training
    may be resumed in another folder, or which may be a stranger's.

    With max_keep_ckpts=1 or save_best, a kill or a full disk between the two steps would leave no checkpoint. A
    training uses this hook in place of MMEngine's own (compat.mmengine.hooks_of_class).
    """

    max_keep_ckpts: int
    best_ckpt_path: str | None
    file_backend: Any

    def before_train(self, runner: Runner) -> None:
        hub = runner.message_hub
        if 'keep_ckpt_ids' in hub.runtime_info:
            steps = hub.get_info('keep_ckpt_ids')
            whole = [step for step in steps if type(step) is int and step >= 0] if isinstance(steps, list) else []
            hub.update_info('keep_ckpt_ids', whole)
        super().before_train(runner)
        if hasattr(self, 'best_ckpt_path'):
            self.best_ckpt_path = self._own(self.best_ckpt_path)
        for key, path in getattr(self, 'best_ckpt_path_dict', {}).items():
            self.best_ckpt_path_dict[key] = self._own(path)

    def _own(self, path: object) -> str | None:
        """The best checkpoint of this name in this run's folder, or None if it has none."""
        name = os.path.basename(path) if isinstance(path, str) else ''
        own = self.file_backend.join_path(self.out_dir, name)
        return own if name.startswith('best_') and self.file_backend.exists(own) else None

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        limit = self.max_keep_ckpts
        if limit <= 0:
            return super()._save_checkpoint_with_step(runner, step, meta)
        before = list(self.keep_ckpt_ids)
        if step not in before:
            self.keep_ckpt_ids.append(step)  # a full deque drops its first step
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
        self.max_keep_ckpts = -1  # so that MMEngine removes nothing
        try:
            super()._save_checkpoint_with_step(runner, step, meta)
        finally:
            self.max_keep_ckpts = limit
        if is_main_process():
            for old in set(before) - set(self.keep_ckpt_ids):
                path = self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(old))
                if self.file_backend.isfile(path):
                    self.file_backend.remove(path)
                elif self.file_backend.isdir(path):  # DeepSpeed's checkpoints are folders
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
    """A file backend of MMEngine that delays all removals until remove_all."""

    def __init__(self, backend: BaseStorageBackend) -> None:
        self.backend = backend
        self.removals: list[tuple[Callable[[str], None], str]] = []

    def remove(self, path: str) -> None:
        self.removals.append((self.backend.remove, path))

    def rmtree(self, path: str) -> None:
        self.removals.append((self.backend.rmtree, path))

    def remove_all(self, but: set[str | None]) -> None:
        """Do the delayed removals, except those of the paths in `but`, which were written again."""
        for remove, path in self.removals:
            if path not in but:
                remove(path)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)
