"""A user's mistakes: each ends in one message that names the file or key, exit code 2, and no traceback."""

import argparse
import errno
import json
import os
import re
import shutil
import sys
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import DATA, DEMO, ROOT, SMALL, cfg_options, tiny
from mmengine.config import ConfigDict

from cbam_mmdet.datasets.checks import check_data, read_voc
from cbam_mmdet.errors import UserError
from cbam_mmdet.models.plugins.checks import check_plugins
from cbam_mmdet.utils.config import load_config
from cbam_mmdet.visualization.sheets import image_grid, save_sheet

BCCD = DATA / 'bccd'


@pytest.fixture
def train(run_tool, tmp_path, shapes):
    def run(*options, config=DEMO, data_root=shapes):
        return run_tool('train.py', config, *tiny(tmp_path / 'work', data_root, *options))

    return run


def assert_refused(result, *patterns):
    assert result.code == 2, result.err[-2000:]
    message = result.err.rpartition('\nerror: ')[2].strip()
    assert 'Traceback' not in result.err
    for pattern in patterns:
        assert re.search(pattern, message), f'{pattern!r} is not in: {message}'


def annotations(root, split='train2017'):
    path = Path(root) / f'annotations/instances_{split}.json'
    return path, json.loads(path.read_text())


def config_with(tmp_path, text):
    path = tmp_path / 'own.py'
    path.write_text(f"_base_ = '{DEMO}'\n{text}\n")
    return path


# The config


def test_config_that_does_not_exist(run_tool):
    assert_refused(
        run_tool('train.py', DEMO.replace('cbam.py', 'cban.py')), 'does not exist', 'did you mean .*faster_rcnn_cbam.py'
    )


def test_package_config_that_does_not_exist(run_tool):
    result = run_tool('train.py', 'cbam_mmdet::faster_rcnn_r50_cbm.py')
    assert_refused(result, "no config 'faster_rcnn_r50_cbm.py'", "did you mean 'faster_rcnn_r50_cbam.py'")


def test_config_with_a_syntax_error(run_tool, tmp_path):
    (tmp_path / 'own.py').write_text('model = dict(\n')
    assert_refused(run_tool('train.py', tmp_path / 'own.py'), 'own.py.* cannot be read: SyntaxError')


def test_config_without_model(run_tool, tmp_path):
    (tmp_path / 'own.py').write_text('x = 1\n')
    assert_refused(run_tool('train.py', tmp_path / 'own.py'), 'has no `model`')


@pytest.mark.parametrize(
    ('text', 'patterns'),
    [
        ("model = dict(type='FasterRCN')", ["type='FasterRCN'", "did you mean 'FasterRCNN'"]),
        ("model = dict(backbone=dict(type='ResNett'))", ["type='ResNett'", "'ResNet'"]),
        ("model = dict(backbone=dict(plugins=[dict(cfg=dict(type='CBAMM'), position='after_conv3')]))",
         [r"model.backbone.plugins\[0\].cfg.type='CBAMM'", "did you mean 'CBAM'"]),
        ("train_dataloader = dict(dataset=dict(type='CocoDataSet'))", ["type='CocoDataSet'", "'CocoDataset'"]),
        ("optim_wrapper = dict(optimizer=dict(type='AdamWW'))", ["optim_wrapper.optimizer.type='AdamWW'", "'AdamW'"]),
        ("val_evaluator = dict(type='CocoMetrics')", ["type='CocoMetrics'", "'CocoMetric'"]),
        ("train_dataloader = dict(dataset=dict(pipeline=[dict(type='LoadImageFromFiles')]))",
         ["type='LoadImageFromFiles'", "'LoadImageFromFile'"]),
    ],
)  # fmt: skip
def test_unknown_type(train, tmp_path, text, patterns):
    assert_refused(train(config=config_with(tmp_path, text)), *patterns)


def test_backbone_of_a_package_that_is_not_installed(train, tmp_path):
    text = "model = dict(backbone=dict(_delete_=True, type='mmnowhere.VGG'))"
    assert_refused(
        train(config=config_with(tmp_path, text)), "'mmnowhere.VGG'", 'package mmnowhere, which is not installed'
    )


def test_neck_that_does_not_fit_the_backbone(train):
    result = train('model.neck.in_channels=[16,32,64,100]')
    assert_refused(result, 'takes 100 channels was given 128', 'model.neck.in_channels')


def test_after_in_place_of_position(train, tmp_path):
    text = "model = dict(backbone=dict(plugins=[dict(cfg=dict(type='CBAM'), after='layer*.*.bn3')]))"
    assert_refused(train(config=config_with(tmp_path, text)), '`after` is for PluginBackbone', 'after_conv3')


def test_key_that_a_type_does_not_take(train, tmp_path):
    text = "model = dict(backbone=dict(plugins=[dict(cfg=dict(type='CBAM', ratio=8), position='after_conv3')]))"
    assert_refused(train(config=config_with(tmp_path, text)), "type='CBAM'.*does not take the key 'ratio'")


def test_value_that_cbam_does_not_take(train, tmp_path):
    text = "model = dict(backbone=dict(plugins=[dict(cfg=dict(type='CBAM', gate='units'), position='after_conv3')]))"
    assert_refused(train(config=config_with(tmp_path, text)), "gate='units' is unknown", "did you mean 'unit'")


def test_plugin_at_a_position_that_does_not_exist(train, tmp_path):
    text = "model = dict(backbone=dict(plugins=[dict(cfg=dict(type='CBAM'), position='after_conv4')]))"
    assert_refused(train(config=config_with(tmp_path, text)), r"plugins\[0\].position='after_conv4'", 'after_conv3')


