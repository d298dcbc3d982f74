"""Grad-CAM: maps against the formula by hand, and the candidates that scores are taken from.

Also where the maps of a trained detector lie.
"""

import copy
import json

import cv2
import numpy as np
import pytest
import torch
from conftest import DEMO, ROOT
from mmdet.apis import init_detector
from mmdet.registry import MODELS
from mmengine.config import Config
from pycocotools.coco import COCO
from torch import nn

from cbam_mmdet.analysis.gradcam import (
    METHODS,
    BoxScores,
    Target,
    best_detections,
    cam_maps,
    find_layers,
    label_at,
    prepare,
)
from cbam_mmdet.apis.infer import advice_on_scores, load_detector
from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.config import load_config
from cbam_mmdet.visualization.gradcam_sheet import Choice, explain_images

pytest.importorskip('pytorch_grad_cam', reason="needs pip install '.[explain]'")

ANY_SCORE = {'model.test_cfg.rcnn.score_thr': 0.0}


def faster_rcnn(trained):
    return load_detector(load_config(str(next(trained.glob('*.py'))), ANY_SCORE), str(trained), 'cpu')


def thin_ssd():
    """SSD300 on a thin ResNet-50 with CBAM, untrained."""
    cfg = load_config(str(ROOT / 'configs/ssd300_r50_cbam_voc0712.py'))
    cfg.model.backbone.update(base_channels=8, init_cfg=None)
    cfg.model.neck.update(in_channels=(64, 128), out_channels=(64, 128, 64, 64, 64, 64))
    cfg.model.bbox_head.in_channels = cfg.model.neck.out_channels
    cfg.model.test_cfg.score_thr = 0.0
    torch.manual_seed(0)
    model = init_detector(cfg, None, device='cpu')
    model.init_weights()
    return model


@pytest.fixture(scope='module', params=['Faster R-CNN', 'SSD'])
def model(request, trained):
    return faster_rcnn(trained) if request.param == 'Faster R-CNN' else thin_ssd()


@pytest.fixture(scope='module')
def image(shapes):
    return cv2.imread(str(sorted((shapes / 'val2017').iterdir())[0]))


def raw_scores(model, inputs, sample):
    """(M, C + 1), of every proposal or anchor, as the detector's own modules give them."""
    features = model.extract_feat(inputs)
    if hasattr(model, 'roi_head'):
        with torch.no_grad():
            proposals = model.rpn_head.predict(features, [sample], rescale=False)[0].bboxes
        rois = torch.cat([torch.zeros(len(proposals), 1), proposals], 1)
        return model.roi_head.bbox_head(model.roi_head.bbox_roi_extractor(features[:3], rois))[0]
    levels = model.bbox_head(features)[0]
    return torch.cat([level.permute(0, 2, 3, 1).flatten().view(-1, 21) for level in levels])


def by_hand(model, prepared, target, score, layer):
    """Grad-CAM of the candidate that has this score.

    The gradient's mean over the pixels weighs the channels. ReLU, scaling to 0..1 and resizing follow.
    """
    kept = {}
    hook = layer.register_forward_hook(lambda _, __, output: kept.update(activation=output))
    scores = raw_scores(model, prepared.inputs.clone().requires_grad_(), prepared.sample)
    hook.remove()
    of_class = scores.softmax(1)[:, target.label]
    candidate = (of_class - score).abs().argmin()
    assert of_class[candidate].item() == pytest.approx(score, rel=1e-5)
    activation = kept['activation']
    (gradient,) = torch.autograd.grad(scores[candidate, target.label], activation)
    weights = gradient.double().mean((2, 3), keepdim=True)
    cam = (weights * activation.double()).sum(1).clamp(min=0)[0].detach().numpy()
    height, width = prepared.inputs.shape[2:]
    for size in (None, (width, height)):
        cam = cam - cam.min()
        cam = cam / cam.max()
        cam = cam if size is None else cv2.resize(cam, size)
    cam = (cam - cam.min()) / (cam.max() - cam.min())
    height, width = prepared.sample.img_shape
    cam = cam[:height, :width]
    return (cam - cam.min()) / (cam.max() - cam.min())


