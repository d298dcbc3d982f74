"""YOLO's text files, as Ultralytics (data.yaml) and Darknet (obj.names) lay them out.

A line is `class x_center y_center width height`, or `class x1 y1 x2 y2 ...` for the corners of a polygon, whose hull is
taken. The coordinates are shares of the image's width and height (https://docs.ultralytics.com/datasets/detect/). Where
data.yaml has a `kpt_shape`, the numbers of the keypoints follow the box, and are left out.
"""

from __future__ import annotations

import contextlib
import os.path as osp
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

import yaml

from cbam_mmdet.compat.yaml import load_yaml
from cbam_mmdet.datasets.formats.content import Found, LabelledImage, by_split, class_name, displayed_size
from cbam_mmdet.datasets.formats.folder import Folder, read_text, split_of
from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.text import brief

SLACK = 0.01  # how far a coordinate may lie beyond the image, as Ultralytics has it
LABELS = ('labels', 'Labels', 'LABELS')
LISTS = dict(train='train', val='val', valid='val', test='test')  # Darknet's, without a .data file that names them
NAMES = ('classes.txt', 'obj.names', 'labels.txt', 'names.txt')


def data_yaml(folder: Folder) -> tuple[Path, dict] | None:
    """The file that describes a data set of Ultralytics', and its content. None if there is none.

    Raises:
        UserError: if there are several of them.
    """
    files = [path for path in (*folder.files['.yaml'], *folder.files['.yml']) if path.parent == folder.root]
    found = [(path, content) for path in files if _describes_data(content := _yaml(path))]
    if len(found) > 1:
        raise UserError(
            f'{folder.root} holds several data sets of YOLO: {", ".join(path.name for path, _ in found)}. Leave one in '
            'the folder'
        )
    return found[0] if found else None


def deeper_yaml(folder: Folder) -> Path | None:
    """A file deeper in the folder that describes a data set of Ultralytics'."""
    for path in (*folder.files['.yaml'], *folder.files['.yml']):
        with contextlib.suppress(UserError):
            if path.parent != folder.root and _describes_data(_yaml(path)):
                return path
    return None


def _describes_data(content: object) -> bool:
    return isinstance(content, dict) and 'names' in content and ('train' in content or 'val' in content)


def _yaml(path: Path) -> object:
    try:
        return load_yaml(read_text(path))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f'{path} is not valid YAML, or more than data: {brief(error)}') from error


def read_ultralytics(folder: Folder, path: Path, content: dict) -> Found:
    """Read a data set of Ultralytics' layout.

    An image's labels are in the file of its name under `labels/` in place of `images/`, or beside it. An image without
    such a file has no objects.

    Args:
        folder: the folder.
        path: the .yaml.
        content: what it holds.

    Raises:
        UserError: for a malformed file, and for a split whose images are not there.
    """
    classes = _names(content['names'], path)
    count = content.get('nc')
    if count is not None and count != len(classes):
        raise UserError(f'{path}: nc is {brief(repr(count))}, and names has {len(classes)} classes')
    names = {
        split: _images_of(folder, content[split], content.get('path'), path, split)
        for split in ('train', 'val', 'test')
        if content.get(split)
    }
    absent = [split for split, listed in names.items() if not listed]  # of a test split alone: exports name it always
    names = {split: listed for split, listed in names.items() if listed}
    same = _make_disjoint(names, path)
    listed = [(name, split) for split, listed in names.items() for name in listed]
    found = _read(folder, classes, listed, _keypoints(content.get('kpt_shape'), path))
    found.style, found.sources = f'YOLO ({path.name})', [path, *found.sources]
    if absent:
        found.notes.append(f'{path.name} names a test split that is not there')
    lists = [other for other in folder.files['.txt'] if other.name in NAMES]
    others = [other for other in lists if (*filter(None, map(str.strip, read_text(other).splitlines())),) != classes]
    if others:
        found.notes.append(f'{others[0].name} lists other classes, or another order: {path.name} is taken')
    if same:
        content = found.splits['train']
        found.splits['val'] = content
        found.notes.append(f'{path.name} validates on the images that it trains on')
    return found


