"""Shapes: a small detection data set that the package draws by itself.

Circles, squares, triangles, stars, rings and crosses of any colour, orientation and size lie over a textured background
and partly cover each other. Nothing is downloaded: :func:`ensure_shapes` draws the pictures in seconds and writes them
in the layout of COCO or of Pascal VOC, so that a detector can be trained from scratch at once.

What is annotated:

- Boxes, areas and masks cover the *visible* pixels, as in COCO. No shape hides more than ``MAX_OCCLUDED`` of another
  one, so every shape in a picture is annotated, and a good part of it is visible.
- Pascal VOC's ``difficult`` marks shapes that are hidden by more than ``DIFFICULT_OCCLUDED``. Its ``truncated`` marks
  those that the edge of the picture cuts. COCO has neither flag, so all shapes count alike there.

Picture ``k`` of a split depends on ``(seed, split, k)`` alone, not on the number of pictures. Pixels and annotations
are the same on every machine: the drawing consists of sums, products, quotients and square roots of arrays, which
IEEE 754 defines to the last bit. Values from the C library (sines, powers) are rounded first, see :func:`_snap`. The
files are JPEG of high quality with unreduced colour, because MMDetection's VOC data set reads JPEG only. Another
version of the codec may change their pixels slightly.
"""

from __future__ import annotations

import colorsys
import json
import math
import operator
import os
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

CLASSES = ('circle', 'square', 'triangle', 'star', 'ring', 'cross')
# Colours (RGB) for drawing boxes. The shapes themselves have random colours, which do not depend on the class.
PALETTE = [(230, 60, 70), (60, 120, 230), (50, 180, 90), (245, 190, 40), (170, 80, 210), (30, 190, 200)]
METAINFO = dict(classes=CLASSES, palette=PALETTE)

SPLITS = ('train', 'val')
STYLES = ('coco', 'voc')
VOC_SPLITS = dict(train='trainval', val='test')

MAX_OBJECTS = 6
SIZE_RANGE = (0.15, 0.6)  # diameter of a shape's circumscribed circle, as a share of the picture's side
MAX_OCCLUDED = 0.6
DIFFICULT_OCCLUDED = 0.4

# It is part of the stamp: raise it whenever the drawing changes, so that sets from older code are drawn again.
DRAWING_VERSION = 1
STAMP = 'shapes.json'


@dataclass(frozen=True)
class ShapeObject:
    """The visible part of one shape in a picture.

    Attributes:
        category: One of ``CLASSES``.
        bbox: ``(x1, y1, x2, y2)`` of the visible pixels. x2 and y2 lie one past the last pixel: the width is x2 - x1.
        area: Number of visible pixels.
        occluded: Share of the whole shape's pixels, 0 to ``MAX_OCCLUDED``, that cannot be seen: covered by other shapes
            or beyond the edge of the picture.
        truncated: Whether a part lies beyond the edge of the picture.
        mask: Visible pixels, bool of shape (size, size).
    """

    category: str
    bbox: tuple[int, int, int, int]
    area: int
    occluded: float
    truncated: bool
    mask: np.ndarray = field(repr=False, compare=False)

    @property
    def difficult(self) -> bool:
        """Whether so much is hidden that Pascal VOC ignores the shape and its detections."""
        return self.occluded > DIFFICULT_OCCLUDED

    @property
    def segmentation(self) -> dict:
        """The mask as COCO's uncompressed RLE: lengths of runs along the columns, the first one outside the mask."""
        column_wise = self.mask.ravel(order='F')
        changes = np.flatnonzero(column_wise[1:] != column_wise[:-1]) + 1
        runs = np.diff(np.concatenate([[0], changes, [column_wise.size]])).tolist()
        return dict(size=list(self.mask.shape), counts=[0, *runs] if column_wise[0] else runs)


Scene = tuple[str, np.ndarray, list[ShapeObject]]  # a picture's name, its pixels and its shapes


