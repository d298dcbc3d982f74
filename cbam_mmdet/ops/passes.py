"""CBAM as six passes over x, with autograd between them: what the CPU path and the Triton kernels share.

x is (N, C, P) with P = H * W; k is 1 for the sigmoid gate, 2 for the unit gate. Only reads and writes of tensors of
x's size cost:

    pool_pixels             read x      avg[n, c], max[n, c] over the pixels, and its argmax i[n, c]
        c = k * sigmoid(MLP(avg) + MLP(max))                                    small, under autograd
    pool_channels           read x      max[n, p], mean[n, p] of x*c over the channels, and its argmax j[n, p]
        s = k * sigmoid(BN(conv([max, mean])))                                  small, under autograd
    refine                  read x      write y = x * c * s

    backward_maps           read g, x   ds[n, p] = sum_c g*x*c      dc[n, c] = sum_p g*x*s
        (dtop, dmean) = gradient of [max, mean] for ds                          autograd
    backward_pool_channels  read x      dc[n, c] += sum_p x * (dmean / C + dtop where j == c)
        (davg, dmax) = gradient of [avg, max] for dc                            autograd
    backward_input          read g      write dx = (g*s + dmean/C + dtop where j == c) * c + davg/P + dmax where i == p

Kept for the backward pass: x, which its producer keeps anyway, c, s, i, j, and what the small parts need. Of equal
maxima the first is taken.

Autograd would add up dx from three parts, each of x's size. Here one pass writes it, the last of the backward:
:class:`_PoolPixels` returns, beside its descriptor, gradient carriers: empty tensors that the two later functions
take as arguments and do not read. The "gradients" that those functions return for the carriers are what the last pass
needs: g, c, s, (dtop, dmean), j. So they go through the graph itself, and whatever handles graphs (torch.compile,
checkpointing, hooks, a second backward) handles them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import Function

from cbam_mmdet.compat.torch import HAS_CUSTOM_OPERATORS, is_compiling


@dataclass(frozen=True)
class Passes:
    """One implementation of the six passes.

    x, g and y are (N, C, P) and contiguous or channels-last, c is (N, C) and s (N, P).

    The small tensors are of `accumulate_dtype(x)`; descriptors and their gradients are (N, 2, C) and (N, 2, P).
    With a tail (fused_tail.py) x is scaled by alpha and beta, (N, C) both, in place of c, and refine adds an identity.
    """

    pool_pixels: Callable  # x, with_argmax -> [avg, max], i
    pool_channels: Callable  # x, with_argmax, c -> [max, mean], j
    refine: Callable  # x, s, c -> y;                       tail: x, s, alpha, beta, identity -> y
    backward_maps: Callable  # g, x, s, c -> ds, dc;        tail: g, x, s, alpha, beta, y -> ds, dalpha, dbeta, h
    backward_pool_channels: Callable  # x, dz, j -> dc;     tail: -> dalpha, dbeta.  dz is [dtop, dmean]
    backward_input: Callable  # g, c, s, dz, j, [davg, dmax], i -> dx
    has_tail: bool = False
    gives_map: bool = False  # refine: x, s, c, width -> y as (N, C, H, W), which torch.compile needs: as_operators


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """In what sums over x are taken: fp32 for half precision, else x's dtype."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def index_dtype(channels: int) -> torch.dtype:
    """Of j, the channels of (N, P) maxima: half the bytes where they suffice."""
    return torch.int16 if channels <= torch.iinfo(torch.int16).max else torch.int32


