"""A config for the user's own classes: `--classes` sets every key that depends on them."""

from __future__ import annotations

import inspect
import logging
import os.path as osp
from collections.abc import Sequence

from mmdet.registry import DATASETS, MODELS
from mmdet.visualization.palette import get_palette
from mmengine.config import Config, ConfigDict

from cbam_mmdet.datasets.checks import (
    annotation_file,
    annotation_format,
    read_coco,
    read_voc,
    read_voc_ids,
    require_annotation_file,
)
from cbam_mmdet.errors import UserError, did_you_mean
from cbam_mmdet.utils.config import SPLITS, class_of, split_datasets
from cbam_mmdet.utils.logging import log

AUTO = 'auto'


def set_classes(cfg: Config, classes: str | Sequence[str]) -> tuple[str, ...]:
    """Make a config detect other classes than its own, and log what was set.

    It sets the heads' num_classes and the data sets' metainfo.

    Args:
        cfg: the config, with its data roots as they will be used.
        classes: names, also as 'a,b,c', or 'auto' for the classes of the training annotations. For VOC data sets these
            are all names that occur, sorted. For COCO data sets they are the file's categories. MMDetection numbers
            COCO's classes in the file's order whatever metainfo says, so names in another order are sorted into that
            one.

    Returns:
        The names, in the order in which MMDetection numbers them.

    Raises:
        UserError: for a name that the annotations do not have, for training files with different classes, and for files
            that cannot be read.
    """
    asked = None if classes == AUTO else _parse(classes)
    found = _find(cfg, required=asked is None)
    split = next((split for split in SPLITS if found[split]), 'train')
    names = _choose(asked, found[split], split)
    sources = ' and '.join(path for path, _, _ in found[split])

    keys = _set_num_classes(cfg.model, len(names), 'model')
    if not keys:
        raise UserError(
            '--classes: the model has no head that takes num_classes: '
            f'set its number of classes ({len(names)}) by --cfg-options'
        )
    splits = [split for split in SPLITS if split_datasets(cfg, split)]
    for dataset in (dataset for split in splits for dataset in split_datasets(cfg, split)):
        set_metainfo(dataset, names)
    origin = f'read from {sources}' if asked is None else 'as given'
    log(
        f'--classes: {len(names)} classes, {origin}: {", ".join(names)}. '
        f'Set: {", ".join(f"{key}={len(names)}" for key in keys)}, '
        f'and metainfo.classes of the data sets for {", ".join(splits)}'
    )
    if asked is not None and names != asked:
        log(
            f'--classes: in the order of {sources}, which numbers the classes, '
            f'and not in that given ({", ".join(asked)})'
        )
    for path, has in dict.fromkeys((path, has) for files in found.values() for path, _, has in files):
        unknown = [name for name in has if name not in names]
        if unknown:
            log(f'{path} has classes besides, whose boxes are left out: {", ".join(unknown)}', logging.WARNING)
    return names


def _parse(classes: str | Sequence[str]) -> tuple[str, ...]:
    names = tuple(name.strip() for name in (classes.split(',') if isinstance(classes, str) else classes))
    if not all(names) or len(set(names)) < len(names):
        raise UserError(f"--classes {','.join(names)}: expected different names, as in --classes cat,dog, or 'auto'")
    return names


def _find(cfg: Config, required: bool) -> dict[str, list[tuple[str, str, tuple[str, ...]]]]:
    """For each split its annotation files, each with its format and the classes in it.

    Files that do not exist are left out, except those of the training set if they are required.
    """
    found: dict[str, list[tuple[str, str, tuple[str, ...]]]] = {split: [] for split in SPLITS}
    read: dict[str, tuple[str, ...]] = {}
    for split in SPLITS:
        for dataset in split_datasets(cfg, split):
            style, path = annotation_format(dataset), annotation_file(dataset)
            if required and split == 'train':
                if style is None:
                    raise UserError(
                        f'--classes auto: the training data set is a {dataset["type"]}, '
                        'of which the classes cannot be read; name them'
                    )
                require_annotation_file(dataset, split)
            if style is None or not osp.isfile(path):
                continue
            if path not in read:
                read[path] = _coco_classes(path) if style == 'coco' else _voc_classes(dataset, path)
            found[split].append((path, style, read[path]))
    if required and not found['train']:
        raise UserError('--classes auto: the config has no training data set to read them from; name them')
    return found


def _coco_classes(path: str) -> tuple[str, ...]:
    try:
        names = tuple(category['name'] for category in read_coco(path)['categories'])
    except (KeyError, TypeError) as error:
        raise UserError(f'annotation file {path}: a category is malformed; each needs id and name.') from error
    odd = [name for name in names if not isinstance(name, str) or not name.strip() or names.count(name) > 1]
    if odd:
        raise UserError(
            f'annotation file {path}: a category is called {odd[0]!r}; each needs a name, and one of its own.'
        )
    return names


def _voc_classes(dataset: ConfigDict, path: str) -> tuple[str, ...]:
    return tuple(
        sorted({item.name for image_id in read_voc_ids(path) for item in read_voc(dataset, path, image_id)[1]})
    )


