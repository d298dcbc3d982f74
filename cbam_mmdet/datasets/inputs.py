"""Image files, folders of images, and videos, as people give them to a tool."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from mmengine.logging import print_log

from cbam_mmdet.errors import UserError

IMAGES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.ppm')  # the suffixes, everywhere in the package
MOST_LINKS = 8  # to one folder, that are followed
VIDEOS = ('.mp4', '.avi', '.mov', '.mkv', '.webm', '.mpg', '.mpeg')


def expand_to_images(inputs: Iterable[str]) -> list[Path]:
    """The images among files and folders, for tools that take no videos.

    Raises:
        UserError: if an input does not exist, or if there is no image among them.
    """
    files = [file for source in inputs for file in expand_inputs(source)]
    images = [file for file in files if file.suffix.lower() not in VIDEOS]
    if not images:
        raise UserError(f'{", ".join(map(str, inputs))}: no image among them, only videos')
    return images


def expand_inputs(given: str | Path) -> list[Path]:
    """A file as it is, or the sorted images and videos in a folder and below it.

    Raises:
        UserError: if the source does not exist, or is a folder without images and videos.
    """
    if not str(given).strip():
        raise UserError('an input is empty: give image files, folders or videos')
    source = Path(given)
    if source.is_dir():
        files = [path for path in files_below(source, unreadable=_skip) if path.suffix.lower() in IMAGES + VIDEOS]
        if not files:
            raise UserError(f'folder {source} holds no image and no video ({", ".join(IMAGES + VIDEOS)})')
        return files
    if not source.exists():
        raise UserError(f'input {source} does not exist: give image files, folders or videos')
    return [source]


def keep_inputs(files: Iterable[Path], pictures: Iterable[Path]) -> None:
    """Refuse to write a picture over one of the files that are read.

    Raises:
        UserError: if one would be.
    """
    given = {file.resolve() for file in files}
    for picture in pictures:
        if picture.resolve() in given:
            raise UserError(f'a picture would replace the input {picture}: give another --out-dir')


def files_below(root: Path, unreadable: Callable[[OSError], None] | None = None) -> list[Path]:
    """What is below a folder, but folders, sorted. Links to folders are followed, but not in a circle.

    Hidden files and folders are left out.

    Raises:
        UserError: for a folder that cannot be read.
    """
    found: list[Path] = []
    real_parents: dict[str, tuple[str, ...]] = {}  # of each folder: the real paths of those around it, and its own
    visits: Counter[str] = Counter()
    try:
        for folder, folders, names in os.walk(root, followlinks=True, onerror=unreadable or _refuse):
            real, around = os.path.realpath(folder), real_parents.get(os.path.dirname(folder), ())
            visits[real] += 1
            if real in around or visits[real] > MOST_LINKS:
                folders.clear()
                continue
            real_parents[folder] = (*around, real)
            folders[:] = sorted(name for name in folders if not name.startswith('.'))
            found += [Path(folder, name) for name in names if not name.startswith('.')]
    except OSError as error:
        raise UserError(f'{error.filename}: cannot be read ({error.strerror})') from error
    return sorted(found)


def _skip(error: OSError) -> None:
    print_log(
        f'{error.filename}: skipped, it cannot be read ({error.strerror})', logger='current', level=logging.WARNING
    )


def _refuse(error: OSError) -> None:
    raise error


def unique_names(files: list[Path]) -> list[str]:
    """A name for each file's picture: the file's stem, with a number behind it where several files share it."""
    names: dict[str, None] = {}
    for file in files:
        name, i = file.stem, 1
        while name in names:
            i += 1
            name = f'{file.stem}_{i}'
        names[name] = None
    return list(names)
