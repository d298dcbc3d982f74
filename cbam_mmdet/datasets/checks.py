"""Checks of a config's data before a detector is built. One message names what is missing or wrong.

With the same faults MMDetection raises a KeyError, silently drops boxes, or trains on labels that are shifted by one.
"""

from __future__ import annotations

import json
import logging
import os
import os.path as osp
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mmdet.datasets import CocoDataset, VOCDataset, XMLDataset
from mmdet.evaluation import VOCMetric
from mmdet.registry import DATASETS, METRICS
from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log
from tqdm import tqdm

from cbam_mmdet.datasets.formats.content import rotation_of
from cbam_mmdet.datasets.formats.folder import read_json
from cbam_mmdet.datasets.inputs import IMAGES
from cbam_mmdet.datasets.layouts import HELP, expected_layout, require_data_root
from cbam_mmdet.datasets.voc import AnySuffixVOCDataset, image_names_by_stem, voc_folder, voc_image_folder
from cbam_mmdet.errors import UserError, did_you_mean
from cbam_mmdet.utils.config import class_of, datasets_of, evaluators_of, named_evaluators, split_datasets, type_name
from cbam_mmdet.utils.files import copies, write_by_content
from cbam_mmdet.utils.text import abridge

MANY = 0.1  # of the boxes: so many do not reach beyond their image by a slip of the hand


@dataclass
class Report:
    """What one annotation file holds."""

    ann_file: str
    split: str
    images: int = 0
    boxes: int = 0
    files: list = field(default_factory=list)
    images_with_boxes: set = field(default_factory=set)
    sizes: Counter = field(default_factory=Counter)
    crowds: int = 0
    ignored: int = 0
    turned: int = 0
    small_images: int = 0  # that the training's filter leaves out
    other_classes: Counter = field(default_factory=Counter)  # the boxes of classes that the config does not name
    beyond: list = field(default_factory=list)
    repeated: list = field(default_factory=list)
    too_large: list = field(default_factory=list)
    degenerate: list = field(default_factory=list)
    outside: list = field(default_factory=list)
    classes: Counter = field(default_factory=Counter)


def check_data(cfg: Config, splits: Sequence[str]) -> list[Report]:
    """Check every data set that the splits of a config read.

    It logs a line for each annotation file, and a warning for boxes that are dropped.

    Args:
        cfg: the config, with its data roots as they will be used.
        splits: names among 'train', 'val' and 'test'.

    Raises:
        UserError: for a missing folder or file (with the expected layout), a malformed annotation file, no image, no
            usable box, or class names that do not fit the config's.
    """
    reports: dict[tuple, Report] = {}
    completed: dict[str, str] = {}
    for split in splits:
        for dataset in split_datasets(cfg, split):
            if split == 'test' and all(metric.get('format_only') for metric in evaluators_of(cfg, split)):
                continue  # it needs no annotations
            _check_dataset(dataset, split, cfg, reports, completed)
            if dataset.get('indices'):
                print_log(
                    f'{split}: indices={dataset.indices!r} of the config takes only some of the images',
                    logger='current',
                )
            _check_num_classes(cfg.model, dataset, where='model')
        for key, metric in named_evaluators(cfg, split):
            scored = _scored_by(key, cfg, split)
            _check_evaluator(metric.get('ann_file'), scored, key, split)
            _require_unchanged_truth(metric, scored, key)
    _name_common_images([*reports.values()])
    for report in reports.values():
        _log(report)
    if 'train' in splits:
        _name_untrained_classes(split_datasets(cfg, 'train'), [*reports.values()])
    return list(reports.values())


def _name_untrained_classes(datasets: Sequence[ConfigDict], reports: Sequence[Report]) -> None:
    if not datasets or not all(map(annotation_format, datasets)):
        return  # one was not read
    seen = {name for report in reports if report.split == 'train' for name in report.classes}
    classes = dataset_classes(datasets[0])
    lacking = [name for name in classes if name not in seen]
    if lacking:
        print_log(
            f'classes without a box in the training images ({len(lacking)} of {len(classes)}), which the detector does '
            f'not learn: {abridge(lacking, 8)}',
            logger='current',
            level=logging.WARNING,
        )


def _name_common_images(reports: Sequence[Report]) -> None:
    """Say which images are both trained on and scored, as the same file or as a copy of it."""
    trained = [path for report in reports if report.split == 'train' for path in report.files]
    scored = {i: report for i, report in enumerate(reports) if report.split != 'train'}
    found = copies({None: trained} | {i: report.files for i, report in scored.items()}) if trained else []
    for i, report in scored.items():
        common = [osp.basename(path) for (group, path), (first, _) in found if (group, first) == (i, None)]
        if common:
            print_log(
                f'{report.ann_file}: {len(common)} of {report.images} images are trained on, too, so the score is not '
                f'that of new images: {abridge(common)}',
                logger='current',
                level=logging.WARNING,
            )