def ensure_shapes(
    root: str | os.PathLike,
    num_train: int = 320,
    num_val: int = 100,
    image_size: int = 128,
    seed: int = 0,
    style: str = 'coco',
    progress: bool = True,
) -> Path:
    """Make sure that ``root`` holds a complete data set with these settings. Draw it only if it does not.

    A set that is incomplete or was drawn with other settings is drawn again. ``root`` may hold both styles, and
    ``root/shapes.json`` records what it holds. Several processes may call this at once: each writes complete files with
    the same content.

    Args:
        root: Folder of the data set. It is created if it does not exist.
        num_train: Number of training pictures.
        num_val: Number of validation pictures.
        image_size: Side of the square pictures in pixels.
        seed: The same seed gives the same pictures.
        style: 'coco' for ``root/{train,val}2017/*.jpg`` and ``root/annotations/instances_{train,val}2017.json``, or
            'voc' for ``root/VOC2007``, where train is ``trainval`` and val is ``test``.
        progress: Show a progress bar if the output is a terminal.

    Returns:
        ``root``.

    Raises:
        ValueError: A setting is out of range.
        FileExistsError: ``root`` holds data in the same layout that this module did not write. They stay intact.
        NotADirectoryError: ``root`` is a file.
        OSError: ``root`` cannot be written.
    """
    root = Path(root)
    settings = _check_settings(num_train, num_val, image_size, seed)
    if style not in STYLES:
        raise ValueError(f'style is {style!r}; expected one of {", ".join(STYLES)}')
    if not _is_complete(root, style, settings):
        _write(root, style, settings, progress)
    return root


def _write(root: Path, style: str, settings: dict[str, int], progress: bool) -> None:
    """Draw the data set and write it, in place of one that this module wrote there before."""
    _begin(root, style, settings)
    write_split = _write_coco_split if style == 'coco' else _write_voc_split
    objects = {split: write_split(root, split, _scenes(split, settings, progress)) for split in SPLITS}
    _finish(root, style, settings, objects)


def _write_coco_split(root: Path, split: str, scenes: Iterator[Scene]) -> Counter:
    """Write ``{split}2017/*.jpg`` and ``annotations/instances_{split}2017.json``; count the objects of each class.

    The segmentations are the exact masks, as RLE.
    """
    images, annotations = [], []
    for name, image, shapes in scenes:
        _write_file(root / f'{split}2017/{name}.jpg', _jpeg(image))
        height, width = image.shape[:2]
        images.append(dict(id=len(images) + 1, file_name=f'{name}.jpg', height=height, width=width))
        for shape in shapes:
            x1, y1, x2, y2 = shape.bbox
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=len(images),
                    category_id=CLASSES.index(shape.category) + 1,
                    bbox=[x1, y1, x2 - x1, y2 - y1],
                    area=shape.area,
                    iscrowd=0,
                    segmentation=shape.segmentation,
                )
            )
    categories = [dict(id=i, name=name, supercategory='shape') for i, name in enumerate(CLASSES, start=1)]
    info = dict(description='Shapes, drawn by cbam_mmdet.datasets.shapes', version=str(DRAWING_VERSION))
    content = dict(info=info, licenses=[], images=images, annotations=annotations, categories=categories)
    _write_file(root / f'annotations/instances_{split}2017.json', json.dumps(content).encode())
    return Counter(CLASSES[annotation['category_id'] - 1] for annotation in annotations)


def _write_voc_split(root: Path, split: str, scenes: Iterator[Scene]) -> Counter:
    """Write a split into ``VOC2007/{JPEGImages,Annotations,ImageSets/Main}``; count the objects of each class.

    Coordinates count from 1 and ``xmax``, ``ymax`` are the last pixels inside, as in VOC. The pictures are those of
    COCO's style, byte for byte.
    """
    names, counter = [], Counter()
    for name, image, shapes in scenes:
        _write_file(root / f'VOC2007/JPEGImages/{name}.jpg', _jpeg(image))
        _write_file(root / f'VOC2007/Annotations/{name}.xml', _voc_xml(name, image.shape[0], shapes))
        names.append(name)
        counter.update(shape.category for shape in shapes)
    id_list = ''.join(f'{name}\n' for name in names)
    _write_file(root / f'VOC2007/ImageSets/Main/{VOC_SPLITS[split]}.txt', id_list.encode())
    return counter


