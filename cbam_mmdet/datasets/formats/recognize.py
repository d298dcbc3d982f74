"""Which format the annotations of a folder have."""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree as ET

from cbam_mmdet.datasets.formats.coco import is_coco, read_coco_files
from cbam_mmdet.datasets.formats.content import Found, hold_out
from cbam_mmdet.datasets.formats.cvat import read_cvat
from cbam_mmdet.datasets.formats.folder import Folder, read_json, read_xml
from cbam_mmdet.datasets.formats.labelme import is_labelme, read_labelme
from cbam_mmdet.datasets.formats.voc import read_voc_folder
from cbam_mmdet.datasets.formats.yolo import data_yaml, deeper_yaml, names_file, read_darknet, read_ultralytics
from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.text import abridge, brief

KNOWN = (
    "COCO (also Roboflow's export), Pascal VOC (with and without ImageSets), YOLO (Ultralytics' data.yaml, Darknet's "
    'obj.names or classes.txt), CVAT for images, LabelMe'
)

OTHER_IMAGES = ('.heic', '.heif', '.avif', '.jfif', '.gif', '.jp2', '.dng')


def read_folder(root: str, train_ann: str | None = None, val_ann: str | None = None) -> Found:
    """Recognize the format of a folder's annotations, and read them.

    Where no split is held out, 20 % of the training images are, by a hash of their names. Without a test split the
    validation split stands for it, and the reverse.

    Args:
        root: the folder.
        train_ann: the COCO annotation file to train on, relative to the folder or to the current one.
        val_ann: that to validate and test on.

    Returns:
        What was found, with the splits 'train', 'val' and 'test'. Without 'train' if the folder has only others.

    Raises:
        UserError: if the folder is none of the known layouts, says what was found and what is missing; for two formats
            in one folder; and for malformed files.
    """
    folder = Folder(root)
    if train_ann or val_ann:
        chosen = {split: _named(folder, name) for split, name in (('train', train_ann), ('val', val_ann)) if name}
        found = read_coco_files(folder, {path: _coco(path) for path in chosen.values()}, chosen)
    else:
        found = _recognize(folder)
    _require_pixels(folder, found)
    found.notes += [*folder.moved(), *_places(found), *_unread(folder)]
    return _complete_splits(found)


def _require_pixels(folder: Folder, found: Found) -> None:
    """Refuse boxes that are all within the first pixel: they are shares of the image's size."""
    boxes = [annotation['bbox'] for content in found.splits.values() for annotation in content['annotations']]
    # Of VOC's corners 1 was taken before.
    if boxes and all(min(x, y) >= -1 and max(x + width, y + height) <= 1 for x, y, width, height in boxes):
        raise UserError(
            f'{folder.root}: all {len(boxes)} boxes lie within the first pixel of their image, as if they were shares '
            f'of its width and height. {found.style} counts in pixels: multiply them'
        )


def _unread(folder: Folder) -> list[str]:
    """A line on images in formats that OpenCV cannot read everywhere."""
    counts = {suffix: len(folder.files[suffix]) for suffix in OTHER_IMAGES if folder.files.get(suffix)}
    listed = ', '.join(f'{count} {suffix}' for suffix, count in counts.items())
    return [f'images in other formats are left out ({listed}): convert them to .jpg or .png'] if counts else []


def _places(found: Found) -> list[str]:
    """A line for each split whose images come from several folders: one of them may be none of images."""
    notes = []
    for split, content in found.distinct().items():
        places = Counter(str(PurePosixPath(image['file_name']).parent) for image in content['images'])
        if len(places) > 1:
            counts = [f'{place}/ {count}' for place, count in places.most_common()]
            notes.append(f'the images ({split}) come from {len(places)} folders: {abridge(counts, 6)}')
    return notes


