"""Detectors of MMDetection with CBAM in their backbones, each with its steps from a config to a prediction."""

import copy
import re

import pytest
import torch
from conftest import ROOT
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import init_default_scope

from cbam_mmdet.apis.insert import insert_cbam
from cbam_mmdet.datasets.classes import _set_num_classes, set_classes
from cbam_mmdet.engine.checkpoint.loading import load_checkpoint
from cbam_mmdet.errors import UserError
from cbam_mmdet.models.gates import find_cbams
from cbam_mmdet.utils.config import set_data_root

# The config of MMDetection, and the heads in which --classes sets the number of classes.
DETECTORS = {
    'RetinaNet': ('retinanet/retinanet_r50_fpn_1x_coco.py', 1),
    'FCOS': ('fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', 1),
    'ATSS': ('atss/atss_r50_fpn_1x_coco.py', 1),
    'Mask R-CNN': ('mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', 2),
    'Cascade R-CNN': ('cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py', 3),
    'YOLOX': ('yolox/yolox_tiny_8xb8-300e_coco.py', 1),
    'RTMDet': ('rtmdet/rtmdet_tiny_8xb32-300e_coco.py', 1),
    'Deformable DETR': ('deformable_detr/deformable-detr_r50_16xb2-50e_coco.py', 1),
    'DINO': ('dino/dino-4scale_r50_8xb2-12e_coco.py', 1),
}
# As docs/any_backbone.md shows it.
WITH_CBAM = """
_base_ = 'mmdet::{base}'
custom_imports = dict(imports=['cbam_mmdet'])
model = dict(
    backbone=dict(
        _delete_=True,
        type='PluginBackbone',
        backbone={{{{_base_.model.backbone}}}},
        plugins=[dict(cfg=dict(type='CBAM', gate='unit'))]))
"""


def read(path, text, shapes):
    """The config for the tiny data set's classes, and the keys that name their number."""
    path.write_text(text)
    cfg = Config.fromfile(path)
    init_default_scope('mmdet')
    set_data_root(cfg, str(shapes))
    set_classes(cfg, 'auto')
    plain = cfg.model.backbone.get('backbone', cfg.model.backbone)
    if 'frozen_stages' in plain:
        plain.frozen_stages = 0
    if (plain.get('init_cfg') or {}).get('type') == 'Pretrained':
        plain.init_cfg = None
    if 'score_thr' in (cfg.model.get('test_cfg') or {}):
        cfg.model.test_cfg.score_thr = 0.0
    if 'encoder' in cfg.model:  # of a transformer: fewer layers, for the sake of time
        cfg.model.encoder.num_layers, cfg.model.decoder.num_layers = 1, 2
        cfg.model.num_queries = 50  # small images have no more
    return cfg


def build(cfg):
    torch.manual_seed(0)
    model = MODELS.build(copy.deepcopy(cfg.model))  # some detectors change what they are built of
    if hasattr(model, 'level_embed'):
        torch.nn.init.normal_(model.level_embed)  # memory as it was found
    if not hasattr(model.backbone, 'layer1'):  # ResNets start with branches of 0, which would hide their CBAMs
        model.init_weights()
    return model


def inputs_of(model, training):
    MessageHub.get_current_instance().update_info('iter', 0)  # YOLOX asks when it changes the size of its images
    masks = hasattr(model, 'roi_head') and model.roi_head.with_mask
    data = demo_mm_inputs(2, [[3, 128, 128], [3, 96, 128]], num_classes=6, with_mask=masks)
    return model.data_preprocessor(data, training)


def detect(model):
    torch.manual_seed(1)
    with torch.no_grad():
        return [sample.pred_instances for sample in model.eval().forward(**inputs_of(model, False), mode='predict')]


@pytest.fixture(params=DETECTORS)
def detector(request):
    return request.param


def test_it_is_built_trained_and_predicts(detector, shapes, tmp_path, logged):
    base, heads = DETECTORS[detector]
    cfg = read(tmp_path / 'with_cbam.py', WITH_CBAM.format(base=base), shapes)
    assert len(re.findall(r'num_classes=6', logged.text)) >= heads, logged.text
    model = build(cfg).train()
    counts = {
        name: module.num_classes
        for name, module in model.named_modules()
        if re.search(r'(bbox|mask)_head(\.\d)?$', name) and hasattr(module, 'num_classes')
    }
    assert len(counts) >= heads and set(counts.values()) == {6}

    cbams = find_cbams(model)
    assert len(cbams) == (16 if 'r50' in base else 8 if 'yolox' in base else 4)
    losses = model.forward(**inputs_of(model, True), mode='loss')
    loss, _ = model.parse_losses(losses)
    loss.backward()
    assert torch.isfinite(loss)
    for name, cbam in cbams.items():
        for branch in (cbam.channel, cbam.spatial):
            # The biases get one in any case, where a single hidden unit may be dead.
            assert max(p.grad.abs().max() for p in branch.last_layer.parameters()) > 0, name

    for found in detect(model):
        assert found.bboxes.shape == (len(found), 4) and torch.isfinite(found.bboxes).all()
        assert ((found.scores >= 0) & (found.scores <= 1)).all() and (found.labels < 6).all()


def test_inserted_it_detects_what_the_plain_one_does(detector, shapes, tmp_path):
    base, _ = DETECTORS[detector]
    cfg = read(tmp_path / 'plain.py', f"_base_ = 'mmdet::{base}'\n", shapes)
    plain = build(cfg)
    torch.save(dict(state_dict=plain.state_dict()), tmp_path / 'plain.pth')
    inserted = insert_cbam(cfg, str(tmp_path / 'plain.pth'), str(tmp_path))
    model = build(Config.fromfile(inserted.config))
    model.load_state_dict(load_checkpoint(str(inserted.checkpoint))['state_dict'])
    assert set(find_cbams(model)) == set(inserted.modules)
    before, after = detect(plain), detect(model)
    assert sum(map(len, before)) > 0
    for a, b in zip(before, after, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ('bboxes', 'scores', 'labels')), 'bit for bit'


def test_the_page_lists_these_detectors():
    page = (ROOT / 'docs/any_backbone.md').read_text()
    table = page[page.index('| detector |') :].split('\n\n')[0]
    assert re.findall(r'\n\| ([\w -]+) \| `(.+?)`', table) == [(name, base) for name, (base, _) in DETECTORS.items()]


MASK2FORMER = 'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco{}.py'


def test_classes_of_a_panoptic_head(shapes, tmp_path):
    cfg = read(tmp_path / 'instances.py', f'_base_ = {MASK2FORMER.format("")!r}\n', shapes)
    head = cfg.model.panoptic_head
    assert (head.num_things_classes, cfg.model.panoptic_fusion_head.num_things_classes) == (6, 6)
    assert head.loss_cls.class_weight == [1.0] * 6 + [0.1]
    assert build(cfg).panoptic_head.cls_embed.out_features == 7
    with pytest.raises(UserError, match=r'panoptic_head also segments num_stuff_classes=53 .* instance segmentation'):
        _set_num_classes(dict(panoptic_head=dict(num_things_classes=80, num_stuff_classes=53)), 6, 'model')