def apply(
    x: Tensor,
    channel_gate: Callable,
    spatial_gate: Callable,
    passes: Passes,
    identity: Tensor | None = None,
    width: int | None = None,
) -> Tensor:
    """y = x * c * s by the given passes; with a tail, relu((alpha * x + beta) * s + identity).

    Args:
        x: (N, C, P), none of them 0, contiguous or channels-last.
        channel_gate: [avg, max] (N, 2, C) -> c (N, C), of any dtype; with a tail, a tuple of alpha and beta.
        spatial_gate: [max, mean] (N, 2, P) -> s (N, P), of any dtype.
        passes: which implementation computes it.
        identity: with a tail, what is added, of x's shape, dtype and strides.
        width: W, for passes with `gives_map`.

    Returns:
        y, of x's dtype and layout, and of its shape; (N, C, H, W) by passes with `gives_map`.
    """
    refine = functools.partial(passes.refine, width=width) if passes.gives_map else passes.refine
    dtype = accumulate_dtype(x)

    def scales_for(descriptor: Tensor) -> tuple[Tensor, ...]:
        scales = channel_gate(descriptor)
        return tuple(scale.to(dtype) for scale in (scales if passes.has_tail else (scales,)))

    added = () if identity is None else (identity,)
    if not torch.is_grad_enabled():
        scales = scales_for(passes.pool_pixels(x, False)[0])
        s = spatial_gate(passes.pool_channels(x, False, *scales)[0]).to(dtype)
        return refine(x, s, *scales, *added)
    # The later functions take x as a constant: its gradient goes by the carriers.
    descriptor, *carriers = _PoolPixels.apply(x, passes)
    scales = scales_for(descriptor)
    descriptor, *carriers = _PoolChannels.apply(x.detach(), passes, *carriers, *scales)
    s = spatial_gate(descriptor).to(dtype)
    return _Refine.apply(x.detach(), passes, refine, *carriers, s, *scales, *added)


def as_map(pixels: Tensor, shape: torch.Size) -> Tensor:
    """(N, C, P) -> (N, C, H, W), fresh to autograd, not a view.

    What follows a CBAM in a backbone (addition of the identity, ReLU) works in place, which on a view copies whole
    gradients, and is refused on one that leaves an activation checkpoint.
    """
    return pixels if pixels.dim() == 4 else torch.ops.aten._unsafe_view(pixels, shape)


class _PoolPixels(Function):
    """The first pass and the last: x -> its descriptor, and carriers for g, c, s, [dtop, dmean], j."""

    @staticmethod
    def forward(ctx, x, passes):
        descriptor, i = passes.pool_pixels(x, True)
        ctx.save_for_backward(i)
        ctx.passes = passes
        (images, channels, pixels), dtype = x.shape, descriptor.dtype
        shapes = (images, channels), (images, pixels), (images, 2, pixels), (images, pixels)
        return descriptor, _carrier(x, x.dtype, x.shape), *(_carrier(x, dtype, shape) for shape in shapes)

    @staticmethod
    def backward(ctx, dpool, g, c, s, dz, j):
        refuse_second_derivatives()
        (i,) = ctx.saved_tensors
        return ctx.passes.backward_input(g, c, s, dz, j.to(torch.int32), dpool, i), None


class _PoolChannels(Function):
    @staticmethod
    def forward(ctx, x, passes, for_g, for_c, for_s, for_dz, for_j, *scales):
        descriptor, j = passes.pool_channels(x, True, *scales)
        ctx.save_for_backward(x, scales[0], j)
        ctx.passes = passes
        return descriptor, _carrier(x, x.dtype, x.shape), _carrier(x, descriptor.dtype, (x.shape[0], x.shape[2]))

    @staticmethod
    def backward(ctx, dz, g, s):
        refuse_second_derivatives()
        x, c, j = ctx.saved_tensors
        gradients = ctx.passes.backward_pool_channels(x, dz, j)
        gradients = gradients if ctx.passes.has_tail else (gradients,)
        # A channel's number is exact in fp32 up to 16 million.
        return None, None, g, c, s, dz, j.to(c.dtype), *gradients


