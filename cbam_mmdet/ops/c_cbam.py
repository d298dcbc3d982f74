"""CBAM with gradients on a CPU in one autograd function: the passes of c_passes.py and the small parts between them.

It computes what passes.apply does with the C library, in the same order. There the graph of autograd has a node for
each pass and each small part, and at a small feature map the graph costs more than the work. It takes branches as
models/cbam.py builds them; anything else, such as a hook on a layer, goes by passes.apply.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from cbam_mmdet.ops.branches import ChannelBranch, SpatialBranch
from cbam_mmdet.ops.c_branches import (
    convolution,
    convolution_backward,
    convolution_backward_weight,
    is_readable,
    is_unhooked,
    mlp,
    mlp_backward,
    serves_convolution,
    serves_mlp,
)
from cbam_mmdet.ops.c_passes import EAGER_FUNCTIONS as PASSES
from cbam_mmdet.ops.passes import accumulate_dtype, like_strides, refuse_second_derivatives


@dataclass(frozen=True)
class Layers:
    """The layers of both branches. upper: what a gate's values do not reach, 1 or 2."""

    fc1: nn.Linear
    fc2: nn.Linear
    conv: nn.Conv2d
    bn: nn.Module | None
    upper: float


def layers_for(x: Tensor, channel: ChannelBranch, spatial: SpatialBranch) -> Layers | None:
    """The layers, if this file computes what they do for x, (N, C, H, W); None otherwise."""
    gates, upper = (channel.activation, spatial.activation), channel.upper
    if upper is None or upper != spatial.upper or not all(is_unhooked(gate, type(gate)) for gate in gates):
        return None
    layers = Layers(channel.fc1, channel.fc2, spatial.conv, spatial.bn, upper)
    like = x.new_empty(0, dtype=accumulate_dtype(x))
    serves = (
        channel.pools == ('avg', 'max')
        and serves_mlp(layers.fc1, layers.fc2, (x.shape[0], 2, x.shape[1]), like)
        and serves_convolution(layers.conv, 2, like)
        and (layers.bn is None or _serves_norm(layers.bn, x.shape[0] * x.shape[2] * x.shape[3], like))
    )
    return layers if serves else None


def _serves_norm(bn: nn.Module, values: int, like: Tensor) -> bool:
    # Of one value BatchNorm takes no statistics: spatial.map_of says what is done then.
    return is_unhooked(bn, nn.BatchNorm2d) and is_readable(like, *_norm_tensors(bn)) and values > 1


def _norm_tensors(bn: Any) -> tuple[Tensor | None, ...]:
    return bn.weight, bn.bias, bn.running_mean, bn.running_var


def apply(x: Tensor, layers: Layers) -> Tensor:
    """(N, C, H, W) -> the same shape, dtype and strides. An x with gaps between its elements is copied."""
    weight, bias, *_ = (None, None) if layers.bn is None else _norm_tensors(layers.bn)
    fc1, fc2, conv = layers.fc1, layers.fc2, layers.conv
    return _CBAM.apply(x, layers, fc1.weight, fc1.bias, fc2.weight, fc2.bias, conv.weight, conv.bias, weight, bias)


class _CBAM(Function):
    @staticmethod
    def forward(ctx, x, layers, w1, b1, w2, b2, conv_weight, conv_bias, bn_weight, bn_bias):
        height, width = x.shape[2:]
        x = x.flatten(2)
        if not x.is_contiguous() and not x.transpose(1, 2).is_contiguous():
            x = x.contiguous()
        descriptor, i = PASSES.pool_pixels(x, True)
        z, *kept_mlp = mlp(descriptor, w1, b1, w2, b2)
        c = _gate(z, layers.upper)
        planes, j = PASSES.pool_channels(x, True, c)
        planes = planes.unflatten(2, (height, width))
        z = convolution(planes, conv_weight)
        if conv_bias is not None:
            z += conv_bias
        n, ctx.by_batch, kept_norm = _norm(layers.bn, z)
        s = _gate(n, layers.upper).flatten(1)
        y = PASSES.refine(x, s, c)
        ctx.upper, ctx.has_bias, ctx.shape = layers.upper, conv_bias is not None, (height, width)
        ctx.eps = None if layers.bn is None else layers.bn.eps
        ctx.save_for_backward(x, i, j, c, s, planes, conv_weight, bn_weight, *kept_norm, *kept_mlp, w1, b1, w2, b2)
        return torch.ops.aten._unsafe_view(y, (*y.shape[:2], height, width))  # no view, as in passes.as_map

    @staticmethod
    def backward(ctx, g):
        refuse_second_derivatives()
        x, i, j, c, s, planes, conv_weight, bn_weight, *rest = ctx.saved_tensors
        (z, *statistics), kept_mlp = rest[:5], rest[5:]
        g = like_strides(g.flatten(2), x)
        ds, dc = PASSES.backward_maps(g, x, s, c)
        dz, dbn_weight, dbn_bias = _gate_backward(ds, s, ctx.upper).unflatten(1, ctx.shape).unsqueeze(1), None, None
        if ctx.by_batch is not None:
            mask = [True, bn_weight is not None, bn_weight is not None]
            dz, dbn_weight, dbn_bias = torch.ops.aten.native_batch_norm_backward(
                dz, z, bn_weight, *statistics, ctx.by_batch, ctx.eps, mask
            )
        dplanes = convolution_backward(dz, conv_weight).flatten(2)
        dconv_weight = convolution_backward_weight(dz, planes, conv_weight) if ctx.needs_input_grad[6] else None
        dconv_bias = dz.sum().view(1) if ctx.has_bias else None
        dc += PASSES.backward_pool_channels(x, dplanes, j)
        ddescriptor, *dmlp = mlp_backward(_gate_backward(dc, c, ctx.upper), *kept_mlp)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = PASSES.backward_input(g, c, s, dplanes, j, ddescriptor, i)
            dx = torch.ops.aten._unsafe_view(dx, (*dx.shape[:2], *ctx.shape))
        return dx, None, *dmlp, dconv_weight, dconv_bias, dbn_weight, dbn_bias


def _gate(z: Tensor, upper: float) -> Tensor:
    return torch.sigmoid(z) if upper == 1 else upper * torch.sigmoid(z)


def _gate_backward(dgate: Tensor, gate: Tensor, upper: float) -> Tensor:
    if upper == 1:
        return torch.ops.aten.sigmoid_backward(dgate, gate)
    return torch.ops.aten.sigmoid_backward(upper * dgate, gate / upper)


def _norm(bn: Any, z: Tensor) -> tuple[Tensor, bool | None, tuple[Tensor | None, ...]]:
    """bn(z) as torch.nn.BatchNorm2d computes it; None for bn leaves z as it is.

    Returns:
        The result; whether it is by the batch's own statistics, None without bn; and five tensors to keep, those that
        native_batch_norm_backward takes beside the weight.
    """
    if bn is None:
        return z, None, (None, None, None, None, None)
    by_batch = bn.training or bn.running_mean is None
    mean, variance, momentum = bn.running_mean, bn.running_var, bn.momentum or 0.0
    if bn.training and not bn.track_running_stats:
        mean = variance = None
    elif bn.training and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:  # the average of all batches
            momentum = 1.0 / float(bn.num_batches_tracked)
    n, *statistics = torch.native_batch_norm(z, bn.weight, bn.bias, mean, variance, by_batch, momentum, bn.eps)
    # The running statistics change with the next batch; backward looks at them only where they were used.
    return n, by_batch, (z, None, None, *statistics) if by_batch else (z, mean, variance, None, None)
