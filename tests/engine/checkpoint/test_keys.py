"""Weights from elsewhere: the authors' networks, timm's and MMYOLO's modules, compared by what the networks compute."""

import pytest
import torch
import torchvision
from mmdet.registry import MODELS
from plain_cbam import PlainCBAM
from torch import nn

from cbam_mmdet import CBAM
from cbam_mmdet.engine.checkpoint.keys import from_official, from_timm, to_official, translate
from cbam_mmdet.engine.checkpoint.loading import safe_loading
from cbam_mmdet.engine.checkpoint.missing_cbam import summarize_missing_cbam
from cbam_mmdet.errors import UserError

UNIT = dict(cfg=dict(type='CBAM', gate='unit'))
BLOCKS = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3]}


def official(depth, reduction=16, classes=1000, width=64):
    """Random weights under the names and in the shapes of the authors' code, written from its published keys."""
    torch.manual_seed(depth)
    state = {}

    def norm(name, channels):
        state[f'{name}.weight'] = torch.rand(channels) + 0.5
        state[f'{name}.bias'] = 0.1 * torch.randn(channels)
        state[f'{name}.running_mean'] = 0.1 * torch.randn(channels)
        state[f'{name}.running_var'] = torch.rand(channels) + 0.5
        state[f'{name}.num_batches_tracked'] = torch.tensor(7)

    def conv(name, out, channels, size):
        state[f'{name}.weight'] = torch.randn(out, channels, size, size) / (channels * size * size) ** 0.5

    def linear(name, out, channels):
        state[f'{name}.weight'] = torch.randn(out, channels) / channels**0.5
        state[f'{name}.bias'] = 0.1 * torch.randn(out)

    conv('conv1', width, 3, 7)
    norm('bn1', width)
    channels, bottleneck = width, depth >= 50
    for stage, blocks in enumerate(BLOCKS[depth]):
        planes = width * 2**stage
        out = planes * (4 if bottleneck else 1)
        for i in range(blocks):
            name = f'layer{stage + 1}.{i}'
            shapes = [(planes, channels, 1), (planes, planes, 3), (out, planes, 1)]
            for j, (o, c, size) in enumerate(shapes if bottleneck else [(planes, channels, 3), (planes, planes, 3)], 1):
                conv(f'{name}.conv{j}', o, c, size)
                norm(f'{name}.bn{j}', o)
            if i == 0 and (stage or bottleneck):
                conv(f'{name}.downsample.0', out, channels, 1)
                norm(f'{name}.downsample.1', out)
            linear(f'{name}.cbam.ChannelGate.mlp.1', out // reduction, out)
            linear(f'{name}.cbam.ChannelGate.mlp.3', out, out // reduction)
            conv(f'{name}.cbam.SpatialGate.spatial.conv', 1, 2, 7)
            norm(f'{name}.cbam.SpatialGate.spatial.bn', 1)
            channels = out
    linear('fc', classes, channels)
    return {f'module.{key}': value for key, value in state.items()}


class TextbookResNet(nn.Module):
    """torchvision's network with the textbook's CBAM at each block's end; it takes the authors' state dict as it is."""

    def __init__(self, depth, state_dict):
        super().__init__()
        self.net = getattr(torchvision.models, f'resnet{depth}')()
        plain = {key.removeprefix('module.'): value for key, value in state_dict.items() if '.cbam.' not in key}
        self.net.load_state_dict(plain)
        last = 'bn3' if depth >= 50 else 'bn2'
        for name, block in self.net.named_modules():
            if hasattr(block, last):
                prefix = f'module.{name}.cbam.'
                cbam = PlainCBAM(getattr(block, last).num_features)
                parts = {'ChannelGate.mlp.1': 'mlp.0', 'ChannelGate.mlp.3': 'mlp.2',
                         'SpatialGate.spatial.conv': 'conv', 'SpatialGate.spatial.bn': 'bn'}  # fmt: skip
                weights = {}
                for key, value in state_dict.items():
                    part, _, kind = key.removeprefix(prefix).rpartition('.')
                    if key.startswith(prefix):
                        weights[f'{parts[part]}.{kind}'] = value
                cbam.load_state_dict(weights)
                setattr(block, last, nn.Sequential(getattr(block, last), cbam))

    def forward(self, x):
        net, maps = self.net, []
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            x = stage(x)
            maps.append(x)
        return maps


def backbone(depth, **init):
    inner = dict(type='ResNet', depth=depth, **init)
    if depth >= 50:
        plugins = [dict(cfg=dict(type='CBAM'), position='after_conv3')]
        return MODELS.build(dict(**inner, plugins=plugins))
    return MODELS.build(dict(type='PluginBackbone', backbone=inner, plugins=[dict(cfg=dict(type='CBAM'))]))


def assert_same_features(depth, actual):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = TextbookResNet(depth, official(depth)).eval()(x)
        actual.eval()
        for ours, theirs in zip(actual(x), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize(
    'depth', [18, 50, pytest.param(34, marks=pytest.mark.slow), pytest.param(101, marks=pytest.mark.slow)]
)
def test_official_weights_compute_what_the_textbook_does(depth):
    converted = from_official(official(depth))
    assert None not in converted.origins.values()
    model = backbone(depth)
    left = model.load_state_dict(converted.state_dict, strict=False)
    assert not left.missing_keys and left.unexpected_keys == ['fc.weight', 'fc.bias']
    assert_same_features(depth, model)


@pytest.mark.parametrize('depth', [18, 50])
def test_and_back(depth):
    theirs = official(depth)
    back = to_official(from_official(theirs).state_dict).state_dict
    assert list(back) == list(theirs)
    assert all(torch.equal(back[key], value) for key, value in theirs.items())


def test_in_the_norm_of_a_bottleneck():
    inner = dict(type='ResNet', depth=50)
    model = MODELS.build(dict(type='PluginBackbone', backbone=inner, plugins=[dict(cfg=dict(type='CBAM'))]))
    left = model.load_state_dict(from_official(official(50), in_norm=True).state_dict, strict=False)
    assert not left.missing_keys
    assert_same_features(50, model)


@pytest.mark.parametrize('depth', [18, 50])
def test_a_config_takes_the_file_itself(depth, tmp_path):
    torch.save(dict(epoch=90, arch=f'resnet{depth}', state_dict=official(depth)), tmp_path / 'theirs.pth')
    model = backbone(depth, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'theirs.pth')))
    with safe_loading():
        model.init_weights()
    assert_same_features(depth, model)


def test_a_config_with_plugin_backbone_takes_the_file_itself(tmp_path):
    torch.save(dict(epoch=90, arch='resnet50', state_dict=official(50)), tmp_path / 'theirs.pth')
    inner = dict(type='ResNet', depth=50, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'theirs.pth')))
    model = MODELS.build(dict(type='PluginBackbone', backbone=inner, plugins=[dict(cfg=dict(type='CBAM'))]))
    assert 'layer1.0.bn3.cbam.channel.fc1.weight' in model.state_dict()
    with safe_loading(), summarize_missing_cbam():
        model.init_weights()
    assert_same_features(50, model)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(extra=torch.zeros(1)), '1 keys no such network has: extra'),
        ({'bam1.channel_att.gate_c.gate_c_fc_0.weight': torch.zeros(1)}, 'BAM'),
        ({'layer2.3.bn1.weight': None}, '1 keys missing: layer2.3.bn1.weight'),
        ({'layer1.1.cbam.ChannelGate.mlp.3.weight': torch.zeros(256, 8)},
         r'1 keys of another shape: layer1.1.cbam.ChannelGate.mlp.3.weight \(\(256, 8\), expected \(256, 16\)\)'),
        (
            {'layer1.3.conv1.weight': torch.zeros(1)},
            'not the weights of a ResNet-18, 34, 50 or 101: stages of 4, 4, 6, 3',
        ),
    ],
)  # fmt: skip
def test_leftover_missing_and_misshapen_keys_are_named(change, message):
    state = official(50)
    for key, value in change.items():
        state[f'module.{key}'] = value
        if value is None:
            del state[f'module.{key}']
    with pytest.raises(UserError, match=message):
        from_official(state)


