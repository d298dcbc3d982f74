"""A lock on a folder that one process at a time holds, and that the kernel frees when the process dies."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path

from cbam_mmdet.errors import UserError

NAME = '.lock'


@contextlib.contextmanager
def locked(folder: str | Path, advice: str) -> Iterator[None]:
    """Hold a folder's lock.

    It is a record lock (fcntl), which belongs to this process alone: a worker process that outlives it does not hold
    it. A file system without such locks gets a warning.

    Args:
        folder: it must exist.
        advice: what to do where another process holds the lock, for the message.

    Raises:
        UserError: if another process holds it, which the message names, or if the file of the lock is a link.
    """
    path = Path(folder, NAME)
    file = _open_locked(path, advice)
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, f'process {os.getpid()} on {platform.node()}'.encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def open_lock(path: Path) -> int:
    """Open a file to lock, which is created if it is not there, and is not emptied.

    Raises:
        UserError: for a link: locking would write into the file that it leads to.
    """
    if path.is_symlink():
        raise UserError(f'{path} is a symbolic link, and would be written to: remove it')
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)


def _open_locked(path: Path, advice: str) -> int:
    while True:
        file = open_lock(path)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(file, 200, 0).decode(errors='replace') or 'another process'
            os.close(file)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(f'{path.parent} is in use by {holder}: {advice}') from error
            message = f'{path.parent} cannot be locked ({error.strerror}): see that nothing else writes there'
            warnings.warn(message, stacklevel=4)
            return open_lock(path)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        os.close(file)  # the last holder has removed this file
