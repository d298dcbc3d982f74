"""The backward pass of our own: gradients, memory, and the ways in which a training uses a module."""

import copy
import itertools

import pytest
import torch
from conftest import run_forks
from plain_cbam import PlainCBAM, saved_share
from torch import distributed
from torch.utils.checkpoint import checkpoint

from cbam_mmdet import CBAM
from cbam_mmdet.engine.distributed import end_process
from cbam_mmdet.models.cbam import cbam_reference

VARIANTS = list(
    itertools.product(
        [('avg', 'max'), ('lp',), ('lse',), ('avg', 'max', 'lp', 'lse')],
        ['pool', 'conv', None],
        ['channel-spatial', 'spatial-channel', 'parallel'],
    )
)
STAGES = [(256, 50, 84), (512, 25, 42), (1024, 25, 42), (2048, 13, 21)]  # R-50's stages, at half of 800x1333 and below


def convolves(dtype):
    try:
        torch.nn.functional.conv2d(torch.ones(1, 1, 1, 1, dtype=dtype), torch.ones(1, 1, 1, 1, dtype=dtype))
    except RuntimeError:
        return False
    return True


NO_FP16 = pytest.mark.skipif(not convolves(torch.float16), reason='this torch has no fp16 convolution on a CPU')
HALVES = [torch.bfloat16, pytest.param(torch.float16, marks=NO_FP16)]


def gradients(module, x, grad):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(module(x), [x, *module.parameters()], grad)


