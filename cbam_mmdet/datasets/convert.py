"""Conversion of annotations from Pascal VOC's format to COCO's and back, with the difficult objects.

A box that spans the pixels xmin to xmax, counted from 1, becomes COCO's x = xmin - 1 with width = xmax - xmin + 1. A
difficult object becomes a crowd (`iscrowd`), which MMDetection and pycocotools ignore. They would take an object with
COCO's `ignore` for background. A conversion and its reverse give the same classes, boxes and flags, but VOC rounds
coordinates to integers.
"""

from __future__ import annotations

import json
import os.path as osp
import xml.etree.ElementTree as ET
from pathlib import Path

from mmengine.config import ConfigDict
from tqdm import tqdm

from cbam_mmdet.datasets.checks import complete, read_coco, read_voc, read_voc_ids, require_coco
from cbam_mmdet.datasets.formats.content import around_turned, upright
from cbam_mmdet.datasets.transforms.loading import read_image
from cbam_mmdet.datasets.voc import image_names_by_stem, voc_image_folder
from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.files import write_text


def convert(source: str, target: str) -> int:
    """Convert annotations from one format to the other.

    Args:
        source: the file to read: VOC's image set 'DIR/ImageSets/Main/NAME.txt', or COCO's 'FILE.json'.
        target: the file to write, of the other format. VOC's XML files go to DIR/Annotations. No image is copied.

    Returns:
        The number of images.

    Raises:
        UserError: if the source cannot be read or the target exists.
    """
    suffixes = Path(source).suffix, Path(target).suffix
    if suffixes not in (('.txt', '.json'), ('.json', '.txt')):
        raise UserError(
            f'{source} to {target}: expected an image set of VOC (DIR/ImageSets/Main/NAME.txt) and a .json of COCO, '
            'or the reverse'
        )
    image_set = source if suffixes[0] == '.txt' else target
    if Path(image_set).absolute().parts[-3:-2] != ('ImageSets',):
        raise UserError(
            f"{image_set}: VOC's image sets are DIR/ImageSets/Main/NAME.txt, and their XML files DIR/Annotations"
        )
    if not osp.isfile(source):
        raise UserError(f'{source} does not exist')
    if osp.exists(target):
        raise UserError(f'{target} exists already: name another one, or remove it')
    if suffixes[0] == '.txt':
        content = voc_to_coco(source)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        write_text(target, json.dumps(content))
        return len(content['images'])
    return _write_voc(source, target)


def voc_to_coco(image_set: str) -> dict:
    """The content of a COCO annotation file for one image set of VOC.

    The categories are the sorted classes of all XML files in the folder, so every image set in it gets the same ones.

    Args:
        image_set: path of DIR/ImageSets/Main/NAME.txt.

    Raises:
        UserError: for an XML file that is missing or malformed.
    """
    folder = Path(image_set).absolute().parents[2]
    dataset = ConfigDict(data_root=str(folder))
    everything = sorted(path.stem for path in (folder / 'Annotations').glob('*.xml'))
    names = sorted({item.name for image_id in everything for item in read_voc(dataset, image_set, image_id)[1]})
    number = {name: i for i, name in enumerate(names, start=1)}
    images_dir = voc_image_folder(dataset)
    files = image_names_by_stem(images_dir) if osp.isdir(images_dir) else {}
    images, annotations = [], []
    for image_id in tqdm(read_voc_ids(image_set), desc='converting', disable=None):
        size, objects = read_voc(dataset, image_set, image_id)
        file_name = files.get(image_id, f'{image_id}.jpg')
        if float('inf') in size or min(size) < 1:  # some tools write 0
            size = read_image(osp.join(images_dir, file_name)).shape[1::-1]
        images.append(
            dict(id=len(images) + 1, file_name=file_name, width=_as_integer(size[0]), height=_as_integer(size[1]))
        )
        for name, (xmin, ymin, xmax, ymax), difficult, degrees in objects:
            x1, y1, x2, y2 = around_turned((xmin - 1, ymin - 1, xmax, ymax), degrees)
            x, y, width, height = (_as_integer(v) for v in (x1, y1, x2 - x1, y2 - y1))
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=len(images),
                    category_id=number[name],
                    bbox=[x, y, width, height],
                    area=width * height,
                    iscrowd=int(difficult),
                )
            )
    return dict(
        images=images, annotations=annotations, categories=[dict(id=i, name=name) for name, i in number.items()]
    )


