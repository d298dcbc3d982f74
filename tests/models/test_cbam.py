"""CBAM against the paper: its equations restated, its parameter counts, and what a backbone does with it."""

import copy
import itertools
import warnings

import pytest
import textbook
import torch
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.registry import MODELS, init_default_scope

from cbam_mmdet import CBAM

POOLS = [p for n in range(1, 5) for p in itertools.combinations(('avg', 'max', 'lp', 'lse'), n)]
ORDERS = ('channel-spatial', 'spatial-channel', 'parallel')


def make(in_channels=8, **kwargs):
    """A CBAM with weights that nothing is zero or one in, so that every term of the equations shows."""
    module = CBAM(in_channels, **{'reduction': 4, **kwargs})
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if module.spatial is not None and module.spatial.bn is not None:
        module.spatial.bn.running_mean.normal_()
        module.spatial.bn.running_var.uniform_(0.5, 2)
    return module


@pytest.mark.parametrize('gate', ['sigmoid', 'unit'])
@pytest.mark.parametrize('order', ORDERS)
@pytest.mark.parametrize('spatial', ['pool', 'conv', None])
@pytest.mark.parametrize('pools', POOLS, ids='+'.join)
def test_equals_the_paper(pools, spatial, order, gate):
    torch.manual_seed(0)
    for kernel_size, training in itertools.product((3, 7), (False, True)):
        module = (
            make(pools=pools, spatial=spatial, order=order, gate=gate, kernel_size=kernel_size).double().train(training)
        )
        x = torch.randn(2, 8, 6, 5, dtype=torch.float64)
        expected = textbook.cbam(x, module.state_dict(), pools, spatial, order, gate, training)
        torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(
            module.requires_grad_(False).eval().float()(x.float()).double(),
            textbook.cbam(x, module.double().state_dict(), pools, spatial, order, gate),
            rtol=1e-4,
            atol=1e-4,
        )


@pytest.mark.parametrize(('pools', 'reduction', 'expected'), [(('avg', 'max'), 16, 28.09)])
def test_resnet50_has_the_papers_number_of_parameters(pools, reduction, expected):
    """Table 4: ResNet-50 with CBAM as a classifier of 1000 classes has 28.09 M parameters."""
    init_default_scope('mmdet')
    plugins = [dict(cfg=dict(type='CBAM', pools=pools, reduction=reduction), position='after_conv3')]
    backbone = MMDET_MODELS.build(dict(type='ResNet', depth=50, plugins=plugins))
    classifier = 2048 * 1000 + 1000
    count = sum(p.numel() for p in backbone.parameters()) + classifier
    assert round(count / 1e6, 2) == expected


