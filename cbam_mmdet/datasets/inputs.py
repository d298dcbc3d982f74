"""Image files, folders of images, and videos, as people give them to a tool."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cbam_mmdet.errors import UserError

IMAGES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.ppm')  # the suffixes, everywhere in the package
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
        files = sorted(p for p in source.rglob('*') if p.suffix.lower() in IMAGES + VIDEOS)
        if not files:
            raise UserError(f'folder {source} holds no image and no video ({", ".join(IMAGES + VIDEOS)})')
        return files
    if not source.exists():
        raise UserError(f'input {source} does not exist: give image files, folders or videos')
    return [source]


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