def _scored_by(key: str, cfg: Config, split: str) -> list[ConfigDict]:
    """The data sets of a split that the metric with this key scores: in a MultiDatasetsEvaluator, each has its own."""
    datasets = cfg.get(f'{split}_dataloader').dataset.get('datasets')
    evaluator = cfg[f'{split}_evaluator']
    if datasets and isinstance(evaluator, dict) and type_name(evaluator.get('type')) == 'MultiDatasetsEvaluator':
        number = key.rpartition('.')[2]
        datasets = datasets[int(number) :][:1] if number.isdigit() else datasets
        return list(datasets_of(datasets))
    return split_datasets(cfg, split)


def _check_evaluator(ann_file: str | None, datasets: Sequence[ConfigDict], key: str, split: str) -> None:
    """An evaluator has an annotation file of its own, which should be that of its data set."""
    if not ann_file or '://' in ann_file:
        return
    theirs = [annotation_file(dataset) for dataset in datasets]
    if not osp.isfile(ann_file):
        remedy = f'--cfg-options {key}.ann_file={theirs[0]}' if theirs and osp.isfile(theirs[0]) else HELP
        raise UserError(f"{key}'s annotation file {ann_file} does not exist. {remedy}")
    others = [path for path in theirs if not osp.isfile(path) or not osp.samefile(path, ann_file)]
    if others:
        if len(theirs) > 1:
            remedy = 'the file must hold all images of these, under the same ids'
        else:
            remedy = f'if that is not meant, --cfg-options {key}.ann_file={others[0]}'
        print_log(
            f'{key} scores against {ann_file}, and the {split} data set is {abridge(theirs, 4)}: {remedy}',
            logger='current',
            level=logging.WARNING,
        )


def _require_unchanged_truth(metric: ConfigDict, datasets: Sequence[ConfigDict], key: str) -> None:
    """Refuse a pipeline that resizes or flips the boxes with which a metric without a file compares detections.

    Detections are of the original image. MMDetection's own pipelines load the boxes afterwards.

    Raises:
        UserError: for such a pipeline.
    """
    kind = class_of(METRICS, metric.get('type'))
    if not (isinstance(kind, type) and (issubclass(kind, VOCMetric) or getattr(kind, 'truth_in_samples', False))):
        return
    for dataset in datasets:
        types = [type_name(step.get('type')) for step in _steps(dataset.get('pipeline'))]
        changed = [i for i, name in enumerate(types) if 'Resize' in name or 'Flip' in name]
        loaded = [i for i, name in enumerate(types) if name == 'LoadAnnotations']
        if loaded and changed and loaded[0] < changed[-1]:
            raise UserError(
                f'{key} ({type_name(metric.type)}) compares with the boxes that the pipeline loads, and '
                f'{types[changed[-1]]} after LoadAnnotations changes them, while detections are of the original image: '
                f'put LoadAnnotations after {types[changed[-1]]}'
            )


def _steps(pipeline: Sequence | None) -> Iterator[Mapping]:
    """The steps of a pipeline, with those of each view of a TestTimeAug."""
    for step in pipeline or ():
        if isinstance(step, (list, tuple)):
            yield from _steps(step)
        elif type_name(step.get('type')) == 'TestTimeAug':
            yield from _steps(step.get('transforms'))
        else:
            yield step


def _check_num_classes(node: object, dataset: ConfigDict, where: str, inside_head: bool = False) -> None:
    """Refuse a box head of the model that has another number of classes than the data set: it fails inside its loss."""
    if isinstance(node, (list, tuple)):
        for i, item in enumerate(node):
            _check_num_classes(item, dataset, f'{where}[{i}]', inside_head)
    elif isinstance(node, dict):
        classes = dataset_classes(dataset)
        count = node.get('num_classes')
        if inside_head and classes and isinstance(count, int) and count != len(classes):
            raise UserError(
                f'{where}.num_classes={count}, but the data set ({dataset.get("ann_file")}) has {len(classes)} '
                f'classes: [{abridge(classes, 8, quoted=True)}]. Set {where}.num_classes={len(classes)}, '
                'or metainfo=dict(classes=(...)) in each data set.'
            )
        for key, value in node.items():
            _check_num_classes(value, dataset, f'{where}.{key}', inside_head=key == 'bbox_head')


def annotation_format(dataset: ConfigDict) -> str | None:
    """'coco' or 'voc'. None for other kinds (LVIS, panoptic, ...), whose formats differ, and for remote files."""
    if '://' in annotation_file(dataset):
        return None
    kind = class_of(DATASETS, dataset['type'])
    if _reads_as_coco(kind):
        return 'coco'
    return 'voc' if kind in (XMLDataset, VOCDataset, AnySuffixVOCDataset) else None