def _choose(
    asked: tuple[str, ...] | None, files: list[tuple[str, str, tuple[str, ...]]], split: str
) -> tuple[str, ...]:
    """The classes in the order in which MMDetection numbers them, from the user's and those of a split's files."""
    if not files:
        return asked
    coco = [(path, names) for path, style, names in files if style == 'coco']
    available = coco[0][1] if coco else tuple(sorted({name for _, _, names in files for name in names}))
    lacking = [name for name in asked or () if name not in available]
    if lacking:
        where = ' and '.join(path for path, _, _ in files)
        raise UserError(
            f'--classes: {where} ({split}) has no {lacking[0]!r}{did_you_mean(lacking[0], available) or "."} '
            f'It has: {", ".join(available)}'
        )
    if not available:
        raise UserError(f'--classes: {" and ".join(path for path, _, _ in files)} holds no object, hence no class')
    names = available if asked is None else asked
    orders = {path: tuple(name for name in has if name in names) for path, has in coco}
    if len(set(orders.values())) > 1 or (asked is None and len({has for _, has in coco}) > 1):
        lists = '; '.join(f'{path}: {", ".join(has)}' for path, has in coco)
        raise UserError(
            f'--classes: the {split} annotation files disagree on the classes or their order, '
            f'which numbers them ({lists})'
        )
    return next(iter(orders.values())) if coco else names


def _set_num_classes(node: object, count: int, where: str) -> list[str]:
    """Set num_classes in every head in a part of the model that has this key, or whose class takes it.

    Heads of proposals (which have one class) and of semantic segmentation (which has other classes) stay as they are.

    Returns:
        The keys that were set.
    """
    if isinstance(node, (list, tuple)):
        return [key for i, item in enumerate(node) for key in _set_num_classes(item, count, f'{where}[{i}]')]
    if not isinstance(node, dict):
        return []
    keys = []
    for name, value in node.items():
        if name.endswith('head') and 'rpn' not in name and 'semantic' not in name:
            several = isinstance(value, (list, tuple))
            for i, head in enumerate(value if several else [value]):
                if not isinstance(head, dict):
                    continue
                place = f'{where}.{name}{f"[{i}]" if several else ""}'
                if 'num_things_classes' in head:
                    keys += _set_num_things(head, count, place)
                elif _takes_num_classes(head):
                    head['num_classes'] = count
                    keys += [f'{place}.num_classes', *_reset_num_classes(head, count, place)]
        keys += _set_num_classes(value, count, f'{where}.{name}')
    return keys


def _set_num_things(head: ConfigDict, count: int, where: str) -> list[str]:
    """Set the classes of a head of MaskFormer's kind: things, which are objects, beside stuff, which is background."""
    if head.get('num_stuff_classes'):
        raise UserError(
            f'--classes: {where} also segments num_stuff_classes={head["num_stuff_classes"]} classes of background, '
            'which a detection data set does not have: take the config of this model for instance segmentation'
        )
    before, head['num_things_classes'] = head['num_things_classes'], count
    keys = [f'{where}.num_things_classes']
    loss = head.get('loss_cls') or {}
    weights = loss.get('class_weight')
    if isinstance(weights, (list, tuple)) and len(weights) == before + 1:  # the last one is that of no object
        if len(set(weights[:-1])) > 1:
            raise UserError(
                f'--classes: {where}.loss_cls.class_weight gives each of {before} classes a weight of its own: '
                f'set it for {count} by --cfg-options'
            )
        loss['class_weight'] = [weights[0]] * count + [weights[-1]]
    return keys


def _takes_num_classes(head: ConfigDict) -> bool:
    cls = class_of(MODELS, head.get('type'))
    bases = getattr(cls, '__mro__', ())
    return 'num_classes' in head or any('num_classes' in inspect.signature(base.__init__).parameters for base in bases)


def _reset_num_classes(head: ConfigDict, count: int, where: str) -> list[str]:
    """Set it in losses inside a head, too: some of them take it."""
    keys = []
    for name, value in head.items():
        if isinstance(value, dict):
            if isinstance(value.get('num_classes'), int):
                value['num_classes'] = count
                keys.append(f'{where}.{name}.num_classes')
            keys += _reset_num_classes(value, count, f'{where}.{name}')
    return keys


def set_metainfo(dataset: ConfigDict, names: tuple[str, ...]) -> None:
    """Give a data set these classes, and as many colours."""
    meta = dict(dataset.get('metainfo') or {}, classes=names)
    kind = class_of(DATASETS, dataset['type'])
    palette = meta.pop('palette', None) or getattr(kind, 'METAINFO', {}).get('palette')
    if not isinstance(palette, list) or len(palette) < len(names):
        # MMDetection cannot draw a picture with fewer colours than classes.
        palette = [tuple(map(int, colour)) for colour in get_palette('random', len(names))]
    dataset['metainfo'] = dict(meta, palette=palette[: len(names)])
