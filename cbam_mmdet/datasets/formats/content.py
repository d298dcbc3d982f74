"""The content of COCO annotation files, as it is gathered from other formats."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.text import brief

LARGEST = 1e9  # pixels: no coordinate is larger
ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # EXIF's tag, and the values that swap width and height
TURNED_FORMATS = ('JPEG', 'MPO', 'PNG', 'TIFF')  # those that OpenCV turns, with which MMDetection reads images
HELD_OUT = 0.2


@dataclass
class Found:
    """What a folder holds.

    Attributes:
        style: the name of the format, for people.
        splits: 'train', 'val' and 'test', as far as there are any, each with the content of a COCO annotation file. The
            names of the images are relative to the folder.
        sources: the annotation files that were read.
        notes: what a user should know of the reading, a line each.
    """

    style: str
    splits: dict[str, dict[str, list]]
    sources: list[Path]
    notes: list[str] = field(default_factory=list)

    def distinct(self) -> dict[str, dict[str, list]]:
        """The splits, without a test split that is the validation split."""
        splits = dict(self.splits)
        if splits.get('test') is splits.get('val'):
            splits.pop('test', None)
        return splits


class Content:
    """The content of one COCO annotation file, built image by image."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.numbers = {name: i for i, name in enumerate(classes, start=1)}
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def add_image(self, name: str, size: tuple[int, int]) -> None:
        """Begin an image of (width, height) pixels, to which the boxes that follow belong."""
        self.images.append(dict(id=len(self.images) + 1, file_name=name, width=size[0], height=size[1]))

    def add_box(self, label: str, corners: Iterable[float], crowd: bool = False) -> None:
        """Add a box x1, y1, x2, y2 in pixels, counted from 0 at the image's edge.

        Raises:
            ValueError: for a coordinate that is no number, and for a label that is not among the classes.
        """
        x1, y1, x2, y2 = (_coordinate(value) for value in corners)
        if label not in self.numbers:
            raise ValueError(f'its class {label!r} is not among the classes')
        width, height = x2 - x1, y2 - y1
        self.annotations.append(
            dict(
                id=len(self.annotations) + 1,
                image_id=len(self.images),
                category_id=self.numbers[label],
                bbox=[x1, y1, width, height],
                area=max(width, 0) * max(height, 0),
                iscrowd=int(crowd),
            )
        )

    def as_coco(self) -> dict[str, list]:
        categories = [dict(id=number, name=name) for name, number in self.numbers.items()]
        return dict(images=self.images, annotations=self.annotations, categories=categories)


@dataclass
class LabelledImage:
    """An image and its objects, as a format of one file an image has them.

    Attributes:
        name: the path of the image, relative to the folder.
        size: (width, height) in pixels.
        objects: each with its class, its box x1, y1, x2, y2 in pixels counted from 0, and whether it is a crowd.
        source: the file that says so, for messages.
        split: the split that the format names for it, if it does.
        source_split: the split that the file's place or name says.
    """

    name: str
    size: tuple[int, int]
    objects: list[tuple[str, Sequence[float], bool]]
    source: Path
    split: str | None = None
    source_split: str | None = None


def by_split(
    images: list[LabelledImage], classes: Sequence[str], split_of: Callable[[str], str | None]
) -> dict[str, dict[str, list]]:
    """The contents of images by their splits; all in 'train' if no split is named for any of them.

    Raises:
        UserError: for two annotations of one image, a malformed box, and if splits are named for some images only.
    """
    sources: dict[str, Path] = {}
    for image in images:
        if image.name in sources:
            raise UserError(f'{image.source}: {sources[image.name]} annotates {image.name}, too: remove one')
        sources[image.name] = image.source
    splits = {image.name: image.split or one_split(image.name, split_of) for image in images}
    if not any(splits.values()):  # the images are in one folder, but perhaps their annotations are not
        splits = {image.name: image.source_split for image in images}
    without = [name for name, split in splits.items() if split is None]
    if without and len(without) < len(images):
        named = sorted({split for split in splits.values() if split})
        raise UserError(
            f'{len(without)} of {len(images)} images are in none of the splits that the others are in '
            f'({", ".join(named)}; the first: {without[0]}): move them into one, or all images into one folder'
        )
    contents: dict[str, Content] = {}
    for image in sorted(images, key=lambda image: image.name):
        content = contents.setdefault(splits[image.name] or 'train', Content(classes))
        content.add_image(image.name, image.size)
        for label, corners, crowd in image.objects:
            try:
                content.add_box(label, corners, crowd)
            except ValueError as error:
                raise UserError(
                    f'annotation file {image.source}: an object of {image.name} is malformed: {brief(error)}'
                ) from error
    return {split: content.as_coco() for split, content in contents.items()}


def take_strays(images: list[LabelledImage]) -> list[Path]:
    """Take out the images that were found by their names alone and belong to other annotations.

    Usually the annotations of one folder have their images in one folder. One whose image is not there must not get the
    image of the same name that belongs to another folder's annotations.

    Returns:
        The annotation files of those that were taken out.
    """
    counts: dict[Path, Counter[PurePosixPath]] = defaultdict(Counter)
    for image in images:
        counts[image.source.parent][PurePosixPath(image.name).parent] += 1
    usual = {folder: places.most_common(1)[0][0] for folder, places in counts.items()}
    strays, kept = [], []
    for image in images:
        place = PurePosixPath(image.name).parent
        strayed = place != usual[image.source.parent] and place in usual.values()
        (strays if strayed else kept).append(image)
    images[:] = kept
    return [image.source for image in strays]