def test_stages_of_the_wrong_length(train, tmp_path):
    plugin = "dict(cfg=dict(type='CBAM'), stages=(True, True, True), position='after_conv3')"
    text = f'model = dict(backbone=dict(plugins=[{plugin}]))'
    assert_refused(train(config=config_with(tmp_path, text)), r'plugins\[0\].stages=.* has 3 entries: expected 4')


@pytest.mark.parametrize(
    ('backbone', 'pattern'),
    [("dict(depth=18)", 'depth 18 takes no plugins'), ("dict(_delete_=True, type='SSDVGG', depth=16, input_size=300, "
      "plugins=[dict(cfg=dict(type='CBAM'), position='after_conv3')])", 'SSDVGG takes no plugins')],
)  # fmt: skip
def test_backbone_that_takes_no_plugins(train, tmp_path, backbone, pattern):
    assert_refused(train(config=config_with(tmp_path, f'model = dict(backbone={backbone})')), pattern)


def test_cfg_options_without_an_equals_sign(run_tool):
    assert_refused(run_tool('train.py', DEMO, '--cfg-options', 'train_cfg.max_epochs', '3'), 'takes KEY=VALUE pairs')


def test_misspelt_cfg_option_is_refused(train):
    assert_refused(train('optim_wraper.optimizer.lr=1'), "no 'optim_wraper'; did you mean 'optim_wrapper'")


@pytest.mark.parametrize(
    ('option', 'words'),
    [
        ('model.test_cfg.rcnn.score_thresh=0.9', "did you mean 'score_thr'"),
        ('model.test_cfg.score_thr=0.9', "did you mean 'rcnn.score_thr'"),
        ('train_dataloader.shuffle=True', "did you mean 'sampler.shuffle'"),
        ('train_cfg.max_epoch=9', 'does not take'),
    ],
)
def test_misspelt_cfg_option_in_a_group_is_refused(train, option, words):
    assert_refused(train(option), words)


def test_cfg_options_that_only_look_misspelt():
    keys = ('model.test_cfg.rcnn.mask_thr_binary', 'optim_wrapper.paramwise_cfg.custom_keys.backbone.lr_mult')
    cfg = load_config(DEMO, dict.fromkeys(keys, 0.5))
    assert cfg.model.test_cfg.rcnn.mask_thr_binary == 0.5


def test_cfg_option_that_nothing_reads_is_named():
    with pytest.warns(UserWarning, match="the config has no 'lr', and no setting has this name"):
        load_config(DEMO, {'lr': 0.1})
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        load_config(DEMO, {'gate_statistics': False, 'resume': True, 'model_wrapper_cfg.type': 'DDP'})


@pytest.mark.parametrize(
    ('config', 'key', 'meant'),
    [
        (DEMO, 'max_epochs', 'train_cfg.max_epochs=1 param_scheduler.1.end=1 param_scheduler.1.T_max=1'),
        (ROOT / 'configs/faster_rcnn_r50_cbam.py', 'cbam.gate', 'model.backbone.plugins.0.cfg.gate=1'),
    ],
)
def test_cfg_option_that_the_config_has_used_already_is_refused(config, key, meant):
    with pytest.raises(UserError, match=rf'no setting is called .* Set those: .*{re.escape(meant)}'):
        load_config(str(config), {key: 1})


def test_cfg_option_of_a_config_whose_base_only_mmengine_finds(tmp_path):
    (tmp_path / 'base.py').write_text(f'_base_ = {str(DEMO)!r}\n')
    (tmp_path / 'own.py').write_text(
        "_base_ = '{{fileDirname}}/base.py'\nepochs = 3\ntrain_cfg = dict(max_epochs=epochs)\n"
    )
    with pytest.raises(UserError, match=r'Set those: train_cfg\.max_epochs=1'):
        load_config(str(tmp_path / 'own.py'), {'epochs': 1})


def test_a_setting_that_takes_norms_out():
    """MMEngine's Runner would erase the calls of the norms, of which the plugins are parts."""
    config = str(ROOT / 'configs/demo/bccd_r18_cbam.py')
    cfg = load_config(config, {'efficient_conv_bn_eval': '[backbone]'})
    with pytest.raises(UserError, match=r'efficient_conv_bn_eval.*takes the norms'):
        check_plugins(cfg)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        check_plugins(load_config(config, {'efficient_conv_bn_eval': None}))


def test_config_of_mmdetection_2(run_tool, tmp_path):
    (tmp_path / 'old.py').write_text("model = dict(type='FasterRCNN')\ndata = dict(samples_per_gpu=2)\n")
    assert_refused(run_tool('train.py', tmp_path / 'old.py'), 'written for MMDetection 2.x')


def test_config_without_a_test_split(run_tool, trained, shapes, tmp_path):
    config = config_with(tmp_path, 'test_dataloader = test_cfg = test_evaluator = None')
    result = run_tool('test.py', config, trained, '--work-dir', tmp_path, '--data-root', shapes)
    assert_refused(result, 'the config has no test split')


def test_broken_images_setting(train):
    assert_refused(train('broken_images=ignore'), "broken_images='ignore'.*'skip' or 'raise'")


# The data


def test_missing_data_set(train, tmp_path):
    result = train(data_root=tmp_path / 'nowhere')
    assert_refused(result, 'no folder .*nowhere', 'COCO, Pascal VOC, YOLO', 'make demo', '--data-root')


def test_missing_annotation_file(train, own_shapes):
    annotations(own_shapes, 'val2017')[0].unlink()
    assert_refused(train(data_root=own_shapes), r'the val data set has no annotation file .*instances_val2017.json')


def test_missing_image_folder(train, own_shapes):
    shutil.rmtree(own_shapes / 'train2017')
    assert_refused(train(data_root=own_shapes), 'no folder .*train2017')


