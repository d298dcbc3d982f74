"""CBAM's passes over memory by PyTorch's operators, for a CPU without the C library. What each computes: passes.py.

Half precision is computed in fp32. No matrix products: torch.set_float32_matmul_precision may round those.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cbam_mmdet.ops.passes import Passes, accumulate_dtype, as_operators, index_dtype

CHUNK = 64  # pixels: the first maximum is looked for only in the chunk that holds it


def pool_pixels(x: Tensor, with_argmax: bool) -> tuple[Tensor, Tensor]:
    u = x.to(accumulate_dtype(x))
    if not with_argmax:
        return torch.stack([u.mean(2), u.amax(2)], 1), u.new_empty(u.shape[:2], dtype=torch.int32)
    if x.is_contiguous():
        top, argmax = u.max(2)
    else:
        top, argmax = _max_over_pixels(u)
    return torch.stack([u.mean(2), top], 1), argmax.to(torch.int32)


def _max_over_pixels(u: Tensor) -> tuple[Tensor, Tensor]:
    """u.max(2), which takes twenty times as long where channels lie side by side. amax does not."""
    whole = u.shape[2] // CHUNK * CHUNK
    tops = [u[:, :, :whole].unflatten(2, (-1, CHUNK)).amax(3)] if whole else []
    tops += [u[:, :, whole:].amax(2, keepdim=True)] if whole < u.shape[2] else []
    top, chunk = torch.cat(tops, 2).max(2, keepdim=True)
    # Beyond the end the last pixel stands in: it comes after itself, so the first of equals is found all the same.
    candidates = (chunk * CHUNK + torch.arange(CHUNK, device=u.device)).clamp_(max=u.shape[2] - 1)
    return top.squeeze(2), candidates.gather(2, u.gather(2, candidates).max(2, keepdim=True).indices).squeeze(2)


def pool_channels(x: Tensor, with_argmax: bool, c: Tensor) -> tuple[Tensor, Tensor]:
    u = x.to(c.dtype) * c[:, :, None]
    if with_argmax:
        top, argmax = u.max(1)
    else:
        top, argmax = u.amax(1), u.new_empty((u.shape[0], u.shape[2]))
    return torch.stack([top, u.mean(1)], 1), argmax.to(index_dtype(x.shape[1]))


def refine(x: Tensor, s: Tensor, c: Tensor) -> Tensor:
    return (x.to(c.dtype) * c[:, :, None]).mul_(s[:, None]).to(x.dtype)


def backward_maps(g: Tensor, x: Tensor, s: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    product = g.to(c.dtype) * x.to(c.dtype)
    return (product * c[:, :, None]).sum(1), product.mul_(s[:, None]).sum(2)


def backward_pool_channels(x: Tensor, dz: Tensor, j: Tensor) -> Tensor:
    dc = (x.to(dz.dtype) * (dz[:, 1:] / x.shape[1])).sum(2)
    # One value a pixel: x itself there, not maximum / c, which is 0 / 0 where c is 0.
    j = j.long()
    return dc.scatter_add_(1, j, x.gather(1, j.unsqueeze(1)).squeeze(1) * dz[:, 0])


def backward_input(g: Tensor, c: Tensor, s: Tensor, dz: Tensor, j: Tensor, dpool: Tensor, i: Tensor) -> Tensor:
    dx = (g.to(c.dtype) * s[:, None]).add_(dz[:, 1:] / g.shape[1])
    dx.scatter_add_(1, j.long().unsqueeze(1), dz[:, :1]).mul_(c[:, :, None]).add_(dpool[:, 0, :, None] / g.shape[2])
    return dx.scatter_add_(2, i.long().unsqueeze(2), dpool[:, 1, :, None]).to(g.dtype)


EAGER_FUNCTIONS = Passes(pool_pixels, pool_channels, refine, backward_maps, backward_pool_channels, backward_input)
CUSTOM_OPERATORS = as_operators(EAGER_FUNCTIONS, 'torch')
