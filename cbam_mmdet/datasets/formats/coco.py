"""COCO's annotation files, wherever they stand: COCO's own layout, Roboflow's, or one file beside an image folder."""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

from cbam_mmdet.datasets.checks import complete, require_coco, require_distinct_names
from cbam_mmdet.datasets.formats.content import Found, one_split, part, rotation_of, upright
from cbam_mmdet.datasets.formats.folder import Folder, split_of, split_of_file
from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.text import abridge, brief

STYLE = 'COCO'
OF_OTHER_TASKS = ('person_keypoints', 'captions', 'stuff', 'panoptic', 'image_info')


def is_coco(content: object) -> bool:
    keys = ('images', 'annotations', 'categories')
    return isinstance(content, dict) and all(isinstance(content.get(key), list) for key in keys)


def read_coco_files(folder: Folder, contents: dict[Path, dict], chosen: dict[str, Path] | None = None) -> Found:
    """Read COCO's files. Each file's own ids stay as they are.

    Args:
        folder: the folder.
        contents: its files in this format, each with its content.
        chosen: the file of each split, if the user named them. Else the files' names and folders say it.

    Raises:
        UserError: for several files of a split, for categories that differ between splits, and if no image is there.
    """
    files = chosen or _choose(folder, contents)
    notes: list[str] = []
    splits = {split: _with_places(folder, path, contents[path], notes) for split, path in files.items()}
    empty = _empty_parent([*splits.values()])
    if empty is not None:
        for content in splits.values():
            content['categories'] = [it for it in content['categories'] if not _is_parent(it, empty)]
        notes.append(f'category {empty!r} is left out: it has no box, and the others belong to it (Roboflow adds such)')
    _require_same_categories(files, splits)
    for split, content in splits.items():
        require_distinct_names(str(files[split]), [category['name'] for category in content['categories']])
    if (
        not chosen
        and [*splits] == ['train']
        and split_of_file(files['train'].relative_to(folder.root).as_posix()) is None
    ):
        splits = _by_folders(splits['train'])
    return Found(STYLE, splits, [*files.values()], notes)


def _by_folders(content: dict) -> dict[str, dict]:
    """The content of one file divided by the folders of its images, where these name splits.

    Raises:
        UserError: if they do for some of the images only.
    """
    named = {image['id']: one_split(image['file_name'], split_of) for image in content['images']}
    splits = set(named.values())
    if len(splits) < 2:
        return dict(train=content)
    if None in splits:
        first = next(image['file_name'] for image in content['images'] if named[image['id']] is None)
        raise UserError(
            f'some images are in folders of splits ({", ".join(sorted(filter(None, splits)))}), {first} and others '
            'are not: move them into one, or all images into one folder'
        )
    return {split: part(content, lambda image_id, split=split: named[image_id] == split) for split in sorted(splits)}


def _choose(folder: Folder, contents: dict[Path, dict]) -> dict[str, Path]:
    paths = [path for path in contents if not path.stem.startswith(OF_OTHER_TASKS)] or [*contents]
    if len(paths) == 1:
        relative = paths[0].relative_to(folder.root).as_posix()
        return {split_of_file(relative) or 'train': paths[0]}
    files: dict[str, Path] = {}
    for path in paths:
        split = split_of_file(path.relative_to(folder.root).as_posix())
        if split is None or split in files:
            listed = ', '.join(str(path.relative_to(folder.root)) for path in paths[:8])
            raise UserError(
                f"{folder.root} holds {len(paths)} annotation files in COCO's format ({listed}), and their names do "
                'not say which to take: choose with --train-ann FILE and --val-ann FILE'
            )
        files[split] = path
    return files


