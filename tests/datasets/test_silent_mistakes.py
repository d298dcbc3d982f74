"""Annotations and configs that were scored or trained on wrongly without a word."""

import copy
import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import DEMO, tiny
from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS
from mmengine.config import ConfigDict
from mmengine.runner import Runner
from pycocotools.coco import COCO

from cbam_mmdet.apis.runner import prepare
from cbam_mmdet.apis.test import _use_tta
from cbam_mmdet.datasets.checks import check_data, complete
from cbam_mmdet.datasets.class_order import follow_class_order
from cbam_mmdet.datasets.transforms.arrays import array_pipeline
from cbam_mmdet.errors import UserError
from cbam_mmdet.evaluation.metrics import HotCocoMetric
from cbam_mmdet.utils.config import (
    SPLITS,
    evaluators_of,
    load_config,
    set_data_root,
    set_default_scope,
    split_datasets,
)


@pytest.fixture
def checked(shapes, tmp_path):
    """A function that checks the shapes with changed validation annotations, and returns the config and the log."""

    def check(change, capsys):
        root = shutil.copytree(shapes, tmp_path / 'data')
        path = root / 'annotations/instances_val2017.json'
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        cfg = load_config(DEMO)
        prepare(cfg, str(root), None, str(tmp_path / 'work'), 'none')
        capsys.readouterr()
        check_data(cfg, ['val', 'test'])
        said = capsys.readouterr()
        return cfg, said.out + said.err

    return check


def test_an_annotation_with_the_id_0_is_found(checked, shapes, capsys):
    """pycocotools takes the object with the id 0 for one that nothing found; perfect detections then score below 1."""

    def from_zero(content):
        for i, annotation in enumerate(content['annotations']):
            annotation['id'] = i

    cfg, said = checked(from_zero, capsys)
    assert '1 annotations lack area or iscrowd, or have the id 0' in said
    for split in ('val', 'test'):
        [dataset] = split_datasets(cfg, split)
        truth = COCO(dataset.ann_file)
        assert min(truth.anns) > 0 and len(truth.anns) == len(
            COCO(str(shapes / 'annotations/instances_val2017.json')).anns
        )
        assert all(metric.ann_file == dataset.ann_file for metric in evaluators_of(cfg, split))
    metric = HotCocoMetric(ann_file=dataset.ann_file, metric='bbox')
    metric.dataset_meta = dict(classes=tuple(category['name'] for category in truth.dataset['categories']))
    assert perfect(metric, truth) == 1


def perfect(metric, truth):
    """The mAP of detections that are the annotated boxes."""
    import torch

    labels = {category: i for i, category in enumerate(truth.getCatIds())}
    for image in truth.loadImgs(truth.getImgIds()):
        found = truth.loadAnns(truth.getAnnIds(image['id']))
        boxes = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in (a['bbox'] for a in found)]).reshape(-1, 4)
        pred = dict(
            bboxes=boxes, scores=torch.ones(len(found)), labels=torch.tensor([labels[a['category_id']] for a in found])
        )
        size = (image['height'], image['width'])
        metric.process({}, [dict(img_id=image['id'], ori_shape=size, pred_instances=pred)])
    return metric.evaluate(len(truth.imgs))['coco/bbox_mAP']


def test_ids_are_as_they_were_where_none_is_0():
    annotations = [dict(id=5, area=1, iscrowd=0), dict(id=2, area=1, iscrowd=1)]
    assert complete(dict(annotations=annotations)) == (dict(annotations=annotations), 0)


def test_crowds_alone_are_no_data(checked, capsys):
    with pytest.raises(UserError, match=r'no usable box for val \(\d+ are crowds, iscrowd=1'):
        checked(lambda content: [a.update(iscrowd=1) for a in content['annotations']], capsys)


def test_corners_in_place_of_width_and_height_are_refused(checked, capsys):
    def to_corners(content):
        for a in content['annotations']:
            x, y, width, height = a['bbox']
            a['bbox'] = [x, y, x + width, y + height]

    with pytest.raises(UserError, match=r'boxes reach beyond their image.*\[x, y, width, height\]'):
        checked(to_corners, capsys)


def test_classes_without_a_box_to_train_on_are_named(shapes, tmp_path, logged):
    root = shutil.copytree(shapes, tmp_path / 'data')
    cfg = load_config(DEMO)
    prepare(cfg, str(root), None, str(tmp_path / 'work'), 'none')
    check_data(cfg, ['train', 'val'])
    assert not any('without a box in' in message for message in logged.messages)
    path = root / 'annotations/instances_train2017.json'
    content = json.loads(path.read_text())
    lost = next(category for category in content['categories'] if category['name'] == 'square')
    content['annotations'] = [a for a in content['annotations'] if a['category_id'] != lost['id']]
    path.write_text(json.dumps(content))
    check_data(cfg, ['train', 'val'])
    assert any('without a box in the training images (1 of 6)' in message for message in logged.messages)


