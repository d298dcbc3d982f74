"""tools/export.py, and its file in tools/test.py, in tools/infer.py and in a program without PyTorch."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import DEMO, ROOT, SMALL, cfg_options, tiny
from mmcv.ops import batched_nms
from mmdet.datasets.transforms import Resize
from mmdet.registry import MODELS
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope
from torch import nn

from cbam_mmdet.datasets.transforms.arrays import array_pipeline
from cbam_mmdet.deploy import onnx_file, packages
from cbam_mmdet.deploy.graph import require_exportable
from cbam_mmdet.errors import UserError

pytest.importorskip('onnx', reason="needs pip install '.[deploy]'")
pytest.importorskip('onnxruntime', reason="needs pip install '.[deploy]'")

ANY_SCORE = 'model.test_cfg.rcnn.score_thr=0.0'


@pytest.fixture
def exported(run_tool, trained, shapes, tmp_path):
    file = tmp_path / 'demo.onnx'
    where = ['--data-root', shapes, '--out', file, *cfg_options(SMALL, ANY_SCORE)]
    result = run_tool('export.py', DEMO, trained, *where)
    assert result.code == 0, result.err
    boxes, scores, unmatched = map(float, re.findall(r'([\d.e-]+) pixels.*by (.+), (\d+) detections', result.out)[0])
    assert boxes < 0.1 and scores < 1e-4 and unmatched == 0
    return file


def test_it_is_tested_and_detects_as_the_checkpoint(run_tool, trained, exported, shapes, tmp_path):
    found = {}
    averaging = tmp_path / 'ema.py'  # what copies the model after every step has none here
    averaging.write_text(f"_base_ = {DEMO!r}\ncustom_hooks = [dict(type='EMAHook')]\n")
    for name, config, weights in (('torch', DEMO, trained), ('onnx', averaging, exported)):
        tested = run_tool('test.py', config, weights, *tiny(tmp_path / name, shapes, ANY_SCORE))
        assert tested.code == 0, tested.err
        scores = re.findall(r'coco/bbox_mAP: (\S+)', tested.out + tested.err)
        out = tmp_path / f'{name}_out'
        done = run_tool('infer.py', DEMO, weights, shapes / 'val2017', '--out-dir', out, '--score-thr', 0.0,
                        '--device', 'cpu', *cfg_options(SMALL, ANY_SCORE))  # fmt: skip
        assert done.code == 0, done.err
        found[name] = scores, json.loads((out / 'predictions.json').read_text())
    assert found['torch'][0] == found['onnx'][0] != []
    theirs, ours = found['torch'][1], found['onnx'][1]
    assert len(theirs) == len(ours) > 100
    assert all(a['category'] == b['category'] for a, b in zip(theirs, ours, strict=True))
    for key, tolerance in (('bbox', 0.1), ('score', 1e-4)):
        assert np.allclose([a[key] for a in theirs], [b[key] for b in ours], atol=tolerance)


def test_pixels_with_fractions_are_rounded(exported):
    session = onnx_file.open_session(exported)
    pixels = np.random.default_rng(0).integers(0, 255, (1, 96, 128, 3), dtype=np.uint8)
    for shift in (0.4, -0.4):
        pairs = zip(*(onnx_file.run_session(session, images) for images in (pixels, pixels + shift)), strict=True)
        assert all(np.array_equal(whole, fractions) for whole, fractions in pairs)


def test_a_program_without_pytorch(run_tool, exported, shapes, tmp_path):
    """A folder of packages that holds what the program names, and neither torch nor mmdet."""
    folder = tmp_path / 'packages'
    folder.mkdir()
    for name in ('numpy', 'opencv-python-headless', 'onnxruntime', 'flatbuffers', 'protobuf'):
        for top in {path.parts[0] for path in distribution(name).files if path.parts[0] not in ('..', '__pycache__')}:
            source = Path(distribution(name).locate_file(top))
            if top == 'cv2':  # it looks for its real place
                shutil.copytree(source, folder / top, dirs_exist_ok=True)
            elif not (folder / top).exists():
                (folder / top).symlink_to(source)
    image = next((shapes / 'val2017').iterdir())
    program = re.sub(r'score < 0\.3', 'score < 0', (ROOT / 'docs/run_onnx.py').read_text())
    assert len(program.splitlines()) <= 40
    (tmp_path / 'run.py').write_text(program + '\nassert not {"torch", "mmdet"} & sys.modules.keys()\n')
    alone = [sys.executable, '-S', '-c', f'import sys; sys.path.insert(0, {str(folder)!r}); import runpy; '
             'sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name="__main__")']  # fmt: skip
    done = subprocess.run([*alone, tmp_path / 'run.py', exported, image], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    where = [image, '--out-dir', tmp_path / 'out', '--score-thr', 0.0, *cfg_options(SMALL)]
    assert run_tool('infer.py', DEMO, exported, *where).code == 0
    expected = json.loads((tmp_path / 'out/predictions.json').read_text())
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == len(expected) > 10
    for (name, score, *box), theirs in zip(lines, expected, strict=True):
        x, y, width, height = theirs['bbox']
        assert name == theirs['category'] and abs(float(score) - theirs['score']) < 1e-3
        assert np.allclose(np.array(box, float), [x, y, x + width, y + height], atol=0.1)
    assert subprocess.run([*alone[:3], 'import torch'], capture_output=True).returncode != 0


def with_steps(*steps):
    """The demo's config with these steps between the loading of an image and its packing."""
    cfg = Config.fromfile(DEMO)
    pipeline = cfg.test_dataloader.dataset.pipeline
    cfg.test_dataloader.dataset.pipeline = [pipeline[0], *steps, pipeline[-1]]
    return cfg


