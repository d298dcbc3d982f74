"""Files that are complete or absent, whatever kills the process."""

from __future__ import annotations

import os
from pathlib import Path

from mmengine.fileio import LocalBackend


class AtomicLocalBackend(LocalBackend):
    """MMEngine's way to the disk, by which it writes checkpoints: beside their place, then moved there when they are on the disk.

    A process that is killed at any moment, or a disk that is full, leaves what was there before.
    """

    def put(self, obj: bytes, filepath: str | Path) -> None:
        path = Path(filepath)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f'.{path.name}.{os.getpid()}.unfinished')
        try:
            with unfinished.open('wb') as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except BaseException as error:
            unfinished.unlink(missing_ok=True)
            if isinstance(error, OSError):
                error.filename = error.filename or str(path)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too
        finally:
            os.close(folder)


def remove_unfinished(work_dir: str) -> None:
    """Remove what a killed process left half written in a folder."""
    for path in Path(work_dir).glob('.*.unfinished'):
        path.unlink(missing_ok=True)