def test_map_is_the_gradient_weighted_sum(model, image):
    prepared = prepare(model, image)
    (target,) = best_detections(model, prepared, score_thr=0)
    with torch.no_grad():
        found = model.predict(prepared.inputs, [prepared.sample.clone()])[0].pred_instances
    score = float(found.scores.max())
    scores = BoxScores(model, prepared, [target])
    assert scores.probabilities == [pytest.approx(score, rel=1e-5)], (
        'the candidate is the one that the detection came from'
    )
    assert scores.overlaps == [pytest.approx(1, abs=1e-4)]
    layers = find_layers(model)
    stages = ['layer1.2', 'layer2.3', 'layer3.5', 'layer4.2'][: len(model.backbone.res_layers)]
    assert list(layers) == [f'backbone.{stage}' for stage in stages]
    maps = cam_maps(scores, prepared, layers, 'gradcam')
    compared = 0
    for map_, layer in zip(maps, layers.values(), strict=True):
        expected = by_hand(model, prepared, target, score, layer)
        if np.isfinite(expected).all():  # a map without any positive value is 0 / 0 by hand, and 0 by the library
            assert np.abs(map_ - expected).max() < 1e-5
            compared += expected.std() > 0.01
    assert compared >= 2, 'maps that differ from pixel to pixel'


def test_the_map_ends_where_the_pipeline_pads(model, image, monkeypatch):
    prepared = prepare(model, image)
    (target,) = best_detections(model, prepared, score_thr=0)
    padding = copy.deepcopy(model.cfg)
    width, height = padding.test_dataloader.dataset.pipeline[1].scale
    padding.test_dataloader.dataset.pipeline.insert(2, dict(type='Pad', size=(2 * width, 3 * height)))
    monkeypatch.setattr(model, 'cfg', padding)
    padded = prepare(model, image)
    assert padded.sample.img_shape == (3 * height, 2 * width)
    maps = cam_maps(BoxScores(model, padded, [target]), padded, find_layers(model))
    assert maps.shape[1:] == prepared.sample.img_shape


def test_two_boxes_are_explained_by_the_sum_of_their_scores(model, image):
    prepared = prepare(model, image)
    targets = best_detections(model, prepared, top=2, score_thr=0)
    both = BoxScores(model, prepared, targets)(prepared.inputs)
    alone = [BoxScores(model, prepared, [target])(prepared.inputs) for target in targets]
    torch.testing.assert_close(both, torch.cat(alone, 1))
    of_class = best_detections(model, prepared, label=3, top=None, score_thr=0)
    assert of_class and {target.label for target in of_class} == {3}


def test_every_method_gives_a_map_and_leaves_the_detector_as_it_was(model, image):
    prepared = prepare(model, image)
    scores = BoxScores(model, prepared, best_detections(model, prepared, score_thr=0))
    layers = find_layers(model, ['backbone.layer3.5'])
    before = scores(prepared.inputs).detach()
    for method in METHODS:
        (map_,) = cam_maps(scores, prepared, layers, method)
        assert map_.shape == prepared.sample.img_shape
        assert 0 <= map_.min() <= map_.max() <= 1 and np.isfinite(map_).all(), method
    assert torch.equal(scores(prepared.inputs), before)
    assert not layers['backbone.layer3.5']._forward_hooks
    assert any(p.requires_grad for p in model.parameters()) and all(p.grad is None for p in model.parameters())


