"""Detectors exported to ONNX: onnxruntime detects what MMDetection does, for batches and sizes that were not traced."""

import copy
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from mmcv.cnn.bricks.conv2d_adaptive_padding import Conv2dAdaptivePadding
from mmdet.models.necks.ssd_neck import L2Norm
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from cbam_mmdet.datasets.classes import _set_num_classes
from cbam_mmdet.deploy import onnx_file
from cbam_mmdet.deploy.export import NEAR_IN_HALF, compare
from cbam_mmdet.deploy.graph import DetectorGraph
from cbam_mmdet.errors import UserError

onnx = pytest.importorskip('onnx', reason="needs pip install '.[deploy]'")
pytest.importorskip('onnx.reference', reason='needs a newer onnx')
pytest.importorskip('onnxruntime', reason="needs pip install '.[deploy]'")

DETECTORS = {
    'Faster R-CNN': 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'Cascade R-CNN': 'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py',
    'Mask R-CNN': 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    'RetinaNet': 'retinanet/retinanet_r50_fpn_1x_coco.py',
    'SSD': 'ssd/ssd300_coco.py',
    'FCOS': 'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    'ATSS': 'atss/atss_r50_fpn_1x_coco.py',
    'RTMDet': 'rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
}
FAST = ('Mask R-CNN', 'RetinaNet')
CLASSES = 4
SIZES = (160, 224), (96, 128), (75, 133), (224, 100)
# Networks that take no other sizes.
OWN_SIZES = {'SSD': [(300, 300)] * 4, 'RTMDet': [(160, 224), (96, 128), (64, 160), (224, 96)]}


def tiny(path):
    """A detector with CBAM, random weights and few channels, of which every score counts."""
    cfg = Config.fromfile(path)
    init_default_scope('mmdet')
    model = cfg.model
    _set_num_classes(model, CLASSES, 'model')
    if model.backbone.type == 'ResNet':
        model.backbone = dict(
            type='ResNet', depth=18, base_channels=8, num_stages=4, out_indices=(0, 1, 2, 3), norm_cfg=dict(type='BN')
        )
        model.neck.in_channels = [8, 16, 32, 64]
    model.backbone.init_cfg = None
    plugin = dict(cfg=dict(type='CBAM', reduction=4), after=None)
    model.backbone = dict(type='PluginBackbone', backbone=model.backbone, plugins=[plugin])
    for test_cfg in (model.test_cfg, model.test_cfg.get('rcnn', {})):
        if 'score_thr' in test_cfg:
            test_cfg.score_thr = 0.001
    torch.manual_seed(0)
    made = MODELS.build(copy.deepcopy(model))
    made.init_weights()
    for name, weights in made.named_parameters():
        if re.search(r'cls(_convs\.\d+\.0)?\.weight', name):  # scores that differ, as a trained detector has them
            weights.data *= 20
    for module in made.modules():  # statistics as after a training, not those of nothing
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    made.cfg = cfg
    made.dataset_meta = dict(classes=tuple(f'class {i}' for i in range(CLASSES)))
    return made.eval()


def write(name, folder):
    path = folder / 'config.py'
    path.write_text(f"_base_ = 'mmdet::{DETECTORS[name]}'\n")
    return path


@pytest.fixture(params=[name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in DETECTORS])
def detector(request, tmp_path):
    model = tiny(write(request.param, tmp_path))
    model.sizes = OWN_SIZES.get(request.param, SIZES)
    return model


def draw(height, width, seed):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def test_onnxruntime_detects_what_mmdetection_does(detector, tmp_path):
    file = tmp_path / 'detector.onnx'
    onnx_file.write_onnx(detector, file)
    made = onnx.load(file)
    assert {node.domain for node in made.graph.node} == {''} and [it.version for it in made.opset_import] == [17]
    alone = compare(detector, file, [draw(*size, seed) for seed, size in enumerate(detector.sizes)])
    together = compare(detector, file, [draw(*detector.sizes[1], seed) for seed in range(6)], batch=3)
    for seen in (alone, together):
        assert seen.detections > 10 * seen.images
        assert seen.within(boxes=0.1, scores=1e-4, masks=0.01), seen


