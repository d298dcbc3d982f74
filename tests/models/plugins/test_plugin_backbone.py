"""PluginBackbone: where plugins go, that they do what MMDetection's own plugins do, and that nothing else changes."""

import copy
import os
import pickle
import random
import subprocess
import sys
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import ROOT
from mmengine.model import BaseModule, ExponentialMovingAverage, convert_sync_batchnorm, revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import checkpoint as checkpoint_module
from torch import nn

from cbam_mmdet import CBAM, PluginBackbone, PluginNeck
from cbam_mmdet.engine.checkpoint.compare import compare_state_dicts
from cbam_mmdet.engine.checkpoint.missing_cbam import summarize_missing_cbam
from cbam_mmdet.errors import UserError
from cbam_mmdet.models.plugins.add import add_plugins
from cbam_mmdet.models.plugins.places import matches

R18 = dict(type='ResNet', depth=18, base_channels=8, init_cfg=None, zero_init_residual=False)
R50 = dict(type='ResNet', depth=50, base_channels=8, init_cfg=None, zero_init_residual=False)
CBAM_CFG = dict(type='CBAM', reduction=4)
IMAGE = (torch.zeros(1, 3, 32, 32),)


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmdet')
    torch.manual_seed(0)


@MODELS.register_module()
class Scale(nn.Module):
    """A plugin that multiplies by a constant, and draws no random number to begin with."""

    def __init__(self, in_channels, by=2.0):
        super().__init__()
        self.by = by

    def forward(self, x):
        return x * self.by


@MODELS.register_module()
class Halve(nn.Module):
    def __init__(self, in_channels):
        super().__init__()

    def forward(self, x):
        return x[:, ::2]


