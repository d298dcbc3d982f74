"""A residual block's tail in CBAM's passes, against the block operator by operator in float64.

Without a GPU the kernels run under Triton's interpreter, in a process of their own (test_triton_passes.py).
"""

import copy

import pytest
import torch
from mmengine.registry import MODELS
from passes_cases import CASES, DEVICE, LAYOUTS, assert_near, draw
from passes_cases import FUSED as FUSED_IMPL
from passes_cases import few_programs as few_programs  # a fixture
from passes_cases import several_threads as several_threads  # a fixture
from plain_cbam import saved_share
from torch import nn

import cbam_mmdet  # noqa: F401 (registers)
from cbam_mmdet import CBAM
from cbam_mmdet.errors import UserError
from cbam_mmdet.models.cbam import cbam_reference
from cbam_mmdet.models.fused_tail import tail
from cbam_mmdet.ops import self_test
from cbam_mmdet.ops.functional import INTERPRETED

FUSED = pytest.mark.parametrize('impl', [FUSED_IMPL])
# A block of each kind: with a shortcut of its own, without one, and with a stride.
BLOCKS = ['layer1.[01]', 'layer2.0']
PLUGIN = dict(cfg=dict(type='CBAM', reduction=4), after=[f'{block}.bn3' for block in BLOCKS])
RESNET = dict(
    type='ResNet',
    depth=50,
    base_channels=8,
    norm_eval=True,
    num_stages=2,
    strides=(1, 2),
    dilations=(1, 1),
    out_indices=(0, 1),
)


def shake(module):
    """No parameter or statistic at its initial value, some weights negative, some zero."""
    torch.manual_seed(3)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.normal_(norm.running_mean)
            norm.weight.data += 0.5
            norm.weight.data[::3] *= -1
            norm.weight.data[::7] = 0
    return module


def gradients(y, grad, *inputs):
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


@FUSED
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize(('shape', 'dtype'), CASES)
def test_equals_float64(shape, dtype, layout, impl):
    v, grad = draw(shape, dtype, layout)
    identity = draw(shape, dtype, layout, seed=1)[0]
    cbam = shake(CBAM(shape[1], impl=impl))
    norm = shake(nn.Sequential(nn.BatchNorm2d(shape[1])))[0].eval()
    exact = copy.deepcopy(nn.ModuleList([norm, cbam])).double()
    parameters = list(exact.parameters())
    inputs = [t.double().requires_grad_() for t in (v, identity)]
    y = torch.relu(cbam_reference(exact[0](inputs[0]), exact[1].channel, exact[1].spatial) + inputs[1])
    truth = gradients(y, grad.double(), *inputs, *parameters)
    ours = nn.ModuleList([norm, cbam])
    if dtype == torch.float64:
        ours.double()
    ours.to(DEVICE)
    inputs = [t.to(DEVICE).requires_grad_() for t in (v, identity)]
    actual = gradients(tail(*inputs, norm, cbam), grad.to(DEVICE), *inputs, *ours.parameters())
    assert_near([value.cpu() for value in actual], truth, dtype)
    assert all(t.dtype == dtype and t.is_contiguous(memory_format=layout) for t in actual[:3])
    cbam.eval()
    with torch.no_grad():
        without = tail(*inputs, norm, cbam)
    assert torch.equal(without, tail(*inputs, norm, cbam).detach())


@FUSED
def test_nan_stays_and_counts_as_in_relu(impl):
    v, identity = draw((2, 16, 6, 10))
    v[0, 3, 2, 2] = float('nan')
    norm, cbam = nn.BatchNorm2d(16).eval().to(DEVICE), CBAM(16, impl=impl).eval().to(DEVICE)
    y = tail(v.to(DEVICE), identity.to(DEVICE), norm, cbam)
    exact = torch.relu(cbam_reference(norm(v.to(DEVICE)), cbam.channel, cbam.spatial) + identity.to(DEVICE))
    assert torch.equal(y.isnan(), exact.isnan()) and y[0].isnan().any() and not y[1].isnan().any()


@FUSED
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_keeps_what_the_plain_tail_keeps(dtype, impl, few_programs):
    """That is the norm's input and ReLU's result; beyond them less than 5 % of a feature map."""
    v, identity = (t.to(DEVICE) for t in draw((1, 256, 50, 84), dtype))
    norm, cbam = nn.BatchNorm2d(256).eval().to(DEVICE), CBAM(256, impl=impl).to(DEVICE)

    class Tail(nn.ModuleList):
        def forward(self, v):
            return tail(v, identity.requires_grad_(), *self)

    assert 1 <= saved_share(Tail([norm, cbam]), v.requires_grad_()) < 1.05


