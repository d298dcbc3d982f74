"""The six passes, by PyTorch's operators, in C and as Triton kernels, against the equations in float64 under autograd.

Without a GPU the kernels run under Triton's interpreter, in a process of their own (test_triton_passes.py): a kernel is
made for it when it is imported.
"""

import copy
import ctypes
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from passes_cases import CASES, IMPLS, LAYOUTS, NO_LIBRARY, assert_near, device_of, draw, make
from passes_cases import few_programs as few_programs  # a fixture
from passes_cases import several_threads as several_threads  # a fixture
from plain_cbam import saved_share

from cbam_mmdet import CBAM
from cbam_mmdet.compat.torch import HAS_CUSTOM_OPERATORS
from cbam_mmdet.errors import UserError
from cbam_mmdet.models.cbam import cbam_reference
from cbam_mmdet.ops import c_branches, c_passes
from cbam_mmdet.ops.functional import INTERPRETED

needs_torch_2_4 = pytest.mark.skipif(not HAS_CUSTOM_OPERATORS, reason='torch.compile takes the passes since torch 2.4')


def run(forward, module, x, grad):
    """The output, and the gradients of x and of the parameters that are not frozen."""
    x = x.detach().requires_grad_()
    y = forward(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *(p for p in module.parameters() if p.requires_grad)], grad)]


def both(x, grad, impl, training=True, **options):
    """What impl gives, and the equations in float64."""
    torch.manual_seed(1)
    module = make(impl, x.shape[1], **options).train(training)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    exact = copy.deepcopy(module).double().cpu()
    truth = run(lambda x: cbam_reference(x, exact.channel, exact.spatial), exact, x.double(), grad.double())
    if x.dtype == torch.float64:
        module = module.double()
    x, grad = x.to(device_of(impl)), grad.to(device_of(impl))
    assert module.implementation(x) == module.impl
    return [value.cpu() for value in run(module, module, x, grad)], truth


@pytest.mark.parametrize('impl', IMPLS)
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize(('shape', 'dtype'), CASES)
def test_equals_float64(shape, dtype, layout, impl):
    if impl == 'c' and dtype == torch.float16:
        pytest.skip('the C library has no fp16')
    x, grad = draw(shape, dtype, layout)
    ours, truth = both(x, grad, impl)
    assert_near(ours, truth, dtype)
    assert all(t.dtype == dtype and t.is_contiguous(memory_format=layout) for t in ours[:2])


@pytest.mark.parametrize('impl', IMPLS)
@pytest.mark.parametrize('options', [
    dict(training=False), dict(gate='unit'), dict(pools='max'), dict(pools='avg'), dict(pools=('max', 'avg')),
    dict(kernel_size=3, norm_cfg=None), dict(reduction=4, norm_cfg=dict(type='GN', num_groups=1)),
], ids=str)  # fmt: skip
def test_variants(options, impl):
    ours, truth = both(*draw((2, 32, 9, 14)), impl, **options)
    assert_near(ours, truth, torch.float32)


@pytest.mark.parametrize('impl', IMPLS)
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('values', ['few', 'constant', 'zero'])
def test_of_equal_maxima_the_first_is_taken(values, layout, impl):
    x, grad = draw((2, 40, 9, 15), layout=layout)
    x = dict(few=x.round().clamp(-1, 1), constant=torch.full_like(x, 0.5), zero=torch.zeros_like(x))[values]
    if values == 'few':
        x[:, 1::2] = x[:, ::2]
    ours, truth = both(x, grad, impl)
    assert_near(ours, truth, torch.float32)


@pytest.mark.parametrize('impl', IMPLS)
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('bad', [float('nan'), float('inf'), float('-inf')])
def test_nan_and_infinity_go_where_they_go_in_the_equations(bad, layout, impl):
    x, grad = draw((3, 24, 9, 11), layout=layout)
    x[1, 3, 2, 2] = x[1, 3, 5, 1] = bad
    x[1, 4] = bad
    ours, truth = both(x, grad, impl, training=False)
    for value, exact in zip(ours[:2], truth[:2], strict=True):
        assert torch.equal(value.isfinite(), exact.isfinite())
        torch.testing.assert_close(value[::2].double(), exact[::2], rtol=1e-4, atol=1e-5)
    assert torch.equal(ours[0].isnan(), truth[0].isnan())
    for value, exact in zip(ours[2:], truth[2:], strict=True):
        assert torch.equal(value.isfinite().all(), exact.isfinite().all())


