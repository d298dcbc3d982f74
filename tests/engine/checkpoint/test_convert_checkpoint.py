"""Weights that nobody's CBAM has are refused by one message, and no key is lost in a conversion."""

import pytest
import torch
from test_keys import official
from torch import nn

from cbam_mmdet import CBAM
from cbam_mmdet.apis.convert import convert_checkpoint
from cbam_mmdet.errors import UserError

TIMM = {
    'a.channel.fc1.weight': torch.ones(4, 8, 1, 1),
    'a.channel.fc2.weight': torch.ones(8, 4, 1, 1),
    'a.spatial.conv.conv.weight': torch.ones(1, 2, 7, 7),
    'a.spatial.conv.bn.weight': torch.ones(1),
}


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'a.spatial.conv.weight': torch.zeros(1, 2, 7, 7)}, 'several of its keys mean the same weight'),
        ({'a.channel.fc1.weight': torch.zeros(0, 8, 1, 1)}, 'ZeroDivisionError'),
        ({'a.channel.fc1.weight': torch.full((4, 8, 1, 1), float('nan'))}, 'not finite'),
        ({'module.a.spatial.conv.bn.weight': torch.zeros(1)}, 'twice, with and without module'),
    ],
)
def test_modules(tmp_path, changes, words):
    torch.save(TIMM, tmp_path / 'a.pth')
    convert_checkpoint(str(tmp_path / 'a.pth'), str(tmp_path / 'sound.pth'))
    torch.save({**TIMM, **changes}, tmp_path / 'a.pth')
    with pytest.raises(UserError, match=words):
        convert_checkpoint(str(tmp_path / 'a.pth'), str(tmp_path / 'b.pth'))
    assert not (tmp_path / 'b.pth').exists()


def test_networks(tmp_path):
    weights = official(18)
    torch.save({**weights, 'module.fc.bias': torch.tensor(1.0)}, tmp_path / 'a.pth')
    with pytest.raises(UserError, match='shapes or names that no CBAM has'):
        convert_checkpoint(str(tmp_path / 'a.pth'), str(tmp_path / 'b.pth'))
    torch.save(weights, tmp_path / 'a.pth')
    convert_checkpoint(str(tmp_path / 'a.pth'), str(tmp_path / 'ours.pth'))
    ours = torch.load(tmp_path / 'ours.pth')['state_dict']
    torch.save({**ours, 'conv1.weight': ours['backbone.conv1.weight'] * 0}, tmp_path / 'both.pth')
    with pytest.raises(UserError, match='several of its keys mean the same weight'):
        convert_checkpoint(str(tmp_path / 'both.pth'), str(tmp_path / 'b.pth'), official=True)


def test_the_source_is_not_overwritten(tmp_path):
    torch.save(TIMM, tmp_path / 'a.pth')
    before = (tmp_path / 'a.pth').read_bytes()
    with pytest.raises(UserError, match='is the source itself'):
        convert_checkpoint(str(tmp_path / 'a.pth'), str(tmp_path / 'a.pth'))
    assert (tmp_path / 'a.pth').read_bytes() == before


@pytest.mark.parametrize('changes', [dict(), dict(gate='unit'), dict(norm_cfg=dict(type='BN', eps=0.1))])
def test_only_the_papers_variant_becomes_the_authors(tmp_path, changes):
    torch.save(nn.ModuleDict(dict(cbam=CBAM(32, **changes))).state_dict(), tmp_path / 'a.pth')
    if changes:
        with pytest.raises(UserError, match="which the authors' network does not have"):
            convert_checkpoint(str(tmp_path / 'a.pth'), str(tmp_path / 'b.pth'), official=True)
    else:  # a module is no network, which is what comes next
        with pytest.raises(UserError, match='these are not the weights of a ResNet'):
            convert_checkpoint(str(tmp_path / 'a.pth'), str(tmp_path / 'b.pth'), official=True)
