"""A hook that refuses a checkpoint which does not fit the model."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from cbam_mmdet.engine.checkpoint.compare import compare_state_dicts
from cbam_mmdet.engine.checkpoint.content import run_state_lacking
from cbam_mmdet.engine.distributed import unwrapped
from cbam_mmdet.errors import UserError


@HOOKS.register_module()
class CheckpointFitHook(Hook):
    """Refuse a checkpoint that does not fit the model. MMEngine would continue with random weights.

    Args:
        strict: whether every key must fit, as for a test or a resumed run. Otherwise (`load_from`, to fine-tune) heads
            and new layers may differ, and only a checkpoint without any key that fits is refused.

    Raises:
        UserError: for a checkpoint that does not fit. The message names keys that are missing, unexpected, or of
            another shape.
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
                f'--resume: {name} holds weights, but not the state of a training run ({", ".join(lacking)}). '
                f'To start from these weights: --cfg-options load_from={name}'
            )