@pytest.mark.parametrize(('pools', 'spatial', 'order'), VARIANTS)
@pytest.mark.parametrize('gate', ['sigmoid', 'unit'])
def test_gradients_by_finite_differences(pools, spatial, order, gate):
    torch.manual_seed(0)
    module = CBAM(4, 2, pools, spatial, 3, order, gate).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*module.named_parameters(), strict=True)

    def run(x, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(run, (x, *parameters))


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('channels_last', [True, False])
def test_gradients_equal_those_of_plain_pytorch(training, channels_last):
    torch.manual_seed(0)
    module = CBAM(32).double().train(training)
    plain = PlainCBAM(32).double().train(training)
    plain.load_state_dict(dict(zip(plain.state_dict(), module.state_dict().values(), strict=True)))
    x, grad = torch.randn(2, 3, 32, 9, 7, dtype=torch.float64).unbind(0)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    for ours, theirs in zip(gradients(module, x, grad), gradients(plain, x, grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_of_equal_maxima_the_first_gets_the_gradient():
    """As in max pooling, which the authors use; amax would share it out."""
    module, plain = CBAM(8).double(), PlainCBAM(8).double()
    plain.load_state_dict(dict(zip(plain.state_dict(), module.state_dict().values(), strict=True)))
    x = torch.randint(0, 3, (2, 8, 4, 4)).double()
    grad = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    for layout in (torch.contiguous_format, torch.channels_last):
        for ours, theirs in zip(
            gradients(module, x.to(memory_format=layout), grad), gradients(plain, x, grad), strict=True
        ):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize('gate', ['sigmoid', 'unit'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('shape', STAGES)
def test_saves_less_than_5_percent_of_the_input(shape, dtype, gate):
    x = torch.randn(2, *shape).to(dtype).requires_grad_()
    assert saved_share(CBAM(shape[0], gate=gate), x) < 0.05


@pytest.mark.parametrize('gate', ['sigmoid', 'unit'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('channels', [64, 128])
def test_saves_23_bytes_a_pixel_of_a_narrow_input(channels, dtype, gate):
    """The maps over pixels do not shrink with the channels: there, 5 % cannot be held."""
    x = torch.randn(2, channels, 100, 168).to(dtype).requires_grad_()
    assert saved_share(CBAM(channels, gate=gate), x) * channels * x.element_size() < 23


def test_plain_pytorch_saves_more_than_the_input():
    """What the line above is worth; and that the counting counts."""
    x = torch.randn(2, 256, 50, 84, requires_grad=True)
    assert saved_share(PlainCBAM(256), x) > 1


@pytest.mark.parametrize('dtype', HALVES)
def test_half_precision_is_as_exact_as_plain_pytorch(dtype):
    """By the median of nine draws: in half precision near maxima tie; which one gets the gradient is luck for both."""
    errors = []
    for seed in range(9):
        torch.manual_seed(seed)
        module, plain = CBAM(64), PlainCBAM(64)
        plain.load_state_dict(dict(zip(plain.state_dict(), module.state_dict().values(), strict=True)))
        x, grad = torch.randn(2, 2, 64, 20, 30).to(dtype).unbind(0)
        exact_module = copy.deepcopy(module).double()
        exact = [exact_module(x.double()), *gradients(exact_module, x.double(), grad.double())]
        ours = [module(x), *gradients(module, x, grad)]
        with torch.autocast('cpu', dtype=dtype):
            theirs = [plain(x), *gradients(plain, x, grad)]
        assert ours[0].dtype == ours[1].dtype == dtype
        errors.append(
            [[relative_error(value, truth) for value in pair] for truth, *pair in zip(exact, ours, theirs, strict=True)]
        )
    ours, theirs = torch.tensor(errors).median(0).values.unbind(1)
    assert (ours <= 1.25 * theirs + torch.finfo(dtype).eps / 2).all(), (ours, theirs)


def relative_error(value, truth):
    return ((value.double() - truth).abs().max() / truth.abs().max()).item()


@pytest.mark.parametrize('dtype', HALVES)
def test_autocast_changes_nothing_of_the_small_parts(dtype):
    module = CBAM(32)
    x = torch.randn(2, 32, 6, 6).to(dtype)
    expected = module(x)
    with torch.autocast('cpu', dtype=dtype):
        y = module(x)
    assert y.dtype == dtype
    assert torch.equal(y, expected)


@pytest.mark.parametrize('half', HALVES)
def test_a_module_in_half_precision(half):
    module = CBAM(32).eval()
    x = torch.randn(2, 32, 6, 6)
    torch.testing.assert_close(copy.deepcopy(module).to(half)(x.to(half)).float(), module(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize('channels_last', [True, False])
def test_layout_is_kept(channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 32, 5, 6).to(memory_format=layout).requires_grad_()
    y = CBAM(32)(x)
    assert y.is_contiguous(memory_format=layout)
    assert torch.autograd.grad(y.sum(), x)[0].is_contiguous(memory_format=layout)


def test_strided_input():
    module = CBAM(8).double()
    x = torch.randn(6, 2, 8, 5, dtype=torch.float64).permute(1, 2, 3, 0)
    grad = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    for ours, theirs in zip(gradients(module, x, grad), gradients(module, x.contiguous(), grad), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_output_may_be_written_to():
    """A block adds its identity in place."""
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64, requires_grad=True)
    module = CBAM(8).double()
    added = module(x)
    added += x
    torch.testing.assert_close(torch.autograd.grad(added.sum(), x)[0], torch.autograd.grad((module(x) + x).sum(), x)[0])


def test_backward_twice():
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    y = CBAM(8)(x)
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y.sum(), x)[0])


@pytest.mark.parametrize('context', [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize('order', ['channel-spatial', 'spatial-channel', 'parallel'])
def test_without_gradients_the_output_is_the_same(context, order):
    module = CBAM(8, order=order).eval()
    x = torch.randn(2, 8, 4, 4)
    with context():
        y = module(x)
    assert not y.requires_grad
    assert torch.equal(y, module(x).detach())


def test_second_derivatives_are_refused():
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match='first derivatives only'):
        torch.autograd.grad(CBAM(8)(x).sum(), x, create_graph=True)


def test_more_channels_than_int16_counts():
    x = torch.zeros(1, 40000, 1, 2)
    x[0, 39999] = 1
    x.requires_grad_()
    module = CBAM(40000, reduction=20000).eval()
    module(x).sum().backward()
    expected = torch.autograd.grad(cbam_reference(x, module.channel, module.spatial).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)


def test_frozen_parameters_get_no_gradient():
    module = CBAM(8)
    module.channel.requires_grad_(False)
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    module(x).sum().backward()
    assert module.channel.fc1.weight.grad is None
    assert module.spatial.conv.weight.grad is not None


@pytest.mark.parametrize('spatial', ['pool', 'conv'])
def test_input_without_gradient_still_trains_the_parameters(spatial):
    """After frozen stages."""
    module = CBAM(8, spatial=spatial)
    x, grad = torch.randn(2, 2, 8, 4, 4).unbind(0)
    module(x).backward(grad)
    expected = gradients(module, x, grad)[1:]
    for parameter, gradient in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize('use_reentrant', [True, False])
def test_activation_checkpointing(use_reentrant):
    module = (
        CBAM(8).double().eval()
    )  # in training, recomputation updates the running statistics twice, as for any BatchNorm
    x, grad = torch.randn(2, 2, 8, 4, 4, dtype=torch.float64).unbind(0)
    expected = gradients(module, x, grad)
    x.requires_grad_()
    checkpoint(module, x, use_reentrant=use_reentrant).backward(grad)
    for actual, wanted in zip([x.grad, *(p.grad for p in module.parameters())], expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_deepcopy_is_independent():
    module = CBAM(8)
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    module(x).sum().backward()
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.channel.fc2.weight.add_(1)
    assert not torch.equal(twin(x), module(x))


@pytest.mark.parametrize('order', ['channel-spatial', 'spatial-channel', 'parallel'])
def test_compile_without_graph_break(order):
    torch._dynamo.reset()
    module = CBAM(8, pools=('avg', 'max', 'lp', 'lse'), order=order).double()
    x, grad = torch.randn(2, 2, 8, 5, 6, dtype=torch.float64).unbind(0)
    compiled = torch.compile(module, fullgraph=True, backend='aot_eager')  # fullgraph raises at a graph break
    running = copy.deepcopy(module.state_dict())
    expected = gradients(module, x, grad)
    module.load_state_dict(running)
    for actual, wanted in zip(gradients(compiled, x, grad), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.skipif(torch.__version__ < (2, 2), reason='before torch 2.2 there is no torch.export.Dim')
@pytest.mark.parametrize('spatial', ['pool', 'conv', None])
def test_export(spatial):
    module = CBAM(8, spatial=spatial).eval()
    x = torch.randn(2, 8, 5, 6)
    dynamic = {2: torch.export.Dim('height', min=2, max=64), 3: torch.export.Dim('width', min=2, max=64)}
    program = torch.export.export(module, (x,), dynamic_shapes=(dynamic,))
    for shape in ((2, 8, 5, 6), (2, 8, 9, 11)):
        x = torch.randn(shape)
        torch.testing.assert_close(program.module()(x), module(x))


def test_trace():
    module = CBAM(8).eval()
    traced = torch.jit.trace(module, torch.randn(2, 8, 5, 6))
    x = torch.randn(2, 8, 5, 6)
    torch.testing.assert_close(traced(x), module(x))


def test_nan_and_infinity_propagate():
    module = CBAM(8).eval()
    for bad in (float('nan'), float('inf')):
        x = torch.randn(2, 8, 4, 4)
        x[1, 3, 2, 2] = bad
        y = module(x)
        assert torch.isfinite(y[0]).all()
        assert not torch.isfinite(y[1, 3, 2, 2])


def train_by_ddp(rank, folder):
    """What each of the two processes does."""
    distributed.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2)
    torch.manual_seed(0)
    module = CBAM(8).double().eval()
    x, grad = torch.randn(2, 4, 8, 5, 6, dtype=torch.float64).unbind(0)
    ddp = torch.nn.parallel.DistributedDataParallel(module)
    half = slice(2 * rank, 2 * rank + 2)
    for _ in range(2):  # the second forward raises if a parameter got no gradient in the first
        ddp.zero_grad()
        ddp(x[half]).backward(grad[half])
    torch.save([p.grad for p in module.parameters()], f'{folder}/{rank}.pt')
    end_process(0)


def test_ddp_over_two_processes_averages_the_gradients(tmp_path):
    run_forks(train_by_ddp, (0, tmp_path), (1, tmp_path))
    torch.manual_seed(0)
    module = CBAM(8).double().eval()
    x, grad = torch.randn(2, 4, 8, 5, 6, dtype=torch.float64).unbind(0)
    expected = [g / 2 for g in gradients(module, x, grad)[1:]]
    for rank in range(2):
        for actual, wanted in zip(torch.load(tmp_path / f'{rank}.pt'), expected, strict=True):
            torch.testing.assert_close(actual, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('channels_last', [True, False])
def test_cuda_equals_cpu(dtype, channels_last):
    torch.manual_seed(0)
    module = CBAM(64)
    x, grad = torch.randn(2, 2, 64, 20, 30).to(dtype).unbind(0)
    exact = gradients(copy.deepcopy(module).double(), x.double(), grad.double())
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    for actual, wanted in zip(gradients(module.cuda(), x.cuda(), grad.cuda()), exact, strict=True):
        scale = wanted.abs().max()
        limit = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
        assert (actual.cpu().double() - wanted).abs().max() <= limit * scale


@pytest.mark.gpu
def test_cuda_peak_memory_of_forward_and_backward_stays_below_plain_pytorch():
    def peak(module):
        x = torch.randn(2, 256, 100, 168, device='cuda', requires_grad=True)
        torch.cuda.reset_peak_memory_stats()
        module.cuda()(x).sum().backward()
        return torch.cuda.max_memory_allocated()

    assert peak(CBAM(256)) < peak(PlainCBAM(256))