def count_objects(root: str | os.PathLike, style: str = 'coco') -> dict[str, dict[str, int]]:
    """The number of objects of each class in each split: ``{'train': {'circle': 201, ...}, ...}``.

    Raises:
        FileNotFoundError: ``root`` holds no complete set of that style.
    """
    entry = _read_stamp(Path(root)).get(style)
    if not entry or not entry.get('complete'):
        raise FileNotFoundError(f"'{root}' holds no complete shapes in the style '{style}'; ensure_shapes makes them")
    return entry['objects']


def draw_image(seed: int, split: str, index: int, image_size: int = 128) -> tuple[np.ndarray, list[ShapeObject]]:
    """Picture ``index`` of a split of the data set, as :func:`draw_scene` returns it."""
    return draw_scene(np.random.default_rng([seed, SPLITS.index(split), index]), image_size)


def draw_scene(rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[ShapeObject]]:
    """Draw one picture: a background, then one to ``MAX_OBJECTS`` shapes, later ones on top of earlier ones.

    Args:
        rng: The generator that makes all random choices.
        size: Side of the picture in pixels.

    Returns:
        The picture, uint8 RGB of shape (size, size, 3), and its shapes from back to front.
    """
    dark = rng.random() < 0.4
    canvas = _draw_background(rng, size, dark)
    # The index of the shape that each pixel belongs to. -1 is the background.
    owner = np.full((size, size), -1)
    stencils: list[_Stencil] = []
    for _ in range(rng.integers(1, MAX_OBJECTS + 1)):
        # A full picture may have no room for a large shape: draw a few candidates, then give up.
        for _ in range(12):
            stencil = _random_stencil(rng, size)
            attempt = owner.copy()
            window, inside = _overlap(attempt, stencil.distance < 0, stencil.left, stencil.top)
            window[inside] = len(stencils)
            if all(_occluded(attempt, k, other) <= MAX_OCCLUDED for k, other in enumerate(stencils)):
                owner = attempt
                stencils.append(stencil)
                _paint(rng, canvas, stencil, dark)
                break
    image = np.rint(np.clip(canvas, 0, 1) * 255).astype(np.uint8)
    return image, [_describe(owner, k, stencil) for k, stencil in enumerate(stencils)]


def _describe(owner: np.ndarray, index: int, stencil: _Stencil) -> ShapeObject:
    """The visible part of shape ``index`` in the finished picture."""
    mask = owner == index
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    _, inside = _overlap(owner, stencil.distance < 0, stencil.left, stencil.top)
    return ShapeObject(
        category=stencil.category,
        bbox=(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1),
        area=int(mask.sum()),
        occluded=_occluded(owner, index, stencil),
        truncated=bool(inside.sum() < stencil.area),
        mask=mask,
    )


def _occluded(owner: np.ndarray, index: int, stencil: _Stencil) -> float:
    return 1 - int((owner == index).sum()) / stencil.area


# Each class is a signed distance: how far a point is outside (> 0) or inside (< 0) of the outline. One such array gives
# the mask, the smooth edge, the rim and the shadow. The circumscribed circle has radius 1 and the centre (0, 0).


def _circle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.sqrt(u * u + v * v) - 0.92


def _ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.abs(np.sqrt(u * u + v * v) - 0.72) - 0.26


