"""The self-test of an implementation of the six passes, and the rule that the Triton kernels pass it before use.

Each pass is called alone on small inputs and compared with its formula (passes.py; of a tail fused_tail.py), written
here plainly and computed in float64 on the CPU. The inputs are sines, so that nobody's random numbers change. x and the
scale of pool_channels lie on a coarse grid: their products are exact in every dtype, many maxima are equal, and so the
argmax must be the very one.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from cbam_mmdet.compat.torch import assume_constant_result
from cbam_mmdet.ops.passes import Passes, index_dtype

DOCTOR = 'python tools/doctor.py'
# (N, C, P); for the channels-last layout C and P are exchanged. The large one is odd, and longer than a tile: the
# kernels cut it into several parts, and their tiles have the sizes there that they have in a detector, so what is
# compiled for the self-test is used again. For the small shapes, tiles of other sizes would be compiled.
LARGE = (2, 17, 1063)
SMALL = ((2, 24, 63), (3, 5, 1))
# The C library cuts rows longer than 2048 into tiles.
WIDE = (1, 5, 2603)

# What a pass returned, what is right, and the pass's name: for each result of each pass.
Results = Iterator[tuple[str, Tensor, Tensor]]


def find_difference(
    passes: Passes,
    device: torch.device | str,
    dtype: torch.dtype,
    channels_last: bool = False,
    shapes: Sequence[tuple[int, int, int]] = (LARGE, *SMALL),
) -> str | None:
    """Compare the six passes with their formulas in float64.

    Args:
        passes: without a tail.
        device: where they run.
        dtype: of the feature maps: fp64, fp32, bf16 or fp16.
        channels_last: the layout of the feature maps.
        shapes: of the feature maps, out of LARGE and SMALL.

    Returns:
        A sentence that says what differs, or None.

    Raises:
        Exception: whatever a pass raises.
    """
    return _find_difference(functools.partial(_results, passes), device, dtype, channels_last, shapes)


def find_tail_difference(
    tail_passes: Callable[[Tensor], Passes],
    device: torch.device | str,
    dtype: torch.dtype,
    channels_last: bool = False,
    shapes: Sequence[tuple[int, int, int]] = (LARGE, *SMALL),
) -> str | None:
    """The same for the passes of a block's tail, given a function that makes them for the signs of the norm's scale."""
    return _find_difference(functools.partial(_tail_results, tail_passes), device, dtype, channels_last, shapes)


@assume_constant_result
def kernels_obstacle(
    device: torch.device, dtype: torch.dtype, channels_last: bool, tail: bool = False, warn: bool = False
) -> str | None:
    """Why the Triton kernels are not to be trusted with such a feature map; None where they pass their self-test.

    It runs at the first call in the process for each device, dtype and layout. It takes milliseconds, and where Triton
    has not cached the kernels also about a second, to compile them. It cannot run while a CUDA graph is captured:
    kernels that were not tested before are not taken then. To torch.compile the answer is a constant.

    Args:
        device, dtype, channels_last: of the feature map.
        tail: ask for the passes of a block's tail.
        warn: warn, once in a process, that the kernels are not taken.

    Returns:
        What follows the words "impl='fused'" in a message.
    """
    key = device, dtype, channels_last, tail
    if key in _verdicts:
        reason = _verdicts[key]
    elif device.type == 'cuda' and torch.cuda.is_current_stream_capturing():
        reason = 'needs a run of the module before a CUDA graph is captured, for the self-test of the kernels'
    else:
        reason = _verdicts[key] = _in_a_thread(functools.partial(_test_kernels, *key))
    if reason and warn and not _warned:
        _warned.append(reason)
        what = 'the tail of a block' if tail else 'CBAM'
        warnings.warn(
            f"impl='fused' {reason}. So {what} is computed without these kernels, as it is in 'eager'.", stacklevel=2
        )
    return reason


_verdicts: dict[tuple[torch.device, torch.dtype, bool, bool], str | None] = {}
_warned: list[str] = []


def _test_kernels(device: torch.device, dtype: torch.dtype, channels_last: bool, tail: bool) -> str | None:
    try:
        from cbam_mmdet.ops import triton_passes  # Triton is optional

        if tail:
            failure = find_tail_difference(triton_passes.tail_passes, device, dtype, channels_last, [LARGE])
        else:
            failure = find_difference(triton_passes.EAGER_FUNCTIONS, device, dtype, channels_last, [LARGE])
    except Exception as error:  # of a compiler, a driver, an assembler: which ones there are is not known here
        failure = f'{type(error).__name__}: {next(filter(None, map(str.strip, str(error).splitlines())), "")}'
    if failure is None:
        return None
    layout = 'channels-last' if channels_last else 'contiguous'
    return (
        f'needs Triton kernels that pass their self-test, and on {device}, in {str(dtype).removeprefix("torch.")}, '
        f'{layout}, they do not ({failure}). `{DOCTOR}` tests every path on this machine'
    )


def _in_a_thread(function: Callable[[], Any]) -> Any:
    """Call a function where no state of this thread is seen: autocast, inference mode, a tracer, fake tensors."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()), name='cbam-self-test')
    with warnings.catch_warnings():  # the filters are those of all threads, and may turn warnings into errors
        warnings.simplefilter('ignore')
        thread.start()
        thread.join()
    return results[0]


