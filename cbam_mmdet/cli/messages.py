"""One message for each failure that a user can mend, wherever the exception was raised."""

from __future__ import annotations

import errno
import functools
import importlib
import importlib.util
import inspect
import os
import pickle
import re
import traceback

import torch

from cbam_mmdet.errors import OperatorError, UserError, did_you_mean, is_dead_worker


def explain(error: BaseException) -> str | None:
    """The message for a failure that a user can mend; None for what looks like a bug."""
    if isinstance(error, UserError):
        return _without_worker_traceback(str(error))
    if isinstance(error, OperatorError):
        return str(error)
    for explainer in (
        _unknown_type,
        _wrong_argument,
        _no_readable_image,
        _damaged_checkpoint,
        _download_failed,
        _channels_that_do_not_fit,
        _out_of_memory,
        _compiled_without_bf16,
        _unusable_file,
        _dead_worker,
        _sync_bn_on_cpu,
    ):
        message = explainer(error)
        if message:
            return message
    return None


def _without_worker_traceback(text: str) -> str:
    """An exception raised in a DataLoader's worker arrives with that worker's traceback as its text."""
    _, found, tail = text.rpartition(f'{UserError.__name__}: ')
    return tail.strip() if found and 'Traceback (most recent call last)' in text else text


def _no_readable_image(error: BaseException) -> str | None:
    if 'Cannot find valid image after' not in str(error):
        return None
    return 'no training image can be read: the lines above name them. Check the data set, or the disk that holds it.'


def _damaged_checkpoint(error: BaseException) -> str | None:
    damaged = isinstance(error, RuntimeError) and 'PytorchStreamReader' in str(error)
    if not damaged and not isinstance(error, (pickle.UnpicklingError, EOFError)):
        return None
    return f'the checkpoint is damaged or is none of PyTorch: {error}. Use an earlier one.'


def _unknown_type(error: BaseException) -> str | None:
    """MMEngine's registries name what they lack but not what they have."""
    found = re.search(r"'?\"?([\w.]+) is not in the ([\w-]+)::([\w ]+) registry", str(error))
    if not isinstance(error, KeyError) or not found:
        return None
    name, scope, registry = found.groups()
    package, dot, _ = name.partition('.')
    if dot and importlib.util.find_spec(package) is None:
        extra = " (pip install 'cbam-mmdet[backbones]')" if package == 'mmpretrain' else ''
        return f'type={name!r} in the config needs the package {package}, which is not installed here{extra}'
    return (
        f'type={name!r} in the config is not a registered {registry}{did_you_mean(name, _registered(registry, scope))}'
    )


@functools.cache
def _registered(registry: str, scope: str) -> tuple[str, ...]:
    names = set()
    for package in {scope, 'mmdet', 'mmengine'}:
        try:
            module = importlib.import_module(f'{package}.registry')
        except ImportError:
            continue
        for candidate in vars(module).values():
            if getattr(candidate, 'name', None) == registry and hasattr(candidate, 'module_dict'):
                candidate.import_from_location()
                names.update(candidate.module_dict)
    return tuple(sorted(names))


def _wrong_argument(error: BaseException) -> str | None:
    """A key of a config that its class does not take."""
    found = re.search(
        r'(?:(\w+)\.)?__init__\(\) (got an unexpected keyword argument|missing \d+ required) ?(.*)', str(error)
    )
    if not isinstance(error, TypeError) or not found:
        return None
    owner, _, rest = found.groups()
    if 'unexpected' in found.group(2):
        hint = did_you_mean(rest.strip("'"), _parameters_of(owner, error))
        return f'type={owner!r} in the config does not take the key {rest}{hint}'
    return f'type={owner!r} in the config lacks {rest}'