@pytest.mark.parametrize(
    'steps',
    [
        [dict(type='Resize', scale=96, keep_ratio=True)],
        [dict(type=Resize, scale=(96, 64)), dict(type='mmdet.Pad', size=(128, 96))],
        [dict(type='Resize', scale=(96, 96), keep_ratio=True), dict(type='Pad', size=(160, 160), pad_val=7)],
        [dict(type='Resize', scale=(96, 96)), dict(type='Pad', size=(160, 130), pad_val=dict(img=114))],
        [dict(type='Resize', scale=(96, 96)), dict(type='Pad', size=(160, 60), pad_val=dict(img=(1, 2, 3)))],
    ],
)
def test_what_a_file_says_makes_the_input_of_the_test_pipeline(steps, tmp_path, monkeypatch):
    """By docs/run_onnx.py, up to what it gives onnxruntime."""
    cfg, given, shape = with_steps(*steps), [], ['batch', 'height', 'width', 3]

    class Session:
        def __init__(self, *args, **kwargs):
            facts = {key: json.dumps(value) for key, value in onnx_file.resize_of(cfg).items()}
            self.meta = type('Meta', (), dict(custom_metadata_map=facts))

        def get_modelmeta(self):
            return self.meta

        def get_inputs(self):
            return [type('Input', (), dict(shape=shape))]

        def run(self, names, inputs):
            given.append(inputs['images'][0])
            return np.zeros((1, 0, 4)), np.zeros((1, 0)), np.zeros((1, 0))

    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3)).astype(np.uint8)
    cv2.imwrite(str(tmp_path / 'a.png'), image)
    monkeypatch.setattr('onnxruntime.InferenceSession', Session)
    monkeypatch.setattr(sys, 'argv', ['run_onnx.py', 'a.onnx', str(tmp_path / 'a.png')])
    runpy.run_path(str(ROOT / 'docs/run_onnx.py'))
    ours = array_pipeline(cfg)(dict(img=image, img_id=0))['inputs'].permute(1, 2, 0).numpy()
    assert np.array_equal(given[0], ours)
    shape[1] = 97
    with pytest.raises(SystemExit, match=r'takes inputs of widthx97 only, and .*a\.png becomes one of'):
        runpy.run_path(str(ROOT / 'docs/run_onnx.py'))


RESIZE = dict(type='Resize', scale=(96, 96))


@pytest.mark.parametrize(
    'steps',
    [
        [dict(RESIZE, interpolation='area')],
        [dict(RESIZE, backend='pillow')],
        [dict(type='Resize', scale_factor=0.5)],
        [RESIZE, RESIZE],
        [dict(type='Pad', size=(128, 128)), RESIZE],
        [RESIZE, dict(type='Pad', size_divisor=32)],
        [RESIZE, dict(type='Pad', size=(128, 128), padding_mode='edge')],
        [RESIZE, dict(type='Pad', size=(128, 128), pad_val=dict(img=114.0))],
        [RESIZE, dict(type='PhotoMetricDistortion')],
        [],
    ],
)
def test_another_pipeline_is_not_said_to_be_a_simple_one(steps):
    facts = onnx_file.resize_of(with_steps(*steps))
    assert facts['scale'] is None
    onnx_file.require_same_resize(with_steps(*steps), facts, 'a.onnx')
    for other in ([RESIZE], [*steps, dict(type='Pad', size_divisor=64)]):
        with pytest.raises(UserError, match=r'a\.onnx was exported for .* export it anew'):
            onnx_file.require_same_resize(with_steps(*other), facts, 'a.onnx')


def test_a_file_of_an_earlier_version_is_taken():
    """It has one pad_value for all channels."""
    cfg = with_steps(RESIZE, dict(type='Pad', size=(128, 128), pad_val=dict(img=114)))
    facts = dict(scale=[96, 96], keep_ratio=False, pad_to=[128, 128], pad_value=114)
    onnx_file.require_same_resize(cfg, facts, 'a.onnx')
    with pytest.raises(UserError, match='exported for pad_value'):
        onnx_file.require_same_resize(cfg, dict(facts, pad_value=0), 'a.onnx')


