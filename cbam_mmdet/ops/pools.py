"""What the pools leave of a feature map: the descriptors from which the attention maps are computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cbam_mmdet.compat.torch import is_compiling
from cbam_mmdet.ops.compiled import first_maximum
from cbam_mmdet.ops.passes import accumulate_dtype, index_dtype

CHANNEL_POOLS = ('avg', 'max', 'lp', 'lse')


def channel_descriptor(x: Tensor, pools: Sequence[str] = ('avg', 'max')) -> Tensor:
    """Pool every channel over its pixels (section 3.1 of the paper; 'lp' and 'lse' are in the authors' code).

    Args:
        x: (N, C, H, W), any floating dtype.
        pools: any of 'avg', 'max', 'lp' (the L2 norm), 'lse' (log-sum-exp).

    Returns:
        (N, len(pools), C), float32 for a half-precision x, else x's dtype.
    """
    return pool_pixels(x, pools, with_argmax=False)[0]


def spatial_descriptor(x: Tensor, reduce_weight: Tensor | None = None) -> Tensor:
    """Pool every pixel over its channels (equation 3: maximum and mean), or reduce it by a 1x1 convolution (table 2).

    Args:
        x: (N, C, H, W), any floating dtype.
        reduce_weight: (1, C, 1, 1), the 1x1 convolution; None for the paper's [max; mean].

    Returns:
        (N, 2, H, W), maximum first, or (N, 1, H, W); float32 for a half-precision x, else x's dtype.
    """
    return pool_channels(x.flatten(2), reduce_weight, with_argmax=False)[0].unflatten(2, x.shape[2:])


def pool_pixels(x: Tensor, pools: Sequence[str], with_argmax: bool = True) -> tuple[Tensor, Tensor | None]:
    """(N, C, H, W) -> (N, K, C), and the argmax of each channel's maximum, (N, C, 1), if 'max' is among the pools."""
    u, dtype, argmax, pooled = x.flatten(2), accumulate_dtype(x), None, []
    for kind in pools:
        if kind == 'avg':
            value = _mean(u, 2)
        elif kind == 'max' and _needs_first(with_argmax):
            value, argmax = _max_with_argmax(x)
        elif kind == 'max':
            value = u.amax(2).to(dtype)
        elif kind == 'lp':
            value = torch.linalg.vector_norm(u, dim=2, dtype=dtype)
        else:
            value = u.to(dtype).logsumexp(2)
        pooled.append(value)
    return torch.stack(pooled, dim=1), argmax


def pool_channels(u: Tensor, reduce_weight: Tensor | None, with_argmax: bool = True) -> tuple[Tensor, Tensor | None]:
    """(N, C, P) -> (N, 2, P) or (N, 1, P), and the channel of each pixel's maximum, (N, 1, P), if one is taken."""
    dtype = accumulate_dtype(u)
    if reduce_weight is not None:
        return (u * reduce_weight.flatten(2).to(dtype)).sum(1, keepdim=True), None
    if _needs_first(with_argmax):
        value, argmax = first_maximum(u, 1)
    else:
        value, argmax = u.amax(1, keepdim=True), None
    if with_argmax:
        argmax = argmax.to(index_dtype(u.shape[1]))
    return torch.cat([value.to(dtype), _mean(u, 1).unsqueeze(1)], dim=1), argmax


def _needs_first(with_argmax: bool) -> bool:
    """Whether it matters which of equal maxima is taken.

    The first gets the gradient, as in max pooling. amax shares it out, and takes a tenth of the time on a CPU. What is
    traced or exported is made without gradients, and may be trained.
    """
    return with_argmax or torch.is_grad_enabled() or torch.jit.is_tracing() or is_compiling()


def _max_with_argmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """(N, C, H, W) -> maxima (N, C) and where they are among the pixels, (N, C, 1): the first of equals."""
    if x.stride(1) == 1 and not is_compiling():
        # Channels-last: the same as max(2), which is 20 times slower on the CPU there. (Not for the other layout: its
        # kernel for half precision rounds the argmax themselves in torch 2.4.)
        value, argmax = F.adaptive_max_pool2d(x, 1, return_indices=True)
    else:
        value, argmax = first_maximum(x.flatten(2), 2)
    return value.flatten(1).to(accumulate_dtype(x)), argmax.flatten(2).to(torch.int32)


def _mean(u: Tensor, dim: int) -> Tensor:
    """The mean over dim, added up in fp32 for half precision (fp16 overflows in a sum over an image)."""
    dtype = accumulate_dtype(u)
    if u.device.type == 'cpu':  # there, reading bf16 while summing in fp32 is 20 times slower than a copy
        return u.to(dtype).mean(dim)
    return u.mean(dim, dtype=dtype)
