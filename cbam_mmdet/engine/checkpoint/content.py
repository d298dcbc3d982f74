"""The parts of a checkpoint."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any


def meta_of(checkpoint: object) -> Mapping:
    """The 'meta' of a checkpoint, in which MMEngine describes the run. Empty if there is none or it is no mapping."""
    meta = checkpoint.get('meta') if isinstance(checkpoint, Mapping) else None
    return meta if isinstance(meta, Mapping) else {}


def classes_of(checkpoint: object) -> tuple[str, ...] | None:
    """The names of the classes that a checkpoint was trained for, in the order of its labels. None if it has none."""
    described = meta_of(checkpoint).get('dataset_meta')
    if not isinstance(described, Mapping):
        return None
    names = next((described[key] for key in ('classes', 'CLASSES') if key in described), None)
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return None
    return tuple(names)


RUN_STATE = ('meta', 'message_hub', 'optimizer')  # what a resumed training run needs besides the weights


def run_state_lacking(checkpoint: object) -> list[str]:
    """The keys that a resumed training run needs and a checkpoint does not hold. Empty if a run can resume from it."""
    if not isinstance(checkpoint, Mapping):
        return list(RUN_STATE)
    return [key for key in RUN_STATE if key not in checkpoint or (key == 'meta' and not meta_of(checkpoint))]


def weights_of(checkpoint: object) -> Mapping | None:
    """The state dict in a checkpoint, without the prefix of DataParallel. None if there is none.

    It is the checkpoint itself, or its entry 'state_dict'. Keys keep their order, and the state dict its metadata.
    """
    weights = checkpoint.get('state_dict', checkpoint) if isinstance(checkpoint, Mapping) else None
    if not isinstance(weights, Mapping):
        return None
    if not any(str(key).startswith('module.') for key in weights):
        return weights
    renamed: Any = OrderedDict((key.removeprefix('module.'), value) for key, value in weights.items())
    metadata = getattr(weights, '_metadata', {})
    renamed._metadata = {name.removeprefix('module.'): value for name, value in metadata.items()}
    return renamed


def beginnings(weights: Mapping) -> list[str]:
    """How the keys of a state dict begin, e.g. 'backbone.'."""
    return list(dict.fromkeys(f'{str(key).partition(".")[0]}.' for key in weights))