def _reads_as_coco(kind: object) -> bool:
    """Whether a class is CocoDataset, or a subclass that leaves the classes and the reading of files to it."""
    own = ('__init__', '_load_metainfo', 'load_data_list', 'parse_data_info')
    return (
        isinstance(kind, type)
        and issubclass(kind, CocoDataset)
        and all(_function(getattr(kind, name)) is _function(getattr(CocoDataset, name)) for name in own)
    )


def _function(method: Any) -> Any:
    """What a class method is bound to differs between classes."""
    return getattr(method, '__func__', method)


def annotation_file(dataset: ConfigDict) -> str:
    """The path of a data set's annotation file. For VOC this is the list of its images."""
    return osp.join(dataset.get('data_root') or '', dataset.get('ann_file') or '')


def require_annotation_file(dataset: ConfigDict, split: str) -> str:
    """The path of a data set's annotation file.

    Raises:
        UserError: if it does not exist. The message shows the expected layout.
    """
    require_data_root(dataset, split)
    path = annotation_file(dataset)
    if not osp.isfile(path):
        layout = expected_layout(dataset)
        expected = f'Expected:\n{layout}' if layout else HELP
        raise UserError(f'the {split} data set has no annotation file {path}. {expected}')
    return path


def _completed(path: str, cfg: Config) -> str:
    """The annotation file, or a copy that is then used, if some annotations lack `area` or `iscrowd`."""
    content, count = complete(read_coco(path))
    if not count:
        return path
    name, folder = Path(path).name, Path(cfg.get('work_dir') or 'work_dirs', 'data')
    target = write_by_content(folder, {name: json.dumps(content).encode()}) / name
    print_log(
        f"{path}: {count} annotations lack area or iscrowd, or have the id 0, which COCO's evaluation cannot count. "
        f'They have the area of the box, iscrowd=0, and another id in {target}, which is used',
        logger='current',
    )
    return str(target)


def use_annotation_file(target: str, path: str, dataset: ConfigDict, evaluators: Sequence[ConfigDict]) -> None:
    """Let a data set, and the evaluators that read the same file, read another one."""
    dataset.ann_file = target
    for metric in evaluators:
        if metric.get('ann_file') and osp.isfile(metric.ann_file) and osp.samefile(metric.ann_file, path):
            metric.ann_file = target


def _check_dataset(
    dataset: ConfigDict, split: str, cfg: Config, done: dict[tuple, Report], completed: dict[str, str]
) -> None:
    style = annotation_format(dataset)
    if style is None:
        print_log(
            f'{annotation_file(dataset)} is not checked: type {dataset["type"]} may read and number its classes in '
            "ways of its own, or the file is remote. Compare its classes with the config's",
            logger='current',
            level=logging.WARNING,
        )
        return
    path = require_annotation_file(dataset, split)
    classes = dataset_classes(dataset)
    if style == 'coco':
        if path not in completed:
            completed[path] = _completed(path, cfg)
        if completed[path] != path:
            use_annotation_file(completed[path], path, dataset, evaluators_of(cfg, split))
            path = completed[path]
    key = (path, split == 'train', classes, str(dataset.get('data_prefix')))
    if key in done:
        return
    print_log(f'checking {path} ...', logger='current')
    report = (_check_coco if style == 'coco' else _check_voc)(path, dataset, classes, split)
    if not report.images:
        raise UserError(f'annotation file {path} lists no image.')
    if not report.boxes:
        dropped = len(report.degenerate) + len(report.outside)
        also = f' ({dropped} degenerate or outside their image were left out)' if dropped else ''
        also += f' ({report.crowds} are crowds, iscrowd=1, which are ignored)' if report.crowds else ''
        raise UserError(
            f'annotation file {path} holds no usable box for {split}{also}: there is nothing to learn or to score.'
        )
    require_sizes(f'annotation file {path}', report.beyond, report.boxes)
    done[key] = report
    if style == 'voc' and split == 'train' and report.degenerate:
        # MMDetection would train on these boxes. With this filter it ignores them.
        dataset.setdefault('filter_cfg', ConfigDict()).setdefault('bbox_min_size', 1)


def dataset_classes(dataset: ConfigDict) -> tuple[str, ...]:
    """The class names of a data set's config: those of its metainfo, or else those of its type."""
    meta = dataset.get('metainfo') or {}
    classes = meta.get('classes')
    if classes is None:
        cls = class_of(DATASETS, dataset['type'])
        classes = getattr(cls, 'METAINFO', {}).get('classes') or ()  # None: it reads them from a file
    return (classes,) if isinstance(classes, str) else tuple(classes)