def _parameters_of(name: str | None, error: BaseException) -> list[str]:
    """What the class takes that was being built when the exception was raised: a local variable of some caller."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for built in frame.f_locals.values():
            if isinstance(built, type) and built.__name__ == name:
                return list(inspect.signature(built).parameters)
    return []


def _download_failed(error: BaseException) -> str | None:
    from urllib.error import URLError

    broken_off = isinstance(error, (ConnectionError, TimeoutError)) and _came_through(error, 'urllib/request.py')
    if not isinstance(error, URLError) and not broken_off:
        return None
    return (
        f'a download failed ({error}). Pretrained weights come from the network the first time: connect once, or '
        'give a local file (--cfg-options model.backbone.init_cfg.checkpoint=FILE), or start from random weights '
        '(--cfg-options model.backbone.init_cfg=None).'
    )


def _channels_that_do_not_fit(error: BaseException) -> str | None:
    """Neighbours in a detector's config that do not fit each other."""
    found = re.search(
        r'weight of size \[.*?\], expected input\[.*?\] to have (\d+) channels, but got (\d+) channels', str(error)
    )
    if not isinstance(error, RuntimeError) or not found:
        return None
    expected, given = found.groups()
    return (
        f'a convolution that takes {expected} channels was given {given}. Most often model.neck.in_channels does not '
        f'say what the backbone returns: set it to the channels of its outputs, level by level ({error})'
    )


def _compiled_without_bf16(error: BaseException) -> str | None:
    if not isinstance(error, RuntimeError) or 'but found BFloat16' not in str(error):
        return None
    if not _came_through(error, 'mmcv/ops/nms.py', 'mmcv/ops/roi_align.py'):
        return None
    return (
        'the compiled operators of this mmcv take no bf16: train without --amp, or with --amp fp16 on a GPU, or with '
        'mmcv-lite, whose operators cbam_mmdet serves in any dtype'
    )


def _out_of_memory(error: BaseException) -> str | None:
    if not isinstance(error, torch.cuda.OutOfMemoryError):
        return None
    return (
        f'the GPU has no memory left ({str(error).split(". ")[0]}). Lower train_dataloader.batch_size (and the '
        'learning rate with it, --auto-scale-lr), use --amp, or set with_cp=True in the backbone.'
    )


UNUSABLE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE, errno.EEXIST, errno.ENOTDIR, errno.EISDIR,
    errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip


def _unusable_file(error: BaseException) -> str | None:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if not isinstance(error, OSError) or _came_through(error, 'subprocess.py') or not (error.filename or full):
        return None
    name = error.filename or 'a file'
    if error.errno == errno.ENOENT:
        return f'{name} does not exist (any more): check the path, and the disk that holds it'
    if full:
        return (
            f'{name} cannot be written: {os.strerror(error.errno)}. Checkpoints that were saved are intact: make '
            'room, then --resume'
        )
    if error.errno in UNUSABLE:
        return f'{name} cannot be used: {os.strerror(error.errno)}'
    return None


def _came_through(error: BaseException, *files: str) -> bool:
    """Whether an exception was raised in, or below, a source file whose path ends so."""
    return any(frame.f_code.co_filename.endswith(files) for frame, _ in traceback.walk_tb(error.__traceback__))


def _dead_worker(error: BaseException) -> str | None:
    if not is_dead_worker(error):
        return None
    reason = re.search(r'is killed by signal: (.*?)\.', f'{error} {error.__cause__}')
    return (
        f'a process that loads images has died ({reason.group(1) if reason else "it ended by itself"}). Most often '
        'the machine, or its /dev/shm, has no memory left: lower train_dataloader.num_workers or batch_size. '
        '--resume continues from the last checkpoint.'
    )


def _sync_bn_on_cpu(error: BaseException) -> str | None:
    # DDP's words, and those of the layer itself.
    found = re.search(r'SyncBatchNorm (layers only work with GPU|expected input tensor to be on GPU)', str(error))
    if not isinstance(error, ValueError) or not found:
        return None
    return "SyncBN needs a GPU: on CPUs leave out sync_bn and norm_cfg=dict(type='SyncBN'), or train in one process"
