"""Load checkpoints as tensors and plain data, without running code from the file."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

from cbam_mmdet.compat.mmengine import checkpoints_loaded_by, prefixes_keep_metadata
from cbam_mmdet.compat.torch import load_without_code, unpickle_without_code
from cbam_mmdet.engine.checkpoint.content import beginnings, meta_of, weights_of
from cbam_mmdet.engine.checkpoint.keys import from_network
from cbam_mmdet.engine.checkpoint.sound import require_sound
from cbam_mmdet.engine.checkpoint.variants import PAPER, add_variants, cbams_in, set_variant
from cbam_mmdet.errors import UserError, did_you_mean
from cbam_mmdet.utils.logging import log
from cbam_mmdet.utils.text import abridge

MAX_COMPRESSION = 20  # of a checkpoint in a zip archive: weights hardly shrink, a zip bomb does by a thousand


def load_checkpoint(path: str, map_location: str | torch.device | None = None, trust: bool = False) -> dict:
    """Load a checkpoint file of tensors and plain data, without executing anything in it.

    NumPy arrays, numbers and the histories of logs are allowed, because MMEngine's own checkpoints hold them.

    Args:
        path: a local file, or a zip archive with one such file in it, as pytorchcv publishes its weights.
        map_location: that of torch.load.
        trust: load any file by full unpickling. This runs code from the file.

    Raises:
        UserError: if the file is damaged or holds other objects. No code from it was run.
    """
    reason: Exception
    try:
        file = _unpacked(path)
        if trust:
            made = torch.load(file, map_location=map_location, weights_only=False)
        else:
            made = load_without_code(file, map_location, _harmless_globals())
        require_sound(made, path)
        return made
    except UserError:
        raise
    except (RuntimeError, EOFError, zipfile.BadZipFile, OSError, pickle.UnpicklingError) as error:
        reason = error
    except Exception as error:  # a damaged pickle may raise anything, and with trust the file's own code, too
        if trust:
            raise
        reason = error
    named = re.search(r'GLOBAL ([\w.]+)', str(reason))
    if isinstance(reason, pickle.UnpicklingError) and named:
        raise UserError(
            f'checkpoint {path} holds more than tensors and plain data (it names {named.group(1)}): loading it would '
            'run code from the file, so it was not loaded. If you trust where it comes from: --trust-checkpoint.'
        ) from reason
    raise UserError(
        f'checkpoint {path} cannot be read, it is damaged or not one of PyTorch '
        f'({type(reason).__name__}: {reason}): use an earlier one.'
    ) from reason


def _unpacked(path: str) -> str | io.BytesIO:
    """The content of the only .pth file in a zip archive, or the path of any other file.

    A checkpoint of torch itself is a zip archive, too: one that holds a data.pkl.
    """
    if not zipfile.is_zipfile(path):
        return path
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        if any(PurePosixPath(member.filename).name == 'data.pkl' for member in members):
            size = sum(member.file_size for member in members)
            if size > MAX_COMPRESSION * os.path.getsize(path):  # torch stores them as they are
                raise UserError(
                    f'checkpoint {path} has {os.path.getsize(path)} bytes and would unpack to {size}: it was not read'
                )
            return path
        found = [member for member in members if member.filename.endswith('.pth')]
        if len(found) != 1:
            held = abridge([member.filename for member in members]) if members else 'nothing'
            raise UserError(
                f'{path} is a zip archive with {len(found)} .pth files in it, where one is expected (it holds {held}): '
                'unpack it, and give the .pth file'
            )
        size, limit = found[0].file_size, MAX_COMPRESSION * os.path.getsize(path)
        if size > limit:
            raise UserError(
                f'{path} is a zip archive of {os.path.getsize(path)} bytes, in which {found[0].filename} would unpack '
                f'to {size}: weights cannot be compressed so far, so it was not unpacked'
            )
        return io.BytesIO(archive.read(found[0]))  # zipfile reads no more than the size that the archive says


def load_plain_pickle(path: str | Path) -> Any:
    """Unpickle a file of tensors and plain data, such as MMEngine's DumpResults writes, without executing anything.

    Raises:
        UserError: if the file holds other objects. No code from it was run.
        Exception: whatever a damaged pickle raises.
    """
    try:
        return unpickle_without_code(path, _harmless_globals())
    except pickle.UnpicklingError as error:
        named = re.search(r'GLOBAL ([\w.]+)', str(error))
        if named is None:
            raise
        raise UserError(
            f'{path} holds more than tensors and plain data (it names {named.group(1)}): reading it would run code '
            'from the file, so it was not read.'
        ) from error


def download(url: str, folder: str | None = None, progress: bool = True) -> str:
    """The path of a downloaded file, which is kept in torch.hub's folder for checkpoints unless another is given."""
    folder = folder or os.path.join(torch.hub.get_dir(), 'checkpoints')
    path = os.path.join(folder, os.path.basename(urlparse(url).path))
    if not os.path.exists(path):
        os.makedirs(folder, exist_ok=True)
        torch.hub.download_url_to_file(url, path, progress=progress)
    return path