class Restless(nn.Module):
    """A backbone that, even in eval mode, draws random numbers and writes to a buffer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.register_buffer('calls', torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.bn(self.conv(x)) + torch.rand(()) + random.random() + np.random.rand()


def build(backbone=R18, after='layer*.*.bn2', cfg=CBAM_CFG, **kwargs):
    return PluginBackbone(backbone, [dict(cfg=cfg, after=after)], **kwargs)


def plugged(model, name='cbam'):
    return [parent for parent, module in model.named_modules() if name in dict(module.named_children())]


def shake(model):
    """Make every CBAM do something, also one that starts as the identity."""
    for module in model.modules():
        if isinstance(module, CBAM):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.5)
    model.eval()
    return model


def outputs_equal(first, second, x=None):
    x = torch.randn(2, 3, 64, 96) if x is None else x
    return [torch.equal(a, b) for a, b in zip(first(x), second(x), strict=True)]


@pytest.mark.parametrize(
    ('pattern', 'name', 'expected'),
    [
        ('layer*.*.bn2', 'layer3.1.bn2', True),
        ('layer*.*.bn2', 'layer3.1.0.bn2', False),
        ('layer*.bn2', 'layer3.1.bn2', False),
        ('layer[12].*.bn?', 'layer2.0.bn1', True),
        ('layer[12].*.bn?', 'layer3.0.bn1', False),
        ('**.bn2', 'layer3.1.bn2', True),
        ('**.bn2', 'bn2', True),
        ('**.bn2', 'bn21', False),
        ('a.**.z', 'a.z', True),
        ('a.**.z', 'a.b.c.z', True),
        ('a.**', 'b.a', False),
        ('features.3', 'features.30', False),
    ],
)
def test_patterns(pattern, name, expected):
    assert matches(pattern, name) is expected


def test_resnet18_takes_plugins():
    model = build()
    assert plugged(model) == [f'layer{stage}.{block}.bn2' for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert [m.channel.fc1.in_features for m in model.modules() if isinstance(m, CBAM)] == [8, 8, 16, 16, 32, 32, 64, 64]


def test_module_named_by_two_patterns_gets_one_plugin():
    assert plugged(build(after=['layer2.*.bn2', 'layer[12].0.*2', 'conv1'])) == [
        'conv1',
        'layer1.0.conv2',
        'layer1.0.bn2',
        'layer2.0.conv2',
        'layer2.0.bn2',
        'layer2.1.bn2',
    ]


def test_plugins_at_one_place_run_in_the_order_of_the_config():
    first, second = dict(type='CBAM', reduction=4), dict(type='CBAM', reduction=2, postfix='_2')
    model = PluginBackbone(R18, [dict(cfg=first, after='conv1'), dict(cfg=second, after=['conv1', 'layer1.0.bn2'])])
    shake(model)
    x = torch.randn(2, 3, 32, 32)
    conv = model.conv1
    expected = conv.cbam_2(conv.cbam(conv._conv_forward(x, conv.weight, conv.bias)))
    assert torch.equal(conv(x), expected)
    assert plugged(model, 'cbam_2') == ['conv1', 'layer1.0.bn2']


def test_does_the_same_as_mmdetections_own_plugins():
    """After the last norm of a Bottleneck: outputs and gradients bit for bit, in training mode too."""
    own = MODELS.build(dict(R50, plugins=[dict(cfg=CBAM_CFG, position='after_conv3')]))
    ours = build(R50, 'layer*.*.bn3')
    weights = {key.replace('.cbam.', '.bn3.cbam.'): value for key, value in shake(own).state_dict().items()}
    ours.load_state_dict(weights)
    x = torch.randn(2, 3, 64, 96)
    for mode in (True, False):
        own.train(mode)
        ours.train(mode)
        for model in (own, ours):
            model.zero_grad()
            sum(y.square().sum() for y in model(x)).backward()
        assert all(outputs_equal(own, ours, x))
        grads = {key.replace('.cbam.', '.bn3.cbam.'): p.grad for key, p in own.named_parameters()}
        assert all(torch.equal(grads[key], p.grad) for key, p in ours.named_parameters())


@pytest.mark.parametrize(('position', 'after'), [('after_conv3', 'layer*.*.bn3'), ('after_conv2', 'layer*.*.bn2')])
def test_weights_of_mmdetections_own_plugins_are_taken_where_they_compute_the_same(position, after):
    """After conv2 of a Bottleneck its plugin comes behind the ReLU, and ours before it."""
    own = shake(MODELS.build(dict(R50, plugins=[dict(cfg=CBAM_CFG, position=position)])))
    ours = build(R50, after)
    own.eval()
    ours.eval()
    before = {key: value.clone() for key, value in ours.state_dict().items() if '.cbam.' in key}
    with summarize_missing_cbam():
        checkpoint_module.load_state_dict(ours, own.state_dict())
    x = torch.randn(1, 3, 64, 96)
    if position == 'after_conv3':
        assert all(outputs_equal(own, ours, x))
    else:
        assert all(torch.equal(ours.state_dict()[key], value) for key, value in before.items())


def test_a_renamed_cbam_is_refused_where_its_checkpoint_says_another_position():
    own, ours = (
        MODELS.build(dict(R50, plugins=[dict(cfg=CBAM_CFG, position='after_conv2')])),
        build(R50, 'layer*.*.bn3'),
    )
    # Of one width, so that the weights fit.
    weights = {key.replace('.bn3.cbam.', '.cbam.'): value for key, value in ours.state_dict().items()}
    assert weights.keys() == own.state_dict().keys()
    for position in ('after_conv3', 'after_conv2'):
        config = f"model = dict(backbone=dict(plugins=[dict(cfg=dict(type='CBAM'), position={position!r})]))"
        refused = (
            pytest.raises(UserError, match="position='after_conv2'") if position == 'after_conv2' else nullcontext()
        )
        with refused:
            compare_state_dicts(dict(state_dict=weights, meta=dict(cfg=config)), ours, False, 'a.pth')


def test_plain_checkpoint_loads_and_unit_gate_changes_nothing():
    plain, ours = MODELS.build(R18), build(cfg=dict(type='CBAM', gate='unit'))
    missing, unexpected = ours.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert missing and all('.cbam.' in key for key in missing)
    plain.eval()
    ours.eval()
    assert all(outputs_equal(plain, ours))


@pytest.mark.parametrize('after', ['outputs', 'layer4', 'layer4.1', 'layer4.1.bn2'])
def test_a_plugins_own_init_cfg_is_followed(after):
    model = build(cfg=dict(type='CBAM', init_cfg=dict(type='Constant', layer='Linear', val=0.125)), after=after)
    model.init_weights()
    weights = [module.channel.fc1.weight for module in model.modules() if isinstance(module, CBAM)]
    assert weights and all((weight == 0.125).all() for weight in weights)


@pytest.mark.parametrize('mode', [True, False])
def test_dry_run_leaves_no_trace(mode):
    model = Restless().train(mode)
    before = copy.deepcopy(model.state_dict())
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    add_plugins(model, [dict(cfg=dict(type='Scale'), after='bn')], lambda: IMAGE)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training is model.bn.training is model.conv.training is mode
    assert not any(p.grad is not None for p in model.parameters())


def test_copies_have_plugins_of_their_own():
    model = shake(build())
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(outputs_equal(model, duplicate))
        duplicate.layer1[0].bn2.cbam.channel.fc2.bias.data += 1
        assert not any(outputs_equal(model, duplicate))
        duplicate.init_weights()  # must not reach over to the first
        assert model.layer1[0].bn2.cbam.channel.fc2.weight.std() > 0.3


def test_survives_sync_batchnorm():
    model = shake(build())
    converted = revert_sync_batchnorm(convert_sync_batchnorm(copy.deepcopy(model)))
    assert type(converted.layer1[0].bn2) is not nn.BatchNorm2d
    converted.eval()
    assert all(outputs_equal(model, converted))
    without = PluginBackbone(R18, [dict(cfg=dict(type='Scale', by=1.0), after='layer*.*.bn2')])
    without.load_state_dict({k: v for k, v in model.state_dict().items() if '.cbam.' not in k})
    without.eval()
    assert not any(outputs_equal(without, converted))


@pytest.mark.parametrize('cbam', [False, True])
def test_activations_inside_timms_norms_survive_sync_batchnorm(cbam):
    pytest.importorskip('timm', reason="an optional extra: pip install '.[backbones]'")
    timm = dict(type='TimmFeatures', model_name='tf_efficientnet_lite0', out_indices=(1, 2))
    plugins = [dict(cfg=CBAM_CFG)] if cbam else None
    model = PluginBackbone(timm, plugins).eval()
    model = shake(model) if cbam else model
    called = []
    for module in model.modules():
        if isinstance(module, nn.ReLU6):
            module.register_forward_hook(lambda *_: called.append(1))
    image = torch.randn(2, 3, 64, 96)
    expected = model(image)
    count = len(called)
    synced = convert_sync_batchnorm(copy.deepcopy(model))
    assert any(type(module) is nn.SyncBatchNorm for module in synced.modules())
    for converted in (synced, revert_sync_batchnorm(synced), nn.SyncBatchNorm.convert_sync_batchnorm(model)):
        called.clear()
        for ours, theirs in zip(converted.eval()(image), expected, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)
        assert len(called) == count > 0


def test_torchs_sync_batchnorm():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(build())
    assert isinstance(model.layer1[0].bn2, nn.SyncBatchNorm)
    assert [hook.name for hook in model.layer1[0].bn2._forward_hooks.values()] == ['cbam']


def test_activation_checkpoints():
    x = torch.randn(2, 3, 32, 32)
    grads = []
    state = shake(build(R50, 'layer*.*.bn3')).state_dict()
    for with_cp in (False, True):
        model = build(dict(R50, with_cp=with_cp), 'layer*.*.bn3')
        model.load_state_dict(state)
        model.train()
        model.maxpool.register_forward_hook(
            lambda _, __, y: y.requires_grad_()
        )  # else the first stage is not checkpointed
        sum(y.sum() for y in model(x)).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('training', [False, True])
def test_torch_compile(training):
    model = shake(
        PluginBackbone(
            dict(R18, num_stages=1, out_indices=(0,), strides=(1,), dilations=(1,)),
            [dict(cfg=CBAM_CFG, after='layer1.*.bn2')],
        )
    )
    model.train(training)
    x = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(copy.deepcopy(model), backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(compiled(x)[0], model(x)[0])
    bare = MODELS.build(dict(R18, num_stages=1, out_indices=(0,), strides=(1,), dilations=(1,)))
    bare.load_state_dict(model.state_dict(), strict=False)
    bare.train(training)
    assert not torch.allclose(bare(x)[0], compiled(x)[0])


def test_distributed_data_parallel(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / 'store'), 1)
    torch.distributed.init_process_group('gloo', store=store, rank=0, world_size=1)
    try:
        model = build()
        nn.parallel.DistributedDataParallel(model)(torch.randn(2, 3, 32, 32))[-1].sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.filterwarnings('ignore:A CBAM with its initial weights')
def test_frozen_stage_freezes_its_plugins_from_the_start():
    model = build(dict(R18, frozen_stages=2))
    frozen = [
        stage
        for stage in (1, 2, 3, 4)
        if not getattr(model, f'layer{stage}')[0].bn2.cbam.channel.fc1.weight.requires_grad
    ]
    assert frozen == [1, 2]
    assert model.layer3[0].bn2.training, 'norm_eval comes with train(), not before'


class Detector(BaseModule):
    """It holds a backbone, and what MMEngine would write into the log of the weights of CBAM."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def _dump_init_info(self):
        self.told = {n: self._params_init_info[p]['init_info'] for n, p in self.named_parameters() if 'cbam' in n}


