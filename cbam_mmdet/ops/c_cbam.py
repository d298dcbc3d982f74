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

native_batch_norm_backward = torch.ops.aten.native_batch_norm_backward


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
        norm = _Norm(layers.bn)
        s = _gate(norm.forward(z, bn_weight, bn_bias), layers.upper).flatten(1)
        y = PASSES.refine(x, s, c)
        ctx.upper, ctx.norm, ctx.has_bias, ctx.shape = layers.upper, norm, conv_bias is not None, (height, width)
        kept_z = None if layers.bn is None else z
        tensors = x, i, j, c, s, planes, kept_z, conv_weight, bn_weight, *norm.tensors, *kept_mlp, w1, b1, w2, b2
        ctx.save_for_backward(*tensors)
        return torch.ops.aten._unsafe_view(y, (*y.shape[:2], height, width))  # no view, as in passes.as_map

    @staticmethod
    def backward(ctx, g):
        refuse_second_derivatives()
        x, i, j, c, s, planes, z, conv_weight, bn_weight, *rest = ctx.saved_tensors
        norm_tensors, mlp_tensors = rest[:4], rest[4:]
        g = like_strides(g.flatten(2), x)
        ds, dc = PASSES.backward_maps(g, x, s, c)
        dn = _gate_backward(ds, s, ctx.upper).unflatten(1, ctx.shape).unsqueeze(1)
        dz, dbn_weight, dbn_bias = ctx.norm.backward(dn, z, bn_weight, norm_tensors)
        dplanes = convolution_backward(dz, conv_weight).flatten(2)
        dconv_weight = convolution_backward_weight(dz, planes, conv_weight) if ctx.needs_input_grad[6] else None
        dconv_bias = dz.sum().view(1) if ctx.has_bias else None
        dc += PASSES.backward_pool_channels(x, dplanes, j)
        ddescriptor, *dmlp = mlp_backward(_gate_backward(dc, c, ctx.upper), *mlp_tensors)
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


class _Norm:
    """A BatchNorm2d of one channel in its present mode, or none."""

    def __init__(self, bn: Any):
        self.bn = bn
        # What backward takes beside z and the weight, as tensors to save.
        self.tensors: tuple[Tensor | None, ...] = (None, None, None, None)
        if bn is not None:
            self.by_batch = bn.training or bn.running_mean is None
            self.eps = bn.eps

    def forward(self, z: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if self.bn is None:
            return z
        mean, variance, momentum = self.bn.running_mean, self.bn.running_var, self.bn.momentum or 0.0
        if self.bn.training and self.bn.track_running_stats and self.bn.num_batches_tracked is not None:
            self.bn.num_batches_tracked.add_(1)
            if self.bn.momentum is None:  # the average of all batches
                momentum = 1.0 / float(self.bn.num_batches_tracked)
        if self.bn.training and not self.bn.track_running_stats:
            mean = variance = None
        n, *statistics = torch.native_batch_norm(z, weight, bias, mean, variance, self.by_batch, momentum, self.eps)
        # The running statistics change with the next batch; backward looks at them only where they were used.
        self.tensors = (None, None, *statistics) if self.by_batch else (mean, variance, None, None)
        self.bn = None  # the graph keeps tensors, and not the module
        return n

    def backward(self, dn: Tensor, z: Tensor | None, weight: Tensor | None, tensors: list) -> tuple[Tensor | None, ...]:
        """The gradients of z, weight and bias."""
        if not hasattr(self, 'by_batch'):
            return dn, None, None
        mask = [True, weight is not None, weight is not None]
        return native_batch_norm_backward(dn, z, weight, *tensors, self.by_batch, self.eps, mask)