class _Refine(Function):
    @staticmethod
    def forward(ctx, x, passes, refine, for_g, for_s, s, *inputs):
        y = refine(x, s, *inputs)
        # With a tail y shows where ReLU lets the gradient through; the identity is not needed any more.
        ctx.save_for_backward(x, s, *((*inputs[:-1], y) if passes.has_tail else inputs))
        ctx.passes = passes
        return y

    @staticmethod
    def backward(ctx, g):
        refuse_second_derivatives()
        x, s, *kept = ctx.saved_tensors
        g = like_strides(g.flatten(2), x)
        ds, *gradients = ctx.passes.backward_maps(g, x, s, *kept)
        if ctx.passes.has_tail:
            g = gradients[-1]  # behind ReLU: the identity's gradient, too
        return None, None, None, g, s, ds, *gradients


def _carrier(x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor of that shape that takes no memory."""
    return x.new_empty_strided(shape, (0,) * len(shape), dtype=dtype)


def like_strides(g: Tensor, x: Tensor) -> Tensor:
    """g in x's strides."""
    return g if g.stride() == x.stride() else torch.empty_like(x).copy_(g)


def refuse_second_derivatives() -> None:
    if torch.is_grad_enabled() and not is_compiling():
        raise RuntimeError(
            'CBAM computes first derivatives only, not gradients of gradients (create_graph=True): '
            'use cbam_mmdet.models.cbam.cbam_reference there'
        )


SCHEMAS = dict(
    pool_pixels='(Tensor x, bool with_argmax) -> (Tensor, Tensor)',
    pool_channels='(Tensor x, bool with_argmax, Tensor c) -> (Tensor, Tensor)',
    refine='(Tensor x, Tensor s, Tensor c, SymInt width) -> Tensor',
    backward_maps='(Tensor g, Tensor x, Tensor s, Tensor c) -> (Tensor, Tensor)',
    backward_pool_channels='(Tensor x, Tensor dz, Tensor j) -> Tensor',
    backward_input='(Tensor g, Tensor c, Tensor s, Tensor dz, Tensor j, Tensor dpool, Tensor i) -> Tensor',
)


def as_operators(passes: Passes, prefix: str) -> Passes | None:
    """The same passes as custom operators `cbam_mmdet::{prefix}_{pass}`.

    torch.compile takes these as they are, without a graph break. None where torch has no custom operators.

    refine gives a map, for the reason that compiled.as_planes tells: a convolution is likely to follow.
    """
    if not HAS_CUSTOM_OPERATORS:
        return None

    def refine(x, s, c, width):
        return passes.refine(x, s, c).unflatten(2, (-1, width))

    def register(name):
        function = refine if name == 'refine' else getattr(passes, name)
        operator = torch.library.custom_op(
            f'cbam_mmdet::{prefix}_{name}', function, mutates_args=(), schema=SCHEMAS[name]
        )
        operator.register_fake(FAKES[name])
        return operator

    return Passes(**{name: register(name) for name in SCHEMAS}, gives_map=True)


def _fake_pool_pixels(x, with_argmax):
    images, channels, _ = x.shape
    return x.new_empty((images, 2, channels), dtype=accumulate_dtype(x)), x.new_empty(
        (images, channels), dtype=torch.int32
    )


def _fake_pool_channels(x, with_argmax, c):
    images, channels, pixels = x.shape
    return c.new_empty((images, 2, pixels)), c.new_empty((images, pixels), dtype=index_dtype(channels))


def _fake_refine(x, s, c, width):
    images, channels, pixels = x.shape
    strides = *x.stride()[:2], width * x.stride(2), x.stride(2)
    return x.new_empty_strided((images, channels, pixels // width, width), strides)  # no view, as it was in unflatten


FAKES: dict[str, Callable] = dict(
    pool_pixels=_fake_pool_pixels,
    pool_channels=_fake_pool_channels,
    refine=_fake_refine,
    backward_maps=lambda g, x, s, c: (torch.empty_like(s), torch.empty_like(c)),
    backward_pool_channels=lambda x, dz, j: dz.new_empty(x.shape[:2]),
    backward_input=lambda g, c, s, dz, j, dpool, i: torch.empty_like(g),
)
