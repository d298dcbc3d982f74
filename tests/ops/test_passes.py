"""The six passes, on a CPU and as Triton kernels, against the equations in float64 under autograd.

Without a GPU the kernels run under Triton's interpreter, in a process of their own (test_triton_passes.py): a kernel is
made for it when it is imported.
"""

import copy
import os
import signal

import pytest
import torch
from passes_cases import CASES, DEVICE, IMPLS, LAYOUTS, assert_near, draw
from passes_cases import few_programs as few_programs  # a fixture
from passes_cases import many_small_blocks as many_small_blocks  # a fixture
from plain_cbam import saved_share

from cbam_mmdet import CBAM
from cbam_mmdet.errors import UserError
from cbam_mmdet.models.cbam import cbam_reference
from cbam_mmdet.ops import cpu_passes
from cbam_mmdet.ops.functional import INTERPRETED


def run(forward, module, x, grad):
    """The output, and the gradients of x and of the parameters."""
    x = x.detach().requires_grad_()
    y = forward(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], grad)]


def both(x, grad, impl, training=True, **options):
    """What impl gives, and the equations in float64."""
    torch.manual_seed(1)
    module = CBAM(x.shape[1], impl=impl, **options).train(training)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    exact = copy.deepcopy(module).double()
    truth = run(lambda x: cbam_reference(x, exact.channel, exact.spatial), exact, x.double(), grad.double())
    if x.dtype == torch.float64:
        module = module.double()
    if impl == 'fused':
        module, x, grad = module.to(DEVICE), x.to(DEVICE), grad.to(DEVICE)
    assert module.implementation(x) == impl
    return [value.cpu() for value in run(module, module, x, grad)], truth


@pytest.mark.parametrize('impl', IMPLS)
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize(('shape', 'dtype'), CASES)
def test_equals_float64(shape, dtype, layout, impl):
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
    module = CBAM(64, impl=impl).eval()
    if impl == 'fused':
        module, x = module.to(DEVICE), x.to(DEVICE)
    with context():
        y = module(x)
    assert torch.equal(y, module(x).detach())


@pytest.mark.parametrize('impl', IMPLS)
def test_a_loss_on_the_maps_alone(impl):
    """Then the last pass gets no gradient, and the others must do without its letters."""
    x, _ = draw((2, 16, 6, 10))
    module = CBAM(16, impl=impl).eval()
    if impl == 'fused':
        module, x = module.to(DEVICE), x.to(DEVICE)
    maps = []
    for branch in (module.channel, module.spatial):
        branch.activation.register_forward_hook(lambda _, __, out: maps.append(out))

    def gradient(forward):
        maps.clear()
        forward(x.requires_grad_())
        c, s = maps
        return torch.autograd.grad((c**2).sum() + (s**3).sum(), x)[0]

    expected = gradient(lambda x: cbam_reference(x, module.channel, module.spatial))
    torch.testing.assert_close(gradient(module), expected)


@pytest.mark.parametrize('impl', IMPLS)
@pytest.mark.parametrize('layout', LAYOUTS)
def test_compiles_without_graph_break_to_the_same(layout, impl):
    torch._dynamo.reset()
    x, grad = draw((2, 16, 6, 10), layout=layout)
    module = CBAM(16, impl=impl)
    if impl == 'fused':
        module, x, grad = module.to(DEVICE), x.to(DEVICE), grad.to(DEVICE)
    twin = copy.deepcopy(module)
    expected = run(twin, twin, x, grad)
    compiled = torch.compile(module, fullgraph=True, backend='aot_eager')  # fullgraph raises at a graph break
    for actual, wanted in zip(run(compiled, module, x, grad), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize('impl', IMPLS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('compiled', [False, True])
def test_saves_less_than_5_percent_of_the_input(compiled, dtype, impl, few_programs):
    torch._dynamo.reset()
    module, x = CBAM(256, impl=impl), draw((1, 256, 25, 42), dtype)[0]
    if impl == 'fused':
        module, x = module.to(DEVICE), x.to(DEVICE)
    run = torch.compile(module, fullgraph=True, backend='aot_eager') if compiled else module
    assert saved_share(run, x.requires_grad_()) < 0.05


def test_the_number_of_threads_changes_nothing():
    x, grad = draw((3, 64, 40, 30))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        module = CBAM(64).eval()
        results.append(run(module, module, x, grad)[:2])
        assert torch.get_num_threads() == threads
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_a_lower_precision_of_matrix_products_changes_no_place():
    x, grad = draw((2, 512, 20, 20))
    torch.set_float32_matmul_precision('medium')
    try:
        ours, truth = both(x, grad, 'eager')
    finally:
        torch.set_float32_matmul_precision('highest')
    assert (ours[1].double() - truth[1]).abs().max() < 0.05 * truth[1].abs().max()


def test_in_a_forked_process():
    """The helping threads stay behind in the parent. (So do OpenMP's: one pass alone, which needs none.)"""
    x, c, s = torch.randn(2, 64, 256), torch.rand(2, 64), torch.rand(2, 256)
    y = cpu_passes.refine(x, s, c)
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # rather than wait for threads that are not there
        os._exit(0 if torch.equal(cpu_passes.refine(x, s, c), y) else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    'options', [dict(pools='lp'), dict(spatial='conv'), dict(spatial=None), dict(order='parallel')]
)
def test_fused_refuses_what_it_does_not_cover(options):
    with pytest.raises(UserError, match="impl='fused' supports"):
        CBAM(8, impl='fused', **options)
    assert CBAM(8, **options).implementation(torch.zeros(1, 8, 2, 2)) == 'eager'


@pytest.mark.skipif(INTERPRETED, reason='the interpreter serves CPUs')
def test_fused_refuses_a_cpu():
    with pytest.raises(UserError, match='needs a CUDA tensor, this one is on cpu'):
        CBAM(8, impl='fused')(torch.zeros(1, 8, 2, 2))