@pytest.mark.parametrize(
    ('head', 'message'),
    [
        (dict(type='YOLOXHead', num_classes=2, in_channels=8, feat_channels=8), 'its predict_by_feat is not that of'),
        (dict(type='GFLHead', num_classes=2, in_channels=32, feat_channels=32, anchor_generator=dict(
            type='AnchorGenerator', ratios=[1.0], octave_base_scale=8, scales_per_octave=1, strides=[8])),
         'its _predict_by_feat_single is not that of'),
    ],
)  # fmt: skip
def test_other_heads_are_refused(head, message):
    model = nn.Module()
    model.bbox_head = MODELS.build(dict(head, type=f'mmdet.{head["type"]}'))
    with pytest.raises(UserError, match=f'{head["type"]} cannot be exported: {message}'):
        require_exportable(model)


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        ('faster_rcnn/faster-rcnn_r50-caffe_c4-1x_coco.py', 'a roi_head with a shared_head'),
        ('sabl/sabl-faster-rcnn_r50_fpn_1x_coco.py', "SABLHead cannot be exported: its forward is not BBoxHead's"),
        ('seesaw_loss/mask-rcnn_r50_fpn_seesaw-loss_random-ms-2x_lvis-v1.py', 'are not those of a softmax'),
        ('libra_rcnn/libra-faster-rcnn_r50_fpn_1x_coco.py', 'a part of it has no ONNX operators'),
        ('vfnet/vfnet_r50_fpn_1x_coco.py', 'cannot be exported'),
    ],
)
def test_parts_that_no_graph_can_hold_are_named(config, message, tmp_path):
    (tmp_path / 'config.py').write_text(f"_base_ = 'mmdet::{config}'\n")
    cfg = Config.fromfile(tmp_path / 'config.py')
    init_default_scope('mmdet')
    cfg.model.backbone.init_cfg = None
    model = MODELS.build(cfg.model)
    model.cfg, model.dataset_meta = cfg, dict(classes=('a',))
    with pytest.raises(UserError, match=message):
        onnx_file.write_onnx(model, tmp_path / 'a.onnx')
    assert not (tmp_path / 'a.onnx').exists()


@pytest.mark.parametrize(
    ('stage', 'change', 'message'),
    [
        ('rcnn', dict(max_per_img=-1), r'model\.test_cfg\.rcnn\.max_per_img=-1 cannot be exported'),
        ('rcnn', dict(max_per_img=0), r'rcnn\.max_per_img=0 cannot'),
        ('rpn', dict(nms_pre=-1), r'rpn\.nms_pre=-1 cannot'),
        ('rpn', dict(max_per_img=-1), r'rpn\.max_per_img=-1 cannot'),
        ('rcnn', dict(nms=dict(type='soft_nms', iou_threshold=0.5)), "the suppression 'soft_nms' cannot"),
        ('rcnn', dict(nms=dict(type=batched_nms, iou_threshold=0.5)), 'the suppression .* cannot'),
        ('rpn', dict(nms=dict(type='nms', iou_thr=0.5)), r'rpn\.nms=.* only dict\(type'),
        ('rpn', dict(nms=dict(type='nms', iou_threshold=0.5, max_num=5)), r'rpn\.nms\.max_num=5 cannot'),
        ('rcnn', dict(nms=None), r'rcnn\.nms=None cannot'),
    ],
)
def test_another_selection_of_detections_is_refused(stage, change, message):
    init_default_scope('mmdet')
    model = MODELS.build(Config.fromfile(DEMO).model)
    require_exportable(model)
    part = model.rpn_head if stage == 'rpn' else model.roi_head
    part.test_cfg = ConfigDict({**part.test_cfg, **change})
    with pytest.raises(UserError, match=message):
        require_exportable(model)


def test_a_comparison_of_nothing_is_said(run_tool, trained, shapes, tmp_path):
    where = ['--data-root', shapes, '--out', tmp_path / 'a.onnx']
    result = run_tool('export.py', DEMO, trained, *where, *cfg_options(SMALL, 'model.test_cfg.rcnn.score_thr=0.999'))
    assert result.code == 0 and 'warning: PyTorch detects nothing in these images, so nothing was' in result.err
    assert 'model.test_cfg.rcnn.score_thr=0 shows them' in result.err


