"""One HTML page of a data set: what it holds, and pictures with their boxes."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from jinja2 import Environment, PackageLoader
from mmdet.visualization.palette import get_palette

from cbam_mmdet.datasets.checks import size_of
from cbam_mmdet.datasets.formats.content import Found
from cbam_mmdet.datasets.transforms.loading import read_image
from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.files import write_text
from cbam_mmdet.utils.tables import Column, Table
from cbam_mmdet.utils.text import abridge
from cbam_mmdet.version import __version__
from cbam_mmdet.visualization.report.encoding import jpeg_uri

WIDTH = 480  # of a picture, in pixels


@dataclass(frozen=True)
class Picture:
    """A picture of the page: its place, and the picture with its boxes as a data URI."""

    split: str
    name: str
    objects: str
    uri: str


def write_data_page(found: Found, root: str | Path, out: str | Path, num_images: int = 24) -> list[Table]:
    """Write the page.

    Args:
        found: what a folder holds. A note on pictures of another size is added.
        root: the folder.
        out: the .html.
        num_images: how many pictures; evenly chosen from the splits, from each the ones with most boxes and others in
            turn.

    Returns:
        The tables of the page: by split, and by class.

    Raises:
        UserError: for malformed annotations.
    """
    root, splits = Path(root), found.distinct()
    resized: list[str] = []
    try:
        tables = [_by_split(splits), _by_class(splits)]
        each = -(-num_images // len(splits))
        shown = [_pictures(split, content, root, each, resized) for split, content in splits.items()]
        pictures = [*itertools.chain(*shown)][:num_images]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f'the annotations in {root} are malformed ({type(error).__name__}: {error})') from error
    found.notes += _resized_note(resized)
    environment = Environment(loader=PackageLoader('cbam_mmdet.visualization', '.'), autoescape=True)
    page = environment.get_template('data_page.html').render(
        root=str(root),
        style=found.style,
        notes=found.notes,
        tables=tables,
        pictures=pictures,
        version=__version__,
    )
    write_text(out, page)
    return tables


def _resized_note(names: list[str]) -> list[str]:
    if not names:
        return []
    return [
        f'{len(names)} of the pictures have another size than their annotation says, so their boxes lie elsewhere, and '
        f'training will refuse them: {abridge(names, 3)}'
    ]


def _by_split(splits: dict[str, dict]) -> Table:
    rows = []
    for split, content in splits.items():
        boxes, sizes = Counter(a['image_id'] for a in content['annotations']), Counter()
        usable = 0
        for annotation in content['annotations']:
            width, height = annotation['bbox'][2:]
            if width >= 1 and height >= 1:
                usable += 1
                sizes[size_of(width * height)] += 1
        images = content['images']
        without = sum(image['id'] not in boxes for image in images)
        counts = (sizes['small'], sizes['medium'], sizes['large'])
        rows.append([split, len(images), without, len(content['annotations']), *counts, sum(boxes.values()) - usable])
    header = ['split', 'images', 'without boxes', 'boxes', 'small', 'medium', 'large', 'below 1 pixel']
    return Table(header, rows, 'splits', "Images and boxes by COCO's sizes: below 32 x 32 and 96 x 96 pixels")


def _by_class(splits: dict[str, dict]) -> Table:
    counts: dict[str, dict[str, int]] = defaultdict(dict)
    for split, content in splits.items():
        names = {category['id']: category['name'] for category in content['categories']}
        counted = Counter(names[a['category_id']] for a in content['annotations'])
        for name in names.values():
            counts[name][split] = counted[name]
    rows = [[name, *(by_split.get(split, 0) for split in splits)] for name, by_split in counts.items()]
    return Table([Column('class'), *splits], rows, 'classes', 'Boxes by class, in the order that numbers the classes')


def _pictures(split: str, content: dict, root: Path, count: int, resized: list[str]) -> list[Picture]:
    objects = defaultdict(list)
    names = [category['name'] for category in content['categories']]
    index = {category['id']: i for i, category in enumerate(content['categories'])}
    for annotation in content['annotations']:
        objects[annotation['image_id']].append((index[annotation['category_id']], annotation['bbox']))
    by_boxes = sorted(content['images'], key=lambda image: -len(objects[image['id']]))
    step = max(1, len(by_boxes) // count)
    pictures = []
    for image in by_boxes[::step][:count]:
        found = objects[image['id']]
        counted = Counter(names[label] for label, _ in found)
        words = ', '.join(f'{number} {name}' for name, number in counted.items()) or 'no box'
        size = image['height'], image['width']
        pixels = read_image(str(root / image['file_name']), size=size)
        if pixels.shape[:2] != size:
            resized.append(image['file_name'])
        uri = jpeg_uri(_drawn(pixels, image, found, len(names)), WIDTH)
        pictures.append(Picture(split, image['file_name'], words, uri))
    return pictures


def _drawn(pixels: np.ndarray, image: dict, objects: list[tuple[int, list[float]]], num_classes: int) -> np.ndarray:
    """The picture, as wide as on the page, with a frame for each box in the colour of its class."""
    scale = WIDTH / image['width']
    canvas = cv2.resize(pixels, (WIDTH, max(1, round(image['height'] * scale))))
    colours = get_palette('random', max(num_classes, 1))
    for label, (x, y, width, height) in objects:
        corners = [round(value * scale) for value in (x, y, x + width, y + height)]
        cv2.rectangle(canvas, tuple(corners[:2]), tuple(corners[2:]), tuple(map(int, colours[label])), 2)
    return canvas