def test_empty_image_folder(train, own_shapes):
    for image in (own_shapes / 'train2017').iterdir():
        image.unlink()
    assert_refused(train(data_root=own_shapes), 'none of the 8 images .* is in .*train2017')


def test_annotation_file_cut_off(train, own_shapes):
    path, _ = annotations(own_shapes)
    path.write_text(path.read_text()[:500])
    assert_refused(train(data_root=own_shapes), r'instances_train2017.json is not valid JSON \(line 1, column \d+')


def test_annotation_file_in_another_format(train, own_shapes):
    annotations(own_shapes)[0].write_text('[]')
    assert_refused(
        train(data_root=own_shapes), "not in COCO's format: it lacks the list.s. images, annotations, categories"
    )


@pytest.mark.parametrize(
    ('change', 'pattern'),
    [
        (dict(bbox=[1, 2, 3]), 'annotation id=5 is malformed'),
        (dict(bbox=[1, 2, 'x', 4]), 'annotation id=5 is malformed'),
        (dict(bbox=['1', '2', '3', '4']), "annotation id=5 is malformed.*'1' is not a number"),
        (dict(area=None), 'annotation id=5 is malformed'),
        (dict(image_id=10**6), 'annotation id=5 is malformed.*1000000'),
        (dict(category_id=99), 'annotation id=5 is malformed.*99'),
    ],
)
def test_malformed_annotation(train, own_shapes, change, pattern):
    path, content = annotations(own_shapes)
    next(a for a in content['annotations'] if a['id'] == 5).update(change)
    path.write_text(json.dumps(content))
    assert_refused(train(data_root=own_shapes), pattern)


def test_malformed_image(train, own_shapes):
    path, content = annotations(own_shapes)
    content['images'][2]['width'] = '64'
    path.write_text(json.dumps(content))
    assert_refused(train(data_root=own_shapes), "an image or category is malformed .*'64' is not a number")


def test_no_image(train, own_shapes):
    path, content = annotations(own_shapes)
    path.write_text(json.dumps(content | dict(images=[], annotations=[])))
    assert_refused(train(data_root=own_shapes), 'instances_train2017.json lists no image')


def test_no_box(train, own_shapes):
    path, content = annotations(own_shapes)
    path.write_text(json.dumps(content | dict(annotations=[])))
    assert_refused(train(data_root=own_shapes), 'instances_train2017.json holds no usable box for train')


def test_only_degenerate_boxes(train, own_shapes):
    path, content = annotations(own_shapes)
    for i, annotation in enumerate(content['annotations']):
        annotation['bbox'] = [5, 5, 0, 10] if i % 2 else [500, 500, 10, 10]
    path.write_text(json.dumps(content))
    count = len(content['annotations'])
    assert_refused(train(data_root=own_shapes), f'no usable box for train .{count} degenerate or outside')


def test_some_degenerate_boxes_are_counted_and_left_out(train, own_shapes):
    path, content = annotations(own_shapes)
    content['annotations'][0]['bbox'][2] = 0
    content['annotations'][1]['bbox'][:2] = [1000, 1000]
    path.write_text(json.dumps(content))
    result = train(data_root=own_shapes)
    assert result.code == 0
    log = result.out + result.err
    ids = [a['id'] for a in content['annotations'][:2]]
    assert f'1 boxes are degenerate (narrower than 1 pixel) and left out: {ids[0]}' in log
    assert f'1 boxes are outside their image and left out: {ids[1]}' in log


def test_an_image_without_boxes_is_fine(train, own_shapes):
    path, content = annotations(own_shapes)
    first = content['images'][0]['id']
    content['annotations'] = [a for a in content['annotations'] if a['image_id'] != first]
    path.write_text(json.dumps(content))
    assert train(data_root=own_shapes).code == 0


def test_class_names_that_match_nothing(train, own_shapes):
    for split in ('train2017', 'val2017'):
        path, content = annotations(own_shapes, split)
        for category in content['categories']:
            category['name'] = category['name'].title() + 's'
        path.write_text(json.dumps(content))
    assert_refused(
        train(data_root=own_shapes),
        "classes \\['Circles', .* expects \\['circle'",
        'none is the same',
        "did you mean 'Circles'",
    )


def test_class_that_the_file_lacks(train, own_shapes):
    path, content = annotations(own_shapes)
    content['categories'][1]['name'] = 'squares'
    path.write_text(json.dumps(content))
    assert_refused(train(data_root=own_shapes), "\\['square'\\] are not in the file; did you mean 'squares'")


def test_classes_in_another_order(train, own_shapes):
    """MMDetection would train, and swap the names."""
    path, content = annotations(own_shapes)
    content['categories'].reverse()
    path.write_text(json.dumps(content))
    assert_refused(train(data_root=own_shapes), 'in another order')


def test_number_of_classes_that_differs_from_the_data(train):
    result = train('model.roi_head.bbox_head.num_classes=5')
    assert_refused(result, r'model.roi_head.bbox_head.num_classes=5, but the data set .* has 6 classes')


def break_image(path, how):
    if how == 'truncated':
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
    elif how == 'text':
        path.write_text('not an image')
    elif how == 'empty':
        path.write_bytes(b'')
    else:
        path.unlink()


@pytest.mark.parametrize('how', ['truncated', 'text', 'empty', 'missing'])
def test_broken_training_image_is_named_and_skipped(train, own_shapes, how):
    image = sorted((own_shapes / 'train2017').iterdir())[2]
    break_image(image, how)
    result = train(data_root=own_shapes)
    assert result.code == 0
    assert re.search(rf"image {image} .*Skipped \(broken_images='skip'\)", result.out + result.err)


