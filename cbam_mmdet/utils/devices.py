"""Devices, as people name them to a tool."""

from __future__ import annotations

import torch

from cbam_mmdet.errors import UserError


def choose_device(name: str | None) -> str:
    """A device's name, or by default the GPU if there is one.

    Raises:
        UserError: for a name that torch does not know, or a device that is not here.
    """
    if name is None:
        return 'cuda:0' if torch.cuda.is_available() else 'cpu'
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: give 'cpu', 'cuda' or 'cuda:N'") from error
    if device.type == 'cuda' and not torch.cuda.is_available():
        raise UserError(f'--device {name}: torch sees no GPU here; use --device cpu')
    if device.type == 'cuda' and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f'--device {name}: torch sees {torch.cuda.device_count()} GPU(s) here, counted from 0')
    return name
