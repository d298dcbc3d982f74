"""The choice between the ways to compute CBAM.

Plain PyTorch keeps `x * channel_map` for the backward pass, a second copy of the largest tensors that a detector has.
The ways here keep x alone, which its producer keeps anyway, and compute the rest again from the two small maps:

    passes.py     the paper's module in six passes over memory, by c_passes.py, triton_passes.py or torch_passes.py
    c_cbam.py     the same by c_passes.py, in one autograd function
    variants.py   every variant of it, by one autograd function of PyTorch's operators

Notation: x is (N, C, H, W) and P = H * W. A *descriptor* is what the pools leave of x: (N, K, C) for K channel pools,
(N, K, H, W) for the K planes of the spatial branch. A *map* is what multiplies x: (N, C, 1, 1) or (N, 1, H, W).
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from cbam_mmdet.compat.torch import HAS_CUSTOM_OPERATORS, assume_constant_result, is_compiling, leaves_this_process
from cbam_mmdet.errors import UserError
from cbam_mmdet.ops import c_branches, c_cbam, c_passes, torch_passes
from cbam_mmdet.ops.branches import ChannelBranch, SpatialBranch
from cbam_mmdet.ops.passes import Passes, apply, as_map
from cbam_mmdet.ops.self_test import kernels_obstacle
from cbam_mmdet.ops.variants import recompute

ORDERS = ('channel-spatial', 'spatial-channel', 'parallel')
IMPLS = ('auto', 'eager', 'fused')
# Triton's interpreter, which runs kernels on a CPU, to test them.
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
# Triton 3, which comes with torch 2.4: the kernels do not compile with an earlier one.
HAS_TRITON = HAS_CUSTOM_OPERATORS and importlib.util.find_spec('triton') is not None
TRITON_DEVICES = ('cuda',)  # where 'auto' takes the Triton kernels


def choose(
    x: Tensor, channel: ChannelBranch, spatial: SpatialBranch | None, order: str, impl: str = 'auto'
) -> Callable[..., Tensor] | None:
    """The function that computes CBAM for x.

    Args:
        x: (N, C, H, W) with H, W >= 1, fp64, fp32, bf16 or fp16, any memory layout.
        channel: the channel branch.
        spatial: the spatial branch; None leaves it out.
        order: 'channel-spatial' (the paper's), 'spatial-channel', or 'parallel' (both maps computed from x itself).
        impl: 'auto', 'eager' or 'fused', see :func:`implementation`.

    Returns:
        A function of x, channel, spatial and order, or None for the equations as they are written: where a graph is
        traced that leaves this process, where a compiler fuses and recomputes by itself, and where nothing is kept
        since no gradient is wanted.

    Raises:
        UserError: for impl='fused' where the kernels do not support it.
    """
    chosen = implementation(x, channel, spatial, order, impl)
    leaves = leaves_this_process()
    if not leaves and x.numel() and not_covered(channel, spatial, order) is None:
        passes = _passes_for(x, chosen)
        if passes is not None:
            return functools.partial(_in_passes, passes=passes)
    if leaves or is_compiling() or not torch.is_grad_enabled():
        return None
    return recompute


def implementation(
    x: Tensor, channel: ChannelBranch, spatial: SpatialBranch | None, order: str, impl: str = 'auto'
) -> str:
    """What :func:`choose` takes for x: 'fused', the kernels, or 'eager', PyTorch's operators.

    'auto' takes the kernels wherever they support the variant (order 'channel-spatial', spatial 'pool', pools out of
    'avg' and 'max', and any gate, norm, kernel size, reduction, shape and layout) and x:

    - on a CPU the C library, where it was built, for fp32, fp64 and bf16;
    - on a GPU of compute capability 8.0 or more the Triton kernels, where Triton is installed, for any dtype. They must
      pass their self-test (self_test.py), which runs at the first tensor of each device, dtype and layout; where they
      fail, a warning says so once.

    All else is eager: without a gradient the equations as they are written; with one the same passes by PyTorch's
    operators on a CPU, and `recompute` elsewhere and for the other variants. None keeps a second feature map. Under
    torch.export and torch.jit.trace, and without any element, it is the equations: what leaves this process holds
    PyTorch's own operators. In a forked process (a worker that loads data) the C library does not serve: OpenMP's
    threads do not live on there.

    Raises:
        UserError: for impl='fused' where one of these does not hold.
    """
    if impl == 'eager' or (impl == 'auto' and not _in_c(x) and x.device.type not in TRITON_DEVICES):
        return 'eager'
    obstacle = not_covered(channel, spatial, order)
    if is_compiling() and not HAS_CUSTOM_OPERATORS:
        obstacle = obstacle or 'needs torch 2.4 or later under torch.compile'
    elif _in_c(x):
        obstacle = obstacle or c_passes.obstacle(x)
    else:
        obstacle = obstacle or _no_kernels(x.device) or distrust(x, warn=impl == 'auto')
    if obstacle and impl == 'fused':
        raise UserError(f"CBAM: impl='fused' {obstacle}; impl='auto' takes the kernels wherever they support it")
    return 'eager' if obstacle else 'fused'


def not_covered(channel: ChannelBranch, spatial: SpatialBranch | None, order: str) -> str | None:
    """Why a variant cannot go by the six passes of passes.py; None if it can."""
    if order != 'channel-spatial':
        return f"supports order='channel-spatial', not {order!r}"
    if spatial is None or spatial.reduce_weight is not None:
        return f"supports spatial='pool', not {None if spatial is None else 'conv'!r}"
    if not set(channel.pools) <= {'avg', 'max'}:
        return f"supports the pools 'avg' and 'max', not {channel.pools}"
    return None


def has_tail(x: Tensor) -> bool:
    """Whether x's kernels can compute a block's tail (models/fused_tail.py): the C library's cannot."""
    return not _in_c(x)


def _in_c(x: Tensor) -> bool:
    """Whether x's kernels are those of the C library, rather than Triton's."""
    return x.device.type == 'cpu' and not INTERPRETED


@assume_constant_result
def _no_kernels(device: torch.device) -> str | None:
    if not HAS_TRITON:
        return 'needs torch 2.4 or later with its Triton, which is not installed here'
    if INTERPRETED and device.type == 'cpu':
        return None
    if device.type == 'cuda':
        capability = torch.cuda.get_device_capability(device)
        return None if capability >= (8, 0) else f'needs compute capability 8.0, this GPU has {capability}'
    return f'needs a CUDA tensor, this one is on {device}'


def distrust(x: Tensor, tail: bool = False, warn: bool = False) -> str | None:
    """Why the kernels are not to be trusted with x, (N, C, H, W): what `self_test.kernels_obstacle` says."""
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return kernels_obstacle(x.device, x.dtype, channels_last, tail, warn)


def _passes_for(x: Tensor, chosen: str) -> Passes | None:
    if chosen == 'eager' and (x.device.type != 'cpu' or not torch.is_grad_enabled()):
        return None
    kernels: ModuleType = torch_passes if chosen == 'eager' else c_passes
    if chosen == 'fused' and not _in_c(x):
        from cbam_mmdet.ops import triton_passes as kernels  # Triton is optional
    return kernels.CUSTOM_OPERATORS if is_compiling() else kernels.EAGER_FUNCTIONS  # None before torch 2.4


def _in_passes(x: Tensor, channel: ChannelBranch, spatial: SpatialBranch, order: str, passes: Passes) -> Tensor:
    """CBAM by the six passes; they cover one order only.

    For the backward pass x is kept, and maps of one or two planes: 18 to 22 bytes a pixel whatever C and dtype, so
    4.4 % of a bf16 x of 256 channels at most, and 17 % of one of 64. An x with gaps between its elements (a slice of
    another tensor) is copied, and the copy kept.
    """
    if passes is c_passes.EAGER_FUNCTIONS and torch.is_grad_enabled():
        layers = c_cbam.layers_for(x, channel, spatial)
        if layers is not None:
            return c_cbam.apply(x, layers)
    pixels = x.flatten(2)
    if not pixels.is_contiguous() and not pixels.transpose(1, 2).is_contiguous():
        pixels = pixels.contiguous()
    small = (c_branches.sum_of_mlp, c_branches.convolve) if passes is c_passes.EAGER_FUNCTIONS else (None, None)
    y = apply(pixels, *map_functions(channel, spatial, x, *small), passes, width=x.shape[3])
    return as_map(y, x.shape)


def map_functions(
    channel: ChannelBranch,
    spatial: SpatialBranch,
    x: Tensor,
    mlp: Callable | None = None,
    convolve: Callable | None = None,
) -> tuple[Callable, Callable]:
    """What passes.apply takes for x, (N, C, H, W). mlp and convolve: see the branches.

    Returns:
        [avg, max] (N, 2, C) -> (N, C), and [max, mean] (N, 2, P) -> (N, P).
    """
    planes = [('avg', 'max').index(pool) for pool in channel.pools]

    def channel_gate(descriptor):
        return channel.scales_of(descriptor if planes == [0, 1] else descriptor[:, planes], mlp)

    def spatial_gate(descriptor):
        return spatial.map_of(descriptor.unflatten(2, x.shape[2:]), convolve).flatten(1)

    return channel_gate, spatial_gate