def test_objects_and_files_that_are_listed_twice_are_named(checked, capsys):
    def twice(content):
        a, image = content['annotations'][0], content['images'][0]
        content['annotations'].append(dict(a, id=9999))
        content['images'].append(dict(image, id=9999))

    _, said = checked(twice, capsys)
    assert '1 objects are annotated twice' in said and '9999' in said
    assert '1 files are listed as several images' in said


def test_an_id_beyond_the_evaluation_is_refused(checked, capsys):
    with pytest.raises(UserError, match=r'no whole number below 2\*\*53'):
        checked(lambda content: content['annotations'][0].update(id=2**70), capsys)


def test_concatenated_data_sets_keep_their_own_annotations(shapes, tmp_path):
    """In the order of a checkpoint's classes each gets a copy of its own file."""
    root = shutil.copytree(shapes, tmp_path / 'data')
    cfg = load_config(DEMO)
    prepare(cfg, str(root), None, str(tmp_path / 'work'), 'none')
    first = cfg.train_dataloader.dataset
    second = ConfigDict(first.to_dict()) if hasattr(first, 'to_dict') else ConfigDict(first)
    second.ann_file = 'annotations/instances_val2017.json'
    cfg.train_dataloader.dataset = ConfigDict(type='ConcatDataset', datasets=[first, second])
    classes = [c['name'] for c in json.loads((root / 'annotations/instances_val2017.json').read_text())['categories']]
    follow_class_order(cfg, ['train'], classes[::-1], 'a checkpoint', str(tmp_path / 'work'))
    counts = [len(json.loads(Path(d.ann_file).read_text())['images']) for d in split_datasets(cfg, 'train')]
    truth = [
        len(json.loads((root / f'annotations/instances_{s}2017.json').read_text())['images']) for s in ('train', 'val')
    ]
    assert counts == truth


@pytest.mark.parametrize('kind', ['Evaluator', 'MultiDatasetsEvaluator'])
def test_the_metrics_inside_an_evaluator_follow(shapes, tmp_path, logged, kind):
    """To the data root, and into the order of a checkpoint's classes."""
    root, names = str(shapes), ('annotations/instances_train2017.json', 'annotations/instances_val2017.json')
    cfg = load_config(DEMO)
    first = cfg.test_dataloader.dataset
    old = cfg.test_evaluator.ann_file.partition('annotations')[0]
    if kind == 'Evaluator':
        names = names[1:]
    else:
        others = [
            ConfigDict(copy.deepcopy(first), ann_file=name, data_prefix=dict(img=f'{split}2017/'))
            for name, split in zip(names, ('train', 'val'), strict=True)
        ]
        cfg.test_dataloader.dataset = ConfigDict(type='ConcatDataset', datasets=others)
    cfg.test_evaluator = ConfigDict(
        type=kind, metrics=[ConfigDict(cfg.test_evaluator, ann_file=f'{old}{name}') for name in names]
    )
    prepare(cfg, root, None, str(tmp_path / 'work'), 'none')
    check_data(cfg, ['test'])
    assert not any('scores against' in message for message in logged.messages)
    classes = [c['name'] for c in json.loads((shapes / names[0]).read_text())['categories']][::-1]
    follow_class_order(cfg, ['test'], classes, 'a checkpoint', str(tmp_path / 'work'))
    for metric, dataset in zip(cfg.test_evaluator.metrics, split_datasets(cfg, 'test'), strict=True):
        assert metric.ann_file == dataset.ann_file
        assert [c['name'] for c in json.loads(Path(metric.ann_file).read_text())['categories']] == classes


@pytest.mark.parametrize('split', ['train', 'test'])
def test_data_sets_of_several_roots_become_no_one_data_set(split):
    cfg = load_config(DEMO)
    first = cfg[f'{split}_dataloader'].dataset
    cfg[f'{split}_dataloader'].dataset = ConfigDict(
        type='ConcatDataset', datasets=[ConfigDict(first, data_root=f'{root}/') for root in ('a', 'b')]
    )
    with pytest.raises(UserError, match=f'the {split} data sets of the config are in a/ and b/, and below new both'):
        set_data_root(cfg, 'new')
    cfg = load_config(DEMO)
    cfg[f'{split}_dataloader'].dataset = ConfigDict(type='ConcatDataset', datasets=[copy.deepcopy(first)] * 2)
    set_data_root(cfg, 'new')  # twice the same is meant so