def test_an_activation_that_is_written_over_later_counts_as_it_was(model, image):
    # The ReLU behind this norm works in place.
    prepared = prepare(model, image)
    (target,) = best_detections(model, prepared, score_thr=0)
    scores = BoxScores(model, prepared, [target])
    name = 'backbone.layer3.5.bn1'
    kept = {}
    layer = find_layers(model, [name])[name]
    hook = layer.register_forward_hook(lambda _, __, output: kept.update(activation=output.detach().clone()))
    (map_,) = cam_maps(scores, prepared, {name: layer}, 'eigencam')
    hook.remove()
    (activation,) = kept['activation'].double()
    columns = activation.flatten(1).T
    columns = columns - columns.mean(0)
    expected = (columns @ torch.linalg.svd(columns, full_matrices=False).Vh[0]).view(activation.shape[1:])
    # A component's sign is arbitrary.
    maps = [(sign * expected).clamp(min=0) for sign in (1, -1)]
    size = prepared.inputs.shape[2:]
    distances = []
    for cam in maps:
        cam = cv2.resize((cam / cam.max()).numpy(), size[::-1])
        height, width = prepared.sample.img_shape
        distances.append(
            np.abs((cam - cam.min()) / (cam.max() - cam.min()) - map_.astype(float))[:height, :width].max()
        )
    assert min(distances) < 1e-4


def test_layers_that_cannot_be_explained(model, image):
    prepared = prepare(model, image)
    scores = BoxScores(model, prepared, best_detections(model, prepared, score_thr=0))
    with pytest.raises(UserError, match=r"no such layer; did you mean 'backbone.layer3.2'"):
        find_layers(model, ['backbone.layer3.2x'])
    with pytest.raises(UserError, match='gives tuple'):
        cam_maps(scores, prepared, find_layers(model, ['backbone']))
    with pytest.raises(UserError, match=r"is unknown.*did you mean 'gradcam"):
        cam_maps(scores, prepared, {}, 'gradcan')
    behind = 'rpn_head.rpn_reg' if hasattr(model, 'roi_head') else 'bbox_head.reg_convs.0.0'
    with pytest.raises(UserError, match=r'is not run|does not depend on it'):
        cam_maps(scores, prepared, find_layers(model, [behind]))
    if hasattr(model, 'roi_head'):
        with pytest.raises(UserError, match='maps are of regions'):
            cam_maps(scores, prepared, find_layers(model, ['roi_head.bbox_roi_extractor']))
        shared = nn.ReLU()
        for stage in (model.backbone.layer1, model.backbone.layer2):
            stage.append(shared)
        with pytest.raises(UserError, match='runs 2 times for an image'):
            cam_maps(scores, prepared, find_layers(model, ['backbone.layer1.3']))


def test_a_map_of_another_level_is_said_to_be_empty(model, image, tmp_path):
    if hasattr(model, 'roi_head'):
        pytest.skip('its boxes use every level')
    file, said = tmp_path / 'a.png', []
    cv2.imwrite(str(file), image)
    layers = ['backbone.layer1.2', 'neck.extra_layers.0']
    for box, empty in (((2, 2, 7, 7), True), ((0.5, 0.5, 44, 44), False)):
        said.clear()
        choice = Choice(box=box, class_name=model.dataset_meta['classes'][0])
        explain_images(
            dict(a=model), [file], tmp_path / 'out', choice, layers=layers, method='layercam', warn=said.append
        )
        first, second = np.load(tmp_path / 'out/raw/a_a.npy')
        assert first.max() == 1 and second.any() != empty
        assert any('the map of neck.extra_layers.0 is empty' in message for message in said) == empty


def test_last_block_of_each_stage_by_backbone():
    for name, expected in (
        ('ssd300_vgg16_cbam_voc0712.py', [f'features.{i}' for i in (3, 8, 15, 22, 29)]),
        ('faster_rcnn_r18_cbam.py', [f'layer{i}.1' for i in (1, 2, 3, 4)]),
    ):
        cfg = load_config(str(ROOT / 'configs' / name))
        cfg.model.backbone.pop('init_cfg', None)
        model = init_detector(cfg, None, device='cpu')
        assert list(find_layers(model)) == [f'backbone.{layer}' for layer in expected]


