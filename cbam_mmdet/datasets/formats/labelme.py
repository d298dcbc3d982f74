"""LabelMe's JSON files, one an image (https://github.com/wkentaro/labelme)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from cbam_mmdet.datasets.formats.content import (
    Found,
    LabelledImage,
    by_split,
    class_name,
    displayed_size,
    size_from,
    take_strays,
)
from cbam_mmdet.datasets.formats.folder import Folder, split_of
from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.text import brief

STYLE = 'LabelMe'


def is_labelme(content: object) -> bool:
    return isinstance(content, dict) and 'shapes' in content and 'imagePath' in content


def read_labelme(folder: Folder, contents: dict[Path, dict]) -> Found:
    """Read LabelMe's files: rectangles, and the boxes around polygons and circles.

    Args:
        folder: the folder.
        contents: its JSON files in this format, each with its content.

    Raises:
        UserError: for a malformed file, or if no image is there.
    """
    images, lost, others = [], [], 0
    for path, content in contents.items():
        try:
            named = content['imagePath']
            if not isinstance(named, str):
                raise ValueError(f'imagePath is {named!r}')
            split = split_of(path.relative_to(folder.root).as_posix())
            name = folder.find_image(named, path, split) or folder.find_image(path.stem, path, split)
            if name is None:
                lost.append(path)
                continue
            width, height = content.get('imageWidth'), content.get('imageHeight')
            size = size_from(width, height) if width and height else displayed_size(folder.root / name)
            shapes = [(_corners(shape), shape) for shape in content['shapes']]
            objects = [(class_name(shape['label']), corners, False) for corners, shape in shapes if corners]
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(
                f"annotation file {path} is not in LabelMe's format ({type(error).__name__}: {brief(error)})."
            ) from error
        others += len(shapes) - len(objects)
        images.append(LabelledImage(name, size, objects, path, source_split=split))
    lost += take_strays(images)
    if not images:
        raise UserError(f"{folder.root}: no image that LabelMe's files name is there ({folder.counts()})")
    classes = sorted({label for image in images for label, _, _ in image.objects})
    found = Found(STYLE, by_split(images, classes, split_of), [*contents])
    if lost:
        found.notes.append(f'{len(lost)} files are left out, whose image is not there: the first is {lost[0]}')
    if others:
        found.notes.append(f'{others} points, lines and other shapes without area are left out')
    without = len(folder.images) - len(images)
    if without:
        found.notes.append(f'{without} images without a .json are left out')
    return found


def _corners(shape: dict) -> Sequence[float] | None:
    """The box x1, y1, x2, y2 around a shape, or None for a shape without area."""
    points = [(float(x), float(y)) for x, y in shape['points']]
    kind = shape.get('shape_type') or 'polygon'
    if kind == 'circle':  # its centre, and a point on it
        (x, y), edge = points
        radius = math.dist((x, y), edge)
        return x - radius, y - radius, x + radius, y + radius
    if kind not in ('rectangle', 'polygon', 'mask', 'rotation') or len(points) < 2:
        return None
    xs, ys = zip(*points, strict=True)
    return min(xs), min(ys), max(xs), max(ys)
