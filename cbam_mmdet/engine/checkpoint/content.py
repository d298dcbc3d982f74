"""What a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping


def meta_of(checkpoint: object) -> Mapping:
    """What MMEngine writes of a run beside the weights; empty if there is none, or something else in its place."""
    meta = checkpoint.get('meta') if isinstance(checkpoint, Mapping) else None
    return meta if isinstance(meta, Mapping) else {}


RUN_STATE = ('meta', 'message_hub', 'optimizer')  # what a training run goes on from, besides the weights


def run_state_lacking(checkpoint: object) -> list[str]:
    """What a training run needs to go on and a checkpoint does not hold; nothing if it can be resumed."""
    if not isinstance(checkpoint, Mapping):
        return list(RUN_STATE)
    return [key for key in RUN_STATE if key not in checkpoint or (key == 'meta' and not meta_of(checkpoint))]


def weights_of(checkpoint: object) -> Mapping | None:
    """The state dict that a checkpoint is, or holds as 'state_dict', without the prefix of DataParallel; None if neither.

    Keys keep their order, and what torch keeps beside them (`_metadata`) is lost only where a prefix is.
    """
    weights = checkpoint.get('state_dict', checkpoint) if isinstance(checkpoint, Mapping) else None
    if not isinstance(weights, Mapping):
        return None
    if not any(str(key).startswith('module.') for key in weights):
        return weights
    return {key.removeprefix('module.'): value for key, value in weights.items()}
