"""Training on one's own folder: class names, num_classes and VOC's folders set in any config, by --classes and --data-root."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, tiny
from mmdet.datasets import CocoDataset, VOCDataset
from mmdet.registry import DATASETS
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope

from cbam_mmdet.config import set_data_root, split_datasets
from cbam_mmdet.datasets import CLASSES, write_voc
from cbam_mmdet.datasets.classes import set_classes
from cbam_mmdet.datasets.voc import fit_voc_folders
from cbam_mmdet.errors import UserError

VOC_CONFIG = ROOT / 'configs/faster_rcnn_r50_cbam_voc0712.py'
SSD_CONFIG = ROOT / 'configs/ssd300_vgg16_cbam_voc0712.py'
COCO_CONFIG = ROOT / 'configs/faster_rcnn_r50_cbam.py'


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmdet')


@pytest.fixture(scope='session')
def voc(tmp_path_factory):
    """The built-in shapes in VOC's layout: a VOC2007/ alone. Not to be written to."""
    return write_voc(tmp_path_factory.mktemp('voc'), num_train=8, num_val=4, image_size=64, progress=False)


def load(path, root):
    cfg = Config.fromfile(path)
    set_data_root(cfg, str(root))
    fit_voc_folders(cfg)
    return cfg


def classes_of(cfg):
    return {tuple(d.metainfo.classes) for split in ('train', 'val', 'test') for d in split_datasets(cfg, split)}


@pytest.mark.parametrize(('path', 'head'), [(VOC_CONFIG, 'roi_head.bbox_head'), (SSD_CONFIG, 'bbox_head')])
def test_auto_reads_xml_files(voc, path, head):
    cfg = load(path, voc)
    assert set_classes(cfg, 'auto') == tuple(sorted(CLASSES))
    assert classes_of(cfg) == {tuple(sorted(CLASSES))}
    node = cfg.model
    for key in head.split('.'):
        node = node[key]
    assert node.num_classes == len(CLASSES)
    assert DATASETS.build(split_datasets(cfg, 'test')[0]).metainfo['classes'] == tuple(sorted(CLASSES))


def test_auto_keeps_the_order_of_a_coco_file(shapes):
    """MMDetection numbers the classes of a COCO file in the file's order."""
    cfg = load(COCO_CONFIG, shapes)
    assert set_classes(cfg, 'auto') == tuple(CLASSES)
    dataset = DATASETS.build(split_datasets(cfg, 'val')[0])
    content = json.loads(Path(dataset.ann_file).read_text())
    names = {category['id']: category['name'] for category in content['categories']}
    truth = {(a['image_id'], names[a['category_id']], *map(float, a['bbox'][:2])) for a in content['annotations']}
    loaded = {
        (item['img_id'], dataset.metainfo['classes'][i['bbox_label']], *i['bbox'][:2])
        for item in map(dataset.get_data_info, range(len(dataset))) for i in item['instances']
    }  # fmt: skip
    assert loaded == truth


def test_names_that_are_given_are_put_into_the_files_order(shapes, voc):
    chosen = [CLASSES[3], CLASSES[0]]
    assert set_classes(load(COCO_CONFIG, shapes), chosen) == (CLASSES[0], CLASSES[3])
    assert set_classes(load(VOC_CONFIG, voc), chosen) == tuple(chosen)


def test_every_head_of_a_cascade(voc):
    cfg = load(VOC_CONFIG, voc)
    heads = [dict(type='Shared2FCBBoxHead', num_classes=80) for _ in range(3)]
    cfg.model.roi_head = ConfigDict(type='CascadeRoIHead', bbox_head=heads, mask_head=dict(type='FCNMaskHead'))
    set_classes(cfg, ['circle', 'ring'])
    assert [head.num_classes for head in cfg.model.roi_head.bbox_head] == [2, 2, 2]
    assert cfg.model.roi_head.mask_head.num_classes == 2
    assert 'num_classes' not in cfg.model.rpn_head


@pytest.mark.parametrize(
    ('names', 'pattern'),
    [
        (['circel'], r"--classes: \['circel'\] not in the annotations .*trainval.txt.*did you mean 'circle'"),
        (['circle', 'car'], r"\['car'\] not in"),
        ([''], 'no name given'),
    ],
)
def test_names_that_are_not_there(voc, names, pattern):
    with pytest.raises(UserError, match=pattern):
        set_classes(load(VOC_CONFIG, voc), names)


