"""The files of a folder, gathered once, and the rules by which folders name splits."""

from __future__ import annotations

import json
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from xml.etree import ElementTree as ET

from cbam_mmdet.datasets.inputs import IMAGES, files_below
from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.text import brief

SPLIT_NAMES = {
    **dict.fromkeys(('train', 'training', 'trainval'), 'train'),
    **dict.fromkeys(('val', 'valid', 'validation', 'dev'), 'val'),
    **dict.fromkeys(('test', 'testing'), 'test'),
}
NOT_SPLITS = ('images', 'image', 'imgs', 'img', 'set', 'data', 'split')  # words beside: train_images, val_set

MASKS = {'mask', 'masks', 'segmentationclass', 'segmentationobject', 'segmentation', 'segmentations'}

# The keys of annotations in JSON that decide of images, boxes and classes.
READ = {
    'images', 'annotations', 'categories', 'id', 'image_id', 'category_id', 'file_name', 'name', 'bbox', 'iscrowd',
    'segmentation', 'width', 'height', 'shapes', 'points', 'label', 'group_id', 'shape_type', 'imagePath',
}  # fmt: skip


class Folder:
    """A folder's images and the files that may be annotations. Hidden files and folders are left out.

    So are images in folders called `masks/`, `SegmentationClass/` and the like, if most have the names of others.

    Args:
        root: the folder.

    Raises:
        UserError: if it cannot be read.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.images: list[str] = []
        self.files: dict[str, list[Path]] = defaultdict(list)  # by suffix: .json, .xml, .txt, ...
        for path in filter(_is_file, files_below(self.root)):
            suffix = path.suffix.lower()
            if suffix in IMAGES:
                self.images.append(path.relative_to(self.root).as_posix())
            else:
                self.files[suffix].append(path)
        self._known = set(self.images)
        self.masks = self._masks()
        self.images = [image for image in self.images if PurePosixPath(image).parent.as_posix() not in self.masks]
        self._by_name: dict[str, list[str]] = defaultdict(list)
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        parents = {PurePosixPath(image).parts[:-1] for image in self.images}
        self._tails = {parts[i:] for parts in parents for i in range(len(parts))}
        self._moved: dict[tuple[str, str], None] = {}
        for image in self.images:
            self._by_name[PurePosixPath(image).name].append(image)
            self._by_stem[PurePosixPath(image).stem].append(image)

    def find_image(self, named: str, source: Path, split: str | None = None) -> str | None:
        """The image that an annotation file means, relative to the folder, or None if it is not there.

        Args:
            named: the path that the file gives, from this or another system. The image is the one that shares most of
                its last parts; without suffix it is compared with the names without suffix. An image in a folder of
                another name is taken only if the folder that is named has no images at all.
            source: the annotation file.
            split: prefer an image of this split, if several have the name.

        Raises:
            UserError: if several images may be meant.
        """
        parts = PureWindowsPath(named).parts if '\\' in named else PurePosixPath(named).parts
        if not parts:
            return None
        relative = '/'.join(part for part in parts if part not in ('.', '..') and not part.endswith((':', ':\\')))
        here = source.parent.relative_to(self.root).as_posix() if source.parent != self.root else ''
        for direct in (f'{here}/{relative}' if here else relative, relative):
            if direct in self._known:
                return direct
        folders, name = relative.split('/')[:-1], parts[-1]
        candidates = self._by_name.get(name) or self._by_stem.get(name) or []
        for tail in (tuple(folders[i:]) for i in range(len(folders))):
            if tail in self._tails:  # the folder that is meant is here, maybe without the image
                deeper = [image for image in candidates if PurePosixPath(image).parts[:-1][-len(tail) :] == tail]
                return self.nearest(deeper, named, source, split)
        found = self.nearest(candidates, named, source, split)
        if found and folders:
            self._moved[folders[-1], PurePosixPath(found).parent.as_posix()] = None
        return found

    def find_own_image(self, named: str, source: Path, split: str | None = None) -> tuple[str | None, bool]:
        """The image of an annotation file for one image, and whether the file names another one that is there, too.

        It is the one that the file names, if that has the file's own name: masks and the like may have the same name
        with another suffix. Else it is the one with the file's name, and else the one that it names.

        Args:
            named: the path that the file gives.
            source: the annotation file.
            split: see `find_image`.

        Raises:
            UserError: if several images may be meant.
        """
        stem = (PureWindowsPath(named) if '\\' in named else PurePosixPath(named)).stem
        own = self.find_image(source.stem, source, split) if stem != source.stem else None
        return own or self.find_image(named, source, split) or self.find_image(source.stem, source, split), bool(
            own and self.has_stem(stem)
        )

    def _masks(self) -> dict[str, int]:
        """The folders called so whose images have the names of others, with the number of their images."""
        by_parent: dict[str, list[str]] = defaultdict(list)
        for image in self.images:
            by_parent[PurePosixPath(image).parent.as_posix()].append(PurePosixPath(image).stem)
        called_so = {place for place in by_parent if MASKS & set(place.lower().split('/'))}
        others = {stem for place, stems in by_parent.items() if place not in called_so for stem in stems}
        return {
            place: len(by_parent[place])
            for place in sorted(called_so)
            if 2 * sum(stem in others for stem in by_parent[place]) >= len(by_parent[place])
        }

    def moved(self) -> list[str]:
        """A line for each folder that the annotations name and that is not there, and for each folder of masks."""
        return [
            f'no images in a folder {named}/, which the annotations name: those of the same names in {place}/ are taken'
            for named, place in self._moved
        ] + [f'{count} images in {place}/ are taken for masks, and left out' for place, count in self.masks.items()]

    def nearest(self, images: list[str], named: str, source: Path, split: str | None) -> str | None:
        """Of several images the one that an annotation file means: of its split, then nearest to it in the folder.

        None if there is none, or if all are of another split.

        Raises:
            UserError: if several are equally near.
        """
        here = source.parent.relative_to(self.root).parts if self.root in source.parents else ()

        def rank(image: str) -> tuple[bool, int, bool]:
            folders = PurePosixPath(image).parts[:-1]
            shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(folders, here, strict=False)))
            return _split_by_words(folders) == split, shared, source.stem in folders

        allowed = {split, None}
        images = [i for i in images if not split or _split_by_words(PurePosixPath(i).parts[:-1]) in allowed]
        ranks = [rank(image) for image in images]
        highest = max(ranks, default=None)
        best = [image for image, its_rank in zip(images, ranks, strict=True) if its_rank == highest]
        if len(best) > 1:
            raise UserError(
                f'{source} names the image {named}, and the folder has {len(best)} of that name '
                f'({", ".join(best[:3])}): give them different names, or a split of its own to each folder'
            )
        return best[0] if best else None

    def images_called(self, name: str) -> list[str]:
        """The images, relative to the folder, whose path ends with this name, which may hold folders."""
        if '/' in name and name in self._known:
            return [name]
        found = self._by_name.get(PurePosixPath(name).name, ())
        return [image for image in found if f'/{image}'.endswith(f'/{name}')]

    def has_stem(self, stem: str) -> bool:
        """Whether an image has this name without suffix."""
        return stem in self._by_stem

    def __contains__(self, relative: str) -> bool:
        return relative in self._known

    def counts(self) -> str:
        """How many files of each kind there are, in words."""
        kinds = Counter({suffix: len(self.files.get(suffix, [])) for suffix in ('.xml', '.txt', '.json', '.yaml')})
        kinds['.yaml'] += len(self.files.get('.yml', []))
        others = sum(map(len, self.files.values())) - sum(kinds.values())
        words = [f'{len(self.images)} images', *(f'{count} {suffix}' for suffix, count in kinds.items())]
        return f'{", ".join(words)} and {others} other files'


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:  # a link that leads nowhere
        return False


def split_of(relative: str) -> str | None:
    """The split that a path names by one of its folders (train, val2017, test_images). The last one decides."""
    for part in reversed(PurePosixPath(relative).parts[:-1]):
        words = [word for word in re.split('[^a-z]+', part.lower()) if word and word not in NOT_SPLITS]
        split = SPLIT_NAMES.get(words[0]) if len(words) == 1 else None
        if split:
            return split
    return None


def _split_by_words(names: Sequence[str]) -> str | None:
    """The split that the last of some names has as a word: train_images, val2017, test."""
    for name in reversed(names):
        named = {SPLIT_NAMES[word] for word in re.split('[^a-z]+', name.lower()) if word in SPLIT_NAMES}
        if len(named) == 1:
            return named.pop()
    return None


def split_of_file(relative: str) -> str | None:
    """The split that an annotation file names: by a word of its own name, else by one of its folders."""
    return _split_by_words([PurePosixPath(relative).stem]) or split_of(relative)


def read_text(path: Path, encoding: str = 'utf-8-sig') -> str:
    """A text file in UTF-8, by default with or without a byte order mark.

    Raises:
        UserError: if it is none, or cannot be read.
    """
    try:
        return path.read_text(encoding=encoding)
    except UnicodeDecodeError as error:
        raise UserError(f'annotation file {path} is not a text file in UTF-8: {error.reason}.') from error
    except OSError as error:
        raise UserError(f'annotation file {path} cannot be read: {error.strerror}.') from error


def read_json(path: Path, encoding: str = 'utf-8-sig') -> Any:
    """The content of a JSON file.

    Raises:
        UserError: if it is none, or has two values under one key, of which a reader would take the last.
    """

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            for key, value in pairs:
                if key in READ and made[key] != value:
                    raise UserError(
                        f'annotation file {path} has the key {brief(key)!r} twice in one object, with different '
                        'values: remove one.'
                    )
        return made

    try:
        return json.loads(read_text(path, encoding), object_pairs_hook=distinct)
    except RecursionError as error:
        raise UserError(f'annotation file {path} is nested too deeply to be one.') from error
    except json.JSONDecodeError as error:
        raise UserError(
            f'annotation file {path} is not valid JSON (line {error.lineno}, column {error.colno}: {error.msg}). '
            'It may be cut off: compare its size with the original.'
        ) from error
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f'annotation file {path} cannot be read: {brief(error)}.') from error


def read_xml(path: Path) -> ET.Element:
    """The root of an XML file.

    Raises:
        UserError: if it is none.
    """
    try:
        return ET.parse(path).getroot()
    except (ET.ParseError, ValueError, LookupError, OSError) as error:
        raise UserError(f'annotation file {path} is not valid XML: {brief(error)}.') from error
