"""CVAT's own format for images (https://docs.cvat.ai/docs/manual/advanced/formats/format-cvat/)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

from cbam_mmdet.datasets.formats.content import (
    Found,
    LabelledImage,
    around_turned,
    by_split,
    class_name,
    left_out,
    size_from,
)
from cbam_mmdet.datasets.formats.folder import SPLIT_NAMES, Folder, split_of, split_of_file
from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.text import brief

STYLE = 'CVAT'


def read_cvat(folder: Folder, roots: dict[Path, ET.Element]) -> Found:
    """Read CVAT's XML files: boxes, turned ones by the box around them, and polygons likewise.

    Args:
        folder: the folder.
        roots: its XML files in this format, each with its root.

    Raises:
        UserError: for a malformed file, for a video's tracks, or if no image is there.
    """
    images, labels, lost, others = [], {}, 0, Counter()
    for path, root in roots.items():
        if root.find('track') is not None:
            raise UserError(
                f"{path} holds the tracks of a video: export the task from CVAT as 'CVAT for images', with its images"
            )
        of_file = split_of_file(path.relative_to(folder.root).as_posix())
        try:
            labels |= dict.fromkeys(class_name(item.text) for item in root.iterfind('meta//labels/label/name'))
            for node in root.iterfind('image'):
                named, subset = node.get('name') or '', (node.get('subset') or '').lower()
                split = SPLIT_NAMES.get(subset)
                name = folder.find_image(named, path, split)
                if name is None:
                    lost += 1
                    continue
                size = size_from(node.get('width'), node.get('height'))
                shapes = [(_corners(shape), shape) for shape in node if shape.tag != 'tag']
                objects = [(class_name(s.get('label')), corners, False) for corners, s in shapes if corners]
                others.update(s.tag for corners, s in shapes if not corners)
                images.append(LabelledImage(name, size, objects, path, split, of_file))
        except UserError:
            raise
        except (TypeError, ValueError) as error:
            raise UserError(f"annotation file {path} is not in CVAT's format: {brief(error)}.") from error
    if not images:
        raise UserError(f"{folder.root}: no image that CVAT's file names is there ({folder.counts()})")
    used = {label: None for image in images for label, _, _ in image.objects}
    classes = [*labels, *sorted(used.keys() - labels.keys())]
    found = Found(STYLE, by_split(images, classes, split_of), [*roots])
    if lost:
        found.notes.append(f'{lost} annotated images are not there: left out')
    if others:
        found.notes.append(left_out(others))
    return found


def _corners(shape: ET.Element) -> Sequence[float] | None:
    """The box x1, y1, x2, y2 around a shape, or None for a shape without area."""
    if shape.tag == 'box':
        x1, y1, x2, y2 = (float(shape.get(key, '')) for key in ('xtl', 'ytl', 'xbr', 'ybr'))
        return around_turned((x1, y1, x2, y2), float(shape.get('rotation', 0)))
    if shape.tag == 'mask':
        x, y, width, height = (float(shape.get(key, '')) for key in ('left', 'top', 'width', 'height'))
        return x, y, x + width, y + height
    if shape.tag == 'cuboid':  # eight corners
        corners = {key: float(value) for key, value in shape.items() if re.fullmatch('[xy][tb][lr][12]', key)}
        xs, ys = ([value for key, value in corners.items() if key[0] == axis] for axis in 'xy')
        return min(xs), min(ys), max(xs), max(ys)
    if shape.tag == 'ellipse':
        x, y, rx, ry = (float(shape.get(key, '')) for key in ('cx', 'cy', 'rx', 'ry'))
        angle = math.radians(float(shape.get('rotation', 0)))
        half_width = math.hypot(rx * math.cos(angle), ry * math.sin(angle))
        half_height = math.hypot(rx * math.sin(angle), ry * math.cos(angle))
        return x - half_width, y - half_height, x + half_width, y + half_height
    if shape.tag == 'polygon':
        points = [tuple(map(float, point.split(','))) for point in (shape.get('points') or '').split(';')]
        if any(len(point) != 2 for point in points):
            raise ValueError('a point of a polygon is not x,y')
        xs, ys = zip(*points, strict=True)
        return min(xs), min(ys), max(xs), max(ys)
    return None
