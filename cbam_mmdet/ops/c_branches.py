"""The small parts of CBAM's branches on a CPU, by the C library: an MLP of pooled values, a convolution of two planes.

PyTorch's operators compute each in many steps, which at these sizes cost more than the work. A module that is not what
CBAM built, or that somebody has hooked, is called as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from cbam_mmdet.compat.torch import has_global_hooks
from cbam_mmdet.ops.c_passes import kernel, threads_for

DTYPES = (torch.float32, torch.float64)
LONGEST_KERNEL = 31  # LONGEST in cpu_kernels.c
MOST_ROWS = 8  # of the MLP's descriptor, four images: for more, PyTorch's matrix products read the weights fewer times


def is_unhooked(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a call of the module is nothing but its class's forward. At a small map such checks count."""
    own = vars(module)
    hooks = own['_forward_hooks'] or own['_forward_pre_hooks'] or own['_backward_hooks'] or own['_backward_pre_hooks']
    return type(module) is cls and 'forward' not in own and not hooks and not has_global_hooks()


def _is_plain(module: nn.Module, cls: type, like: Tensor) -> bool:
    """Whether C can compute a call of the module: it is unhooked, with parameters of like's dtype and device."""
    return is_unhooked(module, cls) and is_readable(like, module.weight, module.bias)


def is_readable(like: Tensor, *parameters: Any) -> bool:
    """Whether C can read these parameters, or None for none, and tensors of like's dtype beside each other."""
    return like.dtype in DTYPES and all(
        type(p) in (Tensor, nn.Parameter) and p.dtype == like.dtype and p.device == like.device
        for p in parameters if p is not None
    )  # fmt: skip


def serves_mlp(fc1: nn.Linear, fc2: nn.Linear, shape: Sequence[int], like: Tensor) -> bool:
    """Whether C computes fc2(relu(fc1(descriptor))) of a descriptor of that shape, (N, K, C), and of like's dtype."""
    images, pools, channels = shape
    return (
        all(_is_plain(layer, nn.Linear, like) and layer.bias is not None for layer in (fc1, fc2))
        and fc1.weight.shape == fc2.weight.shape[::-1]
        and fc1.weight.shape[1] == channels
        and images * pools <= MOST_ROWS
    )


