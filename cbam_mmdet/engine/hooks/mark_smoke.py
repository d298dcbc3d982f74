"""A hook that marks the checkpoints of a first look."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.runner import Runner

SMOKE = 'smoke'  # the key in a checkpoint's meta


class MarkSmokeHook(Hook):
    """Mark the checkpoints of `--smoke`, so that no whole training resumes from one."""

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        checkpoint['meta'][SMOKE] = True
