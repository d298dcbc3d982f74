"""LabelMe's JSON files, one an image (https://github.com/wkentaro/labelme)."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from cbam_mmdet.datasets.formats.content import (
    Found,
    LabelledImage,
    by_split,
    class_name,
    displayed_size,
    left_out,
    size_from,
    take_strays,
)
from cbam_mmdet.datasets.formats.folder import Folder, split_of
from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.text import abridge, brief

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
    images, lost, misnamed, others, parts = [], [], [], Counter(), 0
    for path, content in contents.items():
        try:
            named = content['imagePath']
            if not isinstance(named, str):
                raise ValueError(f'imagePath is {named!r}')
            split = split_of(path.relative_to(folder.root).as_posix())
            name, is_another = folder.find_own_image(named, path, split)
            if name is None:
                lost.append(path)
                continue
            width, height = content.get('imageWidth'), content.get('imageHeight')
            size = size_from(width, height) if width and height else displayed_size(folder.root / name)
            if is_another:
                misnamed.append(f'{path.name} names {named}')
            shapes = [(_corners(shape), shape) for shape in content['shapes']]
            others.update(_kind(shape) for corners, shape in shapes if not corners)
            objects, joined = _objects([(corners, shape) for corners, shape in shapes if corners])
            parts += joined
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(
                f"annotation file {path} is not in LabelMe's format ({type(error).__name__}: {brief(error)})."
            ) from error
        images.append(LabelledImage(name, size, objects, path, source_split=split))
    lost += take_strays(images)
    if not images:
        raise UserError(f"{folder.root}: no image that LabelMe's files name is there ({folder.counts()})")
    classes = sorted({label for image in images for label, _, _ in image.objects})
    found = Found(STYLE, by_split(images, classes, split_of), [*contents])
    if lost:
        found.notes.append(f'{len(lost)} files are left out, whose image is not there: the first is {lost[0]}')
    if misnamed:
        found.notes.append(
            f'{len(misnamed)} .json name another image than that of their own name, which is taken: '
            f'{abridge(misnamed, 3)}'
        )
    if others:
        found.notes.append(left_out(others))
    if parts:
        found.notes.append(f'{parts} shapes are parts of others, of their label and group_id: one box is around all')
    without = len(folder.images) - len(images)
    if without:
        found.notes.append(f'{without} images without a .json are left out')
    return found


def _objects(shapes: list[tuple[Sequence[float], dict]]) -> tuple[list[tuple[str, Sequence[float], bool]], int]:
    """The objects that these boxes and shapes are, and how many shapes are further parts of one.

    Shapes of any kind that have a label and a group_id in common are one, as for LabelMe's own labelme2coco.py.
    """
    boxes: dict[tuple, list[Sequence[float]]] = defaultdict(list)
    for i, (corners, shape) in enumerate(shapes):
        group = shape.get('group_id')
        boxes[class_name(shape['label']), f'alone {i}' if group in (None, '') else f'group {group}'].append(corners)
    objects = [(label, _around(parts), False) for (label, _), parts in boxes.items()]
    return objects, len(shapes) - len(objects)


def _around(boxes: list[Sequence[float]]) -> Sequence[float]:
    x1, y1, x2, y2 = zip(*boxes, strict=True)
    return min(x1), min(y1), max(x2), max(y2)


def _kind(shape: dict) -> str:
    return str(shape.get('shape_type') or 'polygon')


def _corners(shape: dict) -> Sequence[float] | None:
    """The box x1, y1, x2, y2 around a shape, or None for a shape without area."""
    points = [(float(x), float(y)) for x, y in shape['points']]
    kind = _kind(shape)
    if kind == 'circle':  # its centre, and a point on it
        (x, y), edge = points
        radius = math.dist((x, y), edge)
        return x - radius, y - radius, x + radius, y + radius
    if kind not in ('rectangle', 'oriented_rectangle', 'polygon', 'mask', 'rotation') or len(points) < 2:
        return None
    xs, ys = zip(*points, strict=True)
    return min(xs), min(ys), max(xs), max(ys)
