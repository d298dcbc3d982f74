"""Refuse what is in a checkpoint's place and cannot be one: a checkpoint is data, which anybody may have changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

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
    fault = next(filter(None, _faults(checkpoint)), None)
    if fault:
        raise UserError(f'checkpoint {name}: {fault}. Use an earlier one.')


def _faults(checkpoint: object) -> Iterator[str | None]:
    yield _fault_of_meta(meta_of(checkpoint))
    if not isinstance(checkpoint, Mapping):
        return
    weights = checkpoint.get('state_dict', checkpoint)
    if not isinstance(weights, Mapping):
        return
    yield _fault_of_metadata(getattr(weights, '_metadata', {}))
    for key, value in weights.items():
        if not isinstance(key, str):
            yield f'a weight is called {key!r}'
        elif f'module.{key}' in weights:
            yield f'the weight {key} is in it twice, with and without module. before it'
        elif isinstance(value, Tensor):
            yield _fault_of(key, value)
        elif weights is not checkpoint and not key.endswith('_extra_state'):  # which torch lets be anything
            yield f'{key} is a {type(value).__name__}, no weight'


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
        distinct = len({*map(repr, listed)}) == len(listed)
        if not distinct or any(isinstance(name, str) and not name.strip() for name in listed):
            return f'its classes are not a name for each: {brief(repr(names))}'
    return None


def _listed(names: object) -> list:
    return [*names] if isinstance(names, (list, tuple)) else [names]