def test_the_log_of_the_initialization_says_of_whom_the_weights_are():
    detector = Detector(build(dict(R18, zero_init_residual=True), cfg=CBAM_CFG))
    detector.init_weights()
    assert detector.told and set(detector.told.values()) == {'by CBAM itself'}


@pytest.mark.parametrize('zero_init_residual', [True, False])
@pytest.mark.parametrize('gate', ['unit', 'sigmoid'])
def test_init_weights_of_the_backbone_leaves_the_plugins_theirs(gate, zero_init_residual):
    """A backbone sets all norms to 1, and its last ones to 0, with all that hangs on them."""
    detector = nn.Module()
    detector.backbone = build(
        dict(R18, zero_init_residual=zero_init_residual), cfg=dict(type='CBAM', reduction=2, gate=gate)
    )
    cbam = detector.backbone.layer2[0].bn2.cbam
    before = copy.deepcopy(cbam.state_dict())
    norm = detector.backbone.layer2[0].bn2
    norm.weight.data.fill_(7)
    detector.backbone.init_weights()
    assert torch.equal(norm.weight, torch.full_like(norm.weight, 0 if zero_init_residual else 1))
    assert all(torch.equal(value, before[key]) for key, value in cbam.state_dict().items())
    assert cbam.channel.fc1.weight.std() > 0


