"""Shapes, dtypes and layouts on which the passes are tested, alone and as the tail of a block."""

import itertools

import pytest
import torch

from cbam_mmdet import CBAM
from cbam_mmdet.ops import c_passes, self_test
from cbam_mmdet.ops.functional import INTERPRETED

LAYOUTS = [torch.contiguous_format, torch.channels_last]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1, 1), (3, 17, 5, 7), (2, 256, 25, 42), (5, 123, 13, 11), (2, 5, 47, 53)]
CASES = list(itertools.product(SHAPES, DTYPES))
if INTERPRETED:
    # Its time grows with the number of programs. The last two shapes are small, yet longer than 1024 in one dimension:
    # each kernel cuts them into several blocks, and each reduction into several parts and steps.
    SHAPES = [*SHAPES[:2], (2, 5, 33, 35), (1, 1030, 3, 5)]
    CASES = [*itertools.product(SHAPES[:2], DTYPES), *itertools.product(SHAPES[2:], DTYPES[1:3])]
    self_test.LARGE = self_test.SMALL[0]  # for the self-test that comes before the first use of each dtype and layout
DEVICE = 'cpu' if INTERPRETED else 'cuda'
FUSED = pytest.param('fused', marks=[pytest.mark.kernels, *([] if INTERPRETED else [pytest.mark.gpu])])
NO_LIBRARY = 'the interpreter serves CPUs' if INTERPRETED else c_passes.unavailable()
C = pytest.param('c', marks=pytest.mark.skipif(bool(NO_LIBRARY), reason=str(NO_LIBRARY)))
IMPLS = ['eager', C, FUSED]


def make(impl, channels, **options):
    """A CBAM by PyTorch's operators, by the C library, or by Triton's kernels ('fused')."""
    return CBAM(channels, impl='eager' if impl == 'eager' else 'fused', **options).to(device_of(impl))


def device_of(impl):
    return DEVICE if impl == 'fused' else 'cpu'


@pytest.fixture(autouse=True)
def several_threads(monkeypatch):
    """So that small maps are shared out, too."""
    monkeypatch.setattr(c_passes, 'SERIAL', 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def few_programs(monkeypatch):
    """For a map that must be large: the interpreter's time grows with the number of programs."""
    if INTERPRETED:
        from cbam_mmdet.ops import triton_passes

        monkeypatch.setattr(triton_passes, 'TILE', 2**16)


def draw(shape, dtype=torch.float32, layout=torch.contiguous_format, seed=0):
    torch.manual_seed(seed)
    return [t.to(dtype).contiguous(memory_format=layout) for t in torch.randn(2, *shape, dtype=torch.float64)]


def assert_near(ours, truth, dtype):
    limit = {torch.float64: 1e-11, torch.float32: 1e-5}.get(dtype, torch.finfo(dtype).eps)
    for value, exact in zip(ours, truth, strict=True):
        assert (value.double() - exact).abs().max() <= limit * exact.abs().max().clamp(min=1e-3)