def test_bad_input(run_tool, trained, shapes, tmp_path, monkeypatch):
    options = cfg_options(SMALL)
    for tool, arguments, message in (
        ('export.py', [DEMO, trained, '--out', tmp_path / 'a.pth'], 'the name must end with .onnx'),
        ('test.py', [DEMO, tmp_path / 'no.onnx', *tiny(tmp_path / 'w', shapes)], 'no.onnx does not exist'),
        ('train.py', [DEMO, '--resume', text(tmp_path), *tiny(tmp_path / 'w', shapes)], 'is an ONNX file: give a'),
        ('infer.py', [DEMO, text(tmp_path), shapes / 'val2017', *options], 'is not an ONNX file that onnxruntime can'),
    ):
        result = run_tool(tool, *arguments)
        assert result.code == 2 and 'Traceback' not in result.err and message in result.err, result.err[-1000:]
    monkeypatch.setattr(packages.importlib.util, 'find_spec', lambda name: None)
    result = run_tool('export.py', DEMO, trained, '--out', tmp_path / 'a.onnx', *options)
    assert result.code == 2 and 'needs the package onnx, which is not installed here (pip install' in result.err


def text(folder):
    path = folder / 'text.onnx'
    path.write_text('no graph')
    return path


def test_a_file_of_a_fixed_batch_detects_single_images(run_tool, trained, exported, shapes, tmp_path):
    found = []
    for name, fixed in (('any', []), ('fixed', ['--fixed-batch', 3])):
        file = tmp_path / f'{name}.onnx'
        where = ['--data-root', shapes, '--out', file, *fixed, *cfg_options(SMALL, ANY_SCORE)]
        assert run_tool('export.py', DEMO, trained, *where).code == 0
        out = tmp_path / f'{name}_out'
        result = run_tool('infer.py', DEMO, file, shapes / 'val2017', '--out-dir', out, '--score-thr', 0.0,
                          *cfg_options(SMALL, ANY_SCORE))  # fmt: skip
        assert result.code == 0, result.err
        found.append([it['bbox'] for it in json.loads((out / 'predictions.json').read_text())])
    assert len(found[0]) > 100 and np.allclose(*found, atol=0.1)


def test_a_config_of_another_scale_is_refused(run_tool, exported, shapes, tmp_path):
    """mAP would fall without a word."""
    change = [f'{split}_dataloader.dataset.pipeline.1.scale=(64,64)' for split in ('test', 'val')]
    for tool, more in (
        ('test.py', ['--data-root', shapes, '--work-dir', tmp_path]),
        ('infer.py', [shapes / 'val2017']),
    ):
        where = ['--out-dir', tmp_path / 'out'] if tool == 'infer.py' else []
        result = run_tool(tool, DEMO, exported, *more, *where, *cfg_options(SMALL, *change))
        assert result.code == 2 and 'was exported for scale=' in result.err and '[64, 64]' in result.err, result.err


@pytest.mark.parametrize(
    ('damage', 'words'),
    [
        (dict(classes=['a', 'b']), 'names 2 classes'),
        (dict(classes='[' * 100_000), 'does not say its classes'),
        (dict(outputs=('x', 'scores', 'labels')), 'where a detector of tools/export.py takes'),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(run_tool, exported, shapes, tmp_path, damage, words):
    import onnx

    made = onnx.load(str(exported))
    for item in made.metadata_props:
        if item.key in damage:
            item.value = damage[item.key] if isinstance(damage[item.key], str) else json.dumps(damage[item.key])
    if 'outputs' in damage:
        old, new = made.graph.output[0].name, damage['outputs'][0]
        made.graph.output[0].name = new
        for node in made.graph.node:
            node.output[:] = [new if name == old else name for name in node.output]
            node.input[:] = [new if name == old else name for name in node.input]
    file = tmp_path / 'damaged.onnx'
    onnx.save(made, str(file))
    result = run_tool('infer.py', DEMO, file, shapes / 'val2017', '--out-dir', tmp_path / 'out', *cfg_options(SMALL))
    assert result.code == 2 and words in result.err, result.err


def test_it_is_scored_by_a_config_of_voc(run_tool, trained, exported, shapes, tmp_path):
    """Its metrics take the boxes that the data set gives, of MMDetection's own type."""
    metrics = [dict(type='cbam_mmdet.SampleCocoMetric'), dict(type='cbam_mmdet.VOCDetectionMetric')]
    config = tmp_path / 'voc.py'
    config.write_text(
        f'_base_ = {DEMO!r}\ntest_evaluator = dict(_delete_=True, type="Evaluator", metrics={metrics!r})\n'
    )
    scores = []
    for name, weights in (('torch', trained), ('onnx', exported)):
        tested = run_tool('test.py', config, weights, *tiny(tmp_path / name, shapes, ANY_SCORE))
        assert tested.code == 0, tested.err
        scores.append(re.findall(r'(?:bbox_mAP|/mAP): (\S+)', tested.out + tested.err))
    assert scores[0] == scores[1] and len(scores[0]) >= 2