@pytest.mark.parametrize('with_cbam', [True, False])
def test_pretrained_weights(tmp_path, with_cbam):
    unit = dict(CBAM_CFG, gate='unit')
    source = shake(build(cfg=unit) if with_cbam else MODELS.build(R18))
    torch.save(dict(state_dict=source.state_dict()), tmp_path / 'pretrained.pth')
    model = build(
        dict(R18, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'pretrained.pth'))),
        cfg=unit,
    )
    model.init_weights()
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in source.state_dict().items())
    assert bool((state['layer1.0.bn2.cbam.channel.fc2.weight'] == 0).all()) is not with_cbam


def test_init_cfg_replaces_the_backbones():
    own = dict(R18, init_cfg=dict(type='Pretrained', checkpoint='a.pth', prefix='backbone.'))
    assert build(own).init_cfg['checkpoint'] == 'a.pth'
    assert 'Pretrained' not in str(build(own, init_cfg=None).init_cfg)
    merged = build(own, init_cfg=dict(checkpoint='b.pth')).init_cfg
    assert merged == dict(type='Pretrained', checkpoint='b.pth', prefix='backbone.')
    assert own['init_cfg']['checkpoint'] == 'a.pth', "the caller's config is not changed"


def test_what_wraps_a_plugin_does_not_apply_it_again():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    model = shake(build())
    x = torch.randn(2, 3, 64, 64)
    expected = [y.detach() for y in model(x)]
    cbam = model.layer1[0].bn2.cbam
    features = torch.randn(2, 8, 4, 4)
    assert torch.equal(nn.Sequential(cbam)(features), cbam(features))
    apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, CBAM))
    assert type(model.layer1[0].bn2.cbam) is not CBAM
    assert all(torch.equal(a, b) for a, b in zip(model(x), expected, strict=True))