def polygon(*vertices: tuple[float, float]) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The signed distance to a simple polygon with slightly rounded corners.

    The nearest point of the outline is the nearest point of all edges. Each edge that a ray from the point towards +v
    crosses changes between inside and outside.
    """

    def distance(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        nearest = np.full_like(u, np.inf)
        inside = np.zeros(u.shape, bool)
        for (u1, v1), (u2, v2) in zip(vertices, vertices[1:] + vertices[:1], strict=True):
            du, dv, pu, pv = u2 - u1, v2 - v1, u - u1, v - v1
            along = np.clip((pu * du + pv * dv) / (du * du + dv * dv), 0, 1)
            qu, qv = pu - along * du, pv - along * dv
            nearest = np.minimum(nearest, qu * qu + qv * qv)
            if du:
                inside ^= ((u < u1) != (u < u2)) & (pv < pu * (dv / du))
        return np.where(inside, -1, 1) * np.sqrt(nearest) - 0.06

    return distance


def _on_circle(count: int, *radii: float) -> list[tuple[float, float]]:
    """``count`` vertices at equal angles, beginning at the top, with the radii in turn."""
    angles = [2 * math.pi * k / count for k in range(count)]
    return [
        (_snap(radii[k % len(radii)] * math.sin(a)), _snap(-radii[k % len(radii)] * math.cos(a)))
        for k, a in enumerate(angles)
    ]


def _snap(value: float) -> float:
    """Round to a multiple of 2^-12, because the last bits of a sine or power differ between C libraries."""
    return round(value * 4096) / 4096


_ARM = 0.24  # half the width of a cross's arm
_DISTANCES = dict(
    circle=_circle,
    square=polygon(*[(u * 0.72, v * 0.72) for u, v in ((-1, -1), (1, -1), (1, 1), (-1, 1))]),
    triangle=polygon(*_on_circle(3, 0.94)),
    star=polygon(*_on_circle(10, 0.94, 0.4)),
    ring=_ring,
    cross=polygon(
        *[(-_ARM, -0.9), (_ARM, -0.9), (_ARM, -_ARM), (0.9, -_ARM), (0.9, _ARM), (_ARM, _ARM)],
        *[(_ARM, 0.9), (-_ARM, 0.9), (-_ARM, _ARM), (-0.9, _ARM), (-0.9, -_ARM), (-_ARM, -_ARM)],
    ),
)


@dataclass(frozen=True)
class _Stencil:
    """A shape at its place, before it is painted.

    ``u`` and ``v`` are the coordinates in the shape's own frame, and ``distance`` is the signed distance in pixels, all
    of shape (h, w). Element [0, 0] lies at pixel (``left``, ``top``), which may be outside of the picture.
    """

    category: str
    left: int
    top: int
    radius: float
    u: np.ndarray
    v: np.ndarray
    distance: np.ndarray

    @property
    def area(self) -> int:
        """The number of pixels of the complete shape, with those that are covered or beyond the edge."""
        return int((self.distance < 0).sum())


def _random_stencil(rng: np.random.Generator, size: int) -> _Stencil:
    category = CLASSES[rng.integers(len(CLASSES))]
    smallest, largest = SIZE_RANGE
    # Log-uniform: as many shapes of 15 to 30 percent of the side as of 30 to 60 percent.
    radius = _snap(size / 2 * smallest * (largest / smallest) ** rng.random())
    # The centre may be so near to the edge that the edge cuts a little of the shape.
    low, high = 0.8 * radius, size - 0.8 * radius
    x0, y0 = _snap(low + (high - low) * rng.random()), _snap(low + (high - low) * rng.random())
    angle = 2 * math.pi * rng.random()
    cos, sin = _snap(math.cos(angle)), _snap(math.sin(angle))

    reach = 1.25 * radius + 2  # room for the shadow's soft edge
    left, top = math.floor(x0 - reach), math.floor(y0 - reach)
    x = np.arange(left, math.ceil(x0 + reach)) + 0.5 - x0
    y = (np.arange(top, math.ceil(y0 + reach)) + 0.5 - y0)[:, None]
    u, v = (cos * x + sin * y) / radius, (cos * y - sin * x) / radius
    return _Stencil(category, left, top, radius, u, v, _DISTANCES[category](u, v) * radius)


def _overlap(picture: np.ndarray, patch: np.ndarray, left: int, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Views of the overlapping parts of both when ``patch`` lies at (``left``, ``top``) of ``picture``."""
    height, width = picture.shape[:2]
    y1, y2 = max(top, 0), min(top + patch.shape[0], height)
    x1, x2 = max(left, 0), min(left + patch.shape[1], width)
    return picture[y1:y2, x1:x2], patch[y1 - top : y2 - top, x1 - left : x2 - left]