def test_no_training_image_that_can_be_read(train, own_shapes):
    for image in (own_shapes / 'train2017').iterdir():
        break_image(image, 'text')
    assert_refused(
        train('train_dataloader.dataset.max_refetch=20', data_root=own_shapes), 'no training image can be read'
    )


def test_image_of_another_size_than_its_annotation_says(train, own_shapes):
    image = sorted((own_shapes / 'train2017').iterdir())[2]
    cv2.imwrite(str(image), cv2.resize(cv2.imread(str(image)), (32, 32)))
    result = train('broken_images=raise', data_root=own_shapes)
    assert_refused(result, f'image {image} has 32x32 pixels, its annotation says 64x64')


def test_missing_validation_image_is_named_before_the_training(train, own_shapes):
    image = sorted((own_shapes / 'val2017').iterdir())[1]
    image.unlink()
    assert_refused(train(data_root=own_shapes), f'1 of the 4 images .* are not in .*{image.name}')


def test_ids_given_twice(train, own_shapes):
    path, content = annotations(own_shapes)
    content['annotations'][3]['id'] = content['annotations'][2]['id']
    path.write_text(json.dumps(content))
    assert_refused(train(data_root=own_shapes), 'its id is given twice')
    content['images'][3]['id'] = content['images'][2]['id']
    path.write_text(json.dumps(content))
    assert_refused(train(data_root=own_shapes), '1 images share their id')


def test_a_value_of_iscrowd_that_is_none_is_refused(train, own_shapes):
    path, content = annotations(own_shapes, 'val2017')
    content['annotations'][0]['iscrowd'] = None
    path.write_text(json.dumps(content))
    assert_refused(train(data_root=own_shapes), 'malformed .TypeError: None is not a number')


@pytest.mark.parametrize('how', ['truncated', 'text'])
def test_broken_training_image_fails_by_a_setting(train, own_shapes, how):
    image = sorted((own_shapes / 'train2017').iterdir())[2]
    break_image(image, how)
    assert_refused(train('broken_images=raise', data_root=own_shapes), str(image))


def test_broken_image_in_a_worker_process(train, own_shapes):
    image = sorted((own_shapes / 'train2017').iterdir())[2]
    break_image(image, 'text')
    result = train('broken_images=raise', 'train_dataloader.num_workers=1', data_root=own_shapes)
    assert_refused(result, f'^image {image} is not an image')


def test_broken_validation_image_fails(train, own_shapes):
    image = sorted((own_shapes / 'val2017').iterdir())[1]
    break_image(image, 'truncated')
    assert_refused(train(data_root=own_shapes), f'image {image} is truncated')


def test_truncated_jpeg_is_found_where_opencv_is_silent(tmp_path):
    from cbam_mmdet.datasets.transforms.loading import read_image
    from cbam_mmdet.errors import UserError

    rng = np.random.default_rng(0)
    whole = cv2.imencode('.jpg', rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))[1].tobytes()
    path = tmp_path / 'image.jpg'
    path.write_bytes(whole + b'\0\0trailing bytes of a camera')
    assert read_image(str(path)).shape == (64, 64, 3)
    path.write_bytes(whole[:1500])
    assert cv2.imread(str(path)) is not None, 'OpenCV fills it with grey'
    with pytest.raises(UserError, match=r'image\.jpg is truncated'):
        read_image(str(path))


@pytest.mark.skipif(not BCCD.is_dir(), reason='the BCCD images are not there')
def test_degenerate_boxes_of_a_voc_data_set_are_counted():
    from mmdet.registry import DATASETS
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    init_default_scope('mmdet')
    cfg = Config.fromfile(ROOT / 'configs/demo/faster_rcnn_cbam.py')
    cfg.model.roi_head.bbox_head.num_classes = 3
    for part in ('trainval', 'test'):
        names = (BCCD / f'VOC2007/ImageSets/Main/{part}.txt').read_text().split()
        cfg.train_dataloader.dataset = dict(
            type='VOCDataset', data_root=f'{BCCD}/', ann_file=f'VOC2007/ImageSets/Main/{part}.txt',
            data_prefix=dict(sub_data_root='VOC2007/'), metainfo=dict(classes=('RBC', 'WBC', 'Platelets')), pipeline=[],
        )  # fmt: skip
        (report,) = check_data(cfg, ['train'])
        boxes, degenerate = count_xml(names)
        assert (report.images, report.boxes, len(report.degenerate)) == (len(names), boxes, degenerate)
        instances = [i for item in DATASETS.build(cfg.train_dataloader.dataset) for i in item['instances']]
        assert [sum(i['ignore_flag'] == flag for i in instances) for flag in (0, 1)] == [boxes, degenerate]


def count_xml(names):
    """Boxes of at least a pixel, and others, by regular expressions instead of an XML parser."""
    good = bad = 0
    for name in names:
        text = (BCCD / f'VOC2007/Annotations/{name}.xml').read_text()
        corners = [
            [int(v) for v in re.findall(rf'<{key}>(\d+)</{key}>', text)] for key in ('xmin', 'ymin', 'xmax', 'ymax')
        ]
        for x1, y1, x2, y2 in zip(*corners, strict=True):
            good, bad = (good + 1, bad) if x2 - x1 >= 1 and y2 - y1 >= 1 else (good, bad + 1)
    return good, bad