def test_plugins_of_two_calls_keep_their_weights():
    model = build(dict(R18, zero_init_residual=True), after='layer1.0.bn2')
    add_plugins(model, [dict(cfg=CBAM_CFG, after='conv1')], lambda: IMAGE)
    cbams = [model.layer1[0].bn2.cbam, model.conv1.cbam]
    before = [cbam.channel.fc1.weight.clone() for cbam in cbams]
    model.init_weights()
    assert all(torch.equal(cbam.channel.fc1.weight, weight) for cbam, weight in zip(cbams, before, strict=True))


def test_exponential_moving_average():
    model = shake(build())
    average = ExponentialMovingAverage(model, momentum=0.5)
    average.update_parameters(model)  # the first only copies
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    average.update_parameters(model)
    expected = shake(build())
    expected.load_state_dict(average.module.state_dict())
    assert all(outputs_equal(expected, average.module))
    assert not any(outputs_equal(model, average.module))


def test_without_a_scope():
    """As MMDetection's registry is used in a program of one's own."""
    program = (
        'import cbam_mmdet, mmdet.models\n'
        'from mmdet.registry import MODELS\n'
        "m = MODELS.build(dict(type='PluginBackbone', backbone=dict(type='ResNet', depth=18), "
        "plugins=[dict(cfg=dict(type='CBAM'))]))\n"
        'print(type(m.layer1[0].bn2.cbam).__name__)\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', program], capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=str(ROOT))
    )
    assert done.stdout.split()[-1:] == ['CBAM'], done.stderr[-1000:]


def test_sequential_runs_its_plugin_once():
    model = build(after='layer1', cfg=dict(type='Scale'))
    plain = MODELS.build(R18)
    plain.load_state_dict(model.state_dict())
    plain.eval()
    model.eval()
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(x)[0], 2 * plain(x)[0])