def names_file(folder: Folder) -> Path | None:
    """The file that lists the classes of a Darknet data set, one a line: the one that a .data file names, else any.

    Raises:
        UserError: if several list other classes.
    """
    for path in folder.files['.data']:
        place = _place(folder, _data_file(path).get('names', ''), '')
        if place is not None and place.is_file():
            return place
    listed = [path for suffix in ('.txt', '.names') for path in folder.files[suffix] if path.name in NAMES]
    listed += [path for path in folder.files['.names'] if path not in listed]
    if len({read_text(path).strip() for path in listed}) > 1:
        names = ', '.join(str(path.relative_to(folder.root)) for path in listed[:4])
        raise UserError(
            f'{folder.root} holds several lists of classes that differ ({names}), and their order numbers the labels: '
            'leave one in the folder, or name it in a .data file (names = FILE)'
        )
    return next(iter(listed), None)


def _data_file(path: Path) -> dict[str, str]:
    """The settings of Darknet's .data file."""
    pairs = (line.partition('=') for line in read_text(path).splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def read_darknet(folder: Folder, path: Path) -> Found:
    """Read the labels beside the images, or in `labels/` in place of `images/`, with the classes of a text file.

    Args:
        folder: the folder.
        path: the file with a class a line.

    Raises:
        UserError: for a malformed file, and if no image has labels.
    """
    classes = _names(read_text(path).strip().splitlines(), path)
    listed, same = _listed_by_darknet(folder)
    labelled = listed or [(name, None) for name in folder.images if _labels_of(folder, name)]
    if not labelled:
        raise UserError(f'{folder.root}: none of its {len(folder.images)} images has a .txt of its name')
    found = _read(folder, classes, labelled)
    found.style, found.sources = f'YOLO ({path.name})', [path, *found.sources]
    if same:
        found.notes.append('the list to validate on has the training images, so it is left out')
    without = len(folder.images) - len(labelled)
    if without:
        found.notes.append(f'{without} images {"that no list names" if listed else "without a .txt"} are left out')
    return found


def _listed_by_darknet(folder: Folder) -> tuple[list[tuple[str, str | None]], bool]:
    """The images, each with its split, of the lists that a `.data` file names, or of train.txt.

    Returns:
        The images, maybe none, and whether those to validate on are those to train on, and left out.
    """
    for path in folder.files['.data']:
        values = _data_file(path)
        splits = {'train': values.get('train'), 'val': values.get('valid') or values.get('val')}
        splits['test'] = values.get('test')
        splits = {split: given for split, given in splits.items() if given}
        if 'train' in splits and (len(splits) > 1 or _place(folder, splits['train'], '')):
            names = {split: _images_of(folder, given, None, path, split) for split, given in splits.items()}
            same = _make_disjoint(names, path)
            return _with_splits(names), same
    lists = {path.stem: path for path in folder.files['.txt'] if path.stem in LISTS and not folder.has_stem(path.stem)}
    if 'train' not in lists:
        return [], False
    names: dict[str, list[str]] = {}
    for stem, path in lists.items():
        names.setdefault(LISTS[stem], []).extend(_listed(folder, path))
    same = _make_disjoint(names, lists['train'])
    return _with_splits(names), same


def _make_disjoint(names: dict[str, list[str]], path: Path) -> bool:
    """Leave out a split that is another one.

    Args:
        names: the images of each split, changed in place.
        path: the file that names them.

    Returns:
        Whether the validation split was the training split, as in Ultralytics' small examples.

    Raises:
        UserError: if two splits share some of their images.
    """
    same = 'train' in names and names.get('val') == names['train']
    if same:
        del names['val']
    if names.get('test') in (names.get('val'), names.get('train')):
        names.pop('test', None)
    for first, second in (('train', 'val'), ('train', 'test'), ('val', 'test')):
        common = set(names.get(first, ())) & set(names.get(second, ()))
        if common:
            raise UserError(f'{path}: {len(common)} images are in {first} and in {second}: the first is {min(common)}')
    return same


def _with_splits(names: dict[str, list[str]]) -> list[tuple[str, str | None]]:
    """Each image with its split. Images to train on alone have none: some of them will be held out."""
    return [
        (name, split if len(names) > 1 else None) for split, listed in names.items() for name in dict.fromkeys(listed)
    ]


def _listed(folder: Folder, path: Path) -> list[str]:
    """The images that a text file lists, one a line.

    Raises:
        UserError: for one that is not in the folder.
    """
    names = []
    for line in filter(None, map(str.strip, read_text(path).splitlines())):
        name = folder.find_image(line, path)
        if name is None:
            raise UserError(f'{path} lists {brief(line)}, and the folder {folder.root} has no such image')
        names.append(name)
    return [*dict.fromkeys(names)]  # Darknet's users repeat an image that is to count more


def _read(
    folder: Folder, classes: tuple[str, ...], names: Iterable[tuple[str, str | None]], keypoints: int = 0
) -> Found:
    images, sources, polygons, without = [], [], 0, 0
    labels_of: dict[str, Path | None] = {}
    for name, split in names:
        labels = labels_of[name] = _labels_of(folder, name)
        size = displayed_size(folder.root / name)
        objects = []
        if labels:
            sources.append(labels)
            for number, line in enumerate(read_text(labels).splitlines(), start=1):
                if line.strip():
                    try:
                        label, corners, polygon = _object(line, classes, keypoints)
                    except ValueError as error:
                        raise UserError(
                            f"annotation file {labels}, line {number} is not in YOLO's format: {brief(error)}."
                        ) from error
                    polygons += polygon
                    objects.append((label, [v * size[i % 2] for i, v in enumerate(corners)], False))
        else:
            without += 1
        images.append(LabelledImage(name, size, objects, labels or folder.root / name, split))
    if not sources:
        raise UserError(
            f'{folder.root}: none of its {len(images)} images has a label file: expected labels/NAME.txt for '
            'images/NAME.jpg, or NAME.txt beside it'
        )
    found = Found('YOLO', by_split(images, classes, split_of), sources)
    if keypoints:
        found.notes.append('keypoints are left out')
    if polygons:
        found.notes.append(f'{polygons} polygons are taken as the boxes around them')
    if without:
        found.notes.append(f'{without} images have no label file: they are taken for images without objects')
    alone = _labels_alone(folder, labels_of)
    if alone:
        found.notes.append(f'{len(alone)} label files belong to no image: the first is {alone[0]}')
    return found


def _labels_alone(folder: Folder, known: Mapping[str, Path | None]) -> list[str]:
    """The files in folders of labels that are those of no image, relative to the folder.

    Args:
        folder: with its images.
        known: the label files of some of them.
    """
    texts = [(path, path.relative_to(folder.root)) for path in folder.files['.txt']]
    labels = {path: name for path, name in texts if {*name.parts[:-1]} & {*LABELS} and path.name not in NAMES}
    left = labels.keys() - set(known.values())
    left -= {_labels_of(folder, name) for name in folder.images if name not in known} if left else set()
    return sorted(labels[path].as_posix() for path in left)


def _keypoints(shape: object, path: Path) -> int:
    """How many numbers of keypoints follow each box, by `kpt_shape`: their count, and 2 or 3 numbers each."""
    if shape is None:
        return 0
    if isinstance(shape, list) and len(shape) == 2 and type(shape[0]) is int and shape[0] > 0 and shape[1] in (2, 3):
        return shape[0] * shape[1]
    raise UserError(f'{path}: kpt_shape is {brief(repr(shape))}, in place of the number of keypoints and 2 or 3')


def _object(line: str, classes: tuple[str, ...], keypoints: int) -> tuple[str, list[float], bool]:
    """The class, x1, y1, x2, y2 as shares of the image, and whether it was a polygon."""
    label, *numbers = line.split()
    values = [float(number) for number in numbers]
    if keypoints:
        if len(values) not in (4, 4 + keypoints):
            raise ValueError(f'{len(values)} numbers behind the class, in place of 4 and {keypoints} of keypoints')
        values = values[:4]
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        raise ValueError(f'{len(values)} numbers behind the class, in place of 4 for a box or the x, y of a polygon')
    if not all(-SLACK <= value <= 1 + SLACK for value in values):
        raise ValueError('a coordinate is not a share of the image, from 0 to 1')
    index = float(label)
    if not index.is_integer() or not 0 <= index < len(classes):
        raise ValueError(f'class {label} is not among the {len(classes)} classes, counted from 0')
    if len(values) == 4:
        x, y, width, height = values
        return classes[int(index)], [x - width / 2, y - height / 2, x + width / 2, y + height / 2], False
    xs, ys = values[::2], values[1::2]
    return classes[int(index)], [min(xs), min(ys), max(xs), max(ys)], True


def _names(given: object, path: Path) -> tuple[str, ...]:
    """The classes in their order, from a list or from a mapping of the numbers 0, 1, ... to names."""
    try:
        if isinstance(given, dict):
            numbered = {int(number) if isinstance(number, str) else number: name for number, name in given.items()}
            if sorted(numbered) != list(range(len(given))):
                raise ValueError('the numbers of the classes are not 0, 1, ...')
            given = [numbered[i] for i in range(len(given))]
        if not isinstance(given, list):
            raise ValueError(f'{given!r} is not a list of classes')
        booleans = [name for name in given if isinstance(name, bool)]
        if booleans:
            raise ValueError('YAML reads yes, no, on and off as true and false: put quotes around such a class')
        names = [class_name(str(name) if type(name) is int else name) for name in given]
        if not names or len(set(names)) < len(names):
            raise ValueError('each class needs a name of its own')
    except (TypeError, ValueError) as error:
        raise UserError(f'{path}: the names of the classes cannot be read: {brief(error)}') from error
    return tuple(names)


def _images_of(folder: Folder, given: object, base: object, path: Path, split: str) -> list[str]:
    """The images that `train`, `val` or `test` of a .yaml means: folders, or text files that list images."""
    names: dict[str, None] = {}
    for entry in given if isinstance(given, list) else [given]:
        if not isinstance(entry, str) or '\0' in entry:
            raise UserError(f'{path}: {split} is {brief(repr(entry))}, in place of the path of a folder')
        place = _place(folder, entry, base if isinstance(base, str) else '')
        if place is None and split == 'test':
            return []
        if place is None:
            raise UserError(
                f'{path}: {split} is {brief(repr(entry))}, and there is no such folder or list of images in '
                f'{folder.root} ({folder.counts()})'
            )
        if place.is_file():
            names |= dict.fromkeys(_listed(folder, place))
        else:
            below = place.relative_to(folder.root).as_posix()
            names |= dict.fromkeys(n for n in folder.images if below == '.' or n.startswith(f'{below}/'))
    if not names:
        raise UserError(f'{path}: {split} is {brief(repr(given))}, where there is no image')
    return list(names)


def _place(folder: Folder, entry: str, base: str) -> Path | None:
    """Where an entry of a .yaml leads. Its `path`, and a leading '..', often belong to another machine.

    Then the last parts of the entry are looked for in the folder, but not without the one that names the split.
    """
    parts = PurePosixPath(entry.replace('\\', '/')).parts
    while parts and parts[0] in ('..', '.', '/'):
        parts = parts[1:]
    split = split_of('/'.join((*parts, 'image')))
    tails = [parts[i:] for i in range(len(parts)) if split_of('/'.join((*parts[i:], 'image'))) == split]
    root = Path(osp.normpath(folder.root))
    for place in (folder.root / base / entry, folder.root / entry, *(folder.root.joinpath(*tail) for tail in tails)):
        normal = Path(osp.normpath(place))
        try:
            if entry and normal.exists() and (normal == root or root in normal.parents):
                return folder.root / normal.relative_to(root)
        except OSError:  # a name that is too long
            continue
    return None


def _labels_of(folder: Folder, name: str) -> Path | None:
    """The label file of an image: below `labels` in place of a folder `images` on its path, else beside it."""
    path = PurePosixPath(name)
    places = []
    for label in (path.with_suffix('.txt'), path.with_suffix('.TXT')):
        places.append(label)
        for i, part in enumerate(label.parts[:-1]):
            if part.lower() == 'images':
                places[:0] = [PurePosixPath(*label.parts[:i], labels, *label.parts[i + 1 :]) for labels in LABELS]
    return next((folder.root / place for place in places if (folder.root / place).is_file()), None)
