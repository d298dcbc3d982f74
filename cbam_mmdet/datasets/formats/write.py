"""Write a data set in the layout of COCO, Pascal VOC or YOLO, beside the original, with links to its images."""

from __future__ import annotations

import json
import os
import shutil
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import yaml

from cbam_mmdet.datasets.checks import reads_as_corners, require_sizes
from cbam_mmdet.datasets.convert import coco_to_voc
from cbam_mmdet.datasets.formats.content import Found, displayed_size_and_turn, turned_box
from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.files import write_text


def write_data_set(found: Found, root: str | Path, out: str | Path, style: str, copy: bool = False) -> list[str]:
    """Write what was found in a folder as a data set of another format.

    Args:
        found: what the folder holds.
        root: the folder.
        out: a new or empty folder.
        style: 'coco', 'voc' or 'yolo'.
        copy: copy the images. Else links to them are made.

    Returns:
        What a user should know of it, a line each.

    Raises:
        UserError: if the folder holds something, and for annotations that the format has no place for.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f'{out} exists already and is not an empty folder: name another one')
    bring = _copy if copy else _link
    splits, notes = _without_negative(found.distinct())
    _require_sizes(splits, root)
    return notes + _WRITERS[style](splits, Path(root), out, bring)


def _without_negative(splits: dict[str, dict]) -> tuple[dict[str, dict], list[str]]:
    """The splits without boxes of negative width or height, such as those whose corners are exchanged."""
    kept = {
        split: dict(content, annotations=[a for a in content['annotations'] if min(a['bbox'][2:]) >= 0])
        for split, content in splits.items()
    }
    count = sum(len(splits[split]['annotations']) - len(kept[split]['annotations']) for split in splits)
    return kept, [f'{count} boxes of negative width or height are left out'] if count else []


def _require_sizes(splits: dict[str, dict], root: str | Path) -> None:
    beyond, boxes = [], 0
    for content in splits.values():
        sizes = {image['id']: (image['width'], image['height']) for image in content['images']}
        for annotation in content['annotations']:
            x, y, width, height = annotation['bbox']
            if reads_as_corners((x, y, x + width, y + height), sizes[annotation['image_id']]):
                beyond.append(annotation['id'])
        boxes += len(content['annotations'])
    require_sizes(str(root), beyond, boxes)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.symlink(os.path.abspath(source), target)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


Bring = Callable[[Path, Path], None]


def _write_coco(splits: dict[str, dict], root: Path, out: Path, bring: Bring) -> list[str]:
    for split, content in splits.items():
        for image in content['images']:
            bring(root / image['file_name'], out / f'{split}2017' / image['file_name'])
        write_text(out / 'annotations' / f'instances_{split}2017.json', json.dumps(content))
    return []


def _write_voc(splits: dict[str, dict], root: Path, out: Path, bring: Bring) -> list[str]:
    images: dict[str, str] = {}
    notes = ["VOC's format has whole pixels: coordinates are rounded"]
    small, unused = 0, None
    for content in splits.values():
        boxes = [annotation['bbox'] for annotation in content['annotations']]
        small += sum(min(box[2:]) < 1 for box in boxes)
        used = {annotation['category_id'] for annotation in content['annotations']}
        absent = {category['name'] for category in content['categories'] if category['id'] not in used}
        unused = absent if unused is None else unused & absent
    if small:
        notes.append(f"{small} boxes narrower than a pixel become one pixel wide, VOC's smallest box")
    if unused:
        notes.append(f'classes without a box are lost, as VOC has no list of classes: {", ".join(sorted(unused))}')
    for split, content in splits.items():
        files = coco_to_voc(content)
        for image in content['images']:
            name = image['file_name']
            stem = PurePosixPath(name).stem
            if images.get(stem) == name:
                raise UserError(f"{name} is in two splits, and VOC's images stand in one folder: leave one split out")
            if stem in images:
                raise UserError(
                    f"{name} and {images[stem]} have one name, and VOC's images stand in one folder: rename one"
                )
            images[stem] = name
            bring(root / name, out / 'JPEGImages' / PurePosixPath(name).name)
            ET.indent(files[stem])
            write_text(out / 'Annotations' / f'{stem}.xml', ET.tostring(files[stem], encoding='unicode'))
        write_text(out / 'ImageSets' / 'Main' / f'{split}.txt', ''.join(f'{name}\n' for name in files))
    return notes


def _write_yolo(splits: dict[str, dict], root: Path, out: Path, bring: Bring) -> list[str]:
    names = [category['name'] for category in next(iter(splits.values()))['categories']]
    crowds = outside = cut = 0
    frames_of = {split: _frames(content['images'], root) for split, content in splits.items()}
    for split, content in splits.items():
        index = {category['id']: names.index(category['name']) for category in content['categories']}
        lines = defaultdict(list)
        frames = frames_of[split]
        for annotation in content['annotations']:
            if annotation['iscrowd']:
                crowds += 1
                continue
            if not _is_inside(annotation['bbox'], frames[annotation['image_id']][0]):
                outside += 1
                continue
            cut += _is_cut(annotation['bbox'], frames[annotation['image_id']][0])
            box, size, turn = annotation['bbox'], *frames[annotation['image_id']]
            line = _yolo_box(turned_box(box, size, turn), size[::-1]) if turn else _yolo_box(box, size)
            lines[annotation['image_id']].append(f'{index[annotation["category_id"]]} {line}')
        for image, name in zip(content['images'], _plain_names(content['images']), strict=True):
            bring(root / image['file_name'], out / 'images' / split / name)
            labels = out / 'labels' / split / name.with_suffix('.txt')
            write_text(labels, ''.join(f'{line}\n' for line in lines[image['id']]))
    places = {split: f'images/{split}' for split in splits}
    described = {'path': str(out.absolute()), **places, 'names': dict(enumerate(names))}
    write_text(out / 'data.yaml', yaml.safe_dump(described, sort_keys=False, allow_unicode=True))
    notes = [f'{crowds} crowds and difficult objects are left out, for which YOLO has no place'] if crowds else []
    notes += [f'{outside} boxes without size or outside their image are left out'] if outside else []
    return notes + ([f'{cut} boxes that reach beyond their image are cut at its border'] if cut else [])


def _frames(images: list[dict], root: Path) -> dict[object, tuple[tuple[int, int], int | None]]:
    """The annotated (width, height) of each image, and its turn."""
    sizes = [(image['width'], image['height']) for image in images]
    turns = [_turn(root / image['file_name'], size) for image, size in zip(images, sizes, strict=True)]
    return dict(zip((image['id'] for image in images), zip(sizes, turns, strict=True), strict=True))


def _turn(path: Path, size: tuple[int, int]) -> int | None:
    """EXIF's orientation of an image that is displayed turned, if its annotations mean it as stored, by their size.

    Raises:
        UserError: if they mean another size than the image's: boxes cannot be written as shares of it.
    """
    shown, turn = displayed_size_and_turn(path)
    if size == shown:
        return None
    if turn and size == shown[::-1]:
        return turn
    raise UserError(
        f'image {path} has {shown[0]} x {shown[1]} pixels, and its annotations say {size[0]} x {size[1]}: '
        "YOLO's boxes are shares of the image, and of which of both is not known. Mend the annotations"
    )


def _is_cut(box: Sequence[float], size: tuple[int, int]) -> bool:
    """Whether a box x, y, width, height loses more than a pixel at the border of an image of this (width, height)."""
    return any(a < -1 or a + length > end + 1 for a, length, end in zip(box[:2], box[2:], size, strict=True))


def _is_inside(box: Sequence[float], size: tuple[int, int]) -> bool:
    """Whether a part of a box x, y, width, height lies in an image of this (width, height)."""
    return all(a < end and a + length > 0 and length > 0 for a, length, end in zip(box[:2], box[2:], size, strict=True))


def _plain_names(images: list[dict]) -> list[PurePosixPath]:
    """A name for each image, without folders, in one of which `images` would mislead Ultralytics' search for labels.

    Where two share it but for the suffix, and so would share their labels, it is the whole path with _ in place of /.
    """
    plain = [PurePosixPath(image['file_name']) for image in images]
    stems = Counter(path.stem for path in plain)
    names: dict[str, PurePosixPath] = {}
    for path in plain:
        stem = path.stem if stems[path.stem] == 1 else '_'.join((*path.parts[:-1], path.stem, path.suffix[1:]))
        while stem in names:
            stem += '_'
        names[stem] = PurePosixPath(stem + path.suffix)
    return list(names.values())


def _yolo_box(box: Sequence[float], size: tuple[int, int]) -> str:
    """The centre and size of a box as shares of the image, cut at its border."""
    x, y, width, height = box
    (x1, x2), (y1, y2) = ((max(a, 0), min(a + b, end)) for a, b, end in zip((x, y), (width, height), size, strict=True))
    shares = (x1 + x2) / 2 / size[0], (y1 + y2) / 2 / size[1], (x2 - x1) / size[0], (y2 - y1) / size[1]
    return ' '.join(f'{share:.8f}' for share in shares)


_WRITERS = {'coco': _write_coco, 'voc': _write_voc, 'yolo': _write_yolo}
STYLES = tuple(_WRITERS)
