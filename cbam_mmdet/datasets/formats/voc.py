"""Pascal VOC's XML files, with or without image sets (http://host.robots.ox.ac.uk/pascal/VOC/)."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree as ET

from cbam_mmdet.datasets.checks import voc_objects
from cbam_mmdet.datasets.formats.content import (
    Found,
    LabelledImage,
    around_turned,
    by_split,
    class_name,
    displayed_size,
    size_from,
    take_strays,
)
from cbam_mmdet.datasets.formats.folder import Folder, read_text, split_of
from cbam_mmdet.datasets.inputs import IMAGES
from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.text import abridge, brief

STYLE = 'Pascal VOC'


def read_voc_folder(folder: Folder, roots: dict[Path, ET.Element]) -> Found:
    """Read the XML files of a folder.

    A file's image is the one that it names, if that has the file's own name, else the one with the file's name. Image
    sets (`ImageSets/Main/train.txt`, ...) make the splits where there are any, else folders do that are called so.

    Args:
        folder: the folder.
        roots: its XML files in VOC's format, each with its root.

    Raises:
        UserError: for a malformed file, or if the image of none of them is there.
    """
    sets = _image_sets(folder)
    years = {year for year, _ in sets}
    images, lost, others, unlisted = [], [], [], 0
    for path, root in roots.items():
        split = _in_its_year(path, years, sets)
        if sets and split is None:
            unlisted += 1
            continue
        near = split_of(path.relative_to(folder.root).as_posix())
        given = (root.findtext('filename') or '').strip()
        name, is_another = folder.find_own_image(given, path, near)
        if name is None:
            lost.append(path)
        else:
            images.append(_image(folder, path, root, name, split))
            if is_another:
                others.append(f'{path.name} names {given}')
    lost += take_strays(images)
    if not images:
        raise UserError(f'{folder.root}: the images of its {len(roots)} .xml are not there ({folder.counts()})')
    classes = sorted({label for image in images for label, _, _ in image.objects})
    found = Found(STYLE, by_split(images, classes, split_of), [*roots])
    if sets:
        found.style += ' with image sets'
        if unlisted:
            found.notes.append(f'{unlisted} annotated images are in no image set, and are left out')
        absent = len(sets) - (len(roots) - unlisted)
        if absent:
            raise UserError(f'{folder.root}: {absent} images of the image sets have no .xml')
    from_zero = sum(min(corners[:2]) < 0 for image in images for _, corners, _ in image.objects)
    if from_zero:
        found.notes.append(
            f'{from_zero} boxes begin at pixel 0 or before, and VOC counts from 1: if these files count from 0, all '
            'boxes are a pixel too far to the left and top'
        )
    if others:
        found.notes.append(
            f'{len(others)} .xml name another image than that of their own name, which is taken: {abridge(others, 3)}'
        )
    if lost:
        found.notes.append(f'{len(lost)} .xml are left out, whose image is not there: the first is {lost[0]}')
    without = len(folder.images) - len(images) - len(lost)
    if without > 0 and not sets:
        found.notes.append(f'{without} images without an .xml are left out')
    return found


def _image(folder: Folder, path: Path, root: ET.Element, name: str, split: str | None) -> LabelledImage:
    try:
        width, height = root.findtext('size/width'), root.findtext('size/height')
        known = width and height and (float(width), float(height)) != (0, 0)  # some tools write 0
        size = size_from(width, height) if known else displayed_size(folder.root / name)
        # VOC's pixels count from 1, and the last one belongs to the box.
        objects = [
            (
                class_name(o.name),
                around_turned((o.box[0] - 1, o.box[1] - 1, o.box[2], o.box[3]), o.degrees),
                o.difficult,
            )
            for o in voc_objects(root)
        ]
    except (TypeError, ValueError) as error:
        raise UserError(f"annotation file {path} is not in Pascal VOC's format: {brief(error)}.") from error
    return LabelledImage(name, size, objects, path, split, split_of(path.relative_to(folder.root).as_posix()))


def _image_sets(folder: Folder) -> dict[tuple[Path, str], str]:
    """The split of each image, by the folder that holds ImageSets (a year's) and its name without suffix.

    The sets are trainval and test if both are there in any year, else train and val.
    """
    years: dict[Path, dict[str, Path]] = defaultdict(dict)
    # Beside Main/ there are sets of other tasks: Segmentation/, Layout/, Action/. A set in Main/ is taken before one
    # of its name in ImageSets/ itself.
    for path in sorted(folder.files['.txt'], key=lambda path: path.parent.name == 'Main'):
        of_boxes = path.parent.name == 'Main' and path.parent.parent.name == 'ImageSets'
        if of_boxes or path.parent.name == 'ImageSets':
            name = 'val' if path.stem == 'valid' else path.stem
            years[path.parent.parent if of_boxes else path.parent][name] = path
    stems = {path.stem for path in folder.files['.xml']}
    tested = any('test' in files and ('trainval' in files or 'train' not in files) for files in years.values())
    splits: dict[tuple[Path, str], str] = {}
    for year, files in years.items():
        names = dict(train='trainval', val='test')
        if not tested:
            names = dict(train='train' if 'train' in files else 'trainval', val='val', test='test')
        for split, path in ((split, files.get(name)) for split, name in names.items()):
            for line in read_text(path).splitlines() if path else ():
                name = _without_more(line.strip(), stems)
                if name and splits.setdefault((year.parent, name), split) != split:
                    raise UserError(f'{path}: image {name} is in the {splits[year.parent, name]} set, too')
    return splits


def _without_more(name: str, stems: set[str]) -> str:
    """The name in a line of an image set, without a folder, a suffix or a class's 1 or -1 (VOC's lists of a class)."""
    plain = [name, PurePosixPath(name).name]
    plain += [found[1] for text in plain[:2] if (found := re.fullmatch(r'(.*\S)\s+-?[01]', text))]
    plain += [PurePosixPath(text).stem for text in plain if PurePosixPath(text).suffix.lower() in IMAGES]
    return next((text for text in plain if text in stems), plain[-1])


def _in_its_year(path: Path, years: set[Path], sets: dict[tuple[Path, str], str]) -> str | None:
    """The split of an .xml by the image sets of the nearest folder around it that has any."""
    year = next((folder for folder in path.parents if folder in years), None)
    return sets.get((year, path.stem)) if year else None
