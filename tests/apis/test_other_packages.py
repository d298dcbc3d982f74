"""CBAM by its name in the backbones of OpenMMLab's other packages, where they are installed."""

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope

from cbam_mmdet import CBAM
from cbam_mmdet.models.gates import find_cbams


def in_scope(package, **backbone):
    """The backbone as a config of that package builds it."""
    pytest.importorskip(package)
    with DefaultScope.overwrite_default_scope(package):
        return MODELS.build(backbone)


@pytest.mark.parametrize('name', ['CBAM', 'mmengine.CBAM'])
def test_mmsegmentations_resnet_takes_it(name):
    pytest.importorskip('mmseg.models')
    plugins = [dict(cfg=dict(type=name, gate='unit'), position='after_conv3')]
    backbone = in_scope('mmseg', type='ResNetV1c', depth=50, plugins=plugins)
    plain = in_scope('mmseg', type='ResNetV1c', depth=50)
    for model in (backbone, plain):
        model.eval()  # returns None there
    assert len(find_cbams(backbone)) == 16
    plain.load_state_dict(backbone.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 64)
    for actual, expected in zip(backbone(x), plain(x), strict=True):
        torch.testing.assert_close(actual, expected)


def test_mmyolo_has_one_of_its_own_under_the_name():
    pytest.importorskip('mmyolo.models')
    kinds = {}
    for name in ('CBAM', 'mmengine.CBAM'):
        plugins = [dict(cfg=dict(type=name), stages=(True, True, True, True))]
        backbone = in_scope('mmyolo', type='YOLOv5CSPDarknet', deepen_factor=0.33, widen_factor=0.25, plugins=plugins)
        kinds[name] = {type(m).__module__ for m in backbone.modules() if type(m).__name__ == 'CBAM'}
        found = find_cbams(backbone)
        assert len(found) == (4 if name == 'mmengine.CBAM' else 0)
        backbone(torch.randn(1, 3, 64, 64))[-1].sum().backward()
        assert all(module.channel.fc1.weight.grad.abs().sum() > 0 for module in found.values())
    assert kinds == {'CBAM': {'mmyolo.models.plugins.cbam'}, 'mmengine.CBAM': {CBAM.__module__}}


def test_mmpretrains_backbones_take_it():
    pytest.importorskip('mmpretrain.models')
    inner = dict(type='ResNet', depth=18)
    backbone = in_scope('mmpretrain', type='PluginBackbone', backbone=inner, plugins=[dict(cfg=dict(type='CBAM'))])
    assert len(find_cbams(backbone)) == 8
