"""CBAM: Convolutional Block Attention Module (Woo, Park, Lee, Kweon, ECCV 2018, arXiv:1807.06521).

    F'  = M_c(F)  * F                                                            (equation 1)
    F'' = M_s(F') * F'

    M_c(F) = sigmoid(MLP(AvgPool(F)) + MLP(MaxPool(F)))                          (equation 2)
    M_s(F) = sigmoid(BN(conv7x7([MaxPool(F); AvgPool(F)])))                      (equation 3)

What differs from the page: the BatchNorm of M_s and the order [max; mean] are the authors' code; the variants of the
paper's tables 1 to 3 are arguments; and `gate='unit'` is ours: an attention that starts as the exact identity.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence

import torch
from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from cbam_mmdet.compat.torch import is_autocast_enabled
from cbam_mmdet.errors import UserError, did_you_mean
from cbam_mmdet.models.variant import compare_variant, write_variant
from cbam_mmdet.ops.compiled import as_planes
from cbam_mmdet.ops.functional import IMPLS, ORDERS, choose, implementation, not_covered
from cbam_mmdet.ops.pools import CHANNEL_POOLS, channel_descriptor, spatial_descriptor

SPATIAL = ('pool', 'conv', None)


def cbam_reference(
    x: Tensor, channel: ChannelAttention, spatial: SpatialAttention | None, order: str = 'channel-spatial'
) -> Tensor:
    """CBAM as the paper writes it (equation 1), differentiated by autograd.

    Args:
        x: F, (N, C, H, W).
        channel: M_c.
        spatial: M_s; None leaves it out.
        order: 'channel-spatial' (the paper's), 'spatial-channel', or 'parallel' (both maps computed from F itself).

    Returns:
        F'', of F's shape and dtype.
    """
    if spatial is None:
        return x * channel(x)
    if order == 'parallel':
        return x * channel(x) * spatial(x)
    first, second = (channel, spatial) if order == 'channel-spatial' else (spatial, channel)
    x = x * first(x)
    return x * second(x)


class UnitSigmoid(nn.Module):
    """2 * sigmoid(z): in (0, 2), and exactly 1 at z = 0."""

    def forward(self, z: Tensor) -> Tensor:
        return 2 * z.sigmoid()


GATES = {'sigmoid': nn.Sigmoid, 'unit': UnitSigmoid}
UPPER = {nn.Sigmoid: 1.0, UnitSigmoid: 2.0}  # what the gate's values do not reach


class ChannelAttention(nn.Module):
    """M_c: what to look at. One MLP, shared by all pools (section 3.1).

    Args:
        in_channels: C.
        reduction: C / reduction hidden units, at least one.
        pools: any of 'avg', 'max', 'lp', 'lse'.
        gate: 'sigmoid' or 'unit'.
    """

    def __init__(
        self, in_channels: int, reduction: int = 16, pools: Sequence[str] = ('avg', 'max'), gate: str = 'sigmoid'
    ):
        super().__init__()
        hidden = max(in_channels // reduction, 1)
        self.pools = tuple(pools)
        self.fc1 = nn.Linear(in_channels, hidden)
        self.fc2 = nn.Linear(hidden, in_channels)
        self.activation = GATES[gate]()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, 1, 1), of x's dtype."""
        return self.map_of(channel_descriptor(x, self.pools)).to(x.dtype)

    def map_of(self, descriptor: Tensor) -> Tensor:
        """(N, K, C) -> (N, C, 1, 1), in the parameters' dtype whatever autocast says: these tensors are small."""
        return self.scales_of(descriptor)[..., None, None]

    def scales_of(
        self, descriptor: Tensor, mlp: Callable[[Tensor, nn.Linear, nn.Linear], Tensor] | None = None
    ) -> Tensor:
        """The same map as (N, C).

        mlp(descriptor, fc1, fc2) computes fc2(relu(fc1(descriptor))), summed over K; None: the layers themselves.
        """
        with _without_autocast(descriptor.device.type):
            descriptor = descriptor.to(self.fc1.weight.dtype)
            z = self.fc2(F.relu(self.fc1(descriptor))).sum(1) if mlp is None else mlp(descriptor, self.fc1, self.fc2)
            return self.activation(z)

    @property
    def upper(self) -> float | None:
        """What the map's values do not reach; None where a subclass or another activation computes them."""
        return UPPER.get(type(self.activation)) if type(self) is ChannelAttention else None

    def map_parameters(self) -> list[nn.Parameter]:
        """The parameters between descriptor and map: here, all."""
        return list(self.parameters())

    @property
    def last_layer(self) -> nn.Module:
        return self.fc2


class SpatialAttention(nn.Module):
    """M_s: where to look (section 3.1).

    Args:
        in_channels: C; only 'conv' needs it.
        spatial: 'pool', maximum and mean over the channels, or 'conv', a 1x1 convolution to one channel (table 2).
        kernel_size: of the convolution, odd.
        gate: 'sigmoid' or 'unit'.
        norm_cfg: the norm after the convolution; None for none (the convolution then has a bias).
    """

    def __init__(
        self,
        in_channels: int,
        spatial: str = 'pool',
        kernel_size: int = 7,
        gate: str = 'sigmoid',
        norm_cfg: dict | None = None,
    ):
        super().__init__()
        self.reduce = nn.Conv2d(in_channels, 1, 1, bias=False) if spatial == 'conv' else None
        planes = 1 if spatial == 'conv' else 2
        self.conv = nn.Conv2d(planes, 1, kernel_size, padding=kernel_size // 2, bias=norm_cfg is None)
        self.bn = build_norm_layer(norm_cfg, 1)[1] if norm_cfg else None
        self.activation = GATES[gate]()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, 1, H, W), of x's dtype."""
        return self.map_of(spatial_descriptor(x, self.reduce_weight)).to(x.dtype)

    def map_of(self, descriptor: Tensor, convolve: Callable[[Tensor, nn.Conv2d], Tensor] | None = None) -> Tensor:
        """(N, K, H, W) -> (N, 1, H, W), in the parameters' dtype whatever autocast says: these tensors are small.

        convolve(planes, conv) computes the convolution; None: conv itself.
        """
        with _without_autocast(descriptor.device.type):
            planes = as_planes(descriptor.to(self.conv.weight.dtype))
            z = self.conv(planes) if convolve is None else convolve(planes, self.conv)
            return self.activation(z if self.bn is None else self._norm(self.bn, z))

    def _norm(self, bn: nn.Module, z: Tensor) -> Tensor:
        # One value has no variance and BatchNorm refuses it in training; the running statistics are taken instead.
        # Not where other processes wait for it.
        waits = isinstance(bn, nn.SyncBatchNorm) and torch.distributed.is_initialized()
        if isinstance(bn, _BatchNorm) and not waits and bn.training and bn.track_running_stats and z.numel() == 1:
            return F.batch_norm(z, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)
        return bn(z)

    @property
    def upper(self) -> float | None:
        """As in :class:`ChannelAttention`."""
        return UPPER.get(type(self.activation)) if type(self) is SpatialAttention else None

    @property
    def reduce_weight(self) -> Tensor | None:
        """(1, C, 1, 1), the 1x1 convolution of 'conv'; None for 'pool'."""
        return None if self.reduce is None else self.reduce.weight

    def map_parameters(self) -> list[nn.Parameter]:
        """The parameters between descriptor and map: all but the 1x1 convolution, which makes the descriptor."""
        return [p for name, p in self.named_parameters() if not name.startswith('reduce.')]

    @property
    def last_layer(self) -> nn.Module:
        return self.conv if self.bn is None else self.bn


@MODELS.register_module()
class CBAM(BaseModule):
    """Convolutional Block Attention Module, as a plugin of OpenMMLab's backbones.

    A backbone takes it by `plugins=[dict(cfg=dict(type='CBAM'), ...)]`.

    Args:
        in_channels: C; a backbone passes it by itself.
        reduction: ratio of the MLP's hidden layer (16 in the paper).
        pools: the channel branch's pools, any of 'avg', 'max', 'lp', 'lse'. ('avg',) with spatial=None is
            Squeeze-and-Excitation.
        spatial: 'pool', 'conv', or None for no spatial branch (table 2).
        kernel_size: of the spatial branch's convolution, odd (7 in the paper).
        order: 'channel-spatial', 'spatial-channel' or 'parallel' (table 3).
        gate: 'sigmoid', the paper's, or 'unit', 2 * sigmoid with each branch's last layer starting at zero: the module
            then starts as the exact identity, so a trained backbone is not disturbed by it.
        norm_cfg: the spatial branch's norm; None for none.
        impl: 'eager', PyTorch's operators; 'fused', the kernels (in C on a CPU, Triton's on CUDA; default pools,
            spatial and order, see ops.functional.implementation), an error where they do not support the input;
            'auto', the kernels where they do, else eager. `implementation(x)` returns which it is for x. The weights
            are the same in all.
        init_cfg: MMEngine's initialization config.

    To look at the maps, hook `channel.activation` and `spatial.activation`: they run in every path, while the
    branches' own forward runs only where no gradient is wanted.

    Raises:
        UserError: (a ValueError) for an argument that is none of these.
    """

    def __init__(
        self,
        in_channels: int,
        reduction: int = 16,
        pools: Sequence[str] = ('avg', 'max'),
        spatial: str | None = 'pool',
        kernel_size: int = 7,
        order: str = 'channel-spatial',
        gate: str = 'sigmoid',
        norm_cfg: dict | None = dict(type='BN', momentum=0.01),  # noqa: B006 (MMEngine's idiom; never written to)
        impl: str = 'auto',
        init_cfg: dict | None = None,
    ):
        super().__init__(init_cfg)
        pools = (pools,) if isinstance(pools, str) else tuple(pools)
        _check_positive('in_channels', in_channels)
        _check_positive('reduction', reduction)
        if not pools or len(set(pools)) < len(pools):
            raise UserError(f'CBAM: pools={pools} must name at least one pool, and none twice')
        for pool in pools:
            _check_choice('pools', pool, CHANNEL_POOLS)
        _check_choice('spatial', spatial, SPATIAL)
        _check_choice('order', order, ORDERS)
        _check_choice('gate', gate, tuple(GATES))
        _check_choice('impl', impl, IMPLS)
        _check_positive('kernel_size', kernel_size)
        if kernel_size % 2 == 0:
            raise UserError(f'CBAM: kernel_size={kernel_size} must be odd, to keep the size of the feature map')

        self.order = order
        self.unit = gate == 'unit'
        self.channel = ChannelAttention(in_channels, reduction, pools, gate)
        self.spatial = SpatialAttention(in_channels, spatial, kernel_size, gate, norm_cfg) if spatial else None
        self.impl = impl
        obstacle = not_covered(self.channel, self.spatial, order)
        if impl == 'fused' and obstacle:
            raise UserError(f"CBAM: impl='fused' {obstacle}; impl='auto' takes the eager path for this variant")
        self._fresh = True
        self._register_state_dict_hook(write_variant)
        if self.unit:
            self._start_as_identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W), H, W >= 1, of x's dtype and memory layout."""
        compute = choose(x, self.channel, self.spatial, self.order, self.impl)
        if compute is None:
            return cbam_reference(x, self.channel, self.spatial, self.order)
        return compute(x, self.channel, self.spatial, self.order)

    def implementation(self, x: Tensor) -> str:
        """What forward takes for x: 'eager' or 'fused' (see ops.functional.implementation)."""
        return implementation(x, self.channel, self.spatial, self.order, self.impl)

    def init_weights(self) -> None:
        """MMEngine's initialization.

        A backbone's own, which sets all norms to 1, has run before. For gate='unit' it is undone.
        """
        super().init_weights()
        if self.unit and self.init_cfg is None:
            self._start_as_identity()

    def train(self, mode: bool = True) -> CBAM:
        """As for every module; warns where a backbone's `frozen_stages` freezes what was never trained."""
        frozen = not any(p.requires_grad for p in self.parameters())
        if mode and frozen and self._fresh:
            warnings.warn(
                'A CBAM with its initial weights is frozen (requires_grad=False) and would never train: its stage '
                "is among the backbone's frozen_stages. Set frozen_stages=0 (or -1) in the backbone, or take the "
                "frozen stages out of the plugin's stages=(False, True, True, True) (PluginBackbone: out of "
                '`after`), or load weights that hold a trained CBAM.',
                stacklevel=2,
            )
        return super().train(mode)

    def _start_as_identity(self) -> None:
        for branch in filter(None, (self.channel, self.spatial)):
            for parameter in branch.last_layer.parameters():
                nn.init.zeros_(parameter)

    @property
    def variant(self) -> dict[str, str | float]:
        """The arguments that change what the same weights compute."""
        variant: dict[str, str | float] = dict(gate='unit' if self.unit else 'sigmoid')
        variant['pools'] = ', '.join(sorted(self.channel.pools))
        if self.spatial is not None:
            variant['order'] = self.order
            if isinstance(self.spatial.bn, _BatchNorm):
                variant['norm_cfg.eps'] = self.spatial.bn.eps
        return variant

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args, **kwargs):
        if f'{prefix}channel.fc1.weight' in state_dict:
            self._fresh = False
            compare_variant(self, prefix, local_metadata)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    # Entered only where there is one to leave: torch 2.4 cannot export the context manager.
    if is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _check_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not hasattr(value, '__index__') or value < 1:
        raise UserError(f'CBAM: {name}={value!r} must be a whole number of at least 1')


def _check_choice(name: str, value: str | None, choices: Sequence[str | None]) -> None:
    if value not in choices:
        hint = did_you_mean(str(value), filter(None, choices), n=1)
        raise UserError(f'CBAM: {name}={value!r} is unknown, choose from {list(choices)}{hint}')
