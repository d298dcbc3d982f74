"""--classes: every key of a config that depends on the classes, from names or from the annotations themselves."""

import json
import logging
import re

import pytest
from conftest import DATA, DEMO, tiny
from mmdet.registry import DATASETS, MODELS
from mmdet.visualization.palette import get_palette
from mmengine.config import Config
from mmengine.registry import init_default_scope

from cbam_mmdet.datasets import ensure_shapes
from cbam_mmdet.datasets.classes import set_classes
from cbam_mmdet.datasets.voc import fit_layout
from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.config import set_data_root, split_datasets

BCCD = DATA / 'bccd'
SHAPES = ('circle', 'square', 'triangle', 'star', 'ring', 'cross')  # the order of the COCO files
VOC = 'mmdet::pascal_voc/faster-rcnn_r50_fpn_1x_voc0712.py'


@pytest.fixture(scope='module')
def voc_shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp('voc')
    return ensure_shapes(root, num_train=12, num_val=4, image_size=64, style='voc', progress=False)


def config(tmp_path, base, root):
    init_default_scope('mmdet')
    (tmp_path / 'base.py').write_text(f'_base_ = {base!r}\n')
    cfg = Config.fromfile(tmp_path / 'base.py')
    set_data_root(cfg, str(root))
    fit_layout(cfg)
    return cfg


def classes_of(cfg, split):
    return [tuple(d.metainfo.classes) for d in split_datasets(cfg, split)]


def xml_names(root):
    """The classes by regular expressions instead of an XML parser."""
    found = set()
    for name in (root / 'VOC2007/ImageSets/Main/trainval.txt').read_text().split():
        text = (root / f'VOC2007/Annotations/{name}.xml').read_text()
        found |= {re.search('<name>(.*?)</name>', part)[1] for part in text.split('<object>')[1:]}
    return found


def test_auto_reads_voc_names_sorted(tmp_path, voc_shapes):
    cfg = config(tmp_path, VOC, voc_shapes)
    names = set_classes(cfg, 'auto')
    assert names == tuple(sorted(xml_names(voc_shapes)))
    assert cfg.model.roi_head.bbox_head.num_classes == len(names)
    assert 'num_classes' not in cfg.model.rpn_head
    for split in ('train', 'val', 'test'):
        assert set(classes_of(cfg, split)) == {names}
    dataset = DATASETS.build({**cfg.train_dataloader.dataset.dataset.datasets[0], 'pipeline': []})
    assert {i['bbox_label'] for item in dataset for i in item['instances']} == set(range(len(names)))


@pytest.mark.skipif(not BCCD.is_dir(), reason='the BCCD images are not there')
def test_auto_on_real_data(tmp_path):
    cfg = config(tmp_path, VOC, BCCD)
    assert set_classes(cfg, 'auto') == tuple(sorted(xml_names(BCCD))) == ('Platelets', 'RBC', 'WBC')