def test_other_numbers_of_classes_and_reductions():
    converted = from_official(official(18, reduction=8, classes=10)).state_dict
    assert converted['fc.bias'].shape == (10,)
    assert converted['layer4.1.bn2.cbam.channel.fc1.weight'].shape == (64, 512)


def test_timm():
    cbam = pytest.importorskip('timm.layers.cbam')
    torch.manual_seed(0)
    theirs = cbam.CbamModule(64).eval()
    nn.init.uniform_(theirs.spatial.conv.bn.running_mean)
    hidden = theirs.channel.fc1.out_channels
    made = from_timm(
        {f'stem.{key}': value for key, value in theirs.state_dict().items()} | {'head.weight': torch.ones(2)}
    )
    assert made.state_dict['head.weight'] is not None and made.origins['head.weight'] == 'head.weight'
    assert made.origins['stem.channel.fc1.bias'] is None, 'added'
    ours = CBAM(64, reduction=64 // hidden).eval()
    ours.load_state_dict({k.removeprefix('stem.'): v for k, v in made.state_dict.items() if k.startswith('stem.')})
    x = torch.randn(2, 64, 9, 7)
    torch.testing.assert_close(ours(x), theirs(x))


class MMYOLO(nn.Module):
    """MMYOLO's CBAM, from its equations and the names of its parameters; MMYOLO itself is not installed here."""

    def __init__(self, channels, hidden):
        super().__init__()

        def conv(*args, **kwargs):
            return nn.ModuleDict(dict(conv=nn.Conv2d(*args, **kwargs)))

        self.channel_attention = nn.ModuleDict(
            dict(fc=nn.ModuleList([conv(channels, hidden, 1), conv(hidden, channels, 1)]))
        )
        self.spatial_attention = nn.ModuleDict(dict(conv=conv(2, 1, 7, padding=3)))

    def forward(self, x):
        first, second = (layer['conv'] for layer in self.channel_attention['fc'])
        z = sum(second(first(pool).relu()) for pool in (x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)))
        x = x * z.sigmoid()
        planes = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * self.spatial_attention['conv']['conv'](planes).sigmoid()