@pytest.mark.skipif(not BCCD.is_dir(), reason='the BCCD images are not there')
def test_voc_faults(run_tool, shapes, tmp_path):
    root = tmp_path / 'bccd'
    shutil.copytree(BCCD / 'VOC2007/Annotations', root / 'VOC2007/Annotations')
    shutil.copytree(BCCD / 'VOC2007/ImageSets', root / 'VOC2007/ImageSets')
    os.symlink(BCCD / 'VOC2007/JPEGImages', root / 'VOC2007/JPEGImages')
    split = (
        "dict(_delete_=True, type='VOCDataset', data_root='{root}', ann_file='VOC2007/ImageSets/Main/trainval.txt', "
        "data_prefix=dict(sub_data_root='VOC2007/'), metainfo=dict(classes={classes}))"
    )

    def config_of(classes):
        train = f'train_dataloader = dict(dataset={split.format(root=f"{root}/", classes=classes)})'
        others = f"val_dataloader = test_dataloader = dict(dataset=dict(data_root='{shapes}/'))"
        return config_with(tmp_path, f'{train}\n{others}')

    assert_refused(run_tool('train.py', config_of(('red', 'white'))), 'none is the same', "'RBC'")
    config = config_of(('RBC', 'WBC'))
    first = sorted((root / 'VOC2007/Annotations').iterdir())[0]
    whole = first.read_text()
    first.write_text(re.sub('<width>.*</width>', '<width>0</width>', whole))
    assert_refused(run_tool('train.py', config), rf'the .xml of {first.stem} gives the size 0 x \d+. Write that of')
    first.write_text(whole[:200])
    assert_refused(run_tool('train.py', config), rf"annotation file {first} is not in Pascal VOC's format")
    first.unlink()
    assert_refused(run_tool('train.py', config), rf'its annotation {first} does not exist')


@pytest.mark.parametrize(
    ('names', 'patterns'),
    [
        ('circle,sqare', ["has no 'sqare'; did you mean 'square'", 'It has: circle, square, triangle']),
        ('circle,,star', ["--classes circle,,star: expected different names, as in --classes cat,dog, or 'auto'"]),
        ('circle,circle', ['expected different names']),
    ],
)
def test_classes_that_do_not_fit(run_tool, shapes, tmp_path, names, patterns):
    assert_refused(run_tool('train.py', DEMO, '--classes', names, *tiny(tmp_path, shapes)), *patterns)


def test_classes_of_data_that_are_not_there(run_tool, tmp_path):
    result = run_tool('train.py', DEMO, '--classes', 'auto', *tiny(tmp_path, tmp_path / 'nowhere'))
    assert_refused(result, '--data-root .*nowhere: there is no folder .*nowhere', 'COCO, Pascal VOC, YOLO')


# Training


def test_loss_that_is_not_finite(train, tmp_path):
    result = train('optim_wrapper.optimizer.lr=1e20', 'optim_wrapper.clip_grad=None', 'param_scheduler=[]',
                   'train_cfg.max_epochs=3')  # fmt: skip
    assert_refused(result, r'the loss is not finite \(.*loss.*\) in the iterations up to \d', 'learning rate')
    for saved in (tmp_path / 'work').glob('*.pth'):
        weights = torch.load(saved, weights_only=False)['state_dict']
        assert all(torch.isfinite(value).all() for value in weights.values()), f'{saved} holds spoilt weights'


def test_amp_without_a_gpu(train, monkeypatch, run_tool, tmp_path, shapes):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert_refused(run_tool('train.py', DEMO, '--amp', *tiny(tmp_path, shapes)), '--amp: .*needs a GPU')


def test_interrupt_ends_without_a_traceback(train, monkeypatch):
    from mmengine.runner import EpochBasedTrainLoop

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(EpochBasedTrainLoop, 'run_epoch', interrupted)
    result = train()
    assert result.code == 130
    assert result.err.endswith('interrupted\n')
    assert 'Traceback' not in result.err


def test_work_dir_that_cannot_be_made(run_tool, shapes, tmp_path):
    (tmp_path / 'file').write_text('')
    assert_refused(
        run_tool('train.py', DEMO, *tiny(tmp_path / 'file/work', shapes)), '--work-dir .*file/work: cannot be made'
    )


DYING_WORKER = """
import os, signal
from mmcv.transforms import BaseTransform
from mmengine.registry import TRANSFORMS
from torch.utils.data import get_worker_info

@TRANSFORMS.register_module(force=True)
class Die(BaseTransform):
    def transform(self, results):
        if get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return results
"""


def test_worker_that_dies(run_tool, shapes, tmp_path, monkeypatch):
    """As one that the kernel kills for want of memory."""
    (tmp_path / 'dying_worker.py').write_text(DYING_WORKER)
    monkeypatch.syspath_prepend(tmp_path)
    config = tmp_path / 'own.py'
    config.write_text(
        f"_base_ = '{DEMO}'\n"
        "custom_imports = dict(imports=['cbam_mmdet', 'dying_worker'])\n"
        "train_dataloader = dict(dataset=dict(pipeline=[*_base_.train_pipeline, dict(type='Die')]))\n"
    )
    result = run_tool('train.py', config, *tiny(tmp_path, shapes, 'train_dataloader.num_workers=1'))
    assert_refused(result, r'a process that loads images has died \(Killed\)', 'num_workers', '--resume')


def test_annotation_file_that_disappears_after_the_check(run_tool, own_shapes, tmp_path, monkeypatch):
    def check_and_lose(*args):
        check_data(*args)
        (own_shapes / 'annotations/instances_val2017.json').unlink()

    monkeypatch.setattr('cbam_mmdet.apis.runner.check_data', check_and_lose)
    result = run_tool('train.py', DEMO, *tiny(tmp_path, own_shapes))
    assert_refused(result, r'instances_val2017.json does not exist \(any more\)')