@pytest.mark.parametrize('metric', ['VOCMetric', 'cbam_mmdet.SampleCocoMetric', 'CocoMetric'])
def test_a_truth_that_the_pipeline_resizes(shapes, tmp_path, metric):
    """CocoMetric reads a file, or boxes that no transform changes."""
    cfg = load_config(DEMO)
    prepare(cfg, str(shapes), None, str(tmp_path / 'work'), 'none')
    cfg.test_evaluator = ConfigDict(type=metric)
    check_data(cfg, ['test'])
    pipeline = cfg.test_dataloader.dataset.pipeline
    resize, load = ([step for step in pipeline if step.type == name] for name in ('Resize', 'LoadAnnotations'))
    cfg.test_dataloader.dataset.pipeline = [pipeline[0], *load, *resize, pipeline[-1]]
    if metric == 'CocoMetric':
        check_data(cfg, ['test'])
        return
    with pytest.raises(UserError, match='put LoadAnnotations after Resize'):
        check_data(cfg, ['test'])


def test_a_metric_with_names_of_metrics():
    """As some have an argument of this name. It is the metric, and not an evaluator that holds others."""
    cfg = ConfigDict(val_evaluator=dict(type='Mine', metrics=['AP', 'AR']))
    assert evaluators_of(cfg, 'val') == [cfg.val_evaluator]
    cfg = ConfigDict(val_evaluator=[dict(type='Evaluator', metrics=dict(type='A'))])
    assert [metric.type for metric in evaluators_of(cfg, 'val')] == ['A']


def test_each_data_set_keeps_its_pipeline_in_tta():
    cfg = load_config(DEMO)
    first = cfg.test_dataloader.dataset
    second = copy.deepcopy(first)
    second.pipeline[1].scale = (512, 512)
    cfg.test_dataloader.dataset = ConfigDict(type='ConcatDataset', datasets=[first, second])
    scales = [dataset.pipeline[1].scale for dataset in split_datasets(cfg, 'test')]
    _use_tta(cfg)
    augs = [dataset.pipeline[-1] for dataset in split_datasets(cfg, 'test')]
    assert all(aug.type == 'TestTimeAug' for aug in augs)
    assert [aug.transforms[1][0].scale for aug in augs] == scales


def test_images_in_memory_are_read_as_files_are(shapes, tmp_path):
    """With `to_float32` a resized image keeps its fractions."""
    cfg = load_config(DEMO)
    prepare(cfg, str(shapes), None, str(tmp_path / 'work'), 'none')
    cfg.test_dataloader.dataset.pipeline[0].to_float32 = True
    set_default_scope(cfg)
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    tested = dataset[0]['inputs']
    inferred = array_pipeline(cfg)(dict(img=cv2.imread(dataset.get_data_info(0)['img_path']), img_id=0))['inputs']
    assert tested.dtype == inferred.dtype == torch.float32 and torch.equal(tested, inferred)
    assert (tested != tested.round()).any()


def test_a_border_is_no_part_of_what_tta_flips(shapes, tmp_path):
    """Else DetTTAModel would flip the boxes back to where the border has moved the object."""
    cfg = load_config(DEMO)
    prepare(cfg, str(shapes), None, str(tmp_path / 'work'), 'none')
    pipeline = cfg.test_dataloader.dataset.pipeline
    pipeline.insert(2, dict(type='Pad', size=(192, 256)))
    _use_tta(cfg)
    set_default_scope(cfg)
    plain, flipped = DATASETS.build(cfg.test_dataloader.dataset)[0]['inputs']
    width, height = cfg.test_dataloader.dataset.pipeline[1].transforms[1][0].scale
    assert plain.shape[1:] == flipped.shape[1:] == (256, 192)
    assert torch.equal(flipped[:, :height, :width], plain[:, :height, :width].flip(-1))
    assert plain[:, :height, :width].float().std() > 0 and (flipped[:, :, width:] == 0).all()


@pytest.mark.parametrize('before', ['LoadAnnotations', 'RandomFlip'])
def test_a_truth_that_tta_flips(shapes, tmp_path, before):
    cfg = load_config(DEMO)
    prepare(cfg, str(shapes), None, str(tmp_path / 'work'), 'none')
    cfg.test_evaluator = ConfigDict(type='VOCMetric')
    load, resize, truth, pack = cfg.test_dataloader.dataset.pipeline
    steps = [[dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)], [truth]]
    steps = steps[::-1] if before == 'LoadAnnotations' else steps
    cfg.tta_pipeline = [load, dict(type='TestTimeAug', transforms=[[resize], *steps, [pack]])]
    _use_tta(cfg)
    with nullcontext() if before == 'RandomFlip' else pytest.raises(UserError, match='LoadAnnotations after RandomF'):
        check_data(cfg, ['test'])