def test_key_names_inside_a_backbone():
    init_default_scope('mmdet')
    backbone = MMDET_MODELS.build(
        dict(type='ResNet', depth=50, plugins=[dict(cfg=dict(type='CBAM'), position='after_conv3')])
    )
    keys = [k.removeprefix('layer1.0.cbam.') for k in backbone.state_dict() if k.startswith('layer1.0.cbam.')]
    assert keys == [
        'channel.fc1.weight', 'channel.fc1.bias', 'channel.fc2.weight', 'channel.fc2.bias', 'spatial.conv.weight',
        'spatial.bn.weight', 'spatial.bn.bias', 'spatial.bn.running_mean', 'spatial.bn.running_var',
        'spatial.bn.num_batches_tracked',
    ]  # fmt: skip
    assert backbone.layer1[0].cbam.channel.fc1.weight.shape == (256 // 16, 256)
    assert backbone.layer1[0].cbam.spatial.conv.weight.shape == (1, 2, 7, 7)


def test_registered_in_the_root_registry():
    assert MODELS.get('CBAM') is CBAM


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('order', ORDERS)
def test_unit_gate_starts_as_the_exact_identity(dtype, training, order):
    torch.manual_seed(0)
    module = CBAM(8, reduction=2, gate='unit', order=order).train(training)
    module = module.double() if dtype == torch.float64 else module
    x = torch.randn(2, 8, 6, 5).to(dtype).requires_grad_()
    grad = torch.randn(2, 8, 6, 5).to(dtype)
    y = module(x)
    y.backward(grad)
    assert torch.equal(y, x)
    assert torch.equal(x.grad, grad), 'the gradient passes undiminished'
    assert module.channel.fc2.weight.grad.abs().max() > 0
    assert module.spatial.bn.weight.grad.abs().max() > 0


def test_unit_gate_survives_the_backbones_initialization():
    """mmdet's ResNet sets every norm's weight to 1 in init_weights, CBAM's too."""
    init_default_scope('mmdet')
    torch.manual_seed(0)
    plugins = [dict(cfg=dict(type='CBAM', gate='unit'), position='after_conv3')]
    with_cbam = MMDET_MODELS.build(dict(type='ResNet', depth=50, base_channels=8, plugins=plugins))
    plain = MMDET_MODELS.build(dict(type='ResNet', depth=50, base_channels=8))
    with_cbam.init_weights()
    missing, unexpected = with_cbam.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all('.cbam.' in key for key in missing)
    x = torch.randn(2, 3, 64, 64)
    for training in (True, False):
        with_cbam.train(training), plain.train(training)  # mmdet's train() returns nothing
        for ours, theirs in zip(with_cbam(x), plain(x), strict=True):
            assert torch.equal(ours, theirs)


def test_own_init_cfg_wins_over_the_identity():
    module = CBAM(8, gate='unit', init_cfg=dict(type='Constant', layer='Linear', val=0.5))
    module.init_weights()
    assert (module.channel.fc2.weight == 0.5).all()


@pytest.mark.parametrize('shape', [(1, 8, 1, 1), (3, 8, 1, 1), (1, 8, 1, 7), (2, 8, 13, 3)])
@pytest.mark.parametrize('training', [True, False])
def test_any_height_and_width(shape, training):
    module = make().train(training)
    x = torch.randn(shape, requires_grad=True)
    y = module(x)
    y.square().sum().backward()
    assert y.shape == x.shape
    assert torch.isfinite(x.grad).all()


def test_a_single_value_is_normalized_by_the_running_statistics():
    module = make().double().train()
    before = copy.deepcopy(module.state_dict())
    x = torch.randn(1, 8, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(module(x), textbook.cbam(x, before))
    assert torch.equal(module.spatial.bn.running_var, before['spatial.bn.running_var'])


@pytest.mark.parametrize('in_channels', [1, 5, 15])
def test_few_channels_keep_a_hidden_unit(in_channels):
    module = CBAM(in_channels, reduction=16)
    assert module.channel.fc1.weight.shape == (1, in_channels)
    assert module(torch.randn(2, in_channels, 4, 4)).shape == (2, in_channels, 4, 4)


def test_squeeze_and_excitation_is_a_special_case():
    module = make(pools=('avg',), spatial=None).double()
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    squeeze = x.mean((2, 3))
    excitation = torch.sigmoid(module.channel.fc2(torch.relu(module.channel.fc1(squeeze))))
    torch.testing.assert_close(module(x), x * excitation[..., None, None])


def test_norm_cfg():
    assert make(norm_cfg=None).spatial.conv.bias is not None
    assert isinstance(make(norm_cfg=dict(type='SyncBN')).spatial.bn, torch.nn.SyncBatchNorm)
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(CBAM(8, gate='unit', norm_cfg=None)(x), x)
    assert CBAM(8, norm_cfg=dict(type='GN', num_groups=1))(x).shape == x.shape


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(pools=('avg', 'maxx')), "pools='maxx' is unknown.*did you mean 'max'"),
        (dict(pools=()), 'at least one pool'),
        (dict(pools=('avg', 'avg')), 'none twice'),
        (dict(spatial='pooling'), "spatial='pooling' is unknown.*did you mean 'pool'"),
        (dict(order='channel_spatial'), "order='channel_spatial'.*did you mean 'channel-spatial'"),
        (dict(gate='units'), "did you mean 'unit'"),
        (dict(kernel_size=4), 'kernel_size=4 must be odd'),
        (dict(kernel_size=0), 'kernel_size=0 must be a whole number'),
        (dict(reduction=0), 'reduction=0 must be a whole number'),
        (dict(in_channels=0), 'in_channels=0 must be a whole number'),
    ],
)
def test_wrong_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        CBAM(**{'in_channels': 8, **kwargs})


def frozen_warnings(frozen_stages, stages=(True,) * 4, checkpoint=False):
    init_default_scope('mmdet')
    plugins = [dict(cfg=dict(type='CBAM'), stages=stages, position='after_conv3')]
    backbone = MMDET_MODELS.build(
        dict(type='ResNet', depth=50, base_channels=8, frozen_stages=frozen_stages, plugins=plugins)
    )
    if checkpoint:
        backbone.load_state_dict(backbone.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        backbone.train()
        backbone.eval()
    return [str(w.message) for w in caught if 'CBAM' in str(w.message)]


def test_a_frozen_fresh_cbam_warns_and_says_what_to_set():
    messages = frozen_warnings(frozen_stages=1)
    assert len(messages) == 3  # one for each block of stage 1; Python shows the first
    assert 'frozen_stages=0' in messages[0]
    assert 'stages=(False, True, True, True)' in messages[0]
    assert not frozen_warnings(frozen_stages=0)
    assert not frozen_warnings(frozen_stages=1, stages=(False, True, True, True))
    assert not frozen_warnings(frozen_stages=1, checkpoint=True), 'loaded weights may well be frozen'