def serves_convolution(conv: nn.Conv2d, planes: int, like: Tensor) -> bool:
    """Whether C computes conv of that many planes of like's dtype."""
    if not _is_plain(conv, nn.Conv2d, like):
        return False
    size = conv.weight.shape[-1]
    plain = (conv.out_channels, conv.stride, conv.dilation, conv.groups, conv.padding_mode, conv.padding)
    return (
        plain == (1, (1, 1), (1, 1), 1, 'zeros', (size // 2, size // 2))
        and conv.kernel_size == (size, size)
        and size % 2 == 1
        and size <= LONGEST_KERNEL
        and planes == conv.in_channels
    )


def sum_of_mlp(descriptor: Tensor, fc1: nn.Linear, fc2: nn.Linear) -> Tensor:
    """fc2(relu(fc1(descriptor))) summed over the pools, (N, K, C) -> (N, C)."""
    if not serves_mlp(fc1, fc2, descriptor.shape, descriptor):
        return fc2(torch.relu(fc1(descriptor))).sum(1)
    return _SumOfMLP.apply(descriptor, fc1.weight, fc1.bias, fc2.weight, fc2.bias)


class _SumOfMLP(Function):
    @staticmethod
    def forward(ctx, descriptor, *parameters):
        z, *kept = mlp(descriptor, *parameters)
        ctx.save_for_backward(*kept, *parameters)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx, dz):
        return mlp_backward(dz, *ctx.saved_tensors)


def mlp(descriptor: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    """The sum over the pools, (N, C), and what its backward takes first: descriptor, hidden units and their sum."""
    descriptor, *ready = (t.contiguous() for t in (descriptor, *parameters))
    (images, pools, channels), units = descriptor.shape, ready[0].shape[0]
    hidden, total = descriptor.new_empty((images, pools, units)), descriptor.new_empty((images, units))
    z = descriptor.new_empty((images, channels))
    kernel('mlp', z.dtype)(
        descriptor.data_ptr(), *(p.data_ptr() for p in ready), images, pools, channels, units,
        hidden.data_ptr(), total.data_ptr(), z.data_ptr(),
    )  # fmt: skip
    return z, descriptor, hidden, total


def mlp_backward(
    dz: Tensor, descriptor: Tensor, hidden: Tensor, total: Tensor, *parameters: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of descriptor and parameters."""
    dz, *ready = (t.contiguous() for t in (dz, *parameters))
    gradients = [torch.zeros_like(t) for t in (descriptor, *ready)]
    scratch = torch.empty_like(hidden[0, 0])
    kernel('mlp_backward', dz.dtype)(
        dz.data_ptr(), descriptor.data_ptr(), hidden.data_ptr(), total.data_ptr(), ready[0].data_ptr(),
        ready[2].data_ptr(), *descriptor.shape, hidden.shape[2], *(g.data_ptr() for g in gradients),
        scratch.data_ptr(),
    )  # fmt: skip
    return tuple(gradients)


def convolve(planes: Tensor, conv: nn.Conv2d) -> Tensor:
    """What conv gives for (N, K, H, W), a few planes to one: where the C library supports it, by that.

    oneDNN, which torch has for convolutions, takes two to nine times as long for so few planes.
    """
    if not serves_convolution(conv, planes.shape[1], planes):
        return conv(planes)
    z = _Convolve.apply(planes, conv.weight)
    return z if conv.bias is None else z + conv.bias[:, None, None]


class _Convolve(Function):
    """A convolution of planes to one, with zeros around and stride 1."""

    @staticmethod
    def forward(ctx, planes, weight):
        planes = planes.contiguous()
        ctx.save_for_backward(planes, weight)
        return convolution(planes, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        planes, weight = ctx.saved_tensors
        dplanes = convolution_backward(dout, weight) if ctx.needs_input_grad[0] else None
        return dplanes, convolution_backward_weight(dout, planes, weight) if ctx.needs_input_grad[1] else None


def convolution(planes: Tensor, weight: Tensor) -> Tensor:
    """(N, K, H, W) and (L, K, size, size) -> (N, L, H, W), with zeros around."""
    weight = weight.contiguous()
    (images, inputs, height, width, size), padded = _padded(planes, weight)
    out = planes.new_empty((images, weight.shape[0], height, width))
    kernel('convolve', planes.dtype)(
        planes.data_ptr(), weight.data_ptr(), images, inputs, weight.shape[0], height, width, size, padded.data_ptr(),
        out.data_ptr(), threads_for(planes.numel() * weight[0, 0].numel()),
    )  # fmt: skip
    return out


def convolution_backward(dout: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the planes."""
    return convolution(dout.contiguous(), weight.flip(2, 3).transpose(0, 1))


def convolution_backward_weight(dout: Tensor, planes: Tensor, weight: Tensor) -> Tensor:
    dout, dweight = dout.contiguous(), torch.empty_like(weight, memory_format=torch.contiguous_format)
    shape, padded = _padded(planes, weight)
    kernel('convolve_weight', dout.dtype)(
        planes.data_ptr(), dout.data_ptr(), *shape, padded.data_ptr(), dweight.data_ptr(),
        threads_for(planes.numel() * weight[0, 0].numel()),
    )  # fmt: skip
    return dweight


def _padded(planes: Tensor, weight: Tensor) -> tuple[tuple[int, ...], Tensor]:
    images, inputs, height, width = planes.shape
    size = weight.shape[-1]
    padded = planes.new_empty(images * inputs * (height + size - 1) * (width + size - 1) + 32)
    return (images, inputs, height, width, size), padded