@pytest.mark.parametrize('impl', IMPLS)
def test_gradient_of_another_layout(impl):
    x, grad = draw((2, 16, 6, 10))
    for strange in (grad.contiguous(memory_format=torch.channels_last), grad[:1, :1, :1, :1].expand_as(grad)):
        ours, truth = both(x, strange, impl)
        assert_near(ours, truth, torch.float32)


@pytest.mark.parametrize('impl', IMPLS)
@pytest.mark.parametrize('layout', LAYOUTS)
def test_strided_input(layout, impl):
    wide, grad = draw((2, 32, 6, 20))
    x = wide.contiguous(memory_format=layout)[:, ::2, :, 1::2]
    ours, truth = both(x, grad[:, ::2, :, 1::2], impl)
    assert_near(ours, truth, torch.float32)


@pytest.mark.parametrize('impl', IMPLS)
@pytest.mark.parametrize('context', [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_output_is_the_same(context, impl):
    x, _ = draw((2, 64, 16, 16))
    module, x = make(impl, 64).eval(), x.to(device_of(impl))
    with context():
        y = module(x)
    assert torch.equal(y, module(x).detach())


@pytest.mark.parametrize('impl', IMPLS)
def test_a_loss_on_the_maps_alone(impl):
    """Then the last pass gets no gradient, and the others must do without what it carries."""
    x, _ = draw((2, 16, 6, 10))
    module, x = make(impl, 16).eval(), x.to(device_of(impl))
    maps = []
    for branch in (module.channel, module.spatial):
        branch.activation.register_forward_hook(lambda _, __, out: maps.append(out))

    def gradient(forward, **options):
        maps.clear()
        forward(x.requires_grad_())
        c, s = maps
        return torch.autograd.grad((c**2).sum() + (s**3).sum(), x, **options)[0]

    expected = gradient(lambda x: cbam_reference(x, module.channel, module.spatial))
    torch.testing.assert_close(gradient(module), expected)
    with pytest.raises(RuntimeError, match='first derivatives only'):
        gradient(module, create_graph=True)


@pytest.mark.parametrize('impl', IMPLS if HAS_CUSTOM_OPERATORS else ['eager'])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_compiles_without_graph_break_to_the_same(layout, impl):
    torch._dynamo.reset()
    x, grad = draw((2, 16, 6, 10), layout=layout)
    module, x, grad = make(impl, 16), x.to(device_of(impl)), grad.to(device_of(impl))
    twin = copy.deepcopy(module)
    expected = run(twin, twin, x, grad)
    compiled = torch.compile(module, fullgraph=True, backend='aot_eager')  # fullgraph raises at a graph break
    for actual, wanted in zip(run(compiled, module, x, grad), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)  # sums in another order, as against float64


@pytest.mark.parametrize('impl', IMPLS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('compiled', [False, pytest.param(True, marks=needs_torch_2_4)])
def test_saves_less_than_5_percent_of_the_input(compiled, dtype, impl, few_programs):
    torch._dynamo.reset()
    module, x = make(impl, 256), draw((1, 256, 25, 42), dtype)[0].to(device_of(impl))
    run = torch.compile(module, fullgraph=True, backend='aot_eager') if compiled else module
    assert saved_share(run, x.requires_grad_()) < 0.05


@pytest.mark.skipif(bool(NO_LIBRARY), reason=str(NO_LIBRARY))
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_neither_threads_nor_instructions_change_a_bit(dtype, layout, monkeypatch):
    """Of the C library, which cuts a tensor up by its shape alone; for CPUs with and without AVX2."""
    (portable,) = Path(c_passes.__file__).parent.glob('_cpu_kernels.*')
    x, grad = draw((3, 200, 40, 53), dtype, layout)
    results = []
    for library, threads in ((c_passes._load(), 1), (c_passes._load(), 3), ((ctypes.CDLL(str(portable)), None), 2)):
        monkeypatch.setattr(c_passes, '_load', lambda library=library: library)
        c_passes.kernel.cache_clear()
        for module in (c_passes, c_branches):
            monkeypatch.setattr(module, 'threads_for', lambda elements, threads=threads: threads)
        torch.manual_seed(1)
        module = make('c', 200).eval()
        results.append(run(module, module, x, grad))
    c_passes.kernel.cache_clear()
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.skipif(bool(NO_LIBRARY), reason=str(NO_LIBRARY))
@pytest.mark.skipif(sys.platform != 'linux', reason='huge pages are asked for on Linux')
@pytest.mark.parametrize('layout', LAYOUTS)
def test_large_results_lie_in_huge_pages_and_save_their_own_bytes_only(layout, tmp_path):
    x = torch.randn(2, 64, 50, 50).to(memory_format=layout)  # 1.2 MiB: most of one
    y = make('c', 64)(x.requires_grad_())
    (dx,) = torch.autograd.grad(y.sum(), x)
    for result in (y.detach(), dx):
        assert result.data_ptr() % c_passes.HUGE_PAGE == 0
        assert result.stride() == x.stride() and result.untyped_storage().nbytes() == 4 * x.numel()
        torch.save(result, tmp_path / 'result.pth')
        assert torch.equal(torch.load(tmp_path / 'result.pth'), result)
        assert (tmp_path / 'result.pth').stat().st_size < 4 * x.numel() + 4096


@pytest.mark.skipif(bool(NO_LIBRARY), reason=str(NO_LIBRARY))
@pytest.mark.parametrize('size', [1, 3, 5, 31, 33])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('shape', [(1, 2, 1, 1), (2, 1, 5, 9), (3, 2, 11, 45)])
def test_convolution_equals_pytorchs(shape, dtype, size):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(shape[1], 1, size, padding=size // 2).to(dtype)
    planes = torch.randn(shape, dtype=dtype, requires_grad=True)
    grad = torch.randn(shape[0], 1, *shape[2:], dtype=dtype)
    exact = copy.deepcopy(conv).double()
    ours = run(lambda x: c_branches.convolve(x, conv), conv, planes, grad)
    assert_near(ours, run(exact, exact, planes.double(), grad.double()), dtype)


@pytest.mark.skipif(bool(NO_LIBRARY), reason=str(NO_LIBRARY))
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ('images', 'pools', 'channels', 'units'), [(1, 1, 1, 1), (1, 2, 64, 4), (3, 2, 53, 7), (2, 1, 9, 40)]
)
def test_mlp_equals_pytorchs(images, pools, channels, units, dtype):
    torch.manual_seed(0)
    layers = torch.nn.ModuleList([torch.nn.Linear(channels, units), torch.nn.Linear(units, channels)]).to(dtype)
    descriptor, grad = torch.randn(images, pools, channels, dtype=dtype), torch.randn(images, channels, dtype=dtype)
    exact = copy.deepcopy(layers).double()
    ours = run(lambda d: c_branches.sum_of_mlp(d, *layers), layers, descriptor, grad)
    truth = run(lambda d: exact[1](exact[0](d).relu()).sum(1), exact, descriptor.double(), grad.double())
    assert_near(ours, truth, dtype)


@pytest.mark.skipif(bool(NO_LIBRARY), reason=str(NO_LIBRARY))
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('images', [c_branches.MOST_ROWS // 2, c_branches.MOST_ROWS // 2 + 1])
def test_mlp_of_many_rows_or_without_bias_is_left_to_pytorch(images, bias):
    torch.manual_seed(0)
    layers = torch.nn.ModuleList([torch.nn.Linear(6, 3, bias), torch.nn.Linear(3, 6, bias)])
    layers[0].requires_grad_(False)
    descriptor, grad = torch.randn(images, 2, 6), torch.randn(images, 6)
    in_c = '_SumOfMLP' in type(c_branches.sum_of_mlp(descriptor, *layers).grad_fn).__name__
    assert in_c == (bias and 2 * images <= c_branches.MOST_ROWS)
    ours = run(lambda d: c_branches.sum_of_mlp(d, *layers), layers, descriptor, grad)
    exact = copy.deepcopy(layers).double()
    truth = run(lambda d: exact[1](exact[0](d).relu()).sum(1), exact, descriptor.double(), grad.double())
    assert_near(ours, truth, torch.float32)


@pytest.mark.skipif(bool(NO_LIBRARY), reason=str(NO_LIBRARY))
def test_mlp_takes_nan_as_pytorch_does():
    layers = torch.nn.ModuleList([torch.nn.Linear(5, 3), torch.nn.Linear(3, 5)])
    descriptor = torch.randn(2, 2, 5)
    descriptor[1, 0, 2] = float('nan')
    ours = run(lambda d: c_branches.sum_of_mlp(d, *layers), layers, descriptor, torch.ones(2, 5))
    theirs = run(lambda d: layers[1](layers[0](d).relu()).sum(1), layers, descriptor, torch.ones(2, 5))
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.skipif(bool(NO_LIBRARY), reason=str(NO_LIBRARY))
@pytest.mark.parametrize(
    'register', ['register_forward_hook', 'register_forward_pre_hook', 'register_full_backward_hook']
)
@pytest.mark.parametrize('layer', ['spatial.conv', 'channel.fc1', 'channel.fc2'])
def test_a_hook_on_a_layer_is_called(layer, register):
    seen, module = [], make('c', 8)
    getattr(module.get_submodule(layer), register)(lambda *_: seen.append(1))
    module(torch.randn(1, 8, 4, 4, requires_grad=True)).sum().backward()
    assert seen == [1]


@pytest.mark.skipif(bool(NO_LIBRARY), reason=str(NO_LIBRARY))
@pytest.mark.parametrize('options', [
    dict(dilation=2, padding=2), dict(padding=1, padding_mode='reflect'), dict(kernel_size=(3, 5), padding=(1, 2)),
    dict(kernel_size=(3, 33), padding=(1, 16)), dict(bias=True, padding=1),
], ids=str)  # fmt: skip
def test_another_convolution_in_its_place_is_computed_as_it_is(options):
    x, grad = draw((2, 8, 40, 41))
    module = make('c', 8).eval()
    module.spatial.conv = torch.nn.Conv2d(2, 1, **{'kernel_size': 3, 'bias': False, **options})
    exact = copy.deepcopy(module).double()
    truth = run(lambda x: cbam_reference(x, exact.channel, exact.spatial), exact, x.double(), grad.double())
    assert_near(run(module, module, x, grad), truth, torch.float32)


@pytest.mark.skipif(bool(NO_LIBRARY), reason=str(NO_LIBRARY))
def test_under_transforms_of_functions_it_steps_aside():
    module, x, t = CBAM(8).eval(), torch.randn(3, 2, 8, 5, 6), torch.randn(2, 8, 5, 6)
    with torch.no_grad():
        each = torch.stack([module(part) for part in x])
        torch.testing.assert_close(torch.vmap(module)(x), each)
        _, tangent = torch.func.jvp(module, (x[0],), (t,))
        step = 1e-2
        secant = (module(x[0] + step * t) - module(x[0] - step * t)) / (2 * step)
        modules = [CBAM(8).eval() for _ in range(3)]
        stacked, buffers = torch.func.stack_module_state(modules)
        ensemble = torch.vmap(lambda p, b: torch.func.functional_call(module, (p, b), (x[0],)))(stacked, buffers)
        torch.testing.assert_close(ensemble, torch.stack([m(x[0]) for m in modules]))
    torch.testing.assert_close(tangent, secant, rtol=0.05, atol=0.02)


@pytest.mark.skipif(bool(NO_LIBRARY), reason=str(NO_LIBRARY))
@pytest.mark.parametrize('channels', [4, 7, 9, 16])
def test_a_map_of_other_channels_is_refused_as_by_pytorch(channels):
    with pytest.raises(RuntimeError, match='shapes cannot be multiplied'):
        make('c', 8)(torch.randn(2, channels, 5, 5, requires_grad=True))


@pytest.mark.skipif(bool(NO_LIBRARY), reason=str(NO_LIBRARY))
@pytest.mark.parametrize('planes', [1, 3])
def test_a_convolution_of_other_planes_is_refused_as_by_pytorch(planes):
    module = make('c', 8)
    module.spatial.conv = torch.nn.Conv2d(planes, 1, 7, padding=3)
    with pytest.raises(RuntimeError, match=r'to have . channels'):
        module(torch.randn(2, 8, 5, 5))


class Wrapper(torch.nn.Module):
    """Around a layer, as adapters are: it has the layer's weight, and computes more."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.weight = layer.weight

    def forward(self, x):
        return 2 * self.layer(x)


class Subclass(torch.Tensor):
    """A tensor whose operators are not PyTorch's own."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        args = [a.as_subclass(torch.Tensor) if isinstance(a, Subclass) else a for a in args]
        return torch.Tensor.__torch_function__(func, (), args, kwargs or {})


def with_subclass(layer):
    weight = layer.weight.detach().as_subclass(Subclass)
    del layer.weight
    layer.weight = weight
    return layer


@pytest.mark.skipif(bool(NO_LIBRARY), reason=str(NO_LIBRARY))
@pytest.mark.parametrize('change', [Wrapper, with_subclass])
@pytest.mark.parametrize('name', ['channel.fc1', 'channel.fc2', 'spatial.conv'])
def test_a_layer_that_is_no_plain_one_is_called_as_it_is(name, change):
    module, x = make('c', 8).eval(), torch.randn(2, 8, 5, 5)
    parent, _, child = name.partition('.')
    setattr(module.get_submodule(parent), child, change(module.get_submodule(name)))
    with torch.no_grad():
        torch.testing.assert_close(module(x), cbam_reference(x, module.channel, module.spatial))


@pytest.mark.skipif(bool(NO_LIBRARY), reason=str(NO_LIBRARY))
def test_c_refuses_half_precision():
    x = torch.zeros(1, 8, 2, 2, dtype=torch.float16)
    assert CBAM(8).implementation(x) == 'eager'
    with pytest.raises(UserError, match=r'supports fp32, fp64 and bf16 on a CPU, not torch\.float16'):
        CBAM(8, impl='fused')(x)


def test_a_lower_precision_of_matrix_products_changes_no_place():
    x, grad = draw((2, 512, 20, 20))
    torch.set_float32_matmul_precision('medium')
    try:
        ours, truth = both(x, grad, 'eager')
    finally:
        torch.set_float32_matmul_precision('highest')
    assert (ours[1].double() - truth[1]).abs().max() < 0.05 * truth[1].abs().max()


def test_in_a_forked_process():
    """As in a worker that loads data: OpenMP's threads stay behind in the parent, where a pass has started them."""
    x, module = torch.randn(2, 64, 64, 64), CBAM(64).eval()
    y = module(x).detach()
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # rather than wait for threads that are not there
        torch.set_num_threads(1)  # as a worker does: PyTorch's own operators would wait, too
        near = torch.allclose(module(x), y, rtol=1e-5, atol=1e-6)
        os._exit(0 if near and module.implementation(x) == 'eager' else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    'options', [dict(pools='lp'), dict(spatial='conv'), dict(spatial=None), dict(order='parallel')]
)
def test_fused_refuses_what_it_does_not_cover(options):
    with pytest.raises(UserError, match="impl='fused' supports"):
        CBAM(8, impl='fused', **options)
    assert CBAM(8, **options).implementation(torch.zeros(1, 8, 2, 2)) == 'eager'


@pytest.mark.skipif(INTERPRETED, reason='the interpreter serves CPUs')
def test_fused_refuses_a_cpu_without_the_library(monkeypatch):
    monkeypatch.setenv('CBAM_CPU_KERNEL', '0')
    c_passes._load.cache_clear()
    try:
        assert CBAM(8).implementation(torch.zeros(1, 8, 2, 2)) == 'eager'
        with pytest.raises(UserError, match='needs the C library, which is switched off by CBAM_CPU_KERNEL=0'):
            CBAM(8, impl='fused')(torch.zeros(1, 8, 2, 2))
    finally:
        c_passes._load.cache_clear()