def _find_difference(results_for: Callable[..., Results], device, dtype, channels_last, shapes) -> str | None:
    for n, c, p in shapes:
        shape = (n, p, c) if channels_last else (n, c, p)
        with torch.no_grad():
            for name, actual, expected in results_for(_Inputs(shape, torch.device(device), dtype, channels_last)):
                difference = _difference(actual.cpu(), expected)
                if difference:
                    return f'{name} of {shape} {difference}'
    return None


def _difference(actual: Tensor, expected: Tensor) -> str | None:
    """What differs by more than the rounding of its dtype."""
    if actual.shape != expected.shape:
        return f'has the shape {tuple(actual.shape)}, not {tuple(expected.shape)}'
    if not actual.is_floating_point():
        wrong = int((actual != expected).sum())
        return f'differs in {wrong} of {actual.numel()} indices' if wrong else None
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-5}.get(actual.dtype, torch.finfo(actual.dtype).eps)
    error = float((actual.double() - expected).abs().max() / expected.abs().max())
    # Not `error > tolerance`, which a NaN is not.
    return None if error <= tolerance else f'differs by {error:.1e} of its largest value'


class _Inputs:
    """What the passes take, on the device and in float64."""

    def __init__(self, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype, channels_last: bool):
        self.shape, self.device, self.dtype, self.channels_last = shape, device, dtype, channels_last
        self.accumulate = torch.float64 if dtype == torch.float64 else torch.float32

    def map(self, step: float, grid: float | None = None) -> tuple[Tensor, Tensor]:
        """(N, C, P) of the dtype and layout, and the same numbers in float64; multiples of the grid."""
        value = _sines(self.shape, step, grid).to(self.dtype)
        there = value.to(self.device)
        return there.transpose(1, 2).contiguous().transpose(1, 2) if self.channels_last else there, value.double()

    def small(self, shape: tuple[int, ...], step: float, grid: float | None = None) -> tuple[Tensor, Tensor]:
        """Of the dtype of sums, and the same numbers in float64."""
        value = _sines(shape, step, grid).to(self.accumulate)
        return value.to(self.device), value.double()


def _sines(shape: tuple[int, ...], step: float, grid: float | None = None) -> Tensor:
    """Numbers in [-2, 2]."""
    count = torch.Size(shape).numel()
    value = 2 * torch.sin(step * torch.arange(1, count + 1, dtype=torch.float64, device='cpu')).view(shape)
    return value if grid is None else (value / grid).round() * grid


def _results(passes: Passes, inputs: _Inputs) -> Results:
    """Every result of the six passes, beside its formula."""
    images, channels, pixels = inputs.shape
    x, x64 = inputs.map(1.3, grid=0.125)
    c, c64 = inputs.small((images, channels), 0.7, grid=0.25)
    s, s64 = inputs.small((images, pixels), 0.9)

    descriptor, i = passes.pool_pixels(x, True)
    top, i64 = x64.max(2)
    pooled = torch.stack([x64.mean(2), top], 1)
    yield 'pool_pixels', descriptor, pooled
    yield "pool_pixels' argmax", i, i64
    yield 'pool_pixels without argmax', passes.pool_pixels(x, False)[0], pooled

    descriptor, j = passes.pool_channels(x, True, c)
    u64 = x64 * c64[..., None]
    top, j64 = u64.max(1)
    pooled = torch.stack([top, u64.mean(1)], 1)
    yield 'pool_channels', descriptor, pooled
    yield "pool_channels' argmax", j, j64
    yield 'pool_channels without argmax', passes.pool_channels(x, False, c)[0], pooled

    c, c64 = inputs.small((images, channels), 0.7)
    y = passes.refine(x, s, c)
    yield 'refine', y, x64 * c64[..., None] * s64[:, None]
    _check_layout('refine', y, x)

    g, g64 = inputs.map(1.7)
    ds, dc = passes.backward_maps(g, x, s, c)
    yield "backward_maps' ds", ds, (g64 * x64 * c64[..., None]).sum(1)
    yield "backward_maps' dc", dc, (g64 * x64 * s64[:, None]).sum(2)

    dz, e64 = _gradient_of_pool_channels(inputs, j64)
    j = j64.to(inputs.device, index_dtype(channels))
    yield 'backward_pool_channels', passes.backward_pool_channels(x, dz, j), (x64 * e64).sum(2)
    yield from _backward_input(passes, inputs, (g, g64), (c, c64), (s, s64), dz, e64, i64, j64)


