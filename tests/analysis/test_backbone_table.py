"""CBAM in every kind of backbone: it goes in, changes nothing at first, trains, and plain checkpoints load."""

import warnings

import mmdet.models  # noqa: F401  (registers the backbones)
import pytest
import torch
from conftest import ROOT
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.registry import init_default_scope
from torch import nn

from cbam_mmdet import CBAM
from cbam_mmdet.analysis.backbone_table import BACKBONES, build_plain, build_with_cbam, measure

# Registered by MMDetection and not tried here: class -> why.
NOT_BUILT: dict[str, str] = {}


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmdet')
    torch.manual_seed(0)


def registered():
    return {
        name for name, cls in MMDET_MODELS.module_dict.items() if cls.__module__.startswith('mmdet.models.backbones.')
    }


def test_every_backbone_of_mmdetection_is_in_the_table():
    tried = {cfg['type'] for cfg, _ in BACKBONES.values()}
    assert registered() - tried == set(NOT_BUILT)
    assert len(registered()) >= 20


def tensors(outputs):
    return [outputs] if isinstance(outputs, torch.Tensor) else [y for y in outputs if y is not None]


def give_usable_weights(backbone):
    """Where a backbone as built, before init_weights() or pretrained weights, computes with numbers that are none."""
    for module in backbone.modules():
        if type(module).__name__ == 'TridentConv':  # memory as it was found
            nn.init.kaiming_uniform_(module.weight)
        if isinstance(module, nn.BatchNorm2d) and not module.weight.any():  # timm's branches start at 0, and hide CBAM
            nn.init.ones_(module.weight)
        if hasattr(module, 'weight_gamma'):  # DetectoRS's convolutions overflow at the scale that they start with
            nn.init.constant_(module.weight_gamma, 0.05)


@pytest.mark.parametrize('name', BACKBONES)
def test_backbone(name):
    if 'Timm' in BACKBONES[name][0]['type']:
        pytest.importorskip('timm', reason="an optional extra: pip install '.[backbones]'")
    if 'mmpretrain' in BACKBONES[name][0]['type']:
        pytest.importorskip('mmpretrain', reason="an optional extra: pip install '.[backbones]'")
        pytest.importorskip('timm')
    plain, ours = build_plain(name), build_with_cbam(name, (3, 96, 96), gate='unit')
    give_usable_weights(plain)
    cbams = [module for module in ours.modules() if isinstance(module, CBAM)]
    assert cbams

    missing, unexpected = ours.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert missing and all('cbam' in key for key in missing)
    plain.eval()
    ours.eval()
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        expected, actual = tensors(plain(x)), tensors(ours(x))
    assert len(expected) == len(actual)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))

    for cbam in cbams:
        for parameter in cbam.parameters():
            nn.init.normal_(parameter, std=0.1)
        nn.init.ones_(cbam.channel.fc1.bias)  # no hidden unit is dead
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        ours.train()
    ours.requires_grad_(True)  # also what a backbone freezes by default
    for module in ours.modules():
        module.training = True  # and what norm_eval holds: random weights without normalization saturate every gate
    with torch.no_grad():
        assert not all(torch.equal(a, b) for a, b in zip(tensors(ours(x)), expected, strict=True))
    sum((y * torch.randn_like(y)).sum() for y in tensors(ours(x))).backward()
    for key, parameter in ours.named_parameters():
        if 'cbam' in key:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
            assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize(
    ('name', 'added'),
    [('ResNet-18', 0.09), ('ResNet-34', 0.16), ('ResNet-50', 2.53), ('ResNet-101', 4.78), ('ResNeXt-50 32x4d', 2.53)],
)
def test_parameters_added_are_the_papers(name, added):
    """Table 4: ResNet-101 has 44.55 M parameters, and 49.33 M with CBAM; ResNet-18 11.69 and 11.78 M."""
    assert measure(name).added / 1e6 == pytest.approx(added, abs=0.0101)


def rows_of(text):
    """The lines of a Markdown table without the line that aligns its columns."""
    return [line for line in text.splitlines() if line.startswith('| ') and not line.startswith('| ---')]


@pytest.mark.slow
def test_the_page_shows_the_whole_table(run_tool):
    pytest.importorskip('mmpretrain')
    rows = rows_of(run_tool('list_backbones.py').out)
    assert len(rows) == 1 + len(BACKBONES)
    page = (ROOT / 'docs/any_backbone.md').read_text()
    assert all(row in page for row in rows)


def test_the_page_shows_the_table(run_tool):
    pytest.importorskip('mmpretrain')
    result = run_tool('list_backbones.py', '--only', 'ResNet-18', 'Swin-T')
    rows = rows_of(result.out)
    assert result.code == 0 and len(rows) == 3
    page = (ROOT / 'docs/any_backbone.md').read_text()
    assert all(row in page for row in rows)
    for name in BACKBONES:
        assert f'| {name} |' in page