def coco_to_voc(content: dict) -> dict[str, ET.Element]:
    """The content of VOC's XML files for a COCO annotation file, by the names of the images without suffix.

    Args:
        content: that of the COCO annotation file.

    Raises:
        UserError: for a malformed annotation, and for images whose names differ only in folder or suffix.
    """
    try:
        names = {category['id']: category['name'] for category in content['categories']}
        stems = {image['id']: Path(image['file_name']).stem for image in content['images']}
        roots = {image['id']: _image_element(image) for image in content['images']}
        for annotation in content['annotations']:
            difficult = bool(annotation.get('iscrowd') or annotation.get('ignore'))
            _add_object(
                roots[annotation['image_id']], names[annotation['category_id']], upright(annotation)['bbox'], difficult
            )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the annotations are not in COCO's format: {type(error).__name__}: {error}") from error
    if len(set(stems.values())) < len(stems):
        raise UserError(
            'some images share their name without folder and suffix, which VOC has no place for: rename them'
        )
    for image_id, root in roots.items():
        _require_readable(stems[image_id], root)
    return {stems[image_id]: root for image_id, root in roots.items()}


def _require_readable(stem: str, root: ET.Element) -> None:
    """Refuse names that XML or a list of names gives back as others, or not at all."""
    try:
        back = [item.text for item in ET.fromstring(ET.tostring(root, encoding='utf-8')).iter('name')]
    except (ET.ParseError, UnicodeEncodeError):
        back = []
    names = [item.text for item in root.iter('name')]
    if back != names:
        lost = next((name for name in names if name not in back), None)
        raise UserError(f"the class name {lost!r} (image {stem!r}) cannot be written in VOC's format: rename it")
    if [line.strip() for line in f'{stem}\n'.splitlines()] != [stem]:
        raise UserError(f"the image name {stem!r} cannot stand in VOC's list of images: rename it")


def _write_voc(source: str, image_set: str) -> int:
    content, _ = complete(read_coco(source))
    require_coco(source, content)
    files = coco_to_voc(content)
    annotations = Path(image_set).absolute().parents[2] / 'Annotations'
    there = [name for name in files if (annotations / f'{name}.xml').exists()]
    if there:
        raise UserError(f'{annotations / there[0]}.xml exists already: choose another folder')
    for folder in (annotations, Path(image_set).parent):
        folder.mkdir(parents=True, exist_ok=True)
    for name, root in files.items():
        ET.indent(root)
        (annotations / f'{name}.xml').write_bytes(ET.tostring(root, encoding='utf-8'))
    write_text(image_set, ''.join(f'{name}\n' for name in files))
    return len(files)


def _image_element(image: dict) -> ET.Element:
    root = ET.Element('annotation')
    ET.SubElement(root, 'filename').text = Path(image['file_name']).name
    size = ET.SubElement(root, 'size')
    for key in ('width', 'height'):
        ET.SubElement(size, key).text = str(round(image[key]))
    ET.SubElement(size, 'depth').text = '3'
    return root


def _add_object(root: ET.Element, name: str, box: list[float], difficult: bool) -> None:
    x, y, width, height = box
    item = ET.SubElement(root, 'object')
    ET.SubElement(item, 'name').text = name
    ET.SubElement(item, 'difficult').text = str(int(difficult))
    corners = ET.SubElement(item, 'bndbox')
    xmin, ymin = round(x + 1), round(y + 1)
    # A box of less than a pixel stays one of a pixel, which VOC's smallest box is.
    xmax, ymax = max(round(x + width), xmin), max(round(y + height), ymin)
    for key, value in dict(xmin=xmin, ymin=ymin, xmax=xmax, ymax=ymax).items():
        ET.SubElement(corners, key).text = str(value)


def _as_integer(value: float) -> int | float:
    """An integer, where the value is one."""
    return int(value) if value == int(value) else value
