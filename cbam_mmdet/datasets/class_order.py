"""A config whose classes are numbered as in a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config

from cbam_mmdet.datasets.checks import (
    annotation_file,
    annotation_format,
    dataset_classes,
    read_coco,
    use_annotation_file,
)
from cbam_mmdet.datasets.classes import set_metainfo
from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.config import evaluators_of, split_datasets
from cbam_mmdet.utils.files import write_by_content
from cbam_mmdet.utils.logging import log
from cbam_mmdet.utils.text import abridge


def follow_class_order(
    cfg: Config, splits: Sequence[str], classes: Sequence[str], name: str, folder: str, others: bool = False
) -> None:
    """Number the classes of the data sets as a checkpoint does, in place.

    A detector knows its classes by their numbers alone. With the same names in another order it would be scored, or
    trained further, under the wrong ones. MMDetection numbers VOC's classes as metainfo lists them, and COCO's as the
    annotation file does: of such a file a copy with its categories in the checkpoint's order is written and used.

    Args:
        cfg: the config, with its data roots as they will be used.
        splits: names among 'train', 'val' and 'test'.
        classes: the classes of the checkpoint, in its order.
        name: of the checkpoint, for messages.
        folder: for the copies of annotation files.
        others: whether the config may have other classes, which are trained anew. One line says so.

    Raises:
        UserError: if the config has other classes than the checkpoint, and may not.
    """
    classes = tuple(classes)
    for split in splits:
        for dataset in split_datasets(cfg, split):
            here = dataset_classes(dataset)
            if not here or here == classes:
                continue
            if sorted(here) != sorted(classes) and others:
                if len(here) == len(classes):
                    log(f'{name} was trained on other classes ({abridge(classes, 8)}): its head starts with theirs')
                return
            if sorted(here) != sorted(classes):
                raise UserError(
                    f'{name} detects the classes [{abridge(classes, 8, quoted=True)}], and the {split} data set has '
                    f'[{abridge(here, 8, quoted=True)}]: the scores would be those of other classes. Give the data '
                    'set and the --classes that it was trained with; to train it on new ones, load_from takes it'
                )
            log(f'the {split} classes are put into the order of {name}: {", ".join(classes)}')
            set_metainfo(dataset, classes)
            path = annotation_file(dataset)
            if annotation_format(dataset) == 'coco' and Path(path).is_file():
                copy = _in_order(path, classes, Path(folder, 'data'))
                use_annotation_file(str(copy.absolute()), path, dataset, evaluators_of(cfg, split))


def _in_order(path: str, classes: tuple[str, ...], folder: Path) -> Path:
    """Write an annotation file whose categories have the ids 1, 2, ... in this order; others follow.

    It goes to a folder that is called by a hash of its content, so no other one ever takes its place.
    """
    content = read_coco(path)
    rank = {name: i for i, name in enumerate(classes)}
    try:
        categories = sorted(content['categories'], key=lambda category: rank.get(category['name'], len(rank)))
        ids = {category['id']: i for i, category in enumerate(categories, 1)}
        content['categories'] = [dict(category, id=ids[category['id']]) for category in categories]
        content['annotations'] = [dict(a, category_id=ids[a['category_id']]) for a in content['annotations']]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f'annotation file {path}: a category or annotation is malformed ({error})') from error
    name = Path(path).name
    target = write_by_content(folder, {name: json.dumps(content).encode()}) / name
    log(f'{path}: used as {target}')
    return target
