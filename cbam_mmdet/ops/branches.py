"""What the ways to compute CBAM need to know of its two branches, which models/cbam.py defines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from torch import Tensor, nn


class ChannelBranch(Protocol):
    """M_c: from a descriptor of the channels to a map over them.

    Where the map is upper * sigmoid(fc2(relu(fc1(descriptor))).sum(1)), `upper` is 1 or 2; otherwise it is None.
    """

    pools: tuple[str, ...]
    fc1: nn.Linear
    fc2: nn.Linear
    activation: nn.Module

    @property
    def upper(self) -> float | None: ...

    def map_of(self, descriptor: Tensor) -> Tensor:
        """(N, K, C) -> (N, C, 1, 1)."""

    def scales_of(self, descriptor: Tensor, mlp: Callable | None = None) -> Tensor:
        """The same as (N, C). mlp(descriptor, fc1, fc2) computes the MLP's sum over K; None: its layers do."""

    def map_parameters(self) -> list[nn.Parameter]:
        """The parameters between descriptor and map."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters."""


class SpatialBranch(Protocol):
    """M_s: from a descriptor of the pixels to a map over them.

    Where the map is upper * sigmoid(bn(conv(descriptor))), `upper` is 1 or 2; otherwise it is None.
    """

    conv: nn.Conv2d
    bn: nn.Module | None
    activation: nn.Module

    @property
    def upper(self) -> float | None: ...

    @property
    def reduce_weight(self) -> Tensor | None:
        """(1, C, 1, 1), the 1x1 convolution; None for [max; mean]."""

    def map_of(self, descriptor: Tensor, convolve: Callable | None = None) -> Tensor:
        """(N, K, H, W) -> (N, 1, H, W). convolve(planes, conv) computes the convolution; None: conv itself."""

    def map_parameters(self) -> list[nn.Parameter]:
        """The parameters between descriptor and map: not the 1x1 convolution that makes the descriptor."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters, that convolution's included."""