def _tail_results(tail_passes: Callable[[Tensor], Passes], inputs: _Inputs) -> Results:
    """Every result of the passes of a tail, beside its formula. a and b are alpha and beta of passes.py."""
    images, channels, pixels = inputs.shape
    v, v64 = inputs.map(1.3, grid=0.125)
    a, a64 = inputs.small((images, channels), 0.7, grid=0.25)
    b, b64 = inputs.small((images, channels), 1.1, grid=0.25)
    s, s64 = inputs.small((images, pixels), 0.9)
    sign64 = (torch.arange(channels, dtype=torch.float64, device='cpu') % 3) - 1  # -1, 0, 1, -1, ...
    passes = tail_passes(sign64.to(inputs.device, inputs.accumulate))

    descriptor, i = passes.pool_pixels(v, True)
    i64 = (v64 * sign64[:, None]).max(2).indices
    yield "the tail's pool_pixels", descriptor, torch.stack([v64.mean(2), v64.gather(2, i64[..., None])[..., 0]], 1)
    yield "the argmax of the tail's pool_pixels", i, i64

    descriptor, j = passes.pool_channels(v, True, a, b)
    x64 = v64 * a64[..., None] + b64[..., None]
    top, j64 = x64.max(1)
    yield "the tail's pool_channels", descriptor, torch.stack([top, x64.mean(1)], 1)
    yield "the argmax of the tail's pool_channels", j, j64

    identity, identity64 = inputs.map(2.3)
    y = passes.refine(v, s, a, b, identity)
    y64 = (x64 * s64[:, None] + identity64).relu()
    yield "the tail's refine", y, y64
    _check_layout("the tail's refine", y, v)

    g, g64 = inputs.map(1.7)
    ds, da, db, h = passes.backward_maps(g, v, s, a, b, y)
    h64 = g64 * (y.cpu().double() > 0)
    yield "ds of the tail's backward_maps", ds, (h64 * x64).sum(1)
    yield "dalpha of the tail's backward_maps", da, (h64 * v64 * s64[:, None]).sum(2)
    yield "dbeta of the tail's backward_maps", db, (h64 * s64[:, None]).sum(2)
    yield "h of the tail's backward_maps", h, h64

    dz, e64 = _gradient_of_pool_channels(inputs, j64)
    da, db = passes.backward_pool_channels(v, dz, j64.to(inputs.device, index_dtype(channels)))
    yield "dalpha of the tail's backward_pool_channels", da, (v64 * e64).sum(2)
    yield "dbeta of the tail's backward_pool_channels", db, e64.sum(2)
    yield from _backward_input(passes, inputs, (g, g64), (a, a64), (s, s64), dz, e64, i64, j64)


def _gradient_of_pool_channels(inputs: _Inputs, j64: Tensor) -> tuple[Tensor, Tensor]:
    """[dtop, dmean], (N, 2, P), and in float64 what it gives each element: dmean / C, and dtop where j == c."""
    images, channels, pixels = inputs.shape
    dz, dz64 = inputs.small((images, 2, pixels), 1.9)
    e64 = (dz64[:, 1:] / channels).repeat(1, channels, 1)
    return dz, e64.scatter_add(1, j64[:, None], dz64[:, :1])


def _backward_input(passes, inputs: _Inputs, g, c, s, dz: Tensor, e64: Tensor, i64: Tensor, j64: Tensor) -> Results:
    images, channels, pixels = inputs.shape
    dpool, dpool64 = inputs.small((images, 2, channels), 2.1)
    (g, g64), (c, c64), (s, s64) = g, c, s
    i, j = (index.to(inputs.device, torch.int32) for index in (i64, j64))
    dx = passes.backward_input(g, c, s, dz, j, dpool, i)
    dx64 = (g64 * s64[:, None] + e64) * c64[..., None] + dpool64[:, 0, :, None] / pixels
    yield 'backward_input', dx, dx64.scatter_add(2, i64[..., None], dpool64[:, 1, :, None])
    _check_layout('backward_input', dx, g)


def _check_layout(name: str, result: Tensor, x: Tensor) -> None:
    if (result.dtype, result.stride()) != (x.dtype, x.stride()):
        raise TypeError(f'{name} returns {result.dtype} of strides {result.stride()}, not {x.dtype} of {x.stride()}')
