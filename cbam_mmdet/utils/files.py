"""Files that are written completely or not at all, even if the process is killed."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from mmengine.fileio import LocalBackend

START = 2**14  # bytes, in which two compressed photographs differ
Group = TypeVar('Group', bound=Hashable)


class AtomicLocalBackend(LocalBackend):
    """A file backend for MMEngine that writes checkpoints and other files atomically.

    It writes a file under another name, waits until it is on the disk, and then renames it. If the process is killed at
    any moment, or the disk is full, the earlier file stays intact.
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
            os.fsync(folder)  # so that the new name is on the disk, too
        finally:
            os.close(folder)


def write_by_content(folder: str | Path, files: dict[str, bytes]) -> Path:
    """Write files into FOLDER/HASH/, by a hash of their names and content, unless they are there with this content.

    So files with other content never take their place. One that was changed by hand is written anew.

    Returns:
        The absolute path of FOLDER/HASH.
    """
    digest = hashlib.sha256(b''.join(name.encode() + content for name, content in sorted(files.items()))).hexdigest()
    target = Path(folder, digest[:12]).absolute()
    for name, content in files.items():
        path = target / name
        if not path.is_file() or path.read_bytes() != content:
            AtomicLocalBackend().put(content, path)
    return target


def copies(groups: Mapping[Group, Iterable[str]]) -> list[tuple[tuple[Group, str], tuple[Group, str]]]:
    """The files that are in two groups: the same path, or another file that is the same byte for byte.

    Of most files only the size is read, of those of one size the first bytes. Files that cannot be read are left out.

    Args:
        groups: the paths of each group's files, by the group's name.

    Returns:
        For each file that an earlier group has, too: (its group, its path), and the same of the first such file.
    """
    if sum(map(bool, groups.values())) < 2:
        return []
    made: list[tuple[tuple[Group, str], tuple[Group, str]]] = []
    first: dict[str, Group] = {}
    for group, paths in groups.items():
        for path in dict.fromkeys(paths):
            if first.setdefault(path, group) != group:
                made.append(((group, path), (first[path], path)))
    items = [(group, path) for path, group in first.items()]
    for same_size in _across(items, os.path.getsize):
        for same_start in _across(same_size, lambda path: _digest(path, START)):
            for same in _across(same_start, _digest):
                made += [(item, same[0]) for item in same[1:] if item[0] != same[0][0]]
    return made


def _across(items: list[tuple[Group, str]], key: Callable[[str], object]) -> list[list[tuple[Group, str]]]:
    """The items (group, path) of equal keys of their paths, where they are of several groups."""
    alike: dict[object, list[tuple[Group, str]]] = defaultdict(list)
    for item in items:
        with contextlib.suppress(OSError):
            alike[key(item[1])].append(item)
    return [found for found in alike.values() if len({group for group, _ in found}) > 1]


def _digest(path: str, count: int = -1) -> bytes:
    with open(path, 'rb') as file:
        return hashlib.sha256(file.read(count)).digest()


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8 completely or not at all. Its folder is made where it is missing.

    What UTF-8 cannot hold, such as a file's name in another encoding, is written as an escape.

    Raises:
        OSError: with the file's name.
    """
    AtomicLocalBackend().put(text.encode(errors='backslashreplace'), path)


def remove_unfinished(work_dir: str) -> None:
    """Remove the unfinished files of a killed process from a folder."""
    for path in Path(work_dir).glob('.*.unfinished'):
        path.unlink(missing_ok=True)