def test_outputs_get_a_plugin_each():
    model = shake(build(dict(R18, out_indices=(1, 3)), 'outputs'))
    plain = MODELS.build(dict(R18, out_indices=(1, 3)))
    plain.load_state_dict(model.state_dict(), strict=False)
    plain.eval()
    x = torch.randn(2, 3, 64, 64)
    expected = [cbam(y) for cbam, y in zip((model.cbam0, model.cbam1), plain(x), strict=True)]
    assert [cbam.channel.fc1.in_features for cbam in (model.cbam0, model.cbam1)] == [16, 64]
    for actual, wanted in zip(model(x), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_neck():
    neck = dict(
        type='SSDNeck', in_channels=(16, 32), out_channels=(16, 32, 16, 8, 8, 8),
        level_strides=(2, 2, 1, 1), level_paddings=(1, 1, 0, 0), l2_norm_scale=20,
    )  # fmt: skip
    model = PluginNeck(neck, [dict(cfg=CBAM_CFG)])
    model.init_weights()  # L2Norm's weight is uninitialized memory before
    plain = MODELS.build(neck)
    maps = [torch.randn(2, 16, 38, 38), torch.randn(2, 32, 19, 19)]
    assert plain.load_state_dict(model.state_dict(), strict=False).unexpected_keys[0].startswith('cbam0.')
    shake(model)
    expected = [getattr(model, f'cbam{i}')(y) for i, y in enumerate(plain(maps))]
    assert len(expected) == 6
    for actual, wanted in zip(model(maps), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_a_neck_that_names_its_inputs_from_deep_to_shallow():
    neck = dict(type='mmdet.YOLOV3Neck', num_scales=3, in_channels=[32, 16, 8], out_channels=[16, 8, 8])
    model = shake(PluginNeck(neck, [dict(cfg=CBAM_CFG)]))
    plain = MODELS.build(neck).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    maps = [torch.randn(1, channels, size, size) for channels, size in ((8, 32), (16, 16), (32, 8))]
    for i, (ours, theirs) in enumerate(zip(model(maps), plain(maps), strict=True)):
        assert torch.equal(ours, getattr(model, f'cbam{i}')(theirs))


@MODELS.register_module()
class Odd(nn.Module):
    """A backbone with everything that a plugin cannot follow."""

    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    class Tokens(nn.Module):
        def forward(self, x):
            return x.flatten(2).transpose(1, 2)

    class Looping(nn.ModuleDict):
        def forward(self, x):
            for layer in self.values():
                x = layer(x)
            return x

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.wide = nn.Conv2d(8, 16, 1)
        self.relu = nn.ReLU()
        self.pair, self.tokens = self.Pair(), self.Tokens()
        self.looping = self.Looping(dict(inner=nn.Conv2d(16, 16, 1)))
        self.listed = nn.ModuleList([nn.Conv2d(16, 16, 1)])
        self.unused = nn.Conv2d(16, 16, 1)

    def forward(self, x):
        if x.shape[-1] < 8:
            raise RuntimeError('too small')
        x = self.relu(self.wide(self.relu(self.conv(x))))
        return self.listed[0](self.looping(self.pair(x)[0])) + self.tokens(x).mean()


@pytest.mark.parametrize(
    ('backbone', 'after', 'cfg', 'patterns'),
    [
        (R18, 'layer*.*.bn3', CBAM_CFG, ["matches no module of ResNet", 'layer1.0', "did you mean 'bn2'"]),
        (R18, 'layers*', CBAM_CFG, ['matches no module', 'it holds conv1, bn1', 'layer1']),
        (R18, 'layer1.0.bn2.weight', CBAM_CFG, ['matches no module']),
        (R18, ['layer1.*.bn2', 'nowhere'], CBAM_CFG, ["'nowhere' matches no module"]),
        (
            R18,
            'layer1.0.bn2',
            dict(type='Halve'),
            ['Halve after layer1.0.bn2 makes', r'\(1, 4, 56, 56\) of \(1, 8, 56, 56\)'],
        ),
        (R18, 'layer1.0.bn2', dict(type='CBAN'), ["'CBAN' is not a registered model", "did you mean 'CBAM'"]),
        (dict(type='Odd'), 'pair', CBAM_CFG, [r'pair \(Pair\) returns a tuple', 'one tensor of shape']),
        (
            dict(type='Odd'),
            'tokens',
            CBAM_CFG,
            [r'tokens \(Tokens\) returns a tensor of shape \(1, 50176, 16\)', "after='outputs'"],
        ),
        (dict(type='Odd'), 'looping', CBAM_CFG, ['looping', 'runs its children itself']),
        (dict(type='Odd'), 'listed', CBAM_CFG, ['listed never run']),
        (dict(type='Odd'), 'relu', CBAM_CFG, ['relu runs several times', r'\[8, 16\]']),
        (dict(type='Odd'), None, CBAM_CFG, ['no usual place', 'Odd', 'conv, wide, relu']),
    ],
)  # fmt: skip
def test_what_cannot_be_is_explained(backbone, after, cfg, patterns):
    import re

    with pytest.raises(UserError) as error:
        build(backbone, after, cfg)
    for pattern in ['model.backbone.plugins', *patterns]:
        assert re.search(pattern, str(error.value)), str(error.value)


@pytest.mark.parametrize(
    ('plugins', 'pattern'),
    [
        ('CBAM', 'expected a list like'),
        ([dict(type='CBAM')], r'plugins\[0\]: expected dict\(cfg='),
        ([dict(cfg=dict(type='CBAM'), position='after_conv3')], "does not take 'position'"),
        ([dict(cfg=CBAM_CFG, after='conv1')] * 2, "already has a child 'cbam'.*postfix"),
    ],
)
def test_plugins_that_are_none(plugins, pattern):
    with pytest.raises(UserError, match=pattern):
        PluginBackbone(R18, plugins)


@pytest.mark.parametrize('plugins', [None, []])
def test_no_plugins(plugins):
    assert not plugged(PluginBackbone(R18, plugins))


@pytest.mark.parametrize(
    ('kwargs', 'pattern'),
    [
        (dict(backbone=5), 'expected the backbone'),
        (dict(depth=34), 'model.backbone.depth belongs to model.backbone.backbone.depth'),
        (dict(input_shape=3), 'input_shape=3: expected'),
        (dict(plugins=[dict(cfg=CBAM_CFG, after=5)]), 'after=5: expected a pattern'),
        (dict(plugins=[dict(cfg=CBAM_CFG, after=[5])]), 'expected a pattern'),
    ],
)
def test_arguments_that_do_not_fit(kwargs, pattern):
    with pytest.raises(UserError, match=pattern):
        PluginBackbone(**{**dict(backbone=R18, plugins=[dict(cfg=CBAM_CFG, after='conv1')]), **kwargs})


class Maps(NamedTuple):
    fine: torch.Tensor
    none: None
    coarse: torch.Tensor


class Packs(nn.Module):
    """A backbone that returns its maps in a container of its own."""

    def __init__(self, pack):
        super().__init__()
        self.conv, self.pack = nn.Conv2d(3, 8, 1), pack

    def forward(self, x):
        y = self.conv(x)
        return self.pack(y, y[..., ::2])


def test_outputs_in_containers():
    plugin = [dict(cfg=dict(type='Scale'), after='outputs')]
    for pack in (lambda a, b: Maps(a, None, b), lambda a, b: [a, None, b]):
        plain = Packs(pack)
        expected = plain(IMAGE[0])
        outputs = add_plugins(plain, plugin, lambda: IMAGE)(IMAGE[0])
        assert type(outputs) is type(expected) and outputs[1] is None
        assert torch.equal(outputs[0], 2 * expected[0]) and torch.equal(outputs[2], 2 * expected[2])
    with pytest.raises(UserError, match='returns a dict among its outputs'):
        add_plugins(Packs(lambda a, b: dict(a=a)), plugin, lambda: IMAGE)
    model = Packs(lambda a, b: (a, b))
    model.pack = lambda a, b: (a, b) if model.training else (a,)
    add_plugins(model, plugin, lambda: IMAGE)
    with pytest.raises(UserError, match='2 maps here, and 1 in the dry run'):
        model(IMAGE[0])


def test_input_shape():
    with pytest.raises(UserError, match=r'dry run.*failed in Odd.*\(1, 3, 4, 4\).*too small.*input_shape='):
        build(dict(type='Odd'), 'wide', input_shape=(3, 4, 4))
    assert plugged(build(dict(type='Odd'), 'wide', input_shape=(3, 8, 8))) == ['wide']


def test_module_that_does_not_run_is_left_out_and_named(capfd):
    from conftest import forget_earlier_runs

    forget_earlier_runs()
    assert plugged(build(dict(type='Odd'), ['unused', 'wide'])) == ['wide']
    assert 'unused' in ''.join(capfd.readouterr())
