"""Compare a checkpoint with a model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from cbam_mmdet.engine.checkpoint.content import weights_of
from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.text import abridge


def compare_state_dicts(checkpoint: Mapping, model: nn.Module, strict: bool, name: str) -> None:
    """Raise an error unless a checkpoint fits a model.

    Args:
        checkpoint: the loaded checkpoint: a state dict, or a dict that holds one as 'state_dict'.
        model: the model, without a DDP wrapper.
        strict: whether every key must fit. Otherwise at least one weight must fit.
        name: the checkpoint's name, for the message.

    Raises:
        UserError: if the checkpoint does not fit. The message names keys that are missing, unexpected, or of another
            shape.
    """
    given = weights_of(checkpoint)
    if given is None:
        raise UserError(
            f'{name} holds no weights (a dict of tensors, or one with the key state_dict): it is not a checkpoint'
        )
    _require_sound(given, name)
    expected = model.state_dict()
    missing = [key for key in expected if key not in given]
    unexpected = [key for key in given if key not in expected]
    misshapen = [key for key in expected if key in given and getattr(given[key], 'shape', None) != expected[key].shape]
    fitting = len(expected) - len(missing) - len(misshapen)
    if not (missing or unexpected or misshapen) or (not strict and fitting):
        return
    details = []
    for what, keys in (('not in the checkpoint', missing), ('not in the model', unexpected)):
        if keys:
            details.append(f'{len(keys)} keys are {what} ({abridge(keys)})')
    if misshapen:
        key = misshapen[0]
        details.append(
            f'{len(misshapen)} keys have another shape ({key}: {tuple(given[key].shape)} in the checkpoint, '
            f'{tuple(expected[key].shape)} in the model)'
        )
    raise UserError(
        f'checkpoint {name} is of another architecture than the config: {fitting} of {len(expected)} keys fit; '
        f'{"; ".join(details)}. Give the config that it was trained with (a copy lies in its work dir).'
    )


def _require_sound(weights: Mapping, name: str) -> None:
    """Refuse weights that torch cannot load, and those of a training that had diverged, with which nothing is found."""
    metadata = getattr(weights, '_metadata', {})
    if not isinstance(metadata, Mapping) or not all(isinstance(value, Mapping) for value in metadata.values()):
        raise UserError(
            f'checkpoint {name} is damaged: the metadata of its weights are no mappings. Use an earlier one.'
        )
    for key, value in weights.items():
        if not isinstance(key, str):
            raise UserError(f'checkpoint {name} is damaged: a weight is called {key!r}. Use an earlier one.')
        if not isinstance(value, torch.Tensor):
            continue
        if value.is_meta or value.layout is not torch.strided:
            raise UserError(
                f'checkpoint {name}: {key} is a tensor without values, or a sparse one. Use an earlier one.'
            )
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(
                f'checkpoint {name}: {key} holds numbers that are not finite, as after a training that diverged. '
                'Use an earlier one.'
            )
