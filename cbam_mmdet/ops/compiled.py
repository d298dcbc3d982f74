"""Work-arounds for two faults of Inductor, the compiler behind torch.compile, both seen in torch 2.11.

An operator of one's own is out of its sight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cbam_mmdet.compat.torch import HAS_CUSTOM_OPERATORS, is_compiling, leaves_this_process


def first_maximum(u: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """u.max(dim, keepdim=True): the maxima, and where the first of each is, to which its gradient goes.

    On a CPU, where Inductor transposes u in the loop that looks for its maxima, it takes the start of a block of 16 for
    the place of the maximum. So a gradient goes to another pixel.
    """
    if u.device.type == 'cpu' and _goes_through_inductor():
        return _first_maximum(u, dim)
    return u.max(dim, keepdim=True)


def as_planes(descriptor: Tensor) -> Tensor:
    """A descriptor that is a convolution's input, (N, K, H, W): no view in a graph that is compiled.

    Inductor orders the strides of a view that a convolution keeps for its backward pass, and fails where the size is
    dynamic, as it is from the second size on: "cannot determine truth value of Relational".
    """
    return _as_planes(descriptor) if _goes_through_inductor() else descriptor


def _goes_through_inductor() -> bool:
    return HAS_CUSTOM_OPERATORS and is_compiling() and not leaves_this_process()


if HAS_CUSTOM_OPERATORS:

    @torch.library.custom_op('cbam_mmdet::first_maximum', mutates_args=())
    def _first_maximum(u: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        # max over what does not lie side by side takes twenty times as long.
        top, argmax = (u.contiguous() if dim == u.dim() - 1 else u).max(dim, keepdim=True)
        return top, argmax

    @_first_maximum.register_fake
    def _(u: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        shape = [1 if i == dim else size for i, size in enumerate(u.shape)]
        return u.new_empty(shape), u.new_empty(shape, dtype=torch.long)

    def _keep_argmax(ctx, inputs, output) -> None:
        u, ctx.dim = inputs
        ctx.shape = u.shape
        ctx.save_for_backward(output[1])

    def _to_the_first(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        return grad.new_zeros(ctx.shape).scatter(ctx.dim, ctx.saved_tensors[0], grad), None

    _first_maximum.register_autograd(_to_the_first, setup_context=_keep_argmax)

    @torch.library.custom_op('cbam_mmdet::as_planes', mutates_args=())
    def _as_planes(descriptor: Tensor) -> Tensor:
        return descriptor.clone()

    _as_planes.register_fake(torch.empty_like)
    _as_planes.register_autograd(lambda ctx, grad: grad)