def test_more_classes_than_the_types_palette_has_colours(voc, tmp_path):
    root = Path(shutil.copytree(voc, tmp_path / 'voc'))
    xml = sorted((root / 'VOC2007/Annotations').iterdir())
    listed = (root / 'VOC2007/ImageSets/Main/trainval.txt').read_text().split()
    text = next(f for f in xml if f.stem == listed[0])
    objects = ''.join(
        f'<object><name>class {i:02}</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>'
        for i in range(len(VOCDataset.METAINFO['palette']) + 1)
    )
    text.write_text(text.read_text().replace('</annotation>', f'{objects}</annotation>'))
    cfg = load(VOC_CONFIG, root)
    names = set_classes(cfg, 'auto')
    assert len(names) > 21
    assert {d.metainfo.palette for split in ('train', 'val') for d in split_datasets(cfg, split)} == {'random'}


def test_no_training_annotations(tmp_path):
    with pytest.raises(UserError, match=r'no annotation file .*trainval.txt(.|\n)*Expected:'):
        set_classes(load(VOC_CONFIG, tmp_path), 'auto')


def test_data_set_of_another_kind():
    cfg = Config.fromfile(COCO_CONFIG)
    cfg.train_dataloader.dataset.type = 'OpenImagesDataset'
    with pytest.raises(UserError, match='type OpenImagesDataset cannot be read'):
        set_classes(cfg, 'auto')


# VOC's folders


def test_missing_part_of_voc_is_left_out_and_said(voc, capfd):
    from conftest import forget_earlier_runs

    forget_earlier_runs()
    cfg = load(VOC_CONFIG, voc)
    assert [d.ann_file for d in split_datasets(cfg, 'train')] == ['VOC2007/ImageSets/Main/trainval.txt']
    assert 'VOC2012/: that part of the training set is left out' in ''.join(capfd.readouterr())


def test_both_parts_of_voc_stay(voc, tmp_path):
    for year in ('VOC2007', 'VOC2012'):
        shutil.copytree(voc / 'VOC2007', tmp_path / year)
    assert len(split_datasets(load(VOC_CONFIG, tmp_path), 'train')) == 2


def test_neither_part_of_voc_leaves_the_config_for_the_check(tmp_path):
    assert len(split_datasets(load(VOC_CONFIG, tmp_path), 'train')) == 2


def test_folder_without_the_level_of_the_year(voc, tmp_path):
    shutil.copytree(voc / 'VOC2007', tmp_path / 'flat')
    cfg = load(SSD_CONFIG, tmp_path / 'flat')
    set_classes(cfg, 'auto')
    for split, part, images in (('train', 'trainval', 8), ('val', 'test', 4)):
        (dataset,) = split_datasets(cfg, split)
        assert dataset.ann_file == f'ImageSets/Main/{part}.txt'
        built = DATASETS.build(dict(dataset, pipeline=[], filter_cfg=None))
        assert len(built) == images and Path(built.get_data_info(0)['img_path']).is_file()


def test_coco_config_has_no_voc_folders(shapes):
    cfg = load(COCO_CONFIG, shapes)
    assert [DATASETS.get(d.type) for d in split_datasets(cfg, 'train')] == [CocoDataset]


# The tools


def test_train_and_test_on_a_folder_of_ones_own(run_tool, voc, tmp_path):
    """No config is written: the VOC config of the detector, the folder, and `--classes auto`; then the work dir's own config."""
    options = tiny(tmp_path / 'work', voc)
    demo = tmp_path / 'demo_voc.py'
    demo.write_text(
        f"_base_ = '{ROOT}/configs/demo/bccd_r18_cbam.py'\n"
        'model = dict(backbone=dict(backbone=dict(base_channels=4)), neck=dict(in_channels=[4, 8, 16, 32]))\n'
    )
    options = [o for o in options if not str(o).startswith('model.')]
    result = run_tool('train.py', demo, '--classes', 'auto', *options)
    assert result.code == 0, result.err[-2000:]
    printed = result.out + result.err
    assert f'num_classes={len(CLASSES)} of model.roi_head.bbox_head' in printed
    assert 'pascal_voc/mAP_11points' in printed and 'coco/bbox_mAP_50' in printed
    again = run_tool('test.py', tmp_path / 'work/demo_voc.py', tmp_path / 'work')
    assert again.code == 0, again.err[-2000:]
    assert all(name in again.out + again.err for name in CLASSES)


def test_class_that_the_annotations_lack(run_tool, voc, tmp_path):
    result = run_tool('train.py', VOC_CONFIG, '--data-root', voc, '--classes', 'circle,squar', '--work-dir', tmp_path)
    assert result.code == 2 and 'Traceback' not in result.err
    assert "did you mean 'square'" in result.err