def _paint(rng: np.random.Generator, canvas: np.ndarray, stencil: _Stencil, dark: bool) -> None:
    """Paint a shape onto the canvas: a soft shadow, then a bright body with light from the upper left, and a rim."""
    radius, distance, u, v = stencil.radius, stencil.distance, stencil.u, stencil.v
    offset = max(1, round(0.1 * radius))
    under, shadow = _overlap(canvas, distance, stencil.left + offset, stencil.top + offset)
    softness = 0.2 * radius
    under *= 1 - 0.5 * np.clip(0.5 - shadow / softness, 0, 1)[..., None]

    body = _colour(rng.random(), 0.6 + 0.35 * rng.random(), 0.78 + 0.22 * rng.random())
    # A light rim on dark ground and a dark one on light ground: the outline is visible whatever the two colours are.
    rim = 0.8 + 0.2 * body if dark else 0.28 * body
    height, width = distance.shape
    diagonal = (np.arange(width) + np.arange(height)[:, None]) / (height + width)
    light = 1.22 - 0.44 * diagonal
    pattern = rng.integers(4)
    stripes = 1.5 + 1.5 * rng.random()
    if pattern == 0:
        light = light - 0.2 * _soft_step(_wave(stripes * u) - 0.5)
    elif pattern == 1:
        light = light - 0.2 * _soft_step(_wave(stripes * u) * _wave(stripes * v) - 0.35)
    in_rim = np.clip(distance + max(1.2, 0.1 * radius) + 0.5, 0, 1)[..., None]
    colour = body * light[..., None] * (1 - in_rim) + rim * in_rim
    cover = np.clip(0.5 - distance, 0, 1)[..., None]
    below, colour = _overlap(canvas, colour, stencil.left, stencil.top)
    below += _overlap(canvas, cover, stencil.left, stencil.top)[1] * (colour - below)


def _draw_background(rng: np.random.Generator, size: int, dark: bool) -> np.ndarray:
    """A background in dull colours without any of the classes: texture, islands, strokes and grain.

    Returns:
        RGB in 0 to 1, float64 of shape (size, size, 3).
    """

    hue = rng.random()

    def dull_colour() -> np.ndarray:
        # The hues are neighbours, because a background with all hues looks like a stain.
        near = (hue + 0.3 * (rng.random() - 0.5)) % 1
        if dark:
            return _colour(near, 0.15 + 0.35 * rng.random(), 0.14 + 0.26 * rng.random())
        return _colour(near, 0.08 + 0.27 * rng.random(), 0.55 + 0.4 * rng.random())

    y, x = (np.arange(size) + 0.5)[:, None] / size, (np.arange(size) + 0.5) / size
    clouds = np.clip(1.6 * _clouds(rng, size) - 0.3, 0, 1)
    texture = rng.integers(3)
    slant_x, slant_y, bands = 2 * rng.random() - 1, 2 * rng.random() - 1, 3 + 5 * rng.random()
    if texture == 0:  # marble: bands that the clouds bend
        clouds = _wave(bands * (slant_x * x + slant_y * y) + 1.5 * clouds)
    elif texture == 1:  # terraces, like the layers of a map
        clouds = np.floor(clouds * 6) / 5
    first, second, third = dull_colour(), dull_colour(), dull_colour()
    canvas = first + (second - first) * clouds[..., None]

    islands = _soft_step((_noise(rng, size, int(rng.integers(4, 10))) - 0.72) * 4)
    canvas += 0.8 * islands[..., None] * (third - canvas)

    for _ in range(rng.integers(2, 9)):
        (x1, y1, x2, y2), thickness = rng.random(4) * 1.2 - 0.1, 0.004 + 0.016 * rng.random()
        dx, dy = x2 - x1, y2 - y1
        along = np.clip(((x - x1) * dx + (y - y1) * dy) / (dx * dx + dy * dy), 0, 1)
        off_x, off_y = x - x1 - along * dx, y - y1 - along * dy
        stroke = np.clip((thickness - np.sqrt(off_x * off_x + off_y * off_y)) * size + 0.5, 0, 1)
        canvas += 0.7 * stroke[..., None] * (dull_colour() - canvas)

    falloff = 1.08 - 0.3 * ((x - 0.5) * (x - 0.5) + (y - 0.5) * (y - 0.5))
    return canvas * falloff[..., None] + 0.05 * (rng.random((size, size, 1)) - 0.5)


