"""Refuse a checkpoint that does not fit the model."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from cbam_mmdet.engine.checkpoint.compare import compare_state_dicts
from cbam_mmdet.engine.checkpoint.content import run_state_lacking
from cbam_mmdet.engine.hooks.unwrapped import unwrapped
from cbam_mmdet.errors import UserError


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
        model = unwrapped(runner.model)
        name = str(runner._load_from or runner.work_dir)
        compare_state_dicts(checkpoint, model, self.strict, name)
        lacking = run_state_lacking(checkpoint)
        if runner._resume and lacking:
            raise UserError(
                f'--resume: {name} holds weights, but not the state of a training run ({", ".join(lacking)}). To start from '
                f'these weights: --cfg-options load_from={name}'
            )