def test_pretrained_weights_without_a_network(train, tmp_path, monkeypatch):
    from urllib.error import URLError

    def offline(*args, **kwargs):
        raise URLError('Name or service not known')

    monkeypatch.setattr('urllib.request.urlopen', offline)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    weights = "dict(_delete_=True, type='Pretrained', checkpoint='torchvision://resnet50')"
    text = f'model = dict(backbone=dict(init_cfg={weights}))'
    assert_refused(train(config=config_with(tmp_path, text)), 'a download failed', 'model.backbone.init_cfg=None')


# Checkpoints


def test_missing_checkpoint(run_tool, trained, shapes):
    result = run_tool('test.py', DEMO, trained / 'epoch_2.pth', *tiny(trained, shapes))
    assert_refused(result, 'epoch_2.pth does not exist', 'epoch_1.pth')


def test_truncated_checkpoint(run_tool, trained, shapes, tmp_path):
    whole = (trained / 'epoch_1.pth').read_bytes()
    (tmp_path / 'cut.pth').write_bytes(whole[: len(whole) // 2])
    assert_refused(run_tool('test.py', DEMO, tmp_path / 'cut.pth', *tiny(tmp_path, shapes)), 'cut.pth is cut off')


def test_file_that_is_no_checkpoint(run_tool, shapes, tmp_path):
    (tmp_path / 'note.pth').write_text('hello')
    assert_refused(run_tool('test.py', DEMO, tmp_path / 'note.pth', *tiny(tmp_path, shapes)), 'not a checkpoint')


@pytest.mark.parametrize('tool', ['test.py', 'infer.py'])
def test_checkpoint_of_another_architecture(run_tool, trained, shapes, tmp_path, tool):
    plain = 'model.backbone.plugins=None'
    arguments = tiny(tmp_path, shapes, plain)
    if tool == 'infer.py':
        arguments = [shapes / 'val2017', '--out-dir', tmp_path, *cfg_options(SMALL, plain)]
    result = run_tool(tool, DEMO, trained / 'epoch_1.pth', *arguments)
    assert_refused(result, 'epoch_1.pth is of another architecture', 'keys are not in the model .*cbam')


def test_checkpoint_of_other_shapes(run_tool, trained, shapes, tmp_path):
    options = tiny(tmp_path, shapes, 'model.roi_head.bbox_head.fc_out_channels=32')
    result = run_tool('test.py', DEMO, trained / 'epoch_1.pth', *options)
    assert_refused(result, r'keys have another shape \(roi_head.bbox_head')


def test_fine_tuning_may_change_the_head_but_not_everything(train, trained, tmp_path):
    assert train(f'load_from={trained}/epoch_1.pth', 'model.roi_head.bbox_head.fc_out_channels=32').code == 0
    torch.save(dict(state_dict=dict(weight=torch.zeros(3))), tmp_path / 'other.pth')
    assert_refused(train(f'load_from={tmp_path}/other.pth'), 'other.pth is of another architecture', '0 of')


def test_resume_with_nothing_to_resume(run_tool, shapes, tmp_path):
    result = run_tool('train.py', DEMO, '--resume', *tiny(tmp_path / 'empty', shapes))
    assert_refused(result, '--resume: no checkpoint in .*empty')


def test_out_that_is_no_pickle(run_tool, trained, shapes):
    result = run_tool('test.py', DEMO, trained / 'epoch_1.pth', '--out', 'results.json', *tiny(trained, shapes))
    assert_refused(result, '--out results.json.*must end with .pkl')


def test_pickle_that_holds_no_weights(run_tool, shapes, tmp_path):
    torch.save([1, 2], tmp_path / 'list.pth')
    assert_refused(
        run_tool('test.py', DEMO, tmp_path / 'list.pth', *tiny(tmp_path, shapes)), 'list.pth holds no weights'
    )


def test_resume_from_weights_alone(run_tool, trained, shapes, tmp_path):
    weights = torch.load(trained / 'epoch_1.pth', weights_only=False)['state_dict']
    torch.save(dict(state_dict=weights), tmp_path / 'weights.pth')
    result = run_tool('train.py', DEMO, '--resume', tmp_path / 'weights.pth', *tiny(tmp_path / 'work', shapes))
    assert_refused(result, '--resume: .*weights.pth holds weights, but not the state of a training run', 'load_from=')


# Other tools


def test_infer_inputs(run_tool, trained, tmp_path):
    config = next(trained.glob('*.py'))
    checkpoint = trained / 'epoch_1.pth'
    assert_refused(run_tool('infer.py', config, checkpoint, tmp_path / 'no.jpg'), 'input .*no.jpg does not exist')
    (tmp_path / 'empty').mkdir()
    assert_refused(run_tool('infer.py', config, checkpoint, tmp_path / 'empty'), 'empty holds no image and no video')


def test_infer_names_a_broken_image_and_goes_on(run_tool, trained, own_shapes, tmp_path):
    images = sorted((own_shapes / 'val2017').iterdir())
    break_image(images[0], 'truncated')
    result = run_tool(
        'infer.py',
        next(trained.glob('*.py')),
        trained / 'epoch_1.pth',
        own_shapes / 'val2017',
        '--out-dir',
        tmp_path / 'out',
    )
    assert result.code == 2
    assert f'error: 1 inputs could not be read: {images[0]}' in result.err
    assert 'Traceback' not in result.err
    assert len(list((tmp_path / 'out/vis').iterdir())) == len(images) - 1


def test_draw_run_of_a_folder_without_a_run(run_tool, tmp_path):
    assert_refused(run_tool('draw_run.py', tmp_path), 'holds no config')


# Numbers, devices and names that no tool can use


@pytest.mark.parametrize('setting, expected', [
    ('train_cfg.max_epochs=-1', 'whole number of at least 1'), ('train_cfg.val_interval=0', 'at least 1'),
    ('train_dataloader.batch_size=0', 'at least 1'), ('train_dataloader.num_workers=-1', 'at least 0'),
    ('optim_wrapper.optimizer.lr=-1', 'finite number of at least 0'), ('randomness.seed=abc', 'whole number'),
    ('default_hooks.logger.interval=0', 'at least 1'), ('train_dataloader.batch_size=2.5', 'whole number'),
])  # fmt: skip
def test_numbers_out_of_their_range(train, setting, expected):
    name, _, value = setting.partition('=')
    assert_refused(train(setting), f'the config says {name}={value!r}|the config says {setting}', expected)


def test_a_learning_rate_that_is_no_number(run_tool, tmp_path, shapes):
    config = config_with(tmp_path, "optim_wrapper = dict(optimizer=dict(lr=float('nan')))")
    result = run_tool('train.py', config, '--work-dir', tmp_path / 'work', '--data-root', shapes)
    assert_refused(result, 'optim_wrapper.optimizer.lr=nan')


def test_a_config_that_trains_nothing(run_tool, tmp_path, shapes):
    config = config_with(tmp_path, 'train_cfg = None')
    result = run_tool('train.py', config, '--work-dir', tmp_path / 'work', '--data-root', shapes)
    assert_refused(result, 'the config has no train_cfg: it cannot be trained')


@pytest.mark.parametrize('arguments', [
    ['--score-thr', 'nan'], ['--score-thr', '-5'], ['--score-thr', '7'], ['--score-thr', 'x'], ['--device', 'foo'],
])  # fmt: skip
def test_arguments_out_of_their_range(run_tool, trained, shapes, tmp_path, arguments):
    image = next((shapes / 'val2017').iterdir())
    settings = cfg_options(SMALL)
    result = run_tool('infer.py', DEMO, trained, image, '--out-dir', tmp_path / 'out', *arguments, *settings)
    assert_refused(result, arguments[0])
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('tool, argument', [('draw_run.py', '--num-images'), ('report.py', '--num-images')])
def test_no_pictures(run_tool, tmp_path, tool, argument):
    assert_refused(run_tool(tool, tmp_path, argument, '0'), argument, 'not a positive number')


def test_an_empty_input(run_tool, trained, tmp_path):
    result = run_tool('infer.py', DEMO, trained, '', '--out-dir', tmp_path / 'out', *cfg_options(SMALL))
    assert_refused(result, 'an input is empty')


def test_an_out_dir_that_is_a_file(run_tool, trained, shapes, tmp_path):
    (tmp_path / 'out').write_text('')
    image = next((shapes / 'val2017').iterdir())
    result = run_tool('infer.py', DEMO, trained, image, '--out-dir', tmp_path / 'out', *cfg_options(SMALL))
    assert_refused(result, str(tmp_path / 'out'), 'cannot be used')


@pytest.mark.parametrize('change, message', [
    (lambda c: c['categories'][1].update(id=1), 'several categories have the id 1'),
    (lambda c: c['categories'][1].update(name=7), 'an image or category is malformed .*7 is not a name'),
    (lambda c: c['images'][0].update(file_name='a\0b'), 'an image or category is malformed'),
    (lambda c: c['annotations'][0].update(image_id=77), 'its image_id 77 is not among the images'),
    (lambda c: c['annotations'][0].update(category_id=77), 'its category_id 77 is not among the categories'),
    (lambda c: c['annotations'][0].update(bbox=[0, 0, 10**400, 1]), 'is not a number'),
])  # fmt: skip
def test_categories_and_ids(own_shapes, change, message):
    path, content = annotations(own_shapes)
    change(content)
    path.write_text(json.dumps(content))
    cfg = load_config(DEMO)
    for split in ('train', 'val'):
        cfg[f'{split}_dataloader'].dataset.data_root = str(own_shapes)
    with pytest.raises(UserError, match=message):
        check_data(cfg, ['train'])


@pytest.mark.parametrize(
    'mask',
    [
        None,
        [],
        [1, 2, 3, 4, 5, 6],  # a polygon by itself, in no list
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5, 6, 7]],
        [[1, 2, 3, 4, 5, 6], [[1, 2], [3, 4], [5, 6]]],
        [[1, 2, 3, 4, 5, None]],
        dict(counts=[1, 2], size=[128, 128]),
        dict(counts=[128 * 64, 128 * 64], size=[64, 256]),
        dict(counts=[128 * 128]),
    ],
)
def test_masks_that_the_data_do_not_have(own_shapes, mask):
    """MMDetection ignores objects of most of these without a word."""
    path, content = annotations(own_shapes)
    content['annotations'][0]['segmentation'] = mask
    path.write_text(json.dumps(content))
    cfg = load_config(DEMO)
    cfg.train_dataloader.dataset.data_root = str(own_shapes)
    cfg.train_dataloader.dataset.pipeline[1].with_mask = True
    number = 1 if any(a.get('segmentation') for a in content['annotations'][1:]) else len(content['annotations'])
    with pytest.raises(UserError, match=rf'{number} of \d+ annotations have no segmentation that MMDetection reads'):
        check_data(cfg, ['train'])


