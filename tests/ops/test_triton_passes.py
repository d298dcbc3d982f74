"""The Triton kernels: under the interpreter, compiled for a GPU that is not here, and what only a GPU shows."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from cbam_mmdet import CBAM
from cbam_mmdet.models.cbam import cbam_reference
from cbam_mmdet.ops.functional import HAS_TRITON, INTERPRETED

triton = pytest.importorskip('triton')
if not HAS_TRITON:
    pytest.skip('needs Triton 3', allow_module_level=True)


def test_passes_under_tritons_interpreter():
    names = ('ops/test_passes.py', 'ops/test_self_test.py', 'models/test_fused_tail.py', 'tools/test_doctor.py')
    files = [str(ROOT / 'tests' / name) for name in names]
    command = [sys.executable, '-m', 'pytest', *files, '-m', 'kernels', '-p', 'no:cacheprovider', '-p', 'no:xdist']
    done = subprocess.run(command, env={**os.environ, 'TRITON_INTERPRET': '1'}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]  # no test at all is an error, too


class Hopper:
    """As much of Triton's driver as compiling for an H200 takes, on a machine without a GPU."""

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget('cuda', 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@pytest.mark.skipif(INTERPRETED, reason='the interpreter compiles nothing')
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_every_launch_compiles_for_an_h200(layout, monkeypatch):
    from cbam_mmdet.ops import triton_passes

    compiled = {}

    class Compile:
        """In a kernel's place: a launch compiles it for its arguments and does not run it."""

        def __init__(self, name):
            self.name, self.kernel = name, getattr(triton_passes, name)

        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                compiled.setdefault(self.name, []).append(self.kernel.warmup(*args, grid=grid, **kwargs))
                for tensor in args:  # what the kernel would have written: indices within bounds
                    if isinstance(tensor, torch.Tensor) and not tensor.is_floating_point():
                        tensor.zero_()

            return launch

    kernels = [name for name in vars(triton_passes) if name.endswith('_kernel')]
    for name in kernels:
        monkeypatch.setattr(triton_passes, name, Compile(name))
    monkeypatch.setattr(triton.runtime.driver, '_active', Hopper())
    x = torch.randn(2, 256, 32, 32).to(torch.bfloat16).contiguous(memory_format=layout).flatten(2)
    c, s = torch.rand(2, 256), torch.rand(2, 1024)
    descriptor, i = triton_passes.pool_pixels(x, True)
    z, j = triton_passes.pool_channels(x, True, c)
    triton_passes.refine(x, s, c)
    triton_passes.backward_maps(x, x, s, c)
    triton_passes.backward_pool_channels(x, z, j)
    triton_passes.backward_input(x, c, s, z, j.int(), descriptor, i)
    triton_passes.pool_pixels_signed(x, True, c[0])
    triton_passes.pool_channels(x, True, c, c)
    triton_passes.refine_tail(x, s, c, c, x)
    triton_passes.backward_maps_tail(x, x, s, c, c, x)
    triton_passes.backward_pool_channels_tail(x, z, j)
    assert sorted(compiled) == sorted(kernels)
    for name, variants in compiled.items():
        for kernel in variants:
            assert kernel.asm['cubin']
            # x is fetched by 16 bytes a thread, in both layouts.
            assert 'ld.global.v4.b32' in kernel.asm['ptx'], name
            assert '.local' not in kernel.asm['ptx'], name


def fused(channels, dtype=torch.float32, shape=(25, 42), batch=2):
    torch.manual_seed(0)
    x, grad = torch.randn(2, batch, channels, *shape, device='cuda').to(dtype).unbind(0)
    return CBAM(channels, impl='fused').cuda(), x.requires_grad_(), grad


@pytest.mark.gpu
def test_auto_takes_the_kernels():
    module, x, _ = fused(8)
    module.impl = 'auto'
    assert module.implementation(x) == 'fused'
    assert module.implementation(x.cpu()) == 'eager'


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_two_runs_are_equal_bit_for_bit(dtype):
    module, x, grad = fused(256, dtype, (100, 167))
    module.eval()
    first, second = (torch.autograd.grad(module(x), [x, *module.parameters()], grad) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.gpu
def test_an_image_of_more_than_2_to_the_31_elements():
    module = CBAM(64, impl='fused').cuda().eval()
    x = torch.zeros(1, 64, 5800, 5800, dtype=torch.bfloat16, device='cuda')
    x[0, 63, 5799, 5799] = 3
    assert x.numel() > 2**31
    with torch.no_grad():
        y = module(x)
    small = x[:, :, 5792:, 5792:].float()
    channel = torch.stack([x.mean((2, 3), dtype=torch.float32), x.amax((2, 3)).float()], 1)
    c = module.channel.map_of(channel)
    planes = torch.stack([(small * c).amax(1), (small * c).mean(1)], 1)
    expected = small * c * module.spatial.map_of(planes)
    torch.testing.assert_close(y[:, :, -4:, -4:].float(), expected[:, :, -4:, -4:], rtol=0.01, atol=0.01)


@pytest.mark.gpu
def test_in_a_cuda_graph():
    module, x, _ = fused(64)
    module.eval()
    with torch.no_grad():
        expected = module(x)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            module(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = module(x)
        graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.gpu
def test_inductor_gives_the_same():
    module, x, grad = fused(64)
    twin = copy.deepcopy(module)
    expected = torch.autograd.grad(twin(x), [x, *twin.parameters()], grad)
    actual = torch.autograd.grad(torch.compile(module, fullgraph=True)(x), [x, *module.parameters()], grad)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_under_autocast_the_small_parts_stay_in_fp32():
    module, x, _ = fused(64, torch.bfloat16)
    exact = copy.deepcopy(module).double()
    with torch.autocast('cuda', torch.bfloat16):
        y = module(x)
    truth = cbam_reference(x.double(), exact.channel, exact.spatial)
    assert y.dtype == torch.bfloat16
    assert (y.double() - truth).abs().max() <= torch.finfo(torch.bfloat16).eps * truth.abs().max()


@pytest.mark.gpu
def test_peak_memory_is_the_output_and_the_gradient():
    module, x, grad = fused(256, torch.bfloat16, (200, 334))
    module(x).backward(grad)
    x.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    module(x).backward(grad)
    assert torch.cuda.max_memory_allocated() - before < 2.3 * x.numel() * x.element_size()
