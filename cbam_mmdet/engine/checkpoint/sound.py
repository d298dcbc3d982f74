"""Refuse what is in a checkpoint's place and cannot be one: a checkpoint is data, which anybody may have changed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cbam_mmdet.engine.checkpoint.content import meta_of
from cbam_mmdet.errors import UserError
from cbam_mmdet.models.variant import KEY
from cbam_mmdet.utils.text import brief

MOST = 10**12  # epochs and iterations
KINDS = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)
CLASSES = ('classes', 'CLASSES')


def require_sound(checkpoint: object, name: str) -> None:
    """Refuse weights, classes and counters that torch or MMEngine would end in a traceback with, or misread.

    Also those of a training that had diverged, with which nothing is found.

    Args:
        checkpoint: what a file holds. Objects without weights are left to those who use them.
        name: the file's, for the message.

    Raises:
        UserError: which says what is wrong.
    """
    fault = _fault_of_meta(meta_of(checkpoint))
    given = checkpoint.get('state_dict', checkpoint) if isinstance(checkpoint, Mapping) else None
    if fault is None and isinstance(given, Mapping):
        twice = [key for key in given if isinstance(key, str) and f'module.{key}' in given]
        fault = f'the weight {twice[0]} is in it twice, with and without module. before it' if twice else None
        fault = fault or _fault_of_metadata(getattr(given, '_metadata', {}))
        for key, value in given.items():
            fault = fault or (f'a weight is called {key!r}' if not isinstance(key, str) else None)
            fault = fault or (_fault_of(key, value) if isinstance(value, Tensor) else None)
        strange = [key for key, value in given.items() if 'state_dict' in checkpoint and not isinstance(value, Tensor)]
        fault = fault or (f'{strange[0]} is a {type(given[strange[0]]).__name__}, no weight' if strange else None)
    if fault:
        raise UserError(f'checkpoint {name}: {fault}. Use an earlier one.')


def _fault_of(key: str, value: Tensor) -> str | None:
    if value.is_meta or value.layout is not torch.strided:
        return f'{key} is a tensor without values, or a sparse one'
    if value.is_quantized or value.dtype not in KINDS:
        return f'{key} holds numbers of the kind {value.dtype}, which no detector has'
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f'{key} has fewer values in the file than its shape, {tuple(value.shape)}, says'
    single = value.float() if value.is_floating_point() else value  # a network computes in float32, or in less
    if not torch.isfinite(single).all():
        return f'{key} holds numbers that are not finite, as after a training that diverged'
    if key.endswith('running_var') and bool((value < 0).any()):
        return f'{key} holds a variance below 0'
    return None


def _fault_of_metadata(metadata: object) -> str | None:
    if metadata is None or not isinstance(metadata, Mapping):
        return 'it is damaged: the metadata of its weights are no mappings'
    for module, facts in metadata.items():
        if not isinstance(module, str) or not isinstance(facts, Mapping):
            return 'it is damaged: the metadata of its weights are no mappings'
        if not isinstance(facts.get('version', 1), (int, type(None))):
            return f'it is damaged: the version of {module} is {brief(repr(facts["version"]))}'
        variant = facts.get(KEY, {'gate': '', 'pools': ''})
        if not isinstance(variant, Mapping) or not {'gate', 'pools'} <= {*variant}:
            return f'it is damaged: the variant of the CBAM {module} is {brief(repr(variant))}'
    return None


def _fault_of_meta(meta: Mapping) -> str | None:
    for key in ('epoch', 'iter'):
        value = meta.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MOST:
            return f'it is damaged: its {key} is {brief(repr(value))}'
    seed = meta.get('seed')
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        return f'it is damaged: its seed is {brief(repr(seed))}'
    described = meta.get('dataset_meta')
    if not isinstance(described, Mapping):
        return None
    if not all(isinstance(key, str) for key in described):
        return 'it is damaged: what it says of its data set has other keys than names'
    lists = [described[key] for key in CLASSES if key in described]
    if len(lists) == 2 and [*_listed(lists[0])] != [*_listed(lists[1])]:
        return 'it names its classes twice, and differently'
    for names in lists:
        listed = _listed(names)
        if any(isinstance(name, str) and not name.strip() for name in listed) or len({*map(repr, listed)}) < len(
            listed
        ):
            return f'its classes are not a name for each: {brief(repr(names))}'
    return None


def _listed(names: object) -> list:
    return [*names] if isinstance(names, (list, tuple)) else [names]