@contextlib.contextmanager
def safe_loading(trust: bool = False) -> Iterator[None]:
    """Let MMEngine load checkpoints with load_checkpoint inside this context.

    This covers load_from, resume, Pretrained and init_detector, with files and URLs. MMEngine itself tries to load
    safely, but falls back to full unpickling. Checkpoints of the CBAM authors' networks, and of pytorchcv's, are
    translated into the keys used here (see keys.from_network).

    Args:
        trust: load any file by full unpickling. This runs code from the file.
    """

    def load_file(filename: str, map_location: str | torch.device | None = None) -> dict:
        filename = os.path.expanduser(filename)
        if not os.path.isfile(filename):
            raise UserError(
                f'checkpoint {filename}, which the config names for its initial weights (init_cfg), does not exist. '
                'Put the file there, or start from random weights: --cfg-options model.backbone.init_cfg=None. How to '
                'get those of EfficientNet-Lite0: docs/own_data.md#without-a-gpu-a-pretrained-detector'
            )
        return _translated(load_checkpoint(filename, map_location, trust), filename)

    def load_url(
        url: str, model_dir: str | None = None, map_location: str | torch.device | None = None, **kwargs: Any
    ) -> dict:
        path = download(url, model_dir, kwargs.get('progress', True))
        return _translated(load_checkpoint(path, map_location, trust), url)

    with checkpoints_loaded_by(load_file, load_url), prefixes_keep_metadata(_require_prefix):
        yield


def _require_prefix(checkpoint: Any, prefix: str, name: str) -> None:
    weights = weights_of(checkpoint) or {}
    begins = beginnings(weights)
    if not any(str(key).startswith(f'{prefix.rstrip(".")}.') for key in weights):
        raise UserError(
            f'init_cfg: no key of checkpoint {name} begins with prefix={prefix!r}{did_you_mean(prefix, begins) or "."} '
            f'They begin with {abridge(begins, 8)}'
        )


def _translated(checkpoint: Any, name: str) -> Any:
    """Translate networks of CBAM's authors and of pytorchcv into the keys used here, and say a file's variant of CBAM.

    Other files stay as they are.
    """
    weights = weights_of(checkpoint)
    if weights is None:
        return checkpoint
    network = from_network(weights)
    if network is not None:
        weights = OrderedDict(network.state_dict)
        set_variant(weights, cbams_in(weights), PAPER)
        return dict(meta={}, state_dict=weights)
    unknown = add_variants(weights, meta_of(checkpoint))
    if unknown:
        log(
            f'checkpoint {name} does not say which variant of CBAM its {len(unknown)} modules are (gate, pools, '
            'order): they are taken for that of the config',
            logging.WARNING,
        )
    if 'state_dict' in checkpoint:
        checkpoint['state_dict'] = weights
        return checkpoint
    return weights


def _harmless_globals() -> dict[str, Any]:
    """What MMEngine's checkpoints name beside tensors: the parts of NumPy's arrays, and HistoryBuffer."""
    core = getattr(np, 'core' if np.__version__.startswith('1.') else '_core')
    kinds = np.float64, np.float32, np.int64, np.int32, np.uint8, np.uint32, np.bool_
    allowed = [HistoryBuffer, np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in kinds)]
    named = {f'{cls.__module__}.{cls.__qualname__}': cls for cls in allowed}
    # NumPy 1 and 2 pickle these under different module names, and a checkpoint may come from either.
    for module in 'numpy.core.multiarray', 'numpy._core.multiarray':
        named |= {f'{module}.{f.__name__}': f for f in (core.multiarray._reconstruct, core.multiarray.scalar)}
    return named | {'builtins.getattr': _statistics_method}


def _statistics_method(cls: type, name: str) -> Any:
    """The attributes for which the pickle of a HistoryBuffer calls getattr. All others are refused."""
    if cls is HistoryBuffer and name in ('min', 'max', 'mean', 'current'):
        return getattr(cls, name)
    raise pickle.UnpicklingError(f'Unsupported global: GLOBAL builtins.getattr of {cls!r}, {name!r}')