def test_masks_that_are_good(own_shapes):
    path, content = annotations(own_shapes)
    sizes = {image['id']: [image['height'], image['width']] for image in content['images']}
    for i, annotation in enumerate(content['annotations']):
        height, width = size = sizes[annotation['image_id']]
        annotation['segmentation'] = (
            [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4]] if i % 2 else dict(counts=[1, height * width - 1], size=size)
        )
    path.write_text(json.dumps(content))
    cfg = load_config(DEMO)
    cfg.train_dataloader.dataset.data_root = str(own_shapes)
    cfg.train_dataloader.dataset.pipeline[1].with_mask = True
    check_data(cfg, ['train'])


def test_images_outside_the_data_root_are_counted(own_shapes, logged):
    path, content = annotations(own_shapes)
    content['images'][0]['file_name'] = f'../train2017/{content["images"][0]["file_name"]}'
    path.write_text(json.dumps(content))
    cfg = load_config(DEMO)
    cfg.train_dataloader.dataset.data_root = str(own_shapes)
    check_data(cfg, ['train'])
    assert any('1 images may lie outside' in message for message in logged.messages)


def test_a_dollar_is_a_dollar(tmp_path):
    """Matplotlib would take what stands between two of them for a formula, and end where it is none."""
    figure, grid = image_grid(1, 1, (2, 2))
    grid[0, 0].set_title(r'$x^2_')
    grid[0, 0].set_xticks([0], [r'a$\foo$b'])
    grid[0, 0].axis('on')
    assert save_sheet(figure, tmp_path / 'a.png').stat().st_size > 0