@pytest.mark.parametrize('name', ['tf_efficientnet_lite0', 'resnet18', 'convnext_atto', 'mobilenetv3_small_050'])
@pytest.mark.parametrize('cbam', [False, True])
def test_layers_of_a_timm_network_are_the_maps_that_the_neck_gets(name, cbam):
    pytest.importorskip('timm', reason="an optional extra: pip install '.[backbones]'")
    backbone = dict(type='TimmFeatures', model_name=name, out_indices=(1, 2, 3))
    if cbam:
        plugin = dict(cfg=dict(type='CBAM', reduction=4), after=None)
        backbone = dict(type='PluginBackbone', backbone=backbone, plugins=[plugin])
    model = nn.Module()
    model.backbone = MODELS.build(backbone).eval()
    seen = {}
    for layer, module in find_layers(model).items():
        module.register_forward_hook(lambda _, __, output, layer=layer: seen.update({layer: output.clone()}))
    with torch.no_grad():
        maps = model.backbone(torch.rand(1, 3, 64, 96))
    assert len(seen) == len(maps) == 3
    assert all(torch.equal(a, b) for a, b in zip(seen.values(), maps, strict=True))


def test_tool_compares_two_detectors(run_tool, trained, shapes, tmp_path):
    pytest.importorskip('pytorch_grad_cam')
    config = next(trained.glob('*.py'))
    image = sorted((shapes / 'val2017').iterdir())[0]
    models = ['--compare', config, trained, '--device', 'cpu']
    which = ['--score-thr', 0, '--top', 2, '--cfg-options', 'model.test_cfg.rcnn.score_thr=0.0']
    result = run_tool('gradcam.py', config, trained, shapes / 'val2017', *models, '--out-dir', tmp_path, *which)
    assert result.code == 0, result.err
    assert '4 sheets' in result.out
    assert cv2.imread(str(tmp_path / f'{image.stem}.png')).std() > 10
    names = [f'{image.stem}_faster_rcnn_cbam{end}' for end in ('', '_2')]
    records = [json.loads((tmp_path / f'raw/{name}.json').read_text()) for name in names]
    assert records[0] == records[1] and len(records[0]['targets']) == 2
    maps = [np.load(tmp_path / f'raw/{name}.npy') for name in names]
    assert maps[0].shape == (4, 128, 128) and np.array_equal(*maps)
    assert records[0]['layers'] == [f'backbone.layer{name}' for name in ('1.2', '2.3', '3.5', '4.2')]


def test_tool_on_a_given_box(run_tool, trained, shapes, tmp_path):
    config = next(trained.glob('*.py'))
    image = sorted((shapes / 'val2017').iterdir())[0]
    model = ['--config', config, '--checkpoint', trained, '--device', 'cpu']  # the order that was
    which = ['--box', 8, 8, 40, 40, '--class', 'star', '--layers', 'backbone.layer2.3', '--method', 'layercam']
    result = run_tool('gradcam.py', image, *model, '--out-dir', tmp_path, *which)
    assert result.code == 0, result.err
    (record,) = (json.loads(path.read_text()) for path in (tmp_path / 'raw').glob('*.json'))
    assert record['targets'] == [dict(box=[8, 8, 40, 40], label=3, class_name='star')]
    assert record['layers'] == ['backbone.layer2.3'] and record['method'] == 'layercam'


def test_bad_input_is_one_line(run_tool, trained, shapes, tmp_path):
    config = next(trained.glob('*.py'))
    image, other = sorted((shapes / 'val2017').iterdir())[:2]
    where = ['--device', 'cpu', '--out-dir', tmp_path]
    for arguments, message in (
        ([image, *where, '--layers', 'backbone.layer5.0'], "no such layer; did you mean 'backbone.layer"),
        ([image, *where, '--score-thr', 1.0], 'no detection with a score of 1 or more'),
        (
            [image, *where, '--class', 'sta'],
            "the detector knows circle, square, triangle, star, ring, cross; did you mean 'star'",
        ),
        ([image, *where, '--method', 'gradcm'], 'is unknown, choose from'),
        ([image, *where, '--box', 40, 8, 8, 40], 'expected x1 < x2 and y1 < y2 inside the image of 64 x 64'),
        ([image, other, *where, '--box', 8, 8, 40, 40], 'a box of one image, 2 were given'),
        ([image, *where, '--cfg-options', 'model.backbone.base_channels=8'], 'epoch_1.pth'),
        ([image, *where, '--compare', config, tmp_path / 'none.pth'], 'none.pth'),
    ):
        result = run_tool('gradcam.py', config, trained, *arguments)
        assert result.code == 2 and 'Traceback' not in result.err, result.err
        messages = [line for line in result.err.splitlines() if line.startswith(('error: ', 'warning: '))]
        assert len(messages) == 1 and message in messages[0], result.err


