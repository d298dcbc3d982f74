"""A hook that refuses a checkpoint which does not fit the model."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor

from cbam_mmdet.engine.checkpoint.compare import compare_state_dicts
from cbam_mmdet.engine.checkpoint.content import run_state_lacking
from cbam_mmdet.engine.distributed import unwrapped
from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.logging import log

# What torch's optimizers keep for each parameter in its own shape.
SHAPED = (
    'momentum_buffer',
    'exp_avg',
    'exp_avg_sq',
    'max_exp_avg_sq',
    'exp_inf',
    'square_avg',
    'grad_avg',
    'acc_delta',
)
OWN = ('momentum', 'betas', 'alpha', 'rho')  # settings by which the kinds of optimizers differ
# What MMEngine's schedulers keep beside their settings.
PROGRESS = {
    'optimizer',
    'base_values',
    'last_step',
    '_global_step',
    '_last_value',
    'verbose',
    *('best', 'num_bad_epochs', 'cooldown_counter'),  # of ReduceOnPlateauLR
}


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
        from cbam_mmdet.engine.checkpoint.settings import warn_of_other_settings  # it loads MMDetection

        model = unwrapped(runner.model)
        name = str(runner._load_from or runner.work_dir)
        compare_state_dicts(checkpoint, model, self.strict, name)
        warn_of_other_settings(checkpoint, runner.cfg, self.strict, name)
        lacking = run_state_lacking(checkpoint)
        if runner._resume and lacking:
            raise UserError(
                f'--resume: {name} holds weights, but not the state of a training run ({", ".join(lacking)}). '
                f'To start from these weights: --cfg-options load_from={name}'
            )
        if runner._resume:
            _compare_optimizers(checkpoint['optimizer'], runner.optim_wrapper, name)
            _compare_schedulers(checkpoint.get('param_schedulers'), runner.param_schedulers, name)


def _compare_optimizers(state: object, wrapper: Any, name: str) -> None:
    """Refuse the state of another optimizer, and say which settings of the config have no effect.

    A resumed training goes on with the settings in its checkpoint, whatever the config says now.
    """
    theirs = state.get('param_groups') if isinstance(state, dict) else None
    optimizer = getattr(wrapper, 'optimizer', None)
    if not theirs or optimizer is None:
        return  # several optimizers
    ours = optimizer.param_groups
    lacking = [key for key in OWN if key in ours[0] and key not in theirs[0]]
    if lacking or len(theirs) != len(ours):
        why = f'it has no {lacking[0]}' if lacking else 'it has other groups of parameters'
        raise UserError(
            f'--resume: {name} holds the state of another optimizer than {type(optimizer).__name__} ({why}). '
            'Give the optimizer that it was trained with, or start from its weights, without --resume: '
            f'--cfg-options load_from={name}'
        )
    _require_fitting_state(state, ours, name)
    changed: dict[str, str] = {}
    for before, now in zip(theirs, ours, strict=True):
        for key in (*OWN, 'lr', 'weight_decay'):
            old, new = (group.get(f'initial_{key}', group.get(key)) for group in (before, now))
            if old != new and old is not None:
                changed.setdefault(key, f'{key}={new!r} (it is {old!r})')
    if changed:
        log(
            f'--resume: {", ".join(changed.values())} of the config has no effect: a resumed training goes on with the '
            f'settings of its optimizer. To train on with others, without --resume: --cfg-options load_from={name}',
            logging.WARNING,
        )


def _compare_schedulers(states: object, schedulers: object, name: str) -> None:
    """Refuse the states of other kinds of schedulers, and say which settings of the config have no effect.

    MMEngine loads the states with their settings, and as many as there are on both sides.
    """
    if not isinstance(states, list) or not isinstance(schedulers, list):
        return  # several optimizers, or no schedule on one side
    if not all(isinstance(state, Mapping) for state in states):
        return  # MMEngine cannot load them
    ours = [{key: vars(one)[key] for key in vars(one).keys() - PROGRESS} for one in schedulers]
    kinds = [sorted(state.keys() - PROGRESS) for state in states]
    if kinds != [sorted(settings) for settings in ours]:
        classes = ', '.join(type(one).__name__ for one in schedulers) or 'none'
        raise UserError(
            f'--resume: {name} holds the state of {len(states)} schedulers, and not of those in the config '
            f'({classes}): their number or their kinds differ. Give the param_scheduler that it was trained with, or '
            f'start from its weights, without --resume: --cfg-options load_from={name}'
        )
    changed = [
        f'param_scheduler.{number}.{key}={_shown(now[key])} (it is {_shown(before[key])})'
        for number, (before, now) in enumerate(zip(states, ours, strict=True))
        for key in sorted(now)
        if _shown(before[key]) != _shown(now[key])
    ]
    if changed:
        log(
            f'--resume: {", ".join(changed)} of the config has no effect: a resumed training goes on with the '
            f'schedule in its checkpoint. To train on with another, without --resume: --cfg-options load_from={name}',
            logging.WARNING,
        )


def _shown(value: object) -> str:
    if isinstance(value, Counter):  # milestones
        return str(sorted(value.elements()))
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _require_fitting_state(state: Any, groups: list[dict], name: str) -> None:
    """Refuse averages of gradients that are not those of these parameters. They are kept in the parameters' order."""
    parameters = [parameter for group in groups for parameter in group['params']]
    numbers = [number for group in state['param_groups'] for number in group['params']]
    kept = state.get('state')
    for number, parameter in zip(numbers, parameters, strict=False):
        values = kept.get(number) if isinstance(kept, dict) else None
        for key, value in values.items() if isinstance(values, dict) else ():
            wanted = parameter.shape if key in SHAPED else torch.Size() if key == 'step' else None
            if wanted is not None and isinstance(value, Tensor) and value.shape != wanted:
                raise UserError(
                    f"--resume: {name} holds an optimizer's state for other parameters: {key} of the parameter "
                    f'{number} is {tuple(value.shape)}, where {tuple(wanted)} belongs. To start from its '
                    f'weights, without --resume: --cfg-options load_from={name}'
                )
