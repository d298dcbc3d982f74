"""A data preprocessor as a function of an image batch that can be traced."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Pixels(nn.Module):
    """From pixels to the input of a network, as MMDetection's DetDataPreprocessor makes it.

    Args:
        preprocessor: the detector's `data_preprocessor`.

    Attributes:
        mean, std: (3, 1, 1), in the order of the network's channels.
        swaps_channels: whether the network takes RGB.
        divisor: height and width are padded to multiples of it.
        pad_value: what they are padded with, after the normalization.
    """

    def __init__(self, preprocessor: nn.Module) -> None:
        super().__init__()
        self.swaps_channels = bool(getattr(preprocessor, '_channel_conversion', False))
        self.divisor = int(getattr(preprocessor, 'pad_size_divisor', 1))
        self.pad_value = float(getattr(preprocessor, 'pad_value', 0))
        normalizes = getattr(preprocessor, '_enable_normalize', False)
        self.register_buffer('mean', preprocessor.mean if normalizes else torch.zeros(3, 1, 1))
        self.register_buffer('std', preprocessor.std if normalizes else torch.ones(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """(B, H, W, 3), BGR, 0 to 255, uint8 or float, to (B, 3, H', W')."""
        x = images.permute(0, 3, 1, 2).to(self.mean.dtype)
        x = x[:, [2, 1, 0]] if self.swaps_channels else x
        x = (x - self.mean) / self.std
        height, width = x.shape[-2:]
        below, beside = ((self.divisor - size % self.divisor) % self.divisor for size in (height, width))
        return F.pad(x, (0, beside, 0, below), value=self.pad_value)
