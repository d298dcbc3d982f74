"""The tail of a residual block that ends in CBAM, relu(CBAM(norm(v)) + identity), in CBAM's own passes over memory.

With fixed statistics (MMDetection's norm_eval, or eval mode) the norm is x = a * v + b, a and b by channel. Then
nothing of v's size but the block's output need ever be written forward. Notation and the passes without a tail:
passes.py.

    pool_pixels             read v            mean[n, c] of v, and v[i]; i is x's argmax: v's, or -v's where a < 0
        c = k * sigmoid(MLP(a * mean + b) + MLP(a * v[i] + b))                          small, under autograd
        alpha = c * a;  beta = c * b
    pool_channels           read v            max, mean over the channels of alpha * v + beta
        s = k * sigmoid(BN(conv([max, mean])))                                          small, under autograd
    refine                  read v, identity  write y = relu((alpha * v + beta) * s + identity)

    backward_maps           read g, y, v      write h = g where y > 0;  ds, dalpha, dbeta
    backward_pool_channels  read v            dalpha, dbeta
    backward_input          read h            write dv

h is the identity's gradient as well. The gradients of a and b, and so of the norm's weight and bias, come from those
of alpha, beta and the descriptor by autograd. In all 4 reads and 1 write forward, 5 and 2 backward; the plain tail
without CBAM (norm, addition, ReLU, operator by operator) takes 4 and 3 forward, and about as much backward.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cbam_mmdet.compat.torch import is_compiling
from cbam_mmdet.errors import UserError
from cbam_mmdet.models.cbam import CBAM, SpatialAttention
from cbam_mmdet.models.plugins.apply_child import ApplyChild
from cbam_mmdet.ops.functional import distrust, has_tail, map_functions
from cbam_mmdet.ops.passes import accumulate_dtype, apply, as_map

LAST_NORM = {Bottleneck.forward: 3, BasicBlock.forward: 2}


def fuse_tails(backbone: nn.Module) -> int:
    """Let every residual block that ends in one CBAM compute its tail in CBAM's passes, where it is supported.

    It is where CBAM takes the Triton kernels (`CBAM.implementation` is 'fused' on a GPU) and the tail's pass their
    self-test, the block's last norm is a BatchNorm with fixed statistics, the identity has the dtype and strides of the
    last convolution's output, nobody listens by a forward hook on the norm, the CBAM or the ReLU, and the block is not
    under `with_cp` or torch.compile. Otherwise the block's own forward runs. Weights keep their names.

    Args:
        backbone: with MMDetection's BasicBlock or Bottleneck (ResNet, ResNeXt, ...); its blocks are changed in place.

    Returns:
        The number of such blocks.

    Raises:
        UserError: if there is none.
    """
    blocks = [block for block in backbone.modules() if type(block).forward in LAST_NORM and _cbam_of(block)]
    if not blocks:
        raise UserError(
            f'fuse_tail: no block in {type(backbone).__name__} has one CBAM at its end (after bn3 of a Bottleneck, '
            'bn2 of a BasicBlock)'
        )
    for block in blocks:
        block.forward = FusedTail(block)
    return len(blocks)


class FusedTail:
    """In place of a residual block's forward."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __call__(self, x: Tensor) -> Tensor:
        block = self.block
        cbam, norm = _cbam_of(block), _last_norm(block)
        if block.with_cp or cbam is None or not _has_fixed_statistics(norm) or _is_traced() or _has_listeners(block):
            return type(block).forward(block, x)
        out = block.relu(block.norm1(block.conv1(x)))
        if isinstance(block, Bottleneck):
            out = block.relu(block.norm2(block.conv2(_plugins(block, out, 1))))
            v = block.conv3(_plugins(block, out, 2))
        else:
            v = block.conv2(out)
        identity = x if block.downsample is None else block.downsample(x)
        alike = (v.dtype, v.stride()) == (identity.dtype, identity.stride())
        alike = alike and v.numel() and _is_dense(v) and has_tail(v)
        if alike and cbam.implementation(v) == 'fused' and not distrust(v, tail=True, warn=True):
            return tail(v, identity, norm, cbam)
        return block.relu(_plugins(block, norm(v), 3) + identity)


def tail(v: Tensor, identity: Tensor, norm: _BatchNorm, cbam: CBAM) -> Tensor:
    """relu(cbam(norm(v)) + identity).

    Args:
        v: (N, C, H, W), contiguous or channels-last, on a device that has the kernels.
        identity: of v's shape, dtype and strides.
        norm: a BatchNorm whose running statistics are taken.
        cbam: of a variant that the kernels cover.

    Returns:
        Of v's shape, dtype and layout.
    """
    from cbam_mmdet.ops.triton_passes import tail_passes  # Triton is optional

    dtype = accumulate_dtype(v)
    a = (norm.running_var.to(dtype) + norm.eps).rsqrt()
    a = a if norm.weight is None else a * norm.weight.to(dtype)
    b = -norm.running_mean.to(dtype) * a
    b = b if norm.bias is None else b + norm.bias.to(dtype)
    spatial = cast(SpatialAttention, cbam.spatial)  # the kernels support no CBAM without one
    channel_gate, spatial_gate = map_functions(cbam.channel, spatial, v)

    def scales(descriptor: Tensor) -> tuple[Tensor, Tensor]:
        c = channel_gate(descriptor * a + b).to(dtype)
        return c * a, c * b

    y = apply(v.flatten(2), scales, spatial_gate, tail_passes(a.detach().sign()), identity.flatten(2))
    if torch.is_grad_enabled():
        return y.unflatten(2, v.shape[2:])  # a view: y is kept, and so is to be seen to change where it is changed
    return as_map(y, v.shape)


def _last_norm(block: nn.Module) -> Any:
    return getattr(block, f'norm{LAST_NORM[type(block).forward]}')


def _cbam_of(block: nn.Module) -> CBAM | None:
    """The block's last module before the addition, if that is a CBAM right after the norm."""
    norm = _last_norm(block)
    after = [norm.get_submodule(hook.name) for hook in norm._forward_hooks.values() if isinstance(hook, ApplyChild)]
    after += [block.get_submodule(name) for name in getattr(block, 'after_conv3_plugin_names', [])]
    return after[0] if len(after) == 1 and isinstance(after[0], CBAM) else None


def _has_listeners(block: nn.Module) -> bool:
    """Whether someone wants to see what a fused tail does not make."""
    norm, cbam = _last_norm(block), _cbam_of(block)
    hooks = [hook for hook in norm._forward_hooks.values() if not isinstance(hook, ApplyChild)]
    quiet = (cbam, cbam.channel, cbam.spatial, block.relu)
    return bool(hooks or norm._forward_pre_hooks or any(m._forward_hooks or m._forward_pre_hooks for m in quiet if m))


def _has_fixed_statistics(norm: nn.Module) -> bool:
    return isinstance(norm, _BatchNorm) and not norm.training and norm.running_mean is not None


def _is_traced() -> bool:
    return is_compiling() or torch.jit.is_tracing()


def _is_dense(v: Tensor) -> bool:
    return v.is_contiguous() or v.is_contiguous(memory_format=torch.channels_last)


def _plugins(block: nn.Module, out: Tensor, after: int) -> Tensor:
    """The block's own plugins after that convolution."""
    names = getattr(block, f'after_conv{after}_plugin_names', None)
    return block.forward_plugin(out, names) if names else out