def _with_places(folder: Folder, path: Path, content: dict, notes: list[str]) -> dict[str, list]:
    """A content whose images are named relative to the folder. Images that are not there are left out."""
    content, _ = complete(content)
    require_coco(str(path), content)
    # The split of the file's own name, whatever it is used for.
    split = split_of_file(path.relative_to(folder.root).as_posix()) if folder.root in path.parents else None
    images, lost = _find_images(folder, path, content['images'], split)
    if not images and split:  # all of them in the folder of another split, as in a part that somebody took from it
        images, lost = _find_images(folder, path, content['images'], None)
        if images:
            place = PurePosixPath(images[0]['file_name']).parent
            notes.append(f'{path.name} is for the {split} split by its name, and its images are in {place}')
    if not images:
        first = f' (the first: {brief(lost[0]["file_name"])})' if lost else ''
        raise UserError(f'none of the {len(lost)} images that {path} lists is in {folder.root}{first}')
    if lost:
        names = brief(', '.join(image['file_name'] for image in lost[:3]))
        notes.append(f'{len(lost)} images that {path.name} lists are not there and are left out: {names}')
    twice = [name for name, count in Counter(image['file_name'] for image in images).items() if count > 1]
    if twice:
        notes.append(f'{path.name} lists {len(twice)} files as several images: {abridge(twice)}')
    ids = {image['id'] for image in images}
    annotations = [annotation for annotation in content['annotations'] if annotation['image_id'] in ids]
    turned = sum(rotation_of(annotation) != 0 for annotation in annotations)
    if turned:
        notes.append(
            f'{turned} boxes of {path.name} are turned (CVAT writes by how much): the box around each is taken'
        )
    return dict(content, images=images, annotations=[*map(upright, annotations)])


def _find_images(
    folder: Folder, path: Path, images: list[dict], split: str | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The images that are in the folder, named relative to it, and those that are not."""
    found, lost = [], []
    near = _nearest(folder, path, images, split)
    for image in images:
        name = image['file_name']
        place = f'{near}/{name}' if near and f'{near}/{name}' in folder else name if name in folder else None
        place = place or folder.find_image(name, path, split)
        (found if place else lost).append(dict(image, file_name=place or name))
    return found, lost


def _nearest(folder: Folder, path: Path, images: list[dict], split: str | None) -> str | None:
    """Where names are in several folders, the one that has most of a file's images.

    Of those that have nearly as many (one may lack an image), the one nearest to the file.

    Raises:
        UserError: if several are equally near.
    """
    called = {name: folder.images_called(name) for name in (image['file_name'] for image in images)}
    name = max(called, key=lambda name: len(called[name]), default='')
    if not called or len(called[name]) < 2:
        return None

    def place(name: str, found: str) -> str:
        return found[: -len(name)].rstrip('/')

    counts = Counter(place(name, found) for name, files in called.items() for found in files)
    most = max(counts.values())
    nearest = folder.nearest([f for f in called[name] if 4 * counts[place(name, f)] >= 3 * most], name, path, split)
    return nearest and place(name, nearest)


def _empty_parent(contents: list[dict]) -> str | None:
    """The category that Roboflow puts before all others: they name it as their supercategory, and it has no box."""
    categories: list[dict[str, Any]] = contents[0]['categories']
    parents = {str(category.get('supercategory')) for category in categories}
    used = {annotation['category_id'] for content in contents for annotation in content['annotations']}
    for category in categories:
        is_parent = _is_parent(category, category['name']) and parents == {'none', category['name']}
        if is_parent and len(categories) > 1 and category['id'] not in used:
            return category['name']
    return None


def _is_parent(category: dict[str, Any], name: str) -> bool:
    return category['name'] == name and category.get('supercategory') == 'none'


def _require_same_categories(files: dict[str, Path], splits: dict[str, dict]) -> None:
    names = {split: [category['name'] for category in content['categories']] for split, content in splits.items()}
    first = next(iter(names))
    for split in names:
        if names[split] != names[first]:
            raise UserError(
                f'{files[first]} has the categories [{abridge(names[first], 8, quoted=True)}], and {files[split]} has '
                f'[{abridge(names[split], 8, quoted=True)}]: a detector numbers them by their order, so all splits '
                'need the same in the same order'
            )