def test_mmyolo():
    torch.manual_seed(0)
    theirs = MMYOLO(64, 4)
    made = translate(theirs.state_dict())
    assert any('norm_cfg=None' in note for note in made.notes) and any('reduction=16' in note for note in made.notes)
    ours = CBAM(64, norm_cfg=None)
    ours.load_state_dict(made.state_dict)
    x = torch.randn(2, 64, 9, 7)
    torch.testing.assert_close(ours(x), theirs(x))


def test_plain_weights_are_of_none_of_these():
    assert translate(torchvision.models.resnet18().state_dict()) is None
    # A layer that happens to have the name of timm's, without a CBAM around it.
    assert translate({'channel.fc1.weight': torch.zeros(4, 4, 1, 1)}) is None


def test_the_tool_there_and_back(run_tool, tmp_path):
    theirs = dict(epoch=90, arch='resnet18', state_dict=official(18), optimizer=dict(state={}))
    torch.save(theirs, tmp_path / 'theirs.pth')
    result = run_tool('convert_checkpoint.py', tmp_path / 'theirs.pth', tmp_path / 'ours.pth')
    assert result.code == 0, result.err
    line = 'module.layer1.0.cbam.ChannelGate.mlp.1.weight -> backbone.layer1.0.bn2.cbam.channel.fc1.weight (4, 64)'
    assert line in result.out.splitlines()
    assert 'note: not carried over: optimizer' in result.out and 'none left over' in result.out
    assert len(result.out.splitlines()) == len(theirs['state_dict']) + 2
    model = backbone(18, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'ours.pth'), prefix='backbone.'))
    model.init_weights()
    assert_same_features(18, model)
    result = run_tool(
        'convert_checkpoint.py', tmp_path / 'ours.pth', tmp_path / 'back.pth', '--to', 'official', '--quiet'
    )
    assert result.code == 0, result.err
    back = torch.load(tmp_path / 'back.pth')
    assert (back['epoch'], back['arch']) == (90, 'resnet18')
    assert list(back['state_dict']) == list(theirs['state_dict'])
    assert all(torch.equal(back['state_dict'][key], value) for key, value in theirs['state_dict'].items())


@pytest.mark.parametrize('prefix', ['backbone.', 'module.backbone.', 'module.backbone'])
@pytest.mark.parametrize('before', ['', 'module.'])
def test_a_prefix_with_and_without_that_of_data_parallel(tmp_path, prefix, before):
    source = backbone(18)
    torch.save({f'{before}backbone.{key}': value for key, value in source.state_dict().items()}, tmp_path / 'a.pth')
    model = backbone(18, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'a.pth'), prefix=prefix))
    with safe_loading():
        model.init_weights()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in source.state_dict().items())


def test_another_variant_does_not_become_the_authors(run_tool, tmp_path):
    """Their network has the paper's gate alone."""
    model = MODELS.build(dict(type='ResNet', depth=50, plugins=[dict(UNIT, position='after_conv3')]))
    torch.save(model.state_dict(), tmp_path / 'unit.pth')
    result = run_tool('convert_checkpoint.py', tmp_path / 'unit.pth', tmp_path / 'out.pth', '--to', 'official')
    assert result.code == 2 and "was trained with gate='unit'" in result.err and not (tmp_path / 'out.pth').exists()


def test_converted_weights_are_of_the_papers_variant(run_tool, tmp_path):
    torch.save(official(50), tmp_path / 'theirs.pth')
    assert run_tool('convert_checkpoint.py', tmp_path / 'theirs.pth', tmp_path / 'ours.pth').code == 0
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'ours.pth'), prefix='backbone.')
    for source in (init_cfg, dict(type='Pretrained', checkpoint=str(tmp_path / 'theirs.pth'))):
        plugins = [dict(UNIT, position='after_conv3')]
        model = MODELS.build(dict(type='ResNet', depth=50, plugins=plugins, init_cfg=source))
        with safe_loading(), pytest.raises(UserError, match="trained with gate='sigmoid'"):
            model.init_weights()


def test_in_norm_where_it_would_do_nothing(run_tool, tmp_path):
    torch.save({'channel.fc1.weight': torch.zeros(4, 4, 1, 1)}, tmp_path / 'other.pth')
    for more in ([], ['--to', 'official']):
        result = run_tool('convert_checkpoint.py', tmp_path / 'other.pth', tmp_path / 'out.pth', '--in-norm', *more)
        assert result.code == 2 and '--in-norm is for weights of' in result.err


def test_the_tool_refuses(run_tool, tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / 'plain.pth')
    for arguments, message in (([], 'has no CBAM of'), (['--to', 'official'], 'keys missing: layer1.0.cbam')):
        result = run_tool('convert_checkpoint.py', tmp_path / 'plain.pth', tmp_path / 'out.pth', *arguments)
        assert result.code == 2 and message in result.err and 'Traceback' not in result.err, result.err
        assert not (tmp_path / 'out.pth').exists()