class OwnCoco(CocoDataset):
    """A data set as people write it, with classes of their own."""


class OwnReader(CocoDataset):
    def load_data_list(self):
        return super().load_data_list()


@pytest.mark.parametrize('kind', [OwnCoco, OwnReader])
def test_a_data_set_of_an_own_class(shapes, tmp_path, logged, monkeypatch, kind):
    """The file numbers the classes for those that leave the reading to CocoDataset; of others a warning says so."""
    monkeypatch.setitem(DATASETS.module_dict, kind.__name__, kind)
    content = json.loads((shapes / 'annotations/instances_val2017.json').read_text())
    names = tuple(category['name'] for category in content['categories'])
    cfg = load_config(DEMO)
    for split in SPLITS:
        for dataset in split_datasets(cfg, split):
            dataset.type = kind.__name__
    prepare(cfg, str(shapes), ','.join(names[::-1]), str(tmp_path / 'work'), 'none')
    check_data(cfg, ['train', 'val'])
    set_default_scope(cfg)
    [dataset] = split_datasets(cfg, 'val')
    reads = kind is OwnReader
    assert DATASETS.build(dataset).metainfo['classes'] == (names[::-1] if reads else names)
    assert any(f'is not checked: type {kind.__name__}' in message for message in logged.messages) == reads


def test_an_evaluator_that_spells_its_file_otherwise_follows_the_order(shapes, tmp_path):
    cfg = load_config(DEMO)
    prepare(cfg, str(shapes), None, str(tmp_path / 'work'), 'none')
    for metric in evaluators_of(cfg, 'test'):
        metric.ann_file = str(shapes / 'annotations/../annotations/instances_val2017.json')
    classes = [c['name'] for c in json.loads((shapes / 'annotations/instances_val2017.json').read_text())['categories']]
    follow_class_order(cfg, ['test'], classes[::-1], 'a checkpoint', str(tmp_path / 'work'))
    [dataset] = split_datasets(cfg, 'test')
    assert [c['name'] for c in json.loads(Path(dataset.ann_file).read_text())['categories']] == classes[::-1]
    assert all(metric.ann_file == dataset.ann_file for metric in evaluators_of(cfg, 'test'))


def test_no_workers_where_the_config_keeps_them(shapes, tmp_path):
    """torch refuses to keep workers where there are none."""
    cfg = load_config(DEMO)
    cfg.train_dataloader.num_workers = 0
    assert cfg.train_dataloader.persistent_workers
    prepare(cfg, str(shapes), None, str(tmp_path / 'work'), 'none')
    assert len(Runner.build_dataloader(cfg.train_dataloader, seed=0)) == 1  # a batch of all eight images


def test_a_forgotten_comma_in_the_classes(run_tool, shapes, tmp_path):
    """MMDetection would name the classes c, i, r, ..."""
    result = run_tool('train.py', DEMO, *tiny(tmp_path, shapes, 'train_dataloader.dataset.metainfo.classes=circle'))
    assert result.code == 2 and "classes=('circle',)" in result.err


def test_an_area_larger_than_its_box_is_named(checked, capsys):
    def grow(content):
        content['annotations'][3]['area'] = 1e14

    _, said = checked(grow, capsys)
    assert '1 objects have an area larger than their box' in said
    assert str(4) in said.split('larger than their box (annotation ids', 1)[1].split(')')[0]


def test_classes_that_differ_in_capitals_only_are_named(tmp_path, capsys):
    boxes = [dict(id=i, image_id=1, category_id=i, bbox=[1, 1, 9, 9], area=81, iscrowd=0) for i in (1, 2, 3)]
    categories = [dict(id=i, name=name) for i, name in enumerate(('circle', 'Circle', 'square'), start=1)]
    images = [dict(id=1, file_name='0.jpg', width=20, height=20)]
    (tmp_path / 'val.json').write_text(json.dumps(dict(images=images, annotations=boxes, categories=categories)))
    (tmp_path / '0.jpg').write_bytes(cv2.imencode('.jpg', np.zeros((20, 20, 3), np.uint8))[1].tobytes())
    dataset = dict(type='CocoDataset', data_root=f'{tmp_path}/', ann_file='val.json', data_prefix=dict(img=''))
    dataset['metainfo'] = dict(classes=('circle', 'Circle', 'square'))
    check_data(ConfigDict(model=dict(), val_dataloader=dict(dataset=dataset)), ['val'])
    said = capsys.readouterr()
    assert "differ in capitals or blanks only are different ones: 'circle', 'Circle'" in said.out + said.err