def _clouds(rng: np.random.Generator, size: int) -> np.ndarray:
    """Noise, 0 to 1, of several scales, each half as strong as the one before, of shape (size, size)."""
    return sum(_noise(rng, size, 3 * 2**octave) / 2**octave for octave in range(4)) / 1.875


def _noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Random values, 0 to 1, on a grid of ``cells`` x ``cells`` with smooth transitions, of shape (size, size)."""
    grid = rng.random((cells + 1, cells + 1))
    position = (np.arange(size) + 0.5) / size * cells
    cell = position.astype(int)
    t = position - cell
    t = t * t * (3 - 2 * t)
    rows = grid[cell] * (1 - t)[:, None] + grid[cell + 1] * t[:, None]
    return rows[:, cell] * (1 - t) + rows[:, cell + 1] * t


def _wave(t: np.ndarray) -> np.ndarray:
    """A zigzag between 0 and 1 with period 1."""
    return np.abs(2 * (t - np.floor(t)) - 1)


def _soft_step(t: np.ndarray) -> np.ndarray:
    """0 below zero, 1 above it, with a short slope in between."""
    return np.clip(0.5 + 4 * t, 0, 1)


def _colour(hue: float, saturation: float, value: float) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value))


def _check_settings(num_train: int, num_val: int, image_size: int, seed: int) -> dict[str, int]:
    """The settings as plain integers. A ValueError names one that is out of range."""
    limits = dict(num_train=(1, 999_999), num_val=(1, 999_999), image_size=(32, 2048), seed=(0, 2**32 - 1))
    settings = dict(num_train=num_train, num_val=num_val, image_size=image_size, seed=seed)
    for name, (low, high) in limits.items():
        try:
            settings[name] = operator.index(settings[name])
        except TypeError:
            raise ValueError(f'{name} is {settings[name]!r}; expected an integer') from None
        if not low <= settings[name] <= high:
            raise ValueError(f'{name} is {settings[name]}; expected {low} to {high}')
    return settings


def _names(split: str, settings: dict[str, int]) -> list[str]:
    return [f'shapes_{split}_{index:06d}' for index in range(settings[f'num_{split}'])]


def _scenes(split: str, settings: dict[str, int], progress: bool) -> Iterator[Scene]:
    """Name, picture and shapes of every picture of a split, with a progress bar."""
    names = _names(split, settings)
    for index, name in enumerate(tqdm(names, f'drawing {split}', unit='image', disable=None if progress else True)):
        yield name, *draw_image(settings['seed'], split, index, settings['image_size'])


def _jpeg(image: np.ndarray) -> bytes:
    # Colour has full resolution, because the usual half resolution blurs small bright shapes.
    options = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    return cv2.imencode('.jpg', image[..., ::-1], options)[1].tobytes()


def _voc_xml(name: str, image_size: int, shapes: list[ShapeObject]) -> bytes:
    root = ET.Element('annotation')

    def add(parent: ET.Element, **children: object) -> None:
        for tag, text in children.items():
            ET.SubElement(parent, tag).text = str(text)

    add(root, folder='VOC2007', filename=f'{name}.jpg')
    add(ET.SubElement(root, 'size'), width=image_size, height=image_size, depth=3)
    add(root, segmented=0)
    for shape in shapes:
        x1, y1, x2, y2 = shape.bbox
        element = ET.SubElement(root, 'object')
        add(element, name=shape.category, pose='Unspecified')
        add(element, truncated=int(shape.truncated), difficult=int(shape.difficult))
        add(ET.SubElement(element, 'bndbox'), xmin=x1 + 1, ymin=y1 + 1, xmax=x2, ymax=y2)
    ET.indent(root)
    return ET.tostring(root)


def _files(style: str, settings: dict[str, int]) -> set[str]:
    """All files of a set, relative to its root."""
    files = set()
    for split in SPLITS:
        names = _names(split, settings)
        if style == 'coco':
            files.add(f'annotations/instances_{split}2017.json')
            files.update(f'{split}2017/{name}.jpg' for name in names)
        else:
            files.add(f'VOC2007/ImageSets/Main/{VOC_SPLITS[split]}.txt')
            files.update(f'VOC2007/JPEGImages/{name}.jpg' for name in names)
            files.update(f'VOC2007/Annotations/{name}.xml' for name in names)
    return files


def _existing_files(root: Path, style: str) -> set[str]:
    """The files in a style's folders, relative to ``root``, without empty ones."""
    tops = ('train2017', 'val2017', 'annotations') if style == 'coco' else ('VOC2007',)
    paths = [path for top in tops for path in (root / top).rglob('*')]
    return {path.relative_to(root).as_posix() for path in paths if path.is_file() and path.stat().st_size}


