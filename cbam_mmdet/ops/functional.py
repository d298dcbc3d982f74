"""CBAM as functions: the equations in plain PyTorch, the same with a backward pass that keeps no feature map, and the choice between
the ways to compute it.

Plain PyTorch keeps ``x * channel_map`` for the backward pass, a second copy of the largest tensors that a detector has.
:func:`cbam` keeps ``x`` alone (its producer keeps it anyway) and recomputes the rest from the two small maps: the paper's module by
the six passes of passes.py, the variants by :class:`_CBAMFunction`.

Notation: x is (N, C, H, W) and P = H * W. A *descriptor* is what the pools leave of x: (N, K, C) for K channel pools,
(N, K, H, W) for the K planes of the spatial branch. A *map* is what multiplies x: (N, C, 1, 1) or (N, 1, H, W).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from cbam_mmdet.errors import UserError
from cbam_mmdet.ops import cpu_passes, passes
from cbam_mmdet.ops.passes import accumulate_dtype

if TYPE_CHECKING:
    from cbam_mmdet.models.cbam import ChannelAttention, SpatialAttention

CHANNEL_POOLS = ('avg', 'max', 'lp', 'lse')
ORDERS = ('channel-spatial', 'spatial-channel', 'parallel')
IMPLS = ('auto', 'eager', 'fused')
# Triton's interpreter, which runs kernels on a CPU, to test them.
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
HAS_TRITON = importlib.util.find_spec('triton') is not None


def channel_descriptor(x: Tensor, pools: Sequence[str] = ('avg', 'max')) -> Tensor:
    """Pool every channel over its pixels (section 3.1 of the paper; 'lp' and 'lse' are in the authors' code).

    Args:
        x: (N, C, H, W), any floating dtype.
        pools: any of 'avg', 'max', 'lp' (the L2 norm), 'lse' (log-sum-exp).

    Returns:
        (N, len(pools), C), float32 for a half-precision x, else x's dtype.
    """
    return _pool_pixels(x.flatten(2), pools)[0]


def spatial_descriptor(x: Tensor, reduce_weight: Tensor | None = None) -> Tensor:
    """Pool every pixel over its channels (equation 3: maximum and mean), or reduce it by a 1x1 convolution (table 2).

    Args:
        x: (N, C, H, W), any floating dtype.
        reduce_weight: (1, C, 1, 1), the 1x1 convolution; None for the paper's [max; mean].

    Returns:
        (N, 2, H, W), maximum first, or (N, 1, H, W); float32 for a half-precision x, else x's dtype.
    """
    return _pool_channels(x.flatten(2), reduce_weight)[0].unflatten(2, x.shape[2:])


def cbam(
    x: Tensor,
    channel: ChannelAttention,
    spatial: SpatialAttention | None,
    order: str = 'channel-spatial',
    impl: str = 'auto',
) -> Tensor:
    """Refine x by both attention maps (equation 1).

    For the backward pass x is kept, and maps of one or two planes: 18 to 22 bytes a pixel whatever C and dtype, so 4.4 % of a bf16 x of
    256 channels at most, and 17 % of one of 64. An x with gaps between its elements (a slice of another tensor) is copied, and the copy kept.

    Args:
        x: (N, C, H, W) with H, W >= 1, fp64, fp32, bf16 or fp16, any memory layout.
        channel: the channel branch.
        spatial: the spatial branch; None leaves it out.
        order: 'channel-spatial' (the paper's), 'spatial-channel', or 'parallel' (both maps computed from x itself).
        impl: 'auto', 'eager' or 'fused', see :func:`implementation`.

    Returns:
        The refined x, of x's shape, dtype and layout.

    Raises:
        UserError: for impl='fused' where the kernels cannot do it.
    """
    chosen = implementation(x, channel, spatial, order, impl)
    leaves = _leaves_this_process()
    if not leaves and x.numel() and not_covered(channel, spatial, order) is None:
        how = _passes(x, chosen)
        if how is not None:
            return _in_passes(x, channel, spatial, how)
    # A compiler fuses and recomputes by itself, and needs to see the equations for it; without gradients nothing is kept.
    if leaves or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return cbam_reference(x, channel, spatial, order)
    modules = [channel] if spatial is None else [channel, spatial]
    parameters = [p for module in modules for p in module.parameters()]
    pixels = _CBAMFunction.apply(x.flatten(2), x.shape[2:], channel, spatial, order, *parameters)
    return as_map(pixels, x.shape)


def implementation(
    x: Tensor, channel: ChannelAttention, spatial: SpatialAttention | None, order: str, impl: str = 'auto'
) -> str:
    """What :func:`cbam` takes for x: 'fused', the Triton kernels of triton_passes.py, or 'eager', PyTorch's operators.

    'auto' takes the kernels for a CUDA tensor (of a GPU of compute capability 8.0 or more), where Triton is installed and they cover the
    variant: order 'channel-spatial', spatial 'pool', pools out of 'avg' and 'max', and any gate, norm, kernel size, reduction, shape, layout
    and dtype. All else is eager: on a CPU in blocks (cpu_passes.py) for the same variants, else one operator after the other. Under
    torch.export and torch.jit.trace, and without any element, it is the equations: what leaves this process holds PyTorch's own operators.

    Raises:
        UserError: for impl='fused' where one of these does not hold.
    """
    if impl == 'eager' or (impl == 'auto' and x.device.type != 'cuda'):
        return 'eager'
    obstacle = not_covered(channel, spatial, order) or _no_kernels(x.device)
    if obstacle and impl == 'fused':
        raise UserError(f"CBAM: impl='fused' {obstacle}; impl='auto' takes the kernels wherever they serve")
    return 'eager' if obstacle else 'fused'


def not_covered(channel: ChannelAttention, spatial: SpatialAttention | None, order: str) -> str | None:
    """Why a variant cannot go by the six passes of passes.py; None if it can."""
    if order != 'channel-spatial':
        return f"serves order='channel-spatial', not {order!r}"
    if spatial is None or spatial.reduce is not None:
        return f"serves spatial='pool', not {None if spatial is None else 'conv'!r}"
    if not set(channel.pools) <= {'avg', 'max'}:
        return f"serves the pools 'avg' and 'max', not {channel.pools}"
    return None


def _leaves_this_process() -> bool:
    """Whether what is traced now will run elsewhere, and so is to hold PyTorch's own operators."""
    # Not torch.compiler.is_exporting(), which torch.compile takes for True. Where torch cannot tell the two apart, a compilation counts.
    exporting = getattr(torch.compiler, '_is_exporting_flag', None)
    return torch.jit.is_tracing() or (torch.compiler.is_compiling() if exporting is None else exporting)


@torch.compiler.assume_constant_result
def _no_kernels(device: torch.device) -> str | None:
    if not HAS_TRITON:
        return 'needs Triton, which is not installed here'
    if INTERPRETED and device.type == 'cpu':
        return None
    if device.type == 'cuda':
        capability = torch.cuda.get_device_capability(device)
        return None if capability >= (8, 0) else f'needs compute capability 8.0, this GPU has {capability}'
    return f'needs a CUDA tensor, this one is on {device}'


def _passes(x: Tensor, chosen: str) -> passes.Passes | None:
    if chosen == 'fused':
        from cbam_mmdet.ops import triton_passes  # Triton is optional

        return triton_passes.OPERATORS if torch.compiler.is_compiling() else triton_passes.PASSES
    if x.device.type == 'cpu':
        return cpu_passes.OPERATORS if torch.compiler.is_compiling() else cpu_passes.PASSES
    return None


def _in_passes(x: Tensor, channel: ChannelAttention, spatial: SpatialAttention, how: passes.Passes) -> Tensor:
    pixels = x.flatten(2)
    if not pixels.is_contiguous() and not pixels.transpose(1, 2).is_contiguous():
        pixels = pixels.contiguous()
    return as_map(passes.apply(pixels, *gates(channel, spatial, x), how), x.shape)


def gates(channel: ChannelAttention, spatial: SpatialAttention, x: Tensor) -> tuple[Callable, Callable]:
    """What passes.apply takes for x, (N, C, H, W): [avg, max] (N, 2, C) -> (N, C), and [max, mean] (N, 2, P) -> (N, P)."""
    planes = [('avg', 'max').index(pool) for pool in channel.pools]

    def channel_gate(descriptor):
        return channel.gate(descriptor if planes == [0, 1] else descriptor[:, planes]).flatten(1)

    def spatial_gate(descriptor):
        descriptor = descriptor.unflatten(2, x.shape[2:])
        if x.device.type == 'cpu':  # the convolution's gradients take a third of the time in this layout
            descriptor = descriptor.contiguous(memory_format=torch.channels_last)
        return spatial.gate(descriptor).flatten(1)

    return channel_gate, spatial_gate


def as_map(pixels: Tensor, shape: torch.Size) -> Tensor:
    """(N, C, P) -> (N, C, H, W), fresh to autograd, not a view: what follows a CBAM in a backbone (addition of the identity, ReLU) works in
    place, which on a view copies whole gradients, and is refused on one that leaves an activation checkpoint."""
    return torch.ops.aten._unsafe_view(pixels, shape)


def cbam_reference(
    x: Tensor, channel: ChannelAttention, spatial: SpatialAttention | None, order: str = 'channel-spatial'
) -> Tensor:
    """:func:`cbam` as the paper writes it, differentiated by autograd."""
    if spatial is None:
        return x * channel(x)
    if order == 'parallel':
        return x * channel(x) * spatial(x)
    first, second = (channel, spatial) if order == 'channel-spatial' else (spatial, channel)
    x = x * first(x)
    return x * second(x)


class _CBAMFunction(torch.autograd.Function):
    """y = u * second(u) with u = x * first(x); for 'parallel', u * second(x). x and y are (N, C, P) here.

    Saved for the backward pass: x, both maps, the places of the maxima, and the small autograd graphs that lead from
    the descriptors to the maps (MLP; convolution and norm, whichever norm it is). u is computed again.
    """

    @staticmethod
    def forward(ctx, x, shape, channel, spatial, order, *parameters):
        branches = [_ChannelBranch(channel)]
        if spatial is not None:
            branches.append(_SpatialBranch(spatial))
        if order == 'spatial-channel':
            branches.reverse()

        u, maps, places = x, [], []
        for i, branch in enumerate(branches):
            map_, place = branch.attend(x if order == 'parallel' else u, shape)
            maps.append(map_)
            places.append(place)
            # From the second branch on, u is ours to overwrite.
            u = u * maps[i] if i == 0 else u.mul_(maps[i])

        ctx.save_for_backward(x, *maps, *places)
        ctx.branches, ctx.order, ctx.parameters = branches, order, parameters
        return u

    @staticmethod
    def backward(ctx, grad):
        passes.refuse_second_derivatives()
        x, *saved = ctx.saved_tensors
        maps, places = saved[: len(ctx.branches)], saved[len(ctx.branches) :]
        first, second = ctx.branches[0], ctx.branches[1] if len(maps) == 2 else None
        grads = {}
        late = None  # under 'parallel' the second branch pooled x, not u

        grad_u = grad
        if second:
            grad_u = torch.mul(grad, maps[1], out=torch.empty_like(x))  # in x's layout, whatever grad's is
            grad_map = _sum_of_products(grad, x, maps[0], dim=second.sum_dim)
            grad_descriptor = second.backward_gate(grad_map, grads)
            if ctx.order == 'parallel':
                late = grad_descriptor
            else:
                second.backward_pool(grad_descriptor, x, maps[0], places[1], grad_u, grads)

        grad_map = _sum_of_products(grad_u, x, dim=first.sum_dim)
        grad_descriptor = first.backward_gate(grad_map, grads)
        grad_x = torch.mul(grad_u, maps[0], out=grad_u if second else torch.empty_like(x))
        first.backward_pool(grad_descriptor, x, None, places[0], grad_x, grads)
        if late is not None:
            second.backward_pool(late, x, None, places[1], grad_x, grads)
        return (grad_x, None, None, None, None, *(grads.get(id(p)) for p in ctx.parameters))


class _Branch:
    """One attention branch inside :class:`_CBAMFunction`: pools, then its module's own gate under a graph of its own."""

    def __init__(self, module: ChannelAttention | SpatialAttention) -> None:
        self.module = module
        self.parameters = [p for p in module.gate_parameters() if p.requires_grad]

    def attend(self, u: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor | None]:
        """The map for u, (N, C, P), as (N, C, 1) or (N, 1, P), of u's dtype; and the places of the maxima."""
        pooled, places = self.pool(u)
        with torch.enable_grad():
            self.pooled = pooled.detach().requires_grad_()
            self.map = self.gate(self.pooled, shape)
        return self.map.detach().to(u.dtype), places

    def backward_gate(self, grad_map: Tensor, grads: dict[int, Tensor]) -> Tensor:
        """From the gradient of the map to that of the descriptor; the parameters' go into grads."""
        wanted = [self.pooled, *self.parameters]
        # The graph stays whole for a second backward pass (retain_graph=True); it is freed with this object.
        grad_pooled, *grad_parameters = torch.autograd.grad(
            self.map, wanted, grad_map.to(self.map.dtype), retain_graph=True, allow_unused=True
        )
        grads.update({id(p): g for p, g in zip(self.parameters, grad_parameters, strict=True)})
        return grad_pooled


class _ChannelBranch(_Branch):
    sum_dim = 2  # a channel's value multiplies all its pixels

    def pool(self, u):
        return _pool_pixels(u, self.module.pools)

    def gate(self, pooled, shape):
        return self.module.gate(pooled).flatten(2)

    def backward_pool(self, grad, x, scale, places, grad_u, grads):
        """Add to grad_u, in place, the gradient of the pools of u = x * scale; grad is (N, K, C)."""
        pixels = x.shape[2]
        for kind, g, pooled in zip(self.module.pools, grad.unbind(1), self.pooled.detach().unbind(1), strict=True):
            g, pooled = g.unsqueeze(2), pooled.unsqueeze(2)
            if kind == 'avg':
                grad_u += (g / pixels).to(x.dtype)
            elif kind == 'max':
                grad_u.scatter_add_(2, places.long(), g.to(x.dtype))
            else:
                u = x if scale is None else x * scale
                if kind == 'lp':  # d norm / du = u / norm, and 0 where the norm is 0, as torch has it
                    grad_u += u * (g / pooled).masked_fill(pooled == 0, 0).to(x.dtype)
                else:
                    grad_u += ((u - pooled).exp_() * g).to(x.dtype)


class _SpatialBranch(_Branch):
    sum_dim = 1  # a pixel's value multiplies all its channels

    def pool(self, u):
        return _pool_channels(u, self.module.reduce_weight)

    def gate(self, pooled, shape):
        return self.module.gate(pooled.unflatten(2, shape)).flatten(2)

    def backward_pool(self, grad, x, scale, places, grad_u, grads):
        """Add to grad_u, in place, the gradient of the pools of u = x * scale; grad is (N, K, P)."""
        weight = self.module.reduce_weight
        if weight is None:
            grad_max, grad_mean = grad.to(x.dtype).split(1, dim=1)
            grad_u += grad_mean / x.shape[1]
            grad_u.scatter_add_(1, places.long(), grad_max)
            return
        grad_u += weight.detach().flatten(2).to(x.dtype) * grad.to(x.dtype)
        if weight.requires_grad:
            u = x if scale is None else x * scale
            grads[id(weight)] = (u * grad).sum((0, 2)).to(weight.dtype).view_as(weight)


def _pool_pixels(u: Tensor, pools: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """(N, C, P) -> (N, K, C), and the place of each channel's maximum, (N, C, 1), if 'max' is among the pools."""
    dtype, places, pooled = accumulate_dtype(u), None, []
    for kind in pools:
        if kind == 'avg':
            value = _mean(u, 2)
        elif kind == 'max':  # not amax: of equal maxima the first gets the gradient, as in max pooling
            value, places = _max_with_places(u)
        elif kind == 'lp':
            value = torch.linalg.vector_norm(u, dim=2, dtype=dtype)
        else:
            value = u.to(dtype).logsumexp(2)
        pooled.append(value)
    return torch.stack(pooled, dim=1), places


def _pool_channels(u: Tensor, reduce_weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(N, C, P) -> (N, 2, P) or (N, 1, P), and the channel of each pixel's maximum, (N, 1, P), if one is taken."""
    dtype = accumulate_dtype(u)
    if reduce_weight is not None:
        return (u * reduce_weight.flatten(2).to(dtype)).sum(1, keepdim=True), None
    value, places = u.max(1, keepdim=True)
    return torch.cat([value.to(dtype), _mean(u, 1).unsqueeze(1)], dim=1), places.to(
        torch.int16 if u.shape[1] <= torch.iinfo(torch.int16).max else torch.int32
    )


def _max_with_places(u: Tensor) -> tuple[Tensor, Tensor]:
    """(N, C, P) -> maxima (N, C) and where they are, (N, C, 1): the first of equals."""
    if u.stride(1) == 1 and not torch.compiler.is_compiling():
        # Channels-last: the same as u.max(2), which is 17 times slower on the CPU there. (Not for the other layout: its
        # kernel for half precision rounds the places themselves in torch 2.4.)
        value, places = F.adaptive_max_pool2d(u.unsqueeze(2), 1, return_indices=True)
    else:
        value, places = u.max(2, keepdim=True)
    return value.flatten(1).to(accumulate_dtype(u)), places.flatten(2).to(torch.int32)


def _mean(u: Tensor, dim: int) -> Tensor:
    """The mean over dim, added up in fp32 for half precision (fp16 overflows in a sum over an image)."""
    dtype = accumulate_dtype(u)
    if u.device.type == 'cpu':  # there, reading bf16 while summing in fp32 is 20 times slower than a copy
        return u.to(dtype).mean(dim)
    return u.mean(dim, dtype=dtype)


def _sum_of_products(*factors: Tensor, dim: int) -> Tensor:
    """The product of the factors, summed over dim, which stays with size 1."""
    product = factors[0] * factors[1]
    for factor in factors[2:]:
        product *= factor
    return product.sum(dim, keepdim=True, dtype=accumulate_dtype(product))