def test_a_full_disk_leaves_no_empty_file(run_tool, trained, shapes, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, 'fsync', full)
    image = next((shapes / 'val2017').iterdir())
    options = ['--out-dir', tmp_path / 'out', *cfg_options(SMALL)]
    result = run_tool('infer.py', DEMO, trained, image, *options)
    assert_refused(result, r'vis/\S+\.jpg cannot be written: No space left')
    result = run_tool('infer.py', DEMO, trained, image, '--no-draw', *options)
    assert_refused(result, 'predictions.json cannot be written: No space left')
    assert [path for path in (tmp_path / 'out').rglob('*') if path.is_file()] == []
    result = run_tool('test.py', DEMO, trained, '--out', tmp_path / 'a.pkl', *tiny(tmp_path / 'test', shapes))
    assert_refused(result, 'a.pkl cannot be written: No space left')
    assert not (tmp_path / 'a.pkl').exists()


def test_a_name_that_is_no_utf_8(run_tool, trained, shapes, tmp_path):
    folder = os.fsencode(tmp_path) + b'/a\xff'
    os.mkdir(folder)
    shutil.copy(next((shapes / 'val2017').iterdir()), folder + b'/\xfe.jpg')
    out = tmp_path / 'out'
    result = run_tool('infer.py', DEMO, trained, os.fsdecode(folder), '--out-dir', out, *cfg_options(SMALL))
    assert result.code == 0, result.err[-2000:]
    assert json.loads((out / 'predictions.json').read_text()) is not None


def test_a_key_that_is_misspelt(train):
    result = train('model.backbone.plugins.0.cfg.gates=unit')
    assert_refused(result, "does not take the key 'gates'", "did you mean 'gate'")


def test_ctrl_c_in_the_first_second(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / 'tools')
    import arguments

    class Stopped:
        def find_spec(self, name, path=None, target=None):
            if name == 'cbam_mmdet.cli':
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, 'cbam_mmdet.cli', raising=False)
    monkeypatch.setattr(sys, 'meta_path', [Stopped(), *sys.meta_path])
    with pytest.raises(SystemExit) as end:
        arguments.run(lambda args: 0, argparse.Namespace())
    assert end.value.code == 130 and capsys.readouterr().err == '\ninterrupted\n'


def test_an_evaluator_of_another_file(own_shapes, logged, tmp_path):
    cfg = load_config(DEMO)
    cfg.val_dataloader.dataset.data_root = str(own_shapes)
    cfg.val_evaluator.ann_file = str(tmp_path / 'nothing.json')
    own = own_shapes / 'annotations/instances_val2017.json'
    with pytest.raises(UserError, match=rf'nothing\.json does not exist\. --cfg-options val_evaluator\.ann_file={own}'):
        check_data(cfg, ['val'])
    cfg.val_evaluator.ann_file = str(shutil.copy(own, tmp_path / 'other.json'))
    check_data(cfg, ['val'])
    assert any('val_evaluator scores against' in message for message in logged.messages)
    logged.clear()
    cfg.val_evaluator.ann_file = str(own)
    check_data(cfg, ['val'])
    assert not any('scores against' in message for message in logged.messages)


@pytest.mark.parametrize('value', ['nan', 'inf', '1e400', 'x', ''])
def test_a_box_of_voc_that_is_no_number(tmp_path, value):
    (tmp_path / 'Annotations').mkdir()
    box = f'<xmin>{value}</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax>'
    text = f'<annotation><object><name>a</name><bndbox>{box}</bndbox></object></annotation>'
    (tmp_path / 'Annotations/a.xml').write_text(text)
    with pytest.raises(UserError, match=r"a\.xml is not in Pascal VOC's format"):
        read_voc(ConfigDict(data_root=str(tmp_path)), 'x.txt', 'a')


@pytest.mark.parametrize('value', ['', 'Unspecified'])
def test_what_mmdetection_reads_of_voc_as_integers(tmp_path, value):
    """Of the objects of its classes only."""
    (tmp_path / 'Annotations').mkdir()
    box = '<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>'
    size = '<size><width>9</width><height>9</height></size>'

    def read(text):
        (tmp_path / 'Annotations/a.xml').write_text(f'<annotation>{text}</annotation>')
        return read_voc(ConfigDict(data_root=str(tmp_path)), 'x.txt', 'a', read=('a',))

    named, other = (f'<object><name>{n}</name>{box}<difficult>{value}</difficult></object>' for n in 'ab')
    if not value:
        assert [item.name for item in read(size + other)[1]] == ['b']
    with pytest.raises(UserError, match=f"its difficult is '{value}'" if not value else 'not in Pascal VOC'):
        read(size + named)
    with pytest.raises(UserError, match="its width is ''"):
        read('<size><height>9</height></size>' + f'<object><name>a</name>{box}</object>')