def test_auto_keeps_the_order_of_a_coco_file(tmp_path, shapes):
    cfg = config(tmp_path, 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', shapes)
    assert set_classes(cfg, 'auto') == SHAPES
    assert cfg.model.bbox_head.num_classes == 6
    assert classes_of(cfg, 'test') == [SHAPES]


def test_names_are_put_in_the_order_of_a_coco_file(tmp_path, shapes, logged):
    cfg = config(tmp_path, 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', shapes)
    assert set_classes(cfg, 'cross, circle') == ('circle', 'cross')
    assert 'in the order of' in logged.text and 'not in that given (cross, circle)' in logged.text
    assert 'classes besides, whose boxes are left out: square, triangle, star, ring' in logged.text
    dataset = DATASETS.build({**split_datasets(cfg, 'train')[0], 'pipeline': []})
    content = json.loads((shapes / 'annotations/instances_train2017.json').read_text())
    numbers = {c['id']: c['name'] for c in content['categories']}
    kept = [
        numbers[a['category_id']] for a in content['annotations'] if numbers[a['category_id']] in ('circle', 'cross')
    ]
    loaded = [('circle', 'cross')[i['bbox_label']] for item in dataset for i in item['instances']]
    assert sorted(loaded) == sorted(kept)


def test_names_keep_their_order_for_voc(tmp_path, voc_shapes):
    cfg = config(tmp_path, VOC, voc_shapes)
    assert set_classes(cfg, ['star', 'circle']) == ('star', 'circle')


@pytest.mark.parametrize(
    ('base', 'keys'),
    [
        ('cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py', ['bbox_head'] * 3 + ['mask_head']),
        ('mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', ['bbox_head', 'mask_head']),
        ('ssd/ssd300_coco.py', ['bbox_head']),
        ('yolox/yolox_s_8xb8-300e_coco.py', ['bbox_head']),
        ('deformable_detr/deformable-detr_r50_16xb2-50e_coco.py', ['bbox_head']),
    ],
)
def test_every_head_of_the_built_detector_has_the_classes(tmp_path, shapes, logged, base, keys):
    cfg = config(tmp_path, f'mmdet::{base}', shapes)
    set_classes(cfg, 'auto')
    assert re.findall(r'(\w+_head)(?:\[\d\])?\.num_classes=6', logged.text) == keys
    if 'backbone' in cfg.model:
        cfg.model.backbone.init_cfg = None
    model = MODELS.build(cfg.model)
    counts = {
        name: module.num_classes
        for name, module in model.named_modules()
        if re.search(r'(bbox|mask)_head(\.\d)?$', name) and hasattr(module, 'num_classes')
    }
    assert len(counts) >= len(keys)
    assert set(counts.values()) == {6}, counts


def test_a_head_that_states_no_number_gets_one(tmp_path, shapes):
    cfg = config(tmp_path, DEMO, shapes)
    del cfg.model.roi_head.bbox_head['num_classes']
    cfg.model.roi_head.bbox_head.loss_cls = dict(type='SeesawLoss', num_classes=80)
    set_classes(cfg, 'circle,star')
    assert cfg.model.roi_head.bbox_head.num_classes == 2
    assert cfg.model.roi_head.bbox_head.loss_cls.num_classes == 2


def test_palette_is_never_shorter_than_the_classes(tmp_path, shapes, voc_shapes):
    cfg = config(tmp_path, DEMO, shapes)
    for dataset in split_datasets(cfg, 'val'):
        dataset.metainfo.palette = [(1, 2, 3)]
    set_classes(cfg, 'auto')
    assert len(get_palette(split_datasets(cfg, 'val')[0].metainfo.palette, 6)) == 6

    names = [f'class{i}' for i in range(25)]  # VOC's own palette has 20 colours
    cfg = config(tmp_path, VOC, voc_shapes)
    for split in ('train', 'val', 'test'):
        for dataset in split_datasets(cfg, split):
            dataset.ann_file = 'nowhere.txt'  # what is not there cannot contradict the names
    set_classes(cfg, names)
    for split in ('train', 'val', 'test'):
        for dataset in split_datasets(cfg, split):
            assert len(get_palette(dataset.metainfo.palette, 25)) == 25


def test_class_that_training_does_not_know(tmp_path, own_shapes, logged):
    path = own_shapes / 'annotations/instances_val2017.json'
    content = json.loads(path.read_text())
    content['categories'].append(dict(id=7, name='hexagon'))
    path.write_text(json.dumps(content))
    set_classes(config(tmp_path, DEMO, own_shapes), 'auto')
    (record,) = [r for r in logged.records if r.levelno == logging.WARNING]
    assert 'instances_val2017.json has classes besides, whose boxes are left out: hexagon' in record.message


def test_union_of_two_voc_training_sets(tmp_path, voc_shapes):
    cfg = config(tmp_path, VOC, voc_shapes)
    (dataset,) = split_datasets(cfg, 'train')
    one, two = tmp_path / 'one.txt', tmp_path / 'two.txt'
    names = (voc_shapes / 'VOC2007/ImageSets/Main/trainval.txt').read_text().split()
    one.write_text(names[0])
    two.write_text('\n'.join(names[1:]))
    parts = [{**dataset, 'ann_file': str(path)} for path in (one, two)]
    cfg.train_dataloader.dataset = dict(type='ConcatDataset', ignore_keys=['dataset_type'], datasets=parts)
    assert set_classes(cfg, 'auto') == tuple(sorted(xml_names(voc_shapes)))


def test_coco_training_sets_that_disagree(tmp_path, own_shapes):
    cfg = config(tmp_path, DEMO, own_shapes)
    content = json.loads((own_shapes / 'annotations/instances_train2017.json').read_text())
    content['categories'].reverse()
    (own_shapes / 'other.json').write_text(json.dumps(content))
    dataset = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[dataset, {**dataset, 'ann_file': 'other.json'}])
    with pytest.raises(UserError, match=r'disagree on the classes or their order.*other.json: cross, ring'):
        set_classes(cfg, 'auto')


def test_a_model_without_such_heads(tmp_path, shapes):
    cfg = config(tmp_path, 'mmdet::rpn/rpn_r50_fpn_1x_coco.py', shapes)
    with pytest.raises(UserError, match='the model has no head that takes num_classes'):
        set_classes(cfg, 'auto')


def test_work_dir_config_needs_no_classes(run_tool, own_shapes, tmp_path):
    """Files with three classes of their own: trained, then tested with nothing but what the work dir keeps."""
    for split in ('train2017', 'val2017'):
        path = own_shapes / f'annotations/instances_{split}.json'
        content = json.loads(path.read_text())
        content['categories'] = [dict(id=i, name=name) for i, name in enumerate(('round', 'edged', 'other'), 1)]
        for annotation in content['annotations']:
            annotation['category_id'] = annotation['category_id'] % 3 + 1
        path.write_text(json.dumps(content))
    work = tmp_path / 'work'
    result = run_tool('train.py', DEMO, '--classes', 'auto', *tiny(work, own_shapes))
    assert result.code == 0, result.err[-2000:]
    log = result.out + result.err
    assert 'round, edged, other. Set: model.roi_head.bbox_head.num_classes=3' in log
    result = run_tool('test.py', work / 'faster_rcnn_cbam.py', work, '--work-dir', tmp_path / 'test')
    assert result.code == 0, result.err[-2000:]
    assert 'bbox_mAP' in result.out + result.err
    assert Config.fromfile(work / 'faster_rcnn_cbam.py').test_dataloader.dataset.metainfo.classes == (
        'round',
        'edged',
        'other',
    )