@pytest.mark.slow
@pytest.mark.parametrize('name', DETECTORS)
def test_twenty_images(name, tmp_path):
    """In sizes that need no padding.

    In the rows of padding all places look alike. With random weights their proposals have equal scores but for
    rounding, and of those that overlap either one may be kept: of (75, 133) up to a sixth of the detections are others.
    """
    model, file = tiny(write(name, tmp_path)), tmp_path / 'detector.onnx'
    onnx_file.write_onnx(model, file)
    sizes = OWN_SIZES.get(name, [(160, 224), (96, 128), (224, 96), (128, 128)])
    alone = compare(model, file, [draw(*sizes[i % 4], i) for i in range(20)])
    together = compare(model, file, [draw(*sizes[i // 6], i) for i in range(24)], batch=3)
    for seen in (alone, together):
        assert seen.within(boxes=0.1, scores=1e-4, masks=0.01), seen
        assert seen.detections > 10 * seen.images
        print(name, seen)  # for the record, with pytest -s


def test_padding_that_depends_on_the_size(tmp_path):
    """timm's Conv2dSame: right for any size that is padded to multiples of its strides, and refused otherwise."""
    pytest.importorskip('timm', reason="an optional extra: pip install '.[backbones]'")
    cfg = Config.fromfile(ROOT / 'configs/faster_rcnn_effnet_lite0_cbam.py')
    cfg.model.backbone.backbone.init_cfg = None
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).eval()
    model.cfg, model.dataset_meta = cfg, dict(classes=tuple(f'class {i}' for i in range(80)))
    model.test_cfg.rcnn.score_thr = 0
    onnx_file.write_onnx(model, tmp_path / 'padded.onnx')
    session = onnx_file.open_session(tmp_path / 'padded.onnx')
    graph = DetectorGraph(model).eval()
    for size in SIZES:
        image = draw(*size, 0)[None]
        with torch.no_grad():
            scores = graph(torch.from_numpy(image))[1]
        np.testing.assert_allclose(session.run(['scores'], {onnx_file.INPUT: image})[0], scores, atol=1e-3)
    model.data_preprocessor.pad_size_divisor = 1
    with pytest.raises(UserError, match='pad_size_divisor=32'):
        onnx_file.write_onnx(model, tmp_path / 'unpadded.onnx')
    onnx_file.write_onnx(model, tmp_path / 'fixed.onnx', fixed_size=(75, 133))


def test_padding_that_writes_the_size_into_the_graph(tmp_path):
    """MMCV's Conv2dAdaptivePadding, in MMDetection's EfficientNet: right for one size, and refused for any."""
    model = tiny(write('RetinaNet', tmp_path))
    (name, conv), *_ = [
        (name, module)
        for name, module in model.backbone.named_modules()
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2)
    ]
    padded = Conv2dAdaptivePadding(conv.in_channels, conv.out_channels, conv.kernel_size, 2, bias=conv.bias is not None)
    padded.load_state_dict(conv.state_dict())
    parent, _, child = name.rpartition('.')
    setattr(model.backbone.get_submodule(parent), child, padded)
    with pytest.raises(UserError, match=r'Conv2dAdaptivePadding .* give --fixed-size'):
        onnx_file.write_onnx(model, tmp_path / 'any.onnx')
    onnx_file.write_onnx(model, tmp_path / 'fixed.onnx', fixed_size=(64, 96))
    image = draw(64, 96, 0)[None]
    with torch.no_grad():
        scores = DetectorGraph(model).eval()(torch.from_numpy(image))[1]
    session = onnx_file.open_session(tmp_path / 'fixed.onnx')
    np.testing.assert_allclose(session.run(['scores'], {onnx_file.INPUT: image})[0], scores, atol=1e-3)


@pytest.mark.parametrize('name', ['Faster R-CNN', 'SSD', 'RetinaNet'])
def test_half_precision_ends_with_the_network(name, tmp_path):
    """No coordinate is in float16, whose largest number is 65504: the last label of 80 classes is moved further."""
    onnx_file.write_onnx(tiny(write(name, tmp_path)), tmp_path / 'half.onnx', half=True)
    graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / 'half.onnx')).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    makers = {name: node for node in graph.node for name in node.output}
    left = [name for node in graph.node if node.op_type == 'NonMaxSuppression' for name in node.input[:2]]
    assert left
    seen, last = set(), set()
    while left:
        name = left.pop()
        if name in seen or name not in makers:
            continue
        seen.add(name)
        node = makers[name]
        if types.get(name) == onnx.TensorProto.FLOAT16:
            last.add(node.op_type)
        else:
            left += node.input
    assert last and last <= {'Conv', 'Gemm', 'MatMul'}, last


class LayerNormOfMaps(nn.LayerNorm):
    """As in ConvNeXt."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SquaredByHand(nn.Module):
    def forward(self, x):
        return x / (x * x).mean(1, keepdim=True).add(1e-6).sqrt()


@pytest.mark.parametrize(
    'norm',
    [L2Norm(8, scale=1), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True), LayerNormOfMaps(8), SquaredByHand()],
)
def test_norms_in_half_precision(norm, tmp_path):
    """By onnx's own evaluator, which follows the types; onnxruntime computes in float32 on a CPU."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), norm, nn.Conv2d(8, 8, 1)).eval()
    model[0].weight.data *= 200  # sums of squares of some 10^6
    if isinstance(norm, L2Norm):
        norm.weight.data.fill_(1)  # its memory is not initialized
    x = torch.randn(1, 3, 16, 16)
    assert model[0](x).square().sum(1).max() > 2**16
    older = onnx_file._older_exporter()
    torch.onnx.export(model, (x,), str(tmp_path / 'norm.onnx'), opset_version=onnx_file.OPSET, **older)
    half = onnx_file._in_half_precision(onnx.load(tmp_path / 'norm.onnx'))
    assert onnx.TensorProto.FLOAT16 in {weights.data_type for weights in half.graph.initializer}
    made = onnx.reference.ReferenceEvaluator(half).run(None, {half.graph.input[0].name: x.numpy()})[0]
    with torch.no_grad():
        truth = model.double()(x.double()).numpy()
    np.testing.assert_allclose(made, truth, atol=0.02)


def test_half_precision(tmp_path):
    """A graph that onnxruntime takes, with weights in float16, and nearly the same detections.

    With random weights many scores are nearly equal, so others of them are among the best hundred.
    """
    model = tiny(write('RetinaNet', tmp_path))
    onnx_file.write_onnx(model, tmp_path / 'half.onnx', half=True)
    made = onnx.load(tmp_path / 'half.onnx')
    kinds = [weights.data_type for weights in made.graph.initializer if len(weights.dims) == 4]
    assert kinds and set(kinds) == {onnx.TensorProto.FLOAT16}
    images = [draw(*size, seed) for seed, size in enumerate([(160, 224), (96, 128)])]
    seen = compare(model, tmp_path / 'half.onnx', images, near=NEAR_IN_HALF)
    assert seen.within(boxes=4, scores=0.05, masks=0, unmatched=0.25), seen
