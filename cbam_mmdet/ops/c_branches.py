"""The small parts of CBAM's branches on a CPU, by the C library: an MLP of pooled values, a convolution of two planes.

PyTorch's operators compute each in many steps, which at these sizes cost more than the work. A module that is not what
CBAM built, or that somebody has hooked, is called as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from cbam_mmdet.compat.torch import has_global_hooks
from cbam_mmdet.ops.c_passes import kernel, threads_for

DTYPES = (torch.float32, torch.float64)
LONGEST_KERNEL = 31  # LONGEST in cpu_kernels.c
MOST_ROWS = 8  # of the MLP's descriptor, four images: for more, PyTorch's matrix products read the weights fewer times


def _is_plain(module: nn.Module, cls: type[nn.Module], x: Tensor) -> bool:
    """Whether a call of the module is nothing but its class's forward, with parameters that C can read beside x."""
    if type(module) is not cls or 'forward' in vars(module) or has_global_hooks():
        return False
    if any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)):
        return False
    parameters = [p for p in (module.weight, module.bias) if p is not None]
    return x.dtype in DTYPES and all(
        type(p) in (Tensor, nn.Parameter) and p.dtype == x.dtype and p.device == x.device for p in parameters
    )


def sum_of_mlp(descriptor: Tensor, fc1: nn.Linear, fc2: nn.Linear) -> Tensor:
    """fc2(relu(fc1(descriptor))) summed over the pools, (N, K, C) -> (N, C)."""
    supported = (
        all(_is_plain(layer, nn.Linear, descriptor) and layer.bias is not None for layer in (fc1, fc2))
        and fc1.weight.shape == fc2.weight.shape[::-1]
        and fc1.weight.shape[1] == descriptor.shape[2]
        and descriptor.shape[0] * descriptor.shape[1] <= MOST_ROWS
    )
    if not supported:
        return fc2(torch.relu(fc1(descriptor))).sum(1)
    return _SumOfMLP.apply(descriptor, fc1.weight, fc1.bias, fc2.weight, fc2.bias)


class _SumOfMLP(Function):
    @staticmethod
    def forward(ctx, descriptor, *parameters):
        descriptor, *parameters = (t.contiguous() for t in (descriptor, *parameters))
        (images, pools, channels), units = descriptor.shape, parameters[0].shape[0]
        hidden, total = descriptor.new_empty((images, pools, units)), descriptor.new_empty((images, units))
        z = descriptor.new_empty((images, channels))
        kernel('mlp', z.dtype)(
            descriptor.data_ptr(), *(p.data_ptr() for p in parameters), images, pools, channels, units,
            hidden.data_ptr(), total.data_ptr(), z.data_ptr(),
        )  # fmt: skip
        ctx.save_for_backward(descriptor, hidden, total, *parameters)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx, dz):
        dz = dz.contiguous()
        descriptor, hidden, total, *parameters = ctx.saved_tensors
        gradients = [torch.zeros_like(t) for t in (descriptor, *parameters)]
        scratch = torch.empty_like(hidden[0, 0])
        kernel('mlp_backward', dz.dtype)(
            dz.data_ptr(), descriptor.data_ptr(), hidden.data_ptr(), total.data_ptr(), parameters[0].data_ptr(),
            parameters[2].data_ptr(), *descriptor.shape, hidden.shape[2], *(g.data_ptr() for g in gradients),
            scratch.data_ptr(),
        )  # fmt: skip
        return tuple(gradients)


def convolve(planes: Tensor, conv: nn.Conv2d) -> Tensor:
    """What conv gives for (N, K, H, W), a few planes to one: where the C library supports it, by that.

    oneDNN, which torch has for convolutions, takes two to nine times as long for so few planes.
    """
    if not _is_plain(conv, nn.Conv2d, planes):
        return conv(planes)
    size = conv.weight.shape[-1]
    plain = (conv.out_channels, conv.stride, conv.dilation, conv.groups, conv.padding_mode, conv.padding)
    supported = (
        plain == (1, (1, 1), (1, 1), 1, 'zeros', (size // 2, size // 2))
        and conv.kernel_size == (size, size)
        and size % 2 == 1
        and size <= LONGEST_KERNEL
        and planes.shape[1] == conv.in_channels
    )
    if not supported:
        return conv(planes)
    z = _Convolve.apply(planes, conv.weight)
    return z if conv.bias is None else z + conv.bias[:, None, None]


class _Convolve(Function):
    """A convolution of planes to one, with zeros around and stride 1."""

    @staticmethod
    def forward(ctx, planes, weight):
        planes, weight = planes.contiguous(), weight.contiguous()
        ctx.save_for_backward(planes, weight)
        return _convolve(planes, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        planes, weight = ctx.saved_tensors
        dout, dplanes, dweight = dout.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            dplanes = _convolve(dout, weight.flip(2, 3).transpose(0, 1).contiguous())
        if ctx.needs_input_grad[1]:
            dweight = torch.empty_like(weight)
            shape, padded = _padded(planes, weight)
            kernel('convolve_weight', dout.dtype)(
                planes.data_ptr(), dout.data_ptr(), *shape, padded.data_ptr(), dweight.data_ptr(),
                threads_for(planes.numel() * weight[0, 0].numel()),
            )  # fmt: skip
        return dplanes, dweight


def _convolve(planes: Tensor, weight: Tensor) -> Tensor:
    (images, inputs, height, width, size), padded = _padded(planes, weight)
    out = planes.new_empty((images, weight.shape[0], height, width))
    kernel('convolve', planes.dtype)(
        planes.data_ptr(), weight.data_ptr(), images, inputs, weight.shape[0], height, width, size, padded.data_ptr(),
        out.data_ptr(), threads_for(planes.numel() * weight[0, 0].numel()),
    )  # fmt: skip
    return out


def _padded(planes: Tensor, weight: Tensor) -> tuple[tuple[int, ...], Tensor]:
    images, inputs, height, width = planes.shape
    size = weight.shape[-1]
    padded = planes.new_empty(images * inputs * (height + size - 1) * (width + size - 1) + 32)
    return (images, inputs, height, width, size), padded