def read_coco(path: str) -> dict:
    """The content of an annotation file in COCO's format.

    Raises:
        UserError: if it is not JSON, or lacks one of the lists.
    """
    content = read_json(Path(path), encoding='utf-8')  # MMDetection reads no byte order mark
    keys = ('images', 'annotations', 'categories')
    lacking = [key for key in keys if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if lacking:
        raise UserError(f"annotation file {path} is not in COCO's format: it lacks the list(s) {', '.join(lacking)}.")
    return content


def complete(content: dict[str, list]) -> tuple[dict[str, list], int]:
    """A content whose annotations all have `area` (else width x height of the box) and `iscrowd` (else 0).

    None has the id 0, either: COCO's evaluation writes the id of the object that a detection found into a list that
    begins as zeros, and takes that object for one that nothing found.

    Returns:
        The content, and how many annotations were completed. Malformed annotations stay as they are.
    """
    annotations, count = [], 0
    free = 1 + max((a['id'] for a in content['annotations'] if isinstance(a, dict) and _is_id(a.get('id'))), default=0)
    for annotation in content['annotations']:
        if isinstance(annotation, dict) and not {'area', 'iscrowd'} <= annotation.keys():
            annotation = {'area': _area(annotation.get('bbox')), 'iscrowd': 0} | annotation
            count += 1
        if isinstance(annotation, dict) and _is_id(annotation.get('id')) and annotation['id'] == 0:
            annotation = {**annotation, 'id': free}
            count += 1
        annotations.append(annotation)
    return dict(content, annotations=annotations), count


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53


def _area(box: object) -> float:
    try:
        _, _, width, height = box  # type: ignore[misc]
        return max(width, 0) * max(height, 0)
    except (TypeError, ValueError):
        return 0  # the check of the data names the box


class COCOObject(NamedTuple):
    """An object of a COCO data set. Its box is x1, y1, x2, y2 in pixels."""

    id: object
    image_id: object
    name: str
    box: tuple[float, float, float, float]
    area: float
    image_size: tuple[float, float]
    crowd: bool


def _check_coco(path: str, dataset: ConfigDict, classes: tuple[str, ...], split: str) -> Report:
    content = read_coco(path)
    images, names = _coco_images_and_names(path, content)
    require_distinct_names(path, [name for name in names.values() if name.strip() in {*map(str.strip, classes)}])
    _compare_classes(path, list(names.values()), classes)
    report = Report(path, split, images=len(images))
    report.small_images = _count_small(dataset, split, [(i['width'], i['height']) for i in images.values()])
    seen: set = set()
    for item in _coco_objects(path, content['annotations'], images, names, needs_iscrowd=split != 'train'):
        if item.name not in classes:
            report.other_classes[item.name] += 1
            continue
        if item.crowd:
            report.crowds += 1
            continue
        box = (item.image_id, item.name, item.box)
        if box in seen:
            report.repeated.append(item.id)
        seen.add(box)
        if reads_as_corners(item.box, item.image_size):
            report.beyond.append(item.id)
        if item.area > 1.01 * (item.box[2] - item.box[0]) * (item.box[3] - item.box[1]) + 1:
            report.too_large.append(item.id)
        _count(report, item.id, item.image_id, item.name, item.box, item.image_size, item.area > 0)
    report.ignored = sum(
        bool(annotation.get('ignore')) and names[annotation['category_id']] in classes
        for annotation in content['annotations']
    )
    report.turned = sum(rotation_of(annotation) != 0 for annotation in content['annotations'])
    files = [image['file_name'] for image in images.values()]
    twice = [name for name, count in Counter(files).items() if count > 1]
    if twice:
        _warn(report, f'{len(twice)} files are listed as several images: [{abridge(twice, quoted=True)}]')
    folder = osp.join(dataset.get('data_root') or '', (dataset.get('data_prefix') or {}).get('img', ''))
    _check_image_files(path, split, folder, files)
    report.files = [osp.join(folder, name) for name in files]
    _check_masks(path, dataset, content['images'], content['annotations'])
    return report


def _count_small(dataset: ConfigDict, split: str, sizes: Sequence[tuple[float, float]]) -> int:
    """How many images of these (width, height) the data set's filter leaves out of the training."""
    least = (dataset.get('filter_cfg') or {}).get('min_size', 0)
    return sum(min(size) < least for size in sizes) if split == 'train' else 0


def reads_as_corners(box: tuple[float, float, float, float], size: tuple[float, float]) -> bool:
    """Whether a box reaches far beyond its image, and would not if its bbox were [x1, y1, x2, y2]."""
    x1, y1, x2, y2 = box
    far = x2 > 1.02 * size[0] + 2 or y2 > 1.02 * size[1] + 2
    return far and x1 < x2 - x1 <= size[0] + 1 and y1 < y2 - y1 <= size[1] + 1


def require_sizes(where: str, beyond: Sequence, boxes: int) -> None:
    """Refuse boxes that are written as corners in place of a corner and a size.

    Args:
        where: what holds the boxes.
        beyond: the annotation ids of those that read so, see `reads_as_corners`.
        boxes: how many there are.

    Raises:
        UserError: if they are many.
    """
    if len(beyond) > MANY * boxes:
        raise UserError(
            f'{where}: {len(beyond)} of {boxes} boxes reach beyond their image, and would not if their bbox were '
            f"[x1, y1, x2, y2] (annotation ids {abridge([*map(str, beyond)])}). In COCO's format it is "
            '[x, y, width, height]: convert them'
        )


def _check_masks(path: str, dataset: ConfigDict, images: list[dict], annotations: list[dict]) -> None:
    """A detector of masks trains on them. MMDetection says KeyError where there are none."""
    if not any(step.get('with_mask') for step in dataset.get('pipeline') or [] if isinstance(step, dict)):
        return
    sizes = {image['id']: (image['height'], image['width']) for image in images}
    without = [a['id'] for a in annotations if not _is_mask(a.get('segmentation'), sizes[a['image_id']])]
    if without:
        raise UserError(
            f'annotation file {path}: {len(without)} of {len(annotations)} annotations have no segmentation that '
            f'MMDetection reads (ids {abridge([*map(str, without)])}), and the config loads masks (with_mask=True). A '
            'segmentation is a list of polygons [x1, y1, x2, y2, x3, y3, ...], or a run-length code of the size of its '
            'image. Take a detector of boxes, such as configs/faster_rcnn_r50_cbam.py, or mend them'
        )


def _is_mask(value: object, size: tuple[float, float]) -> bool:
    """Whether MMDetection makes a mask of a segmentation: it ignores objects with another one without a word.

    Args:
        value: the segmentation.
        size: the height and width of its image.
    """
    if isinstance(value, list):
        return all(map(_are_numbers, value)) and any(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in value)
    if not isinstance(value, dict) or not isinstance(value.get('size'), list) or tuple(value['size']) != size:
        return False
    runs = value.get('counts')
    if isinstance(runs, list):
        return all(isinstance(run, int) and run >= 0 for run in runs) and sum(runs) == size[0] * size[1]
    return isinstance(runs, str) and bool(runs)


def _are_numbers(value: object) -> bool:
    if not isinstance(value, list):
        return False
    try:
        for item in value:
            _number(item)
    except TypeError:
        return False
    return True


def require_distinct_names(path: str, names: Sequence[str]) -> None:
    """Refuse categories of one name, or of names that differ in blanks at their ends only.

    Raises:
        UserError: for the first such name.
    """
    twice = [name for name, count in Counter(map(str.strip, names)).items() if count > 1]
    if twice:
        raise UserError(f'annotation file {path}: several categories are called {twice[0]!r}: each needs its own name')


def require_coco(path: str, content: dict) -> None:
    """Check the images, categories and annotations of a COCO file, each by itself.

    Raises:
        UserError: for the first one that is malformed.
    """
    images, names = _coco_images_and_names(path, content)
    for _ in _coco_objects(path, content['annotations'], images, names, needs_iscrowd=False):
        pass


def _coco_images_and_names(path: str, content: dict) -> tuple[dict[Any, dict], dict[Any, str]]:
    """The images and the names of the categories, by their ids."""
    try:
        images = {image['id']: image for image in content['images']}
        names = {category['id']: category['name'] for category in content['categories']}
        for image in images.values():
            for value in (image['width'], image['height']):
                if _number(value) < 1:
                    raise TypeError(f'{image["width"]} x {image["height"]} is not the size of an image')
            _text(image['file_name'])
        for name in names.values():
            if not _text(name).isprintable():  # it would reach the terminal
                raise TypeError(f'{name!r} is not a name')
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f'annotation file {path}: an image or category is malformed ({type(error).__name__}: {error}). '
            'Each image needs id, file_name, width and height, each category id and name.'
        ) from error
    alike = [key for key, count in Counter(map(str, images)).items() if count > 1]
    if alike:
        raise UserError(f'annotation file {path}: several images have the id {alike[0]}, as a number and as a text')
    if len(images) < len(content['images']):
        raise UserError(
            f'annotation file {path}: {len(content["images"]) - len(images)} images share their id with another'
        )
    if len(names) < len(content['categories']):
        twice = [category for category in content['categories'] if category['name'] != names[category['id']]]
        raise UserError(
            f'annotation file {path}: several categories have the id {twice[0]["id"] if twice else "of another"}: '
            'each needs an id of its own'
        )
    return images, names