def _recognize(folder: Folder) -> Found:
    if not folder.images:
        raise UserError(_none_of_these(folder, 'there is no image'))
    described = data_yaml(folder)
    if described:
        return read_ultralytics(folder, *described)
    contents = {path: read_json(path) for path in folder.files['.json']}
    roots = {path: read_xml(path) for path in folder.files['.xml']}
    of_coco: dict[Path, Any] = {path: content for path, content in contents.items() if is_coco(content)}
    of_labelme: dict[Path, Any] = {path: content for path, content in contents.items() if is_labelme(content)}
    of_cvat = {path: root for path, root in roots.items() if root.tag == 'annotations'}
    of_voc = {path: root for path, root in roots.items() if root.tag == 'annotation'}
    several = [
        f'{len(files)} files of {name}'
        for name, files in (('COCO', of_coco), ('LabelMe', of_labelme), ('CVAT', of_cvat), ('Pascal VOC', of_voc))
        if files
    ]
    if len(several) > 1:
        raise UserError(
            f'{folder.root} holds {" and ".join(several)}: leave one format in the folder, or choose files of COCO by '
            '--train-ann FILE and --val-ann FILE'
        )
    if of_coco:
        return read_coco_files(folder, of_coco)
    if of_cvat:
        return read_cvat(folder, of_cvat)
    if of_voc:
        return read_voc_folder(folder, of_voc)
    if of_labelme:
        return read_labelme(folder, of_labelme)
    names = None if deeper_yaml(folder) else names_file(folder)
    if names:
        return read_darknet(folder, names)
    raise UserError(_none_of_these(folder, _what_is_missing(folder, roots)))


def _what_is_missing(folder: Folder, roots: dict[Path, ET.Element]) -> str:
    """The nearest layout, and what it lacks."""
    stems = {Path(image).stem for image in folder.images}
    labels = [path for path in folder.files['.txt'] if path.stem in stems]
    deeper = deeper_yaml(folder)
    if deeper:
        return f"nearest is YOLO's layout, described by {deeper}: give --data-root {deeper.parent}"
    if labels:
        return (
            f"nearest is YOLO's layout ({len(labels)} .txt have the name of an image). The names of the classes are "
            'missing: a data.yaml with train, val and names, or a classes.txt with a name a line'
        )
    if roots:
        tags = brief('>, <'.join(sorted({root.tag for root in roots.values()})[:3]))
        return f"nearest is Pascal VOC's layout, but the .xml are of another kind (<{tags}>, expected <annotation>)"
    if folder.files['.json']:
        return (
            "nearest is COCO's layout, but no .json has the lists images, annotations and categories (nor LabelMe's "
            'shapes and imagePath)'
        )
    return 'the annotations are missing. tools/infer.py takes images without them'


def _none_of_these(folder: Folder, missing: str) -> str:
    return (
        f'--data-root {folder.root} is no data set of a known layout. It holds {folder.counts()}: {missing}. Known are '
        f'{KNOWN}; docs/own_data.md shows each'
    )


def _named(folder: Folder, name: str) -> Path:
    for path in (folder.root / name, Path(name)):
        if path.is_file():
            return path
    raise UserError(f'annotation file {name}: it is neither in {folder.root} nor in the current folder')


def _coco(path: Path) -> dict:
    content = read_json(path)
    if not isinstance(content, dict) or not is_coco(content):
        raise UserError(f"annotation file {path} is not in COCO's format: it lacks images, annotations or categories.")
    return content


def _complete_splits(found: Found) -> Found:
    splits = found.splits
    if 'train' in splits and 'val' not in splits and 'test' not in splits:
        if len(splits['train']['images']) < 2:
            raise UserError('the data set has one image only: it needs one to train on and one to validate on')
        splits['train'], splits['val'] = hold_out(splits['train'])
        counts = ' and '.join(f'{len(splits[split]["images"])}' for split in ('train', 'val'))
        found.notes.append(
            f'no split is held out, so 20 % of the images are, by a hash of their names: {counts} images to train and '
            'to validate on'
        )
    elif 'val' not in splits and 'test' in splits:
        splits['val'] = splits['test']
        found.notes.append('no validation split: validated on the test split')
    splits.setdefault('test', splits['val'])
    return found