def one_split(name: str, split_of: Callable[[str], str | None]) -> str | None:
    """The split that an image's folders name.

    Raises:
        UserError: if they name two.
    """
    path = PurePosixPath(name)
    splits = {split_of(f'{folder}/{path.name}') for folder in (path.parent, *path.parent.parents)} - {None}
    if len(splits) > 1:
        raise UserError(f'{name} is in folders of two splits ({", ".join(sorted(splits))}): rename one of the folders')
    return next(iter(splits), None)


def hold_out(content: dict[str, list]) -> tuple[dict[str, list], dict[str, list]]:
    """Divide a content into 80 % and 20 % of its images, by a hash of each file's name.

    Which part an image is in depends on its name alone, so it stays there as images are added. Of a handful of images
    the part that would be empty gets one.
    """
    images = sorted(content['images'], key=lambda image: _share_of(image['file_name']))
    count = sum(_share_of(image['file_name']) < HELD_OUT for image in images)
    count = min(max(count, 1), len(images) - 1)
    held = {image['id'] for image in images[:count]}
    return part(content, lambda image_id: image_id not in held), part(content, lambda image_id: image_id in held)


def _share_of(name: str) -> float:
    """A number from 0 to 1 that depends on a file's name, without its folder, alone."""
    digest = hashlib.sha256(Path(name).name.encode('utf-8', 'surrogateescape')).digest()
    return int.from_bytes(digest[:8], 'big') / 2**64


def part(content: dict[str, list], belongs: Callable[[Any], bool]) -> dict[str, list]:
    return dict(
        content,
        images=[image for image in content['images'] if belongs(image['id'])],
        annotations=[annotation for annotation in content['annotations'] if belongs(annotation['image_id'])],
    )


def displayed_size(path: Path) -> tuple[int, int]:
    """See `displayed_size_and_turn`."""
    return displayed_size_and_turn(path)[0]


def displayed_size_and_turn(path: Path) -> tuple[tuple[int, int], int | None]:
    """How an image is displayed, after the turn that its EXIF data ask for, from its header.

    Returns:
        Its (width, height), and EXIF's orientation if that swaps width and height.

    Raises:
        UserError: if the file is no image.
    """
    try:
        with Image.open(path) as image:
            orientation = image.getexif().get(ORIENTATION) if image.format in TURNED_FORMATS else None
            return (image.size[::-1], orientation) if orientation in TURNED else (image.size, None)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f'image {path} cannot be read: {brief(error)}') from error


def around_turned(box: Sequence[float], degrees: float) -> tuple[float, float, float, float]:
    """The upright box around a box x1, y1, x2, y2 that is turned about its centre."""
    x1, y1, x2, y2 = box
    if not degrees:
        return x1, y1, x2, y2
    cos, sin = abs(math.cos(math.radians(degrees))), abs(math.sin(math.radians(degrees)))
    half_width = ((x2 - x1) * cos + (y2 - y1) * sin) / 2
    half_height = ((x2 - x1) * sin + (y2 - y1) * cos) / 2
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    return x - half_width, y - half_height, x + half_width, y + half_height


def rotation_of(annotation: dict) -> float:
    """By how many degrees a box is turned about its centre, which CVAT writes beside the upright one."""
    attributes = annotation.get('attributes')
    degrees = attributes.get('rotation') if isinstance(attributes, dict) else 0
    return degrees if isinstance(degrees, (int, float)) and abs(degrees) < 1e15 else 0


def upright(annotation: dict[str, Any]) -> dict[str, Any]:
    """An annotation whose box is the one around the turned box that CVAT means."""
    degrees = rotation_of(annotation)
    if not degrees:
        return annotation
    x, y, width, height = annotation['bbox']
    x1, y1, x2, y2 = around_turned((x, y, x + width, y + height), degrees)
    attributes = {key: value for key, value in annotation['attributes'].items() if key != 'rotation'}
    return dict(annotation, bbox=[x1, y1, x2 - x1, y2 - y1], attributes=attributes)


def left_out(kinds: Counter[str]) -> str:
    """A line on shapes that are left out, by their kinds."""
    counts = ', '.join(f'{count} {brief(kind)}' for kind, count in kinds.most_common(8))
    return f'{sum(kinds.values())} shapes without an area that is known are left out: {counts}'


def turned_box(box: Sequence[float], size: tuple[int, int], orientation: int) -> tuple[float, float, float, float]:
    """A box x, y, width, height of an image as stored, in the image as displayed.

    Args:
        box: in pixels.
        size: (width, height) as stored.
        orientation: EXIF's, one of those that swap width and height.
    """
    x, y, width, height = box
    left = y if orientation in (5, 8) else size[1] - y - height
    top = x if orientation in (5, 6) else size[0] - x - width
    return left, top, height, width


def size_from(width: object, height: object) -> tuple[int, int]:
    """A (width, height) that a file gives.

    Raises:
        ValueError: if it is none.
    """
    size = _coordinate(width), _coordinate(height)
    if min(size) < 1 or size != (int(size[0]), int(size[1])):
        raise ValueError(f'{width} x {height} is not the size of an image')
    return int(size[0]), int(size[1])


def _coordinate(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f'{value!r} is not a number')
    number = float(value)
    if not math.isfinite(number) or abs(number) > LARGEST:
        raise ValueError(f'{value!r} is not a coordinate')
    return number


def class_name(value: object) -> str:
    """A class's name that a file gives.

    Raises:
        ValueError: if it is none.
    """
    if not isinstance(value, str) or not value.strip() or not value.strip().isprintable():
        raise ValueError(f'{value!r} is not the name of a class')
    return value.strip()
