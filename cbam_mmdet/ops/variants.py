"""Every variant of CBAM by PyTorch's operators, keeping no second feature map for the backward pass."""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor

from cbam_mmdet.ops.branches import ChannelBranch, SpatialBranch
from cbam_mmdet.ops.passes import accumulate_dtype, as_map, refuse_second_derivatives
from cbam_mmdet.ops.pools import pool_channels, pool_pixels


def recompute(x: Tensor, channel: ChannelBranch, spatial: SpatialBranch | None, order: str) -> Tensor:
    """CBAM by equation 1, whose backward pass computes the intermediate feature map again.

    Args:
        x: (N, C, H, W).
        channel: the channel branch.
        spatial: the spatial branch; None leaves it out.
        order: 'channel-spatial', 'spatial-channel' or 'parallel'.

    Returns:
        Of x's shape, dtype and layout.
    """
    parameters = [*channel.parameters(), *([] if spatial is None else spatial.parameters())]
    return as_map(_Recompute.apply(x.flatten(2), x.shape[2:], channel, spatial, order, *parameters), x.shape)


class _Recompute(torch.autograd.Function):
    """y = u * second(u) with u = x * first(x); for 'parallel', u * second(x). x and y are (N, C, P) here.

    Saved for the backward pass: x, both maps, the arguments of the maxima, and the small autograd graphs that lead from
    the descriptors to the maps (MLP; convolution and norm, whichever norm it is). u is computed again.
    """

    @staticmethod
    def forward(ctx, x, shape, channel, spatial, order, *parameters):
        branches = [_ChannelBranch(channel)]
        if spatial is not None:
            branches.append(_SpatialBranch(spatial))
        if order == 'spatial-channel':
            branches.reverse()

        u, maps, argmax = x, [], []
        for i, branch in enumerate(branches):
            map_, index = branch.attend(x if order == 'parallel' else u, shape)
            maps.append(map_)
            argmax.append(index)
            # From the second branch on, u is ours to overwrite.
            u = u * maps[i] if i == 0 else u.mul_(maps[i])

        ctx.save_for_backward(x, *maps, *argmax)
        ctx.branches, ctx.order, ctx.parameters = branches, order, parameters
        return u

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivatives()
        x, *saved = ctx.saved_tensors
        dtype = x.dtype
        maps, argmax = saved[: len(ctx.branches)], saved[len(ctx.branches) :]
        if x.device.type == 'cpu':  # whose sums and scatters of half precision take several times as long
            x, grad, *maps = (t.to(accumulate_dtype(x)) for t in (x, grad, *maps))
        first, second = ctx.branches[0], ctx.branches[1] if len(maps) == 2 else None
        grads = {}
        late = None  # under 'parallel' the second branch pooled x, not u

        grad_u = grad
        if second:
            grad_u = torch.mul(grad, maps[1], out=torch.empty_like(x))  # in x's layout, whatever grad's is
            grad_map = _sum_of_products(grad, x, maps[0], dim=second.sum_dim)
            grad_descriptor = second.backward_map(grad_map, grads)
            if ctx.order == 'parallel':
                late = grad_descriptor
            else:
                second.backward_pool(grad_descriptor, x, maps[0], argmax[1], grad_u, grads)

        grad_map = _sum_of_products(grad_u, x, dim=first.sum_dim)
        grad_descriptor = first.backward_map(grad_map, grads)
        grad_x = torch.mul(grad_u, maps[0], out=grad_u if second else torch.empty_like(x))
        first.backward_pool(grad_descriptor, x, None, argmax[0], grad_x, grads)
        if late is not None:
            second.backward_pool(late, x, None, argmax[1], grad_x, grads)
        return (grad_x.to(dtype), None, None, None, None, *(grads.get(id(p)) for p in ctx.parameters))