@pytest.mark.parametrize('kind', ['ATSSHead', 'FCOSHead', 'GFLHead'])
def test_other_heads_are_refused_before_anything_is_detected(kind, image):
    """ATSS multiplies a third output with the class score, GFL codes boxes as distributions, FCOS has no anchors."""
    anchors = dict(type='AnchorGenerator', ratios=[1.0], octave_base_scale=8, scales_per_octave=1, strides=[8])
    more = {} if kind == 'FCOSHead' else dict(anchor_generator=anchors)
    if kind == 'ATSSHead':
        more['loss_centerness'] = dict(type='mmdet.CrossEntropyLoss', use_sigmoid=True)
    model = nn.Module()
    model.bbox_head = MODELS.build(dict(type=f'mmdet.{kind}', num_classes=2, in_channels=32, feat_channels=32, **more))
    with pytest.raises(UserError, match=f'SSD and RetinaNet, not Module with a {kind}'):
        explain_images({'one': model}, [], 'nowhere', Choice())


def test_what_shows_weaker_detections(trained):
    model = load_detector(load_config(str(next(trained.glob('*.py')))), str(trained), 'cpu')
    assert advice_on_scores(model, 0.3) == 'a lower --score-thr shows weaker ones'
    own = 'leaves out scores below 0.05 (--cfg-options model.test_cfg.rcnn.score_thr=0 shows them)'
    assert own in advice_on_scores(model, 0.05)
    assert 'model.test_cfg.score_thr=0' in advice_on_scores(with_own_threshold(0.02), 0.01)


def with_own_threshold(score_thr):
    model = nn.Module()
    model.cfg = Config(dict(model=dict(test_cfg=dict(score_thr=score_thr))))
    return model


def test_class_in_a_box(trained, image):
    model = faster_rcnn(trained)
    prepared = prepare(model, image)
    (best,) = best_detections(model, prepared, score_thr=0)
    assert label_at(model, prepared, best.box) in range(6)
    with pytest.raises(UserError, match='no candidate of the detector overlaps it by half'):
        label_at(model, prepared, (0.0, 0.0, 1.0, 64.0))


def inside(model, folder, layer):
    """For each object of the demo's validation set, its box's share of the map's mass over that of the image's area."""
    truth = COCO(str(folder / 'annotations/instances_val2017.json'))
    ratios = []
    for i in truth.getImgIds():
        info = truth.loadImgs(i)[0]
        prepared = prepare(model, cv2.imread(str(folder / 'val2017' / info['file_name'])))
        for instance in truth.loadAnns(truth.getAnnIds(i)):
            x, y, width, height = instance['bbox']
            target = Target((x, y, x + width, y + height), instance['category_id'] - 1)
            scores = BoxScores(model, prepared, [target])
            (map_,) = cam_maps(scores, prepared, find_layers(model, [layer]), 'gradcam++')
            rows, columns = slice(round(y), round(y + height)), slice(round(x), round(x + width))
            assert map_.shape == (info['height'], info['width']), 'the network takes the image in its own size'
            share = map_[rows, columns].size / map_.size
            ratios.append(map_[rows, columns].sum() / max(map_.sum(), 1e-9) / share)
    return np.array(ratios)


@pytest.mark.slow
def test_maps_of_a_trained_detector_lie_on_the_objects(demo):
    cfg = load_config(DEMO)
    model = load_detector(cfg, str(demo / 'work'), 'cpu')
    ratios = inside(model, demo / 'shapes', 'backbone.layer2.3')
    assert (ratios > 1).mean() >= 0.9
    torch.manual_seed(0)
    untrained = init_detector(load_config(DEMO), None, device='cpu')
    untrained.init_weights()
    assert (inside(untrained, demo / 'shapes', 'backbone.layer2.3') > 1).mean() < 0.9
