"""Checkpoints: found, written whole, loaded without running code from them, and compared with the model they are for."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.fileio import register_backend
from mmengine.logging import HistoryBuffer, print_log
from mmengine.runner import CheckpointLoader, find_latest_checkpoint
from mmengine.runner import checkpoint as checkpoint_module
from torch import nn

from cbam_mmdet.errors import UserError, did_you_mean
from cbam_mmdet.utils.files import AtomicLocalBackend
from cbam_mmdet.utils.text import abridge

RUN_STATE = ('meta', 'message_hub', 'optimizer')  # what a training run goes on from, besides the weights


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
        inside = os.path.join(path, os.path.basename(newest or ''))
        if os.path.isfile(inside):  # the folder may have been moved or copied
            newest = inside
        if not newest or not os.path.isfile(newest):  # killed while it was written
            newest, passed_over = newest_checkpoint(path)
            for reason in passed_over:
                print_log(f'passed over: {reason}', logger='current', level=logging.WARNING)
        if newest is None:
            raise UserError(
                f'{path} is a folder without a checkpoint of a training run: give a .pth file or the work dir of a run'
            )
        path = newest
    if not os.path.isfile(path):
        folder = Path(path).parent
        siblings = [str(p) for p in folder.glob('*.pth')] if folder.is_dir() else []
        have = f' {folder} holds {", ".join(sorted(siblings)[:5])}.' if siblings else ''
        raise UserError(f'checkpoint {path} does not exist{did_you_mean(path, siblings)}.{have}')
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


# Writing whole files only


def write_whole_files() -> None:
    """Let MMEngine write checkpoints through AtomicLocalBackend in this process."""
    register_backend('local', AtomicLocalBackend, force=True, prefixes='')


def newest_checkpoint(
    *folders: str, trust: bool = False, templates: Sequence[str] = ('epoch_{}.pth', 'iter_{}.pth')
) -> tuple[str | None, list[str]]:
    """The newest checkpoint of a training run that can be gone on from.

    That is the one which last_checkpoint names, or one that was written later and is further, as after a kill between the two. If that file is missing or
    names none that loads: the one written last.

    Args:
        folders: where the run's checkpoints may lie.
        trust: load them by full unpickling (see load_checkpoint).
        templates: their names.

    Returns:
        Its path, None if there is none; and for each that was newer, or was named, why it was passed over.
    """
    names = re.compile('|'.join(re.escape(template).replace(r'\{\}', r'\d+') for template in templates))
    files = [path for folder in folders for path in Path(folder).glob('*') if names.fullmatch(path.name)]
    files.sort(key=lambda path: (path.stat().st_mtime_ns, int(re.findall(r'\d+', path.name)[-1])), reverse=True)
    named = _named_by_last_checkpoint(folders)
    later = files[: files.index(named)] if named in files else []
    passed_over: list[str] = []
    if named in files:
        done = {path: _iterations(path, trust, passed_over) for path in [*later, named]}
        if done[named] is not None:
            return str(max((path for path in done if done[path] is not None), key=lambda path: done[path])), passed_over
        files = [path for path in files if path != named]
        passed_over.clear()
        _iterations(named, trust, passed_over)
    for path in files:
        if _iterations(path, trust, passed_over) is not None:
            return str(path), passed_over
    return None, passed_over


def _named_by_last_checkpoint(folders: Sequence[str]) -> Path | None:
    for folder in folders:
        try:
            name = Path(folder, 'last_checkpoint').read_text().strip()
        except OSError:
            continue
        for place in folders:
            if name and Path(place, os.path.basename(name)).is_file():
                return Path(place, os.path.basename(name))
    return None


def _iterations(path: Path, trust: bool, passed_over: list[str]) -> int | None:
    """How many iterations a checkpoint holds the state after; None, with the reason, if it cannot be gone on from."""
    try:
        checkpoint = load_checkpoint(find_checkpoint(str(path)), 'cpu', trust)
    except UserError as error:
        passed_over.append(str(error))
        return None
    lacking = run_state_lacking(checkpoint)
    if lacking:
        passed_over.append(f'checkpoint {path} lacks the state of the run ({", ".join(lacking)})')
        return None
    return checkpoint['meta'].get('iter', 0)


def run_state_lacking(checkpoint: object) -> list[str]:
    """What a training run needs to go on and a checkpoint does not hold; nothing if it can be resumed."""
    if not isinstance(checkpoint, Mapping):
        return list(RUN_STATE)
    return [key for key in RUN_STATE if key not in checkpoint or (key == 'meta' and not meta_of(checkpoint))]


def meta_of(checkpoint: object) -> Mapping:
    """What MMEngine writes of a run beside the weights; empty if there is none, or something else in its place."""
    meta = checkpoint.get('meta') if isinstance(checkpoint, Mapping) else None
    return meta if isinstance(meta, Mapping) else {}


# Loading without running code from the file


def load_checkpoint(path: str, map_location: str | torch.device | None = None, trust: bool = False) -> dict:
    """Load a checkpoint file of tensors and plain data; nothing in it is executed.

    What MMEngine's own checkpoints hold besides (numpy arrays and numbers, the histories of its logs) is let through.

    Args:
        path: a local file.
        map_location: as torch.load's.
        trust: load whatever it holds, by full unpickling: this runs code from the file.

    Raises:
        UserError: if the file is damaged, or needs more than that; nothing of it was run.
    """
    try:
        with _harmless_globals():
            return torch.load(path, map_location=map_location, weights_only=not trust)
    except (RuntimeError, EOFError, zipfile.BadZipFile, OSError, pickle.UnpicklingError) as error:
        reason = error
    except Exception as error:  # a damaged pickle can raise anything; with trust, the file's own code
        if trust:
            raise
        reason = error
    named = re.search(r'GLOBAL ([\w.]+)', str(reason))
    if isinstance(reason, pickle.UnpicklingError) and named:
        raise UserError(
            f'checkpoint {path} holds more than tensors and plain data (it names {named.group(1)}): loading it would run code from the file, '
            'so it was not loaded. If you trust where it comes from: --trust-checkpoint.'
        ) from reason
    raise UserError(
        f'checkpoint {path} cannot be read, it is damaged or none of PyTorch ({type(reason).__name__}: {reason}): use an earlier one.'
    ) from reason


def use_safe_loading(trust: bool = False) -> None:
    """Let all that MMEngine loads in this process (load_from, resume, Pretrained, init_detector, by file or by URL) go through load_checkpoint.

    MMEngine tries to load safely, too, but falls back to unpickling whatever the file holds. Checkpoints of the CBAM authors'
    networks get the keys used here on the way (see weights.from_official).
    """

    def load_from_local(filename: str, map_location: str | torch.device | None = None) -> dict:
        filename = os.path.expanduser(filename)
        if not os.path.isfile(filename):
            raise UserError(f'checkpoint {filename} does not exist')
        return _translated(load_checkpoint(filename, map_location, trust))

    def load_url(
        url: str, model_dir: str | None = None, map_location: str | torch.device | None = None, **kwargs: Any
    ) -> dict:
        folder = model_dir or os.path.join(torch.hub.get_dir(), 'checkpoints')
        path = os.path.join(folder, os.path.basename(urlparse(url).path))
        if not os.path.exists(path):
            os.makedirs(folder, exist_ok=True)
            torch.hub.download_url_to_file(url, path, progress=kwargs.get('progress', True))
        return _translated(load_checkpoint(path, map_location, trust))

    CheckpointLoader.register_scheme(prefixes='', loader=load_from_local, force=True)
    checkpoint_module.load_url = load_url  # what 'https://', 'torchvision://' and 'open-mmlab://' end in


def _translated(checkpoint: dict) -> dict:
    """The CBAM authors' own checkpoints, in the keys used here."""
    from cbam_mmdet.weights import from_official, is_official

    weights = checkpoint.get('state_dict', checkpoint) if isinstance(checkpoint, Mapping) else {}
    if not isinstance(weights, Mapping) or not is_official(weights):
        return checkpoint
    return dict(meta={}, state_dict=from_official(weights).state_dict)


@contextlib.contextmanager
def _harmless_globals() -> Iterator[None]:
    """What MMEngine's checkpoints name besides tensors: numpy's arrays, and its HistoryBuffer."""
    core = getattr(np, '_core', None) or np.core
    # Named by the modules that numpy 1 and 2 pickle them under; a checkpoint may come from either.
    allowed = [HistoryBuffer, np.ndarray, np.dtype, core.multiarray._reconstruct, core.multiarray.scalar]
    allowed += [
        type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.uint8, np.uint32, np.bool_)
    ]
    allowed += [_statistics_method]
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals(allowed)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _statistics_method(cls: type, name: str) -> Any:
    """What a HistoryBuffer's pickle calls getattr for, and nothing else that getattr can reach."""
    if cls is HistoryBuffer and name in ('min', 'max', 'mean', 'current'):
        return getattr(cls, name)
    raise pickle.UnpicklingError(f'Unsupported global: GLOBAL builtins.getattr of {cls!r}, {name!r}')


# A checkpoint asks for it by this name.
_statistics_method.__module__, _statistics_method.__qualname__ = 'builtins', 'getattr'
