"""Checkpoints: is a file one, and does it fit a model?"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

from mmengine.runner import find_latest_checkpoint
from torch import nn

from .errors import UserError, near


def find_checkpoint(path: str) -> str:
    """Find a checkpoint, and look at its first and last bytes before minutes are spent on data and models.

    Args:
        path: a file, or a work dir, which stands for the newest checkpoint in it; URLs and 'torchvision://' names are left to
            MMEngine.

    Returns:
        The file's path, or the name as it was.

    Raises:
        UserError: if it does not exist, is cut off, or is no checkpoint.
    """
    if '://' in path:
        return path
    if os.path.isdir(path):
        newest = find_latest_checkpoint(path)
        if newest is None:
            raise UserError(
                f'{path} is a folder without a last_checkpoint: give a .pth file or the work dir of a training run'
            )
        path = newest
    if not os.path.isfile(path):
        folder = Path(path).parent
        siblings = [str(p) for p in folder.glob('*.pth')] if folder.is_dir() else []
        have = f' {folder} holds {", ".join(sorted(siblings)[:5])}.' if siblings else ''
        raise UserError(f'checkpoint {path} does not exist{near(path, siblings)}.{have}')
    with open(path, 'rb') as file:
        head = file.read(2)
    if head == b'PK' and not zipfile.is_zipfile(path):
        raise UserError(f'checkpoint {path} is cut off (a killed job or a full disk?): use an earlier one.')
    if head != b'PK' and not head.startswith(b'\x80'):  # zip, and the pickle of torch before 1.6
        raise UserError(f'{path} is not a checkpoint of PyTorch.')
    return path


def compare_state_dicts(checkpoint: Mapping, model: nn.Module, strict: bool, name: str) -> None:
    """Raise unless a checkpoint fits a model.

    Args:
        checkpoint: what was loaded: a state dict, or a dict that holds one as 'state_dict'.
        model: the model it is for, without a DDP wrapper.
        strict: every key must fit; otherwise at least one weight must.
        name: the checkpoint's name, for the message.

    Raises:
        UserError: that names keys which are missing, left over or of another shape.
    """
    weights = checkpoint.get('state_dict', checkpoint) if isinstance(checkpoint, Mapping) else None
    if not isinstance(weights, Mapping):
        raise UserError(
            f'{name} holds no weights (a dict of tensors, or one with the key state_dict): it is not a checkpoint'
        )
    given = {key.removeprefix('module.'): value for key, value in weights.items()}
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
            details.append(f'{len(keys)} keys are {what} ({_some(keys)})')
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


def _some(keys: list[str], most: int = 3) -> str:
    return ', '.join(keys[:most]) + (', ...' if len(keys) > most else '')
