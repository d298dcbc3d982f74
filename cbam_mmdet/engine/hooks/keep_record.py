"""A hook that writes what a training is into its work dir, once it has begun."""

from __future__ import annotations

import copy
from typing import Any

from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from cbam_mmdet.engine.record import write_record


@HOOKS.register_module()
class KeepRecordHook(Hook):
    """Write the config and the record of a training after its first iteration (see engine.record.write_record).

    The config in a work dir is that of the newest training there. One that fails before it has trained anything, for
    the sake of its data or of a checkpoint that does not fit, leaves it as it was. It does not say that a run was
    resumed: who trains with it starts anew.

    Args:
        load_from: the config's, before a run was resumed.
    """

    priority = 'VERY_HIGH'  # before a checkpoint is written

    def __init__(self, load_from: str | None = None) -> None:
        self.load_from = load_from
        self.written = False

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        if not self.written:
            self.written = True
            self._write(runner)

    @master_only
    def _write(self, runner: Runner) -> None:
        cfg = copy.deepcopy(runner.cfg)
        if cfg.get('resume'):
            cfg.resume, cfg.load_from = False, self.load_from
        write_record(cfg, runner.log_dir, copy_in=runner.work_dir)