class _Branch(abc.ABC):
    """One attention branch inside :class:`_Recompute`: pools, then its module's own gate under a graph of its own."""

    def __init__(self, module: ChannelBranch | SpatialBranch) -> None:
        self.module: Any = module
        self.parameters = [p for p in module.map_parameters() if p.requires_grad]

    @abc.abstractmethod
    def pool(self, u: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor | None]:
        """The descriptor of u, (N, C, P), and the arguments of its maxima."""

    @abc.abstractmethod
    def compute_map(self, pooled: Tensor, shape: torch.Size) -> Tensor:
        """From the descriptor to the map, (N, C, 1) or (N, 1, P)."""

    def attend(self, u: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor | None]:
        """The map for u, (N, C, P), as (N, C, 1) or (N, 1, P), of u's dtype; and the arguments of the maxima."""
        pooled, argmax = self.pool(u, shape)
        with torch.enable_grad():
            self.pooled = pooled.detach().requires_grad_()
            self.map = self.compute_map(self.pooled, shape)
        return self.map.detach().to(u.dtype), argmax

    def backward_map(self, grad_map: Tensor, grads: dict[int, Tensor]) -> Tensor:
        """From the gradient of the map to that of the descriptor; the parameters' go into grads."""
        wanted = [self.pooled, *self.parameters]
        # The graph is kept for a second backward pass (retain_graph=True); it is freed with this object.
        grad_pooled, *grad_parameters = torch.autograd.grad(
            self.map, wanted, grad_map.to(self.map.dtype), retain_graph=True, allow_unused=True
        )
        grads.update({id(p): g for p, g in zip(self.parameters, grad_parameters, strict=True)})
        return grad_pooled


class _ChannelBranch(_Branch):
    sum_dim = 2  # a channel's value multiplies all its pixels

    def pool(self, u, shape):
        return pool_pixels(u.unflatten(2, shape), self.module.pools)

    def compute_map(self, pooled, shape):
        return self.module.map_of(pooled).flatten(2)

    def backward_pool(self, grad, x, scale, argmax, grad_u, grads):
        """Add to grad_u, in place, the gradient of the pools of u = x * scale; grad is (N, K, C)."""
        pixels = x.shape[2]
        for kind, g, pooled in zip(self.module.pools, grad.unbind(1), self.pooled.detach().unbind(1), strict=True):
            g, pooled = g.unsqueeze(2), pooled.unsqueeze(2)
            if kind == 'avg':
                grad_u += (g / pixels).to(x.dtype)
            elif kind == 'max':
                grad_u.scatter_add_(2, argmax.long(), g.to(x.dtype))
            else:
                u = x if scale is None else x * scale
                if kind == 'lp':  # d norm / du = u / norm, and 0 where the norm is 0, as torch has it
                    grad_u += u * (g / pooled).masked_fill(pooled == 0, 0).to(x.dtype)
                else:
                    grad_u += ((u - pooled).exp_() * g).to(x.dtype)


class _SpatialBranch(_Branch):
    sum_dim = 1  # a pixel's value multiplies all its channels

    def pool(self, u, shape):
        return pool_channels(u, self.module.reduce_weight)

    def compute_map(self, pooled, shape):
        return self.module.map_of(pooled.unflatten(2, shape)).flatten(2)

    def backward_pool(self, grad, x, scale, argmax, grad_u, grads):
        """Add to grad_u, in place, the gradient of the pools of u = x * scale; grad is (N, K, P)."""
        weight = self.module.reduce_weight
        if weight is None:
            grad_max, grad_mean = grad.to(x.dtype).split(1, dim=1)
            grad_u += grad_mean / x.shape[1]
            grad_u.scatter_add_(1, argmax.long(), grad_max)
            return
        grad_u += weight.detach().flatten(2).to(x.dtype) * grad.to(x.dtype)
        if weight.requires_grad:
            u = x if scale is None else x * scale
            grads[id(weight)] = (u * grad).sum((0, 2)).to(weight.dtype).view_as(weight)


def _sum_of_products(*factors: Tensor, dim: int) -> Tensor:
    """The product of the factors, summed over dim, which stays with size 1."""
    product = factors[0] * factors[1]
    for factor in factors[2:]:
        product *= factor
    return product.sum(dim, keepdim=True, dtype=accumulate_dtype(product))