def _coco_objects(
    path: str, annotations: list, images: dict[Any, dict], names: dict[Any, str], needs_iscrowd: bool
) -> Iterator[COCOObject]:
    """The annotations of a COCO file, each checked."""
    ids: set = set()
    for annotation in annotations:
        try:
            if annotation['id'] in ids:
                raise ValueError('its id is given twice')
            ids.add(annotation['id'])
            item = _coco_object(annotation, images, names, needs_iscrowd)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            which = annotation.get('id') if isinstance(annotation, dict) else repr(annotation)
            raise UserError(
                f'annotation file {path}: annotation id={which} is malformed ({type(error).__name__}: {error}). '
                'Each needs bbox=[x, y, width, height], area, id, iscrowd=0 or 1, and the ids of an image and a '
                'category that the file lists.'
            ) from error
        yield item


def _coco_object(annotation: dict, images: dict[Any, dict], names: dict[Any, str], needs_iscrowd: bool) -> COCOObject:
    if needs_iscrowd and 'iscrowd' not in annotation:
        raise KeyError('iscrowd')  # the metric reads it
    crowd = annotation.get('iscrowd', 0)
    if crowd is None and not needs_iscrowd:  # the training takes it for 0
        crowd = 0
    if not isinstance(crowd, bool) and _number(crowd) not in (0, 1):
        raise ValueError(f'its iscrowd is {crowd!r}')
    if not _is_id(annotation['id']):
        raise TypeError(f'its id {annotation["id"]!r} is no whole number below 2**53')
    if annotation['image_id'] not in images:
        raise ValueError(f'its image_id {annotation["image_id"]!r} is not among the images')
    if annotation['category_id'] not in names:
        raise ValueError(f'its category_id {annotation["category_id"]!r} is not among the categories')
    name, image = names[annotation['category_id']], images[annotation['image_id']]
    x, y, width, height = (_number(value) for value in annotation['bbox'])
    box, area = (x, y, x + width, y + height), _number(annotation['area'])
    return COCOObject(
        annotation['id'],
        annotation['image_id'],
        name,
        box,
        area,
        (image['width'], image['height']),
        bool(annotation.get('iscrowd')),
    )


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip() or '\0' in value:
        raise TypeError(f'{value!r} is not a name')
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e15:
        raise TypeError(f'{value!r} is not a number')
    return value


