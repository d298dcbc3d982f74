"""Checkpoints are loaded as tensors and plain data: no code from a file is run."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

from cbam_mmdet.compat.mmengine import checkpoints_loaded_by
from cbam_mmdet.engine.checkpoint.content import weights_of
from cbam_mmdet.engine.checkpoint.keys import from_official, is_official
from cbam_mmdet.errors import UserError


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
    reason: Exception
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


@contextlib.contextmanager
def safe_loading(trust: bool = False) -> Iterator[None]:
    """Let all that MMEngine loads meanwhile go through load_checkpoint.

    That is load_from, resume, Pretrained and init_detector, by file or by URL. MMEngine tries to load safely, too, but falls
    back to unpickling whatever the file holds. Checkpoints of the CBAM authors' networks get the keys used here on the way
    (see keys.from_official).

    Args:
        trust: load whatever a file holds, by full unpickling: this runs code from the file.
    """

    def load_file(filename: str, map_location: str | torch.device | None = None) -> dict:
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

    with checkpoints_loaded_by(load_file, load_url):
        yield


def _translated(checkpoint: dict) -> dict:
    """The CBAM authors' own checkpoints, in the keys used here."""
    weights = weights_of(checkpoint)
    if weights is None or not is_official(weights):
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
