"""A config for other classes: those of a user's own data set, in every data set and every head of the config."""

from __future__ import annotations

import os.path as osp
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence

from mmdet.datasets import CocoDataset, XMLDataset
from mmdet.registry import DATASETS
from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log

from ..config import SPLITS, split_datasets
from ..errors import UserError, near
from .checks import COCO_LAYOUT, HELP, VOC_LAYOUT, abridge, read_json

AUTO = 'auto'
HEADS = ('bbox_head', 'mask_head')


def set_classes(cfg: Config, classes: str | Sequence[str]) -> tuple[str, ...]:
    """Set the class names of every data set and `num_classes` of every head; print what was done.

    Args:
        cfg: the config, with its data roots as they will be used.
        classes: names, or 'auto' for all that the annotations of the training data sets hold: of XML files sorted, of a COCO file in
            the file's order (which is the order by which MMDetection numbers them, so names that are given are put into it, too).

    Returns:
        The names.

    Raises:
        UserError: for a name that the annotations lack, with near ones; annotations that are not there; a model without heads.
    """
    found, sources, ordered = _training_classes(cfg)
    if classes == AUTO:
        names = tuple(found)
    else:
        names = tuple(dict.fromkeys(name.strip() for name in classes if name.strip()))
        lacking = [name for name in names if name not in found]
        if lacking or not names:
            what = f'{abridge(lacking)} not in' if lacking else 'no name given;'
            hint = near(lacking[0], found, n=1) if lacking else ''
            raise UserError(f'--classes: {what} the annotations {sources}, which have {abridge(found)}{hint}')
        if ordered:
            names = tuple(name for name in found if name in names)
    keys = list(_set_num_classes(cfg.model, 'model', len(names)))
    if not keys:
        raise UserError(
            f'--classes: the model ({cfg.model.get("type")}) has no {" or ".join(HEADS)} to set num_classes in'
        )
    for split in SPLITS:
        for dataset in split_datasets(cfg, split):
            dataset.metainfo = ConfigDict(classes=names)
            if len(names) > len(getattr(_kind(dataset), 'METAINFO', {}).get('palette', ())):
                dataset.metainfo.palette = 'random'  # the type's own has too few colours, and drawing would fail
    origin = f'read from {sources}' if classes == AUTO else f'checked against {sources}'
    order = ", in the file's order" if ordered else ''
    print_log(
        f'--classes: {len(names)} classes {abridge(names)} ({origin}{order}): metainfo of every data set; num_classes={len(names)} of '
        f'{", ".join(keys)}',
        logger='current',
    )
    return names


def _kind(dataset: ConfigDict) -> type | None:
    return DATASETS.get(dataset['type']) if isinstance(dataset['type'], str) else dataset['type']


def _training_classes(cfg: Config) -> tuple[list[str], str, bool]:
    """The names in the training annotations, the files they come from, and whether their order is the file's."""
    found: list[list[str]] = []
    files, ordered = [], False
    for dataset in split_datasets(cfg, 'train'):
        kind, root, ann_file = _kind(dataset), dataset.get('data_root') or '', dataset.get('ann_file') or ''
        path = osp.join(root, ann_file)
        is_coco = isinstance(kind, type) and issubclass(kind, CocoDataset)
        if not is_coco and not (isinstance(kind, type) and issubclass(kind, XMLDataset)):
            raise UserError(
                f'--classes: the classes of a data set of type {dataset["type"]} cannot be read; set them in the config'
            )
        if not osp.isfile(path):
            layout = (COCO_LAYOUT if is_coco else VOC_LAYOUT).format(root=root.rstrip('/') or '.')
            raise UserError(f'the train data set has no annotation file {path}. Expected:\n{layout}\n{HELP}')
        files.append(path)
        found.append(_coco_classes(path) if is_coco else _voc_classes(path, root, dataset))
        ordered |= is_coco
    if not found:
        raise UserError('--classes: the config has no training data set to read classes from')
    if ordered and any(names != found[0] for names in found):
        raise UserError(
            f'--classes: the training files {files} have different classes; they must be the same, in the same order'
        )
    names = found[0] if ordered else sorted({name for names in found for name in names})
    if not names:
        raise UserError(f'--classes: {", ".join(files)}: the annotations name no class')
    return names, ', '.join(files), ordered


def _coco_classes(path: str) -> list[str]:
    try:
        return [category['name'] for category in read_json(path)['categories']]
    except (KeyError, TypeError) as error:
        raise UserError(f'annotation file {path}: a category has no name ({type(error).__name__}: {error})') from error


def _voc_classes(path: str, root: str, dataset: ConfigDict) -> list[str]:
    folder = osp.join(
        root, (dataset.get('data_prefix') or {}).get('sub_data_root', ''), dataset.get('ann_subdir', 'Annotations')
    )
    names: set[str] = set()
    with open(path, encoding='utf-8') as file:
        for image_id in filter(None, map(str.strip, file)):
            xml = osp.join(folder, f'{image_id}.xml')
            try:
                names |= {item.findtext('name') or '' for item in ET.parse(xml).getroot().findall('object')}
            except FileNotFoundError as error:
                raise UserError(f'{path} lists {image_id}, but its annotation {xml} does not exist.') from error
            except ET.ParseError as error:
                raise UserError(f"annotation file {xml} is not in Pascal VOC's format: {error}.") from error
    return sorted(names - {''})


def _set_num_classes(node: object, where: str, num_classes: int) -> Iterator[str]:
    """Set it in every box and mask head below a part of the model's config; yield their keys."""
    if isinstance(node, (list, tuple)):
        for i, item in enumerate(node):
            yield from _set_num_classes(item, f'{where}[{i}]', num_classes)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key in HEADS:
                heads = value if isinstance(value, (list, tuple)) else [value]
                for i, head in enumerate(heads):
                    if isinstance(head, dict):
                        head['num_classes'] = num_classes
                        yield f'{where}.{key}' + (f'[{i}]' if heads is value else '')
            else:
                yield from _set_num_classes(value, f'{where}.{key}', num_classes)
