"""What the gates of a model's CBAMs do: record them, and put each into a few figures.

    with record_gates(model) as gates:
        inference_detector(model, 'photo.jpg')
    gates['backbone.layer1.0.cbam'].spatial[0]  # (H, W), the gate over the first image

A gate's values lie in (0, upper): upper is 1 for gate='sigmoid', 2 for 'unit'. A value of 1 leaves the feature map as
it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cbam_mmdet.errors import UserError
from cbam_mmdet.models.cbam import CBAM

# Within this share of its range from an end, a sigmoid's slope is less than a fifth of its steepest.
SATURATED = 0.05
FIGURES = ('mean', 'spread', 'closed', 'open', 'distance')


@dataclass
class RecordedGates:
    """The gates of one CBAM, an entry for each image that went through it, in order.

    Attributes:
        upper: what no value reaches: 1 for gate='sigmoid', 2 for 'unit'.
        channel: (C,) each, M_c.
        spatial: (H, W) each, M_s, padding of the batch included; empty where the CBAM has no spatial branch.
    """

    upper: float
    channel: list[Tensor] = field(default_factory=list)
    spatial: list[Tensor] = field(default_factory=list)


def find_cbams(model: nn.Module) -> dict[str, CBAM]:
    """The CBAMs of a model by their dotted names, in the order of the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CBAM)}


@contextlib.contextmanager
def record_gates(model: nn.Module) -> Iterator[dict[str, RecordedGates]]:
    """Record the gates of every CBAM while the context lasts, by forward hooks; the model computes what it always does.

    With activation checkpointing the second forward pass, inside the backward pass, is not counted. A model compiled
    by torch.compile runs no hooks, and records nothing.

    Args:
        model: any module that holds CBAMs.

    Yields:
        For each CBAM, by its dotted name, its :class:`RecordedGates`: detached, on the model's device.

    Raises:
        UserError: if the model holds no CBAM.
    """
    cbams = find_cbams(model)
    if not cbams:
        raise UserError(f'this {type(model).__name__} holds no CBAM: there are no gates to look at')
    gates = {name: RecordedGates(2.0 if cbam.unit else 1.0) for name, cbam in cbams.items()}
    handles = []
    try:
        for name, cbam in cbams.items():
            handles.append(cbam.channel.activation.register_forward_hook(_append_to(gates[name].channel)))
            if cbam.spatial is not None:
                handles.append(cbam.spatial.activation.register_forward_hook(_append_to(gates[name].spatial)))
        yield gates
    finally:
        for handle in handles:
            handle.remove()


def gate_figures(values: Tensor, upper: float) -> Tensor:
    """Five figures of a gate, on its device: nothing waits for a GPU.

    Args:
        values: of any shape, in (0, upper).
        upper: 1 for gate='sigmoid', 2 for 'unit'.

    Returns:
        (5,), in the order of FIGURES: the mean; the spread, which is the standard deviation of these values;
        `closed`, the share of them below 0.05 * upper; `open`, the share above 0.95 * upper (both together are
        saturated); and the distance from identity, the mean of |value - 1|.
    """
    values = values.detach().float()
    spread, mean = torch.std_mean(values, correction=0)
    closed = (values < SATURATED * upper).float().mean()
    opened = (values > (1 - SATURATED) * upper).float().mean()
    return torch.stack([mean, spread, closed, opened, (values - 1).abs().mean()])


def _append_to(images: list[Tensor]) -> Callable:
    def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if torch._C._current_graph_task_id() == -1:  # otherwise in a backward pass: a checkpoint computes again
            images.extend(output.detach().squeeze(1) if output.dim() == 4 else output.detach())

    return hook