def _read_stamp(root: Path) -> dict:
    """The content of ``root/shapes.json``: for each style whether it is complete, its settings and object counts."""
    try:
        content = json.loads((root / STAMP).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_stamp(root: Path, style: str, entry: dict) -> None:
    content = {**_read_stamp(root), style: entry}
    _write_file(root / STAMP, (json.dumps(content, indent=2) + '\n').encode())


def _is_complete(root: Path, style: str, settings: dict[str, int]) -> bool:
    entry = _read_stamp(root).get(style, {})
    if not entry.get('complete') or entry.get('settings') != {**settings, 'drawing_version': DRAWING_VERSION}:
        return False
    return _files(style, settings) <= _existing_files(root, style)


def _begin(root: Path, style: str, settings: dict[str, int]) -> None:
    """Mark the set as unfinished, and remove the pictures of an older, larger one."""
    if root.is_file():
        raise NotADirectoryError(f"'{root}' is a file; expected a folder, which may be missing")
    existing = _existing_files(root, style)
    # They may be the real COCO or VOC. The stamp, which is written first, distinguishes our files from others.
    if existing and style not in _read_stamp(root):
        raise FileExistsError(
            f"'{root}' already holds data in the style '{style}' that was not made here, such as '{min(existing)}'; "
            'choose another folder'
        )
    _write_stamp(root, style, dict(complete=False))
    for stale in existing - _files(style, settings):
        if Path(stale).name.startswith('shapes_'):
            (root / stale).unlink()


def _finish(root: Path, style: str, settings: dict[str, int], objects: dict[str, Counter]) -> None:
    counts = {split: {name: objects[split][name] for name in CLASSES} for split in SPLITS}
    settings = {**settings, 'drawing_version': DRAWING_VERSION}
    _write_stamp(root, style, dict(complete=True, settings=settings, objects=counts))


def _write_file(path: Path, content: bytes) -> None:
    """Write a file completely or not at all, even if the process is killed or another one writes the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f'.{path.name}.{os.getpid()}')
    unfinished.write_bytes(content)
    os.replace(unfinished, path)
