"""The gates of each CBAM of a detector for one image."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from mmdet.apis import inference_detector
from torch import Tensor, nn

from ..cbam import CBAM


@dataclass
class Gates:
    """What one CBAM multiplied an image's features by.

    Args:
        channel: (C,).
        spatial: (H, W), without the padding of the batch; None for a CBAM without a spatial branch.
    """

    channel: np.ndarray
    spatial: np.ndarray | None = None


def read_gates(model: nn.Module, image: str) -> dict[str, Gates]:
    """Run a detector on an image file, and read the gates of its CBAMs.

    Args:
        model: from inference.load_detector.
        image: the file.

    Returns:
        By the CBAM's name, in the order of the model.
    """
    maps: dict[tuple[str, str], Tensor] = {}

    def keep(name: str, branch: str):
        return lambda module, inputs, output: maps.__setitem__((name, branch), output.detach()[0].float().cpu())

    cbams = {name: module for name, module in model.named_modules() if isinstance(module, CBAM)}
    with ExitStack() as stack:
        for name, module in cbams.items():
            for branch in ('channel', 'spatial'):
                if getattr(module, branch) is not None:
                    hook = getattr(module, branch).activation.register_forward_hook(keep(name, branch))
                    stack.callback(hook.remove)
        sample = inference_detector(model, image)
    shares = [part / whole for part, whole in zip(sample.img_shape, sample.batch_input_shape, strict=True)]
    gates = {}
    for name in cbams:
        if (name, 'channel') not in maps:  # not on the way of this image
            continue
        spatial = maps.get((name, 'spatial'))
        if spatial is not None:
            height, width = (max(1, round(n * share)) for n, share in zip(spatial.shape[-2:], shares, strict=True))
            spatial = spatial[0, :height, :width].numpy()
        gates[name] = Gates(maps[name, 'channel'].flatten().numpy(), spatial)
    return gates
