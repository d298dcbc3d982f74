"""CBAM in one autograd function: bit for bit what the graph of the passes and small parts gives."""

import copy

import pytest
import torch
from torch import nn

from cbam_mmdet import CBAM
from cbam_mmdet.ops import c_cbam, c_passes

pytestmark = pytest.mark.skipif(bool(c_passes.unavailable()), reason=f'the C library {c_passes.unavailable()}')

NORMS = {
    'none': None,
    'batch': dict(type='BN', momentum=0.01),
    'average': dict(type='BN', momentum=None),
    'without statistics': dict(type='BN', track_running_stats=False),
    'without weights': dict(type='BN', affine=False),
}


def make(**options):
    torch.manual_seed(0)
    module = CBAM(32, impl='fused', **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def step(module, x, grad, in_one, monkeypatch):
    """The output, all gradients, and what the module's buffers are then."""
    module, x = copy.deepcopy(module), x.detach().requires_grad_()
    with monkeypatch.context() as context:
        if not in_one:
            context.setattr(c_cbam, 'layers_for', lambda *_: None)
        y = module(x)
    assert ('_CBAM' in type(y.grad_fn).__name__) == in_one
    y.backward(grad)
    gradients = [parameter.grad for parameter in module.parameters() if parameter.requires_grad]
    return [y.detach(), x.grad, *gradients, *module.buffers()]


def assert_same(module, x, monkeypatch):
    grad = torch.randn(x.shape).to(x.dtype)
    one, graph = (step(module, x, grad, in_one, monkeypatch) for in_one in (True, False))
    assert len(one) == len(graph)
    for actual, expected in zip(one, graph, strict=True):
        assert torch.equal(actual, expected) and actual.stride() == expected.stride()


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('gate', ['sigmoid', 'unit'])
@pytest.mark.parametrize('norm', NORMS)
def test_norms_and_gates(norm, gate, training, monkeypatch):
    module = make(norm_cfg=NORMS[norm], gate=gate).train(training)
    assert_same(module, torch.randn(2, 32, 9, 11), monkeypatch)


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('shape', [(1, 32, 40, 41), (4, 32, 3, 5), (1, 32, 1, 1)])
def test_shapes_and_dtypes(shape, dtype, layout, monkeypatch):
    module = make(norm_cfg=None if shape[2] == 1 else NORMS['batch'])
    module.to(torch.float64 if dtype == torch.float64 else torch.float32)
    assert_same(module, torch.randn(shape).to(dtype).contiguous(memory_format=layout), monkeypatch)


def test_a_part_of_another_tensor(monkeypatch):
    assert_same(make(), torch.randn(2, 32, 9, 22)[..., ::2], monkeypatch)


@pytest.mark.parametrize('frozen', ['channel', 'spatial', 'spatial.conv', 'spatial.bn'])
def test_frozen_parameters(frozen, monkeypatch):
    module = make()
    module.get_submodule(frozen).requires_grad_(False)
    assert_same(module, torch.randn(2, 32, 9, 11), monkeypatch)


def test_under_autocast(monkeypatch):
    module, x = make(), torch.randn(2, 32, 9, 11)
    with torch.autocast('cpu', torch.bfloat16):
        assert_same(module, x, monkeypatch)
        assert_same(module, x.bfloat16(), monkeypatch)


@pytest.mark.parametrize(
    'options',
    [dict(pools=('avg',)), dict(pools=('max', 'avg')), dict(kernel_size=33), dict(norm_cfg=dict(type='SyncBN'))],
    ids=str,
)
def test_what_it_does_not_cover_is_left_to_the_graph(options):
    module = make(**options).eval()
    y = module(torch.randn(2, 32, 9, 11, requires_grad=True))
    assert '_CBAM' not in type(y.grad_fn).__name__


@pytest.mark.parametrize('layer', ['channel.fc1', 'channel.activation', 'spatial.bn', 'spatial.activation'])
def test_a_hook_is_called(layer):
    seen, module = [], make()
    handle = module.get_submodule(layer).register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(2, 32, 9, 11, requires_grad=True)
    module(x).sum().backward()
    assert seen == [1]
    handle.remove()
    assert '_CBAM' in type(module(x).grad_fn).__name__


def test_a_subclass_of_a_branch_computes_its_own_map():
    module = make()

    class Half(type(module.channel)):
        def scales_of(self, descriptor, mlp=None):
            return 0.5 * super().scales_of(descriptor, mlp)

    x = torch.randn(2, 32, 9, 11, requires_grad=True)
    whole = module.eval()(x)
    module.channel.__class__ = Half
    assert not torch.allclose(module(x), whole)


def test_two_images_of_one_module_before_the_backward_pass():
    """The second training step changes BatchNorm's statistics, which the first one's backward pass does not need."""
    x = torch.randn(2, 2, 32, 9, 11)
    both, single = make(), make()
    (both(x[0]).square().sum() + both(x[1]).square().sum()).backward()
    for part in x:
        single(part).square().sum().backward()
    for actual, expected in zip(both.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad)


def test_weights_changed_before_the_backward_pass_are_an_error():
    module = make()
    y = module(torch.randn(2, 32, 9, 11, requires_grad=True))
    with torch.no_grad():
        module.channel.fc1.weight.mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        y.sum().backward()


def test_only_the_parameters_want_a_gradient():
    module, x = make(), torch.randn(2, 32, 9, 11)
    module(x).square().sum().backward()
    other = make()
    other(x.requires_grad_()).square().sum().backward()
    for actual, expected in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(actual.grad, expected.grad)


def test_the_output_may_be_changed_in_place():
    module, x = make(), torch.randn(2, 32, 9, 11, requires_grad=True)
    (module(x) + 0).relu().sum().backward()
    expected, x.grad = x.grad, None
    module.zero_grad()
    module(x).relu_().sum().backward()
    torch.testing.assert_close(x.grad, expected)