def test_objects_that_the_config_or_mmdetection_leaves_out_are_said(checked, capsys):
    def others(content):
        content['categories'].append(dict(id=99, name='zebra'))
        content['annotations'][0]['category_id'] = 99
        content['annotations'][1]['ignore'] = 1

    _, said = checked(others, capsys)
    assert "1 boxes are left out, whose classes the config does not name: 'zebra' 1" in said
    assert '1 objects have ignore=1' in said


@pytest.mark.parametrize('annotation', [5, None, []])
def test_an_annotation_that_is_none(checked, capsys, annotation):
    with pytest.raises(UserError, match='is malformed'):
        checked(lambda content: content['annotations'].append(annotation), capsys)


def test_iscrowd_may_be_true_or_false(checked, capsys):
    checked(lambda content: content['annotations'][0].update(iscrowd=False), capsys)


def test_iscrowd_is_no_text(checked, capsys):
    with pytest.raises(UserError, match='is malformed'):
        checked(lambda content: content['annotations'][0].update(iscrowd='0'), capsys)


def test_images_that_the_filter_drops_are_said(shapes, tmp_path, capsys):
    root = shutil.copytree(shapes, tmp_path / 'data')
    path = root / 'annotations/instances_train2017.json'
    content = json.loads(path.read_text())
    for image in content['images'][:3]:
        image['width'] = 31
    path.write_text(json.dumps(content))
    cfg = load_config(DEMO)
    prepare(cfg, str(root), None, str(tmp_path / 'work'), 'none')
    check_data(cfg, ['train'])
    said = capsys.readouterr()
    assert '3 of 8 images are not trained on' in said.out + said.err
    left = DATASETS.build(cfg.train_dataloader.dataset)
    assert len(left) <= 5


def test_copies_in_two_splits_are_named_in_the_layout_of_coco_too(shapes, tmp_path, capsys):
    root = shutil.copytree(shapes, tmp_path / 'data')
    images = [sorted((root / folder).iterdir())[0] for folder in ('train2017', 'val2017')]
    shutil.copy(*images)
    cfg = load_config(DEMO)
    prepare(cfg, str(root), None, str(tmp_path / 'work'), 'none')
    check_data(cfg, ['train', 'val'])
    said = capsys.readouterr()
    assert f'1 of 4 images are trained on, too, so the score is not that of new images: {images[1].name}' in (
        said.out + said.err
    )


def test_turned_boxes_are_named(checked, capsys):
    """CVAT writes an upright box and its turn, of which MMDetection reads the first only."""
    _, said = checked(lambda content: content['annotations'][0].update(attributes=dict(rotation=30.0)), capsys)
    assert '1 boxes are turned' in said and 'tools/convert_annotations.py' in said


def test_images_of_one_id_are_not_scored(shapes):
    """COCO's evaluation would add up the detections of a data set that is repeated, or of two that number alike."""
    path = shapes / 'annotations/instances_val2017.json'
    metric = HotCocoMetric(ann_file=str(path), metric='bbox')
    truth = COCO(str(path))
    metric.dataset_meta = dict(classes=tuple(category['name'] for category in truth.dataset['categories']))
    assert perfect(metric, truth) == 1
    size = len(truth.imgs)
    process = metric.process
    metric.process = lambda *args: [process(*args) for _ in range(2)]
    metric.evaluate = lambda _: type(metric).evaluate(metric, 2 * size)
    with pytest.raises(UserError, match=f'{size} image ids occur several times among the {2 * size} images'):
        perfect(metric, truth)


def test_an_evaluator_of_one_of_two_joined_data_sets_is_named(shapes, tmp_path, capsys):
    cfg = load_config(DEMO)
    prepare(cfg, str(shapes), None, str(tmp_path / 'work'), 'none')
    first = ConfigDict(cfg.val_dataloader.dataset)
    other = ConfigDict(first, ann_file='annotations/instances_train2017.json', data_prefix=dict(img='train2017/'))
    cfg.val_dataloader.dataset = ConfigDict(type='ConcatDataset', datasets=[first, other])
    check_data(cfg, ['val'])
    said = ''.join(capsys.readouterr())
    assert 'val_evaluator scores against' in said and 'the val data set is' in said and 'instances_train2017' in said
    assert 'must hold all images of these' in said and 'ann_file=' not in said