def backbones(impl, fuse_tail, depth=50, own=False):
    """The same ResNet, its CBAMs by PluginBackbone or (`own`) by MMDetection's `plugins`."""
    plugin = dict(PLUGIN, cfg=dict(PLUGIN['cfg'], impl=impl))
    backbone = dict(RESNET, depth=depth)
    if own:
        backbone['plugins'] = [dict(cfg=plugin['cfg'], position='after_conv3', stages=(True, False))]
    elif depth < 50:
        plugin['after'] = [f'{block}.bn2' for block in BLOCKS]
    return MODELS.build(
        dict(type='PluginBackbone', backbone=backbone, plugins=None if own else [plugin], fuse_tail=fuse_tail)
    )


@FUSED
@pytest.mark.parametrize('depth, own', [(50, False), (50, True), (18, False)])
def test_a_backbone_trains_to_the_same(depth, own, impl, monkeypatch, few_programs):
    fused, plain = backbones(impl, True, depth, own), backbones('eager', False, depth, own)
    calls = []
    monkeypatch.setattr('cbam_mmdet.models.fused_tail.tail', lambda *args: calls.append(1) or tail(*args))
    assert fused.state_dict().keys() == plain.state_dict().keys()
    x, results = torch.randn(2, 3, 32, 32).to(DEVICE), []
    plain.load_state_dict(shake(fused).state_dict())
    for model in (fused, copy.deepcopy(fused), plain):
        model.to(DEVICE).train()
        sum(y.square().mean() for y in model(x)).backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(calls) == 2 * 3, 'both models take it, in every block with CBAM'
    for name, expected in results[2].items():
        scale = expected.abs().max().clamp(min=1e-3)
        assert (results[0][name] - expected).abs().max() < 1e-3 * scale, name
        assert torch.equal(results[1][name], results[0][name])


@FUSED
def test_steps_aside(impl, monkeypatch, few_programs):
    """Where it does not apply, the block's own forward runs: batch statistics, a listener, activation checkpoints."""
    model = shake(backbones(impl, True)).to(DEVICE)
    monkeypatch.setattr('cbam_mmdet.models.fused_tail.tail', None)  # not to be called
    x = torch.randn(2, 3, 32, 32).to(DEVICE)
    for module in model.modules():
        module.training = True
    model(x)
    model.eval()
    for block in (module for module in model.modules() if hasattr(module, 'with_cp')):
        block.with_cp = True
    model(x)
    seen = []
    for module in model.modules():
        if isinstance(module, CBAM):
            module.register_forward_hook(lambda *_: seen.append(1))
            block.with_cp = False
    model(x)
    assert len(seen) == 3


@FUSED
def test_a_tail_that_fails_its_self_test_is_not_taken(impl, monkeypatch, few_programs):
    from cbam_mmdet.ops import triton_passes

    right = triton_passes.refine_tail
    monkeypatch.setattr(self_test, '_verdicts', {})
    monkeypatch.setattr(self_test, '_warned', [])
    monkeypatch.setattr(triton_passes, 'refine_tail', lambda *args: right(*args) * 1.01)
    monkeypatch.setattr('cbam_mmdet.models.fused_tail.tail', None)  # not to be called
    fused, plain = backbones(impl, True), backbones('eager', False)
    plain.load_state_dict(shake(fused).state_dict())
    x = torch.randn(2, 3, 32, 32).to(DEVICE)
    for model in (fused, plain):
        model.to(DEVICE).eval()  # which returns None
    with pytest.warns(UserWarning, match=r"the tail's refine .*python tools/doctor\.py.*the tail of a block") as caught:
        ours = [*fused(x), *fused(x)]
    assert len([warning for warning in caught if 'doctor' in str(warning.message)]) == 1
    for y, expected in zip(ours, 2 * plain(x), strict=True):
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(INTERPRETED, reason='the interpreter has kernels on a CPU')
@pytest.mark.parametrize('depth, own', [(50, False), (50, True), (18, False)])
def test_without_kernels_a_backbone_is_the_same(depth, own):
    fused, plain = backbones('auto', True, depth, own), backbones('auto', False, depth, own)
    plain.load_state_dict(shake(fused).state_dict())
    x = torch.randn(2, 3, 32, 32)
    for model in (fused, plain):
        model.train(False)
    for ours, expected in zip(fused(x), plain(x), strict=True):
        assert torch.equal(ours, expected)


def test_no_block_to_fuse():
    with pytest.raises(UserError, match='no block in ResNet has one CBAM at its end'):
        MODELS.build(
            dict(
                type='PluginBackbone',
                backbone=RESNET,
                plugins=[dict(PLUGIN, after='layer*.*.conv2')],
                fuse_tail=True,
            )
        )