def read_voc_ids(path: str) -> list[str]:
    """The names of the images, without suffix, that a VOC image set lists.

    Raises:
        UserError: if it is not a text file.
    """
    try:
        with open(path, encoding='utf-8') as file:
            return [line.strip() for line in file if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f'image set {path} is not a text file in UTF-8: {error.reason}.') from error


class VOCObject(NamedTuple):
    """An object of a VOC data set.

    Its box is xmin, ymin, xmax, ymax in pixels counted from 1. The last pixels are inside. It is turned about its
    centre by so many degrees, as CVAT writes turned boxes.
    """

    name: str
    box: tuple[float, float, float, float]
    difficult: bool
    degrees: float = 0


def read_voc(
    dataset: ConfigDict, path: str, image_id: str, read: Collection[str] = ()
) -> tuple[tuple[float, float], list[VOCObject]]:
    """Read one XML file of a VOC data set.

    Args:
        dataset: the data set's config.
        path: the image set that lists the image. The error names it.
        image_id: the image's name without suffix.
        read: the classes whose objects MMDetection must be able to read, too, which takes only integers for
            `difficult` there, and for the size.

    Returns:
        The image's (width, height), infinite where the file does not give them, and the objects.

    Raises:
        UserError: if the file is missing or not in VOC's format.
    """
    xml = osp.join(voc_folder(dataset), dataset.get('ann_subdir', 'Annotations'), f'{image_id}.xml')
    try:
        tree = ET.parse(xml).getroot()
        width, height = (float(tree.findtext(f'size/{key}', 'inf')) for key in ('width', 'height'))
        objects = voc_objects(tree)
        if read:
            for item in tree.iterfind('object'):
                if item.findtext('name') in read and item.find('difficult') is not None:
                    _require_integer('difficult', item.findtext('difficult'))
            if tree.find('size') is not None:
                for key in ('width', 'height'):
                    _require_integer(key, tree.findtext(f'size/{key}'))
    except FileNotFoundError as error:
        raise UserError(f'{path} lists {image_id}, but its annotation {xml} does not exist.') from error
    except (ET.ParseError, OSError, TypeError, ValueError) as error:
        raise UserError(f"annotation file {xml} is not in Pascal VOC's format: {error}.") from error
    return (width, height), objects


def _require_integer(name: str, text: str | None) -> None:
    try:
        int(text or '')
    except ValueError:
        said = (text or '').strip()
        raise ValueError(f'its {name} is {said!r}, where MMDetection reads integers only: write one') from None


def voc_objects(annotation: ET.Element) -> list[VOCObject]:
    """The objects of an XML file in VOC's format.

    Raises:
        TypeError, ValueError: for an object without a name or a box.
    """
    return [_voc_object(item) for item in annotation.findall('object')]


