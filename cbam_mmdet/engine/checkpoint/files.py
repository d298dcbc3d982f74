"""Find checkpoint files, the newest intact one among them, and write them atomically."""

from __future__ import annotations

import io
import logging
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from mmengine.logging import print_log
from mmengine.runner import find_latest_checkpoint

from cbam_mmdet.engine.checkpoint.content import run_state_lacking
from cbam_mmdet.engine.checkpoint.loading import load_checkpoint
from cbam_mmdet.errors import UserError, did_you_mean
from cbam_mmdet.utils.files import AtomicLocalBackend


def find_checkpoint(path: str, onnx: bool = False) -> str:
    """Find a checkpoint, and check the first and last bytes of its file before data and models are loaded.

    Args:
        path: a file, or a work dir, which stands for the newest checkpoint in it. MMEngine handles URLs and
            'torchvision://' names.
        onnx: an ONNX file will do, too. It is told by its name.

    Returns:
        The file's path, or the URL or name as it was given.

    Raises:
        UserError: if the file does not exist, is cut off, or is no checkpoint.
    """
    if '://' in path:
        return path
    if os.path.isdir(path):
        newest = _latest(path)
        inside = os.path.join(path, os.path.basename(newest or ''))
        if os.path.isfile(inside):  # the folder may have been moved or copied
            newest = inside
        elif newest and any(Path(path).glob('*.pth')):  # another folder's, whose copy this one is
            newest = newest_checkpoint(path)[0]
        if not newest or not os.path.isfile(newest):  # the process was killed while it was written
            newest, skipped = newest_checkpoint(path)
            for reason in skipped:
                print_log(f'skipped: {reason}', logger='current', level=logging.WARNING)
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
    if is_onnx(path):
        if onnx:
            return path
        raise UserError(f'{path} is an ONNX file: give a checkpoint. tools/test.py and tools/infer.py run ONNX files.')
    with open(path, 'rb') as file:
        head = file.read(2)
    if head == b'PK' and not _is_whole_zip(path):
        raise UserError(f'checkpoint {path} is cut off (a killed job or a full disk?): use an earlier one.')
    if head != b'PK' and not head.startswith(b'\x80'):  # zip, and the pickle of torch before 1.6
        raise UserError(f'{path} is not a checkpoint of PyTorch.')
    return path


def _latest(folder: str) -> str | None:
    """What the file last_checkpoint of a folder says, whatever that is worth."""
    try:
        return find_latest_checkpoint(folder)
    except (OSError, UnicodeDecodeError):  # it is no file, or no text
        return None


def is_onnx(path: str) -> bool:
    """Whether a file is an ONNX file by its name."""
    return path.endswith('.onnx')


def _is_whole_zip(path: str) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # its directory is damaged
        return False


def newest_checkpoint(
    *folders: str, trust: bool = False, templates: Sequence[str] = ('epoch_{}.pth', 'iter_{}.pth')
) -> tuple[str | None, list[str]]:
    """The newest checkpoint of a training run from which the run can resume.

    This is the one that the file last_checkpoint names, or a later one with more iterations, which exists after a kill
    between the two writes. If that file is missing or names a checkpoint that does not load, it is the one that was
    written last.

    Args:
        folders: the folders that may hold the run's checkpoints.
        trust: load them by full unpickling (see load_checkpoint).
        templates: the templates of their names.

    Returns:
        The path, or None if there is none, and the reason for each skipped checkpoint that was newer or was named.
    """
    names = re.compile('|'.join(re.escape(template).replace(r'\{\}', r'\d+') for template in templates))
    files = [path for folder in folders for path in Path(folder).glob('*') if names.fullmatch(path.name)]
    files.sort(key=lambda path: (path.stat().st_mtime_ns, int(re.findall(r'\d+', path.name)[-1])), reverse=True)
    named = _named_by_last_checkpoint(folders)
    later = files[: files.index(named)] if named in files else []
    skipped: list[str] = []
    if named in files:
        done = {path: _iterations(path, trust, skipped) for path in [*later, named]}
        if done[named] is not None:
            counts = {path: count for path, count in done.items() if count is not None}
            return str(max(counts, key=lambda path: counts[path])), skipped
        files = [path for path in files if path != named]
        skipped.clear()
        _iterations(named, trust, skipped)
    for path in files:
        if _iterations(path, trust, skipped) is not None:
            return str(path), skipped
    return None, skipped


def _named_by_last_checkpoint(folders: Sequence[str]) -> Path | None:
    for folder in folders:
        try:
            name = Path(folder, 'last_checkpoint').read_text().strip()
        except (OSError, UnicodeDecodeError):
            continue
        for place in folders:
            if name and Path(place, os.path.basename(name)).is_file():
                return Path(place, os.path.basename(name))
    return None


def _iterations(path: Path, trust: bool, skipped: list[str]) -> int | None:
    """The number of iterations in a checkpoint. None if a run cannot resume from it, with the reason in `skipped`."""
    try:
        checkpoint = load_checkpoint(find_checkpoint(str(path)), 'cpu', trust)
    except UserError as error:
        skipped.append(str(error))
        return None
    lacking = run_state_lacking(checkpoint)
    if lacking:
        skipped.append(f'checkpoint {path} lacks the state of the run ({", ".join(lacking)})')
        return None
    return checkpoint['meta'].get('iter', 0)


def write_checkpoint(content: Mapping, path: str | Path) -> None:
    """Write a checkpoint completely or not at all, even if the process is killed."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    AtomicLocalBackend().put(buffer.getvalue(), path)