def _voc_object(item: ET.Element) -> VOCObject:
    name = item.findtext('name')
    if not name:
        raise ValueError('an object has no name')
    box = tuple(_number(float(item.findtext(f'bndbox/{key}'))) for key in ('xmin', 'ymin', 'xmax', 'ymax'))
    turns = [it.findtext('value') for it in item.iterfind('attributes/attribute') if it.findtext('name') == 'rotation']
    try:
        degrees = _number(float(next(filter(None, turns), 0)))
    except (TypeError, ValueError):
        degrees = 0  # an attribute of that name that says something else
    return VOCObject(name, box, bool(int(item.findtext('difficult') or 0)), degrees)


def _check_voc(path: str, dataset: ConfigDict, classes: tuple[str, ...], split: str) -> Report:
    ids = read_voc_ids(path)
    report = Report(path, split, images=len(ids))
    found = _count_voc_objects(report, dataset, ids, classes)
    if ids:
        _compare_classes(path, found, classes, ordered=False)
    folder = voc_image_folder(dataset)
    names = image_names_by_stem(folder) if osp.isdir(folder) else {}
    files = [names.get(image_id, f'{image_id}.jpg') for image_id in ids]
    if class_of(DATASETS, dataset['type']) is XMLDataset:
        _require_jpg(path, files)
    _check_image_files(path, split, folder, files)
    report.files = [osp.join(folder, name) for name in files]
    twice = [name for name, count in Counter(files).items() if count > 1]
    if twice:
        _warn(report, f'{len(twice)} files are listed as several images: [{abridge(twice, quoted=True)}]')
    stems = Counter(osp.splitext(name)[0] for name in os.listdir(folder) if name.lower().endswith(IMAGES))
    twins = [name for name in files if stems[osp.splitext(name)[0]] > 1]
    if twins:
        _warn(report, f'{len(twins)} images are there in several formats, of which these are read: {abridge(twins)}')
    return report


def _count_voc_objects(report: Report, dataset: ConfigDict, ids: list[str], classes: tuple[str, ...]) -> list[str]:
    """Count the objects of the images, and return the names of all classes that occur."""
    found: dict[str, None] = {}
    sizes = []
    for image_id in tqdm(ids, desc='reading annotations', disable=None):
        size, objects = read_voc(dataset, report.ann_file, image_id, read=classes)
        if not min(size) >= 1:
            raise UserError(
                f'{report.ann_file}: the .xml of {image_id} gives the size {size[0]:g} x {size[1]:g}. Write that of '
                'the image, or remove its <size>: then it is taken from the image'
            )
        for name, (x1, y1, x2, y2), _, degrees in objects:
            found[name] = None
            report.turned += degrees != 0
            if name in classes:
                _count(report, image_id, image_id, name, (x1 - 1, y1 - 1, x2 - 1, y2 - 1), size, True)
            else:
                report.other_classes[name] += 1
        sizes.append(size)
    report.small_images = _count_small(dataset, report.split, sizes)
    return list(found)


def _require_jpg(path: str, files: list[str]) -> None:
    others = [name for name in files if not name.endswith('.jpg')]
    if others:
        raise UserError(
            f'{len(others)} images that {path} lists are not .jpg (the first: {others[0]}), '
            "and MMDetection's XMLDataset reads no other: set type='VOCDataset' in the data set, "
            'for which the tools read any suffix, or convert the images.'
        )


def _count(
    report: Report,
    name_of_box: object,
    image: object,
    label: str,
    box: tuple[float, float, float, float],
    image_size: tuple[float, float],
    has_area: bool,
) -> None:
    """Count a box as usable, degenerate, or outside its image."""
    (x1, y1, x2, y2), (width, height) = box, image_size
    if not has_area or x2 - x1 < 1 or y2 - y1 < 1:
        report.degenerate.append(name_of_box)
    elif min(x2, width) <= max(x1, 0) or min(y2, height) <= max(y1, 0):
        report.outside.append(name_of_box)
    else:
        report.boxes += 1
        report.classes[label] += 1
        report.images_with_boxes.add(image)
        area = (x2 - x1) * (y2 - y1)
        report.sizes[size_of(area)] += 1


def size_of(area: float) -> str:
    """What COCO calls a box of so many pixels: 'small', 'medium' or 'large'."""
    return 'small' if area < 32**2 else 'medium' if area < 96**2 else 'large'


def _compare_classes(path: str, found: list[str], classes: tuple[str, ...], ordered: bool = True) -> None:
    """Refuse other classes, or another order: MMDetection numbers by the file's order and names by the config's."""
    shared = [name for name in found if name in classes]
    what = (
        f'annotation file {path} has the classes [{abridge(found, 8, quoted=True)}], '
        f'the config expects [{abridge(classes, 8, quoted=True)}]'
    )
    fix = (
        'The files of all splits need the same classes: those that the config names, or --classes. --classes auto '
        'takes those of the training annotations. In a config, set metainfo=dict(classes=(...)) in each dataset to '
        "the file's names, and num_classes in the model's heads to their number."
    )
    if not shared:
        hints = [did_you_mean(name, found, n=1) for name in classes[:20]]
        raise UserError(f'{what}: none is the same{next(filter(None, hints), "")}. {fix}')
    if not ordered:
        return
    lacking = [name for name in classes if name not in found]
    if lacking:
        hint = did_you_mean(lacking[0], found, n=1)
        raise UserError(f'{what}: [{abridge(lacking, 8, quoted=True)}] are not in the file{hint}. {fix}')
    if shared != list(classes):
        raise UserError(f"{what}: in another order, and the file's order is the one that numbers them. {fix}")


def _check_image_files(path: str, split: str, folder: str, names: list[str]) -> None:
    if not osp.isdir(folder):
        raise UserError(f'the images of {path} are not there: no folder {folder}. {HELP}')
    outside = [name for name in names if osp.isabs(name) or '..' in name.split('/')]
    if outside:
        print_log(f'{path}: {len(outside)} images may lie outside {folder}: [{abridge(outside)}]', logger='current')
    present = set(os.listdir(folder))
    missing = [name for name in names if name not in present and not osp.isfile(osp.join(folder, name))]
    if names and len(missing) == len(names):
        raise UserError(f'none of the {len(names)} images that {path} lists is in {folder} (the first: {names[0]}).')
    if missing:
        what = (
            f'{len(missing)} of the {len(names)} images that {path} lists are not in {folder}: '
            f'[{abridge(missing, quoted=True)}]'
        )
        if split != 'train':
            raise UserError(f'{what}. Without them the score would not be that of the complete {split} set.')
        print_log(what, logger='current', level=logging.WARNING)


def _log(report: Report) -> None:
    boxes, classes = report.boxes, len(report.classes)
    print_log(f'{report.ann_file}: {report.images} images, {boxes} boxes, {classes} classes', logger='current')
    sizes = ', '.join(f'{report.sizes[size]} {size}' for size in ('small', 'medium', 'large'))
    without = report.images - len(report.images_with_boxes)
    most = [f'{name} {count}' for name, count in report.classes.most_common()]
    print_log(
        f'    boxes by size: {sizes} (COCO: below 32 x 32, below 96 x 96 pixels); images without boxes: {without}; '
        f'boxes by class: {abridge(most, 12)}',
        logger='current',
    )
    every = [*report.classes, *report.other_classes]
    names = Counter(name.strip().casefold() for name in every)
    alike = [name for name in every if names[name.strip().casefold()] > 1]
    if alike:
        _warn(
            report, f'classes that differ in capitals or blanks only are different ones: {abridge(alike, quoted=True)}'
        )
    if report.other_classes:
        others = [f'{name!r} {count}' for name, count in report.other_classes.most_common()]
        _warn(
            report,
            f'{report.other_classes.total()} boxes are left out, whose classes the config does not name: '
            f'{abridge(others, 8)}. --classes auto takes all classes of the training annotations',
        )
    if report.ignored:
        _warn(
            report,
            f'{report.ignored} objects have ignore=1: MMDetection trains as if they were not there, and the score '
            'counts those that are no crowds. To leave them out of both: iscrowd=1 in place of ignore=1',
        )
    if report.turned:
        _warn(
            report,
            f'{report.turned} boxes are turned (rotation, as CVAT writes it) and are read as if they were not: '
            'tools/convert_annotations.py FOLDER NEW --to coco writes the boxes around them',
        )
    if report.small_images:
        _warn(
            report,
            f'{report.small_images} of {report.images} images are not trained on: they are smaller than the min_size '
            "of the data set's filter_cfg",
        )
    if report.too_large:
        _warn(
            report,
            f'{len(report.too_large)} objects have an area larger than their box (annotation ids '
            f'{abridge([str(i) for i in report.too_large])}): the scores of small, medium and large objects go by it',
        )
    if report.repeated:
        _warn(
            report,
            f'{len(report.repeated)} objects are annotated twice, with the same box and class: annotation ids '
            f'{abridge([str(i) for i in report.repeated])}. Each of them counts as one more object that nothing found',
        )
    fate = (
        'and left out'
        if report.split == 'train'
        else '; take them out of the file: a metric that reads it counts each as an object that nothing found'
    )
    for kind, where in (
        ('degenerate (narrower than 1 pixel)', report.degenerate),
        ('outside their image', report.outside),
    ):
        if where:
            ids = ', '.join(map(str, where[:5])) + (', ...' if len(where) > 5 else '')
            _warn(report, f'{len(where)} boxes are {kind} {fate}: {ids}')


def _warn(report: Report, message: str) -> None:
    print_log(f'{report.ann_file}: {message}', logger='current', level=logging.WARNING)
