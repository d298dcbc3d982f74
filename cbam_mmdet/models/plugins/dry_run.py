"""A forward pass of zeros that finds the shapes of modules' outputs and checks whether the plugins fit.

It leaves modes, buffers and random states as they were.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cbam_mmdet.errors import UserError
from cbam_mmdet.models.plugins.places import OUTPUTS
from cbam_mmdet.utils.text import abridge


def zeros_for(module: nn.Module, shape: Sequence[int]) -> Tensor:
    """Zeros of shape (1, *shape), with dtype and device of the module's weights."""
    weight = next(module.parameters(), torch.empty(0))
    return torch.zeros(1, *shape, dtype=weight.dtype, device=weight.device)


@contextlib.contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside this context. Afterwards modes, buffers and random states are as before."""
    modes = {m: m.training for m in module.modules()}
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            for m in modes:
                m.training = False
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for m, mode in modes.items():
            m.training = mode
        for name, buffer in module.named_buffers():
            if name in buffers:
                buffer.copy_(buffers[name])


def dry_run(module: nn.Module, inputs: Callable, names: list[str], where: str) -> dict[str, list[torch.Size]]:
    """The shapes (N, C, H, W) that the named modules return, one for each call, or one for each map for 'outputs'."""
    calls: dict[str, list[torch.Size]] = {name: [] for name in names}

    def record(name: str) -> Callable:
        def hook(_: nn.Module, __: tuple, output: Any) -> None:
            many = name == OUTPUTS and isinstance(output, (tuple, list))
            values = [value for value in output if value is not None] if many else [output]
            calls[name] += [_shape(value, name, where, module) for value in values]

        return hook

    hooks = [(module_at(module, name), record(name)) for name in names]
    _forward(module, inputs, hooks, where, 'the dry run that finds the channels')
    for name, shapes in calls.items():
        channels = {shape[1] for shape in shapes}
        if name != OUTPUTS and len(channels) > 1:
            raise UserError(
                f'{where}: {name} runs several times, with {sorted(channels)} channels: one plugin does not fit all of '
                'them. Choose another module.'
            )
    return calls


def _forward(
    module: nn.Module, inputs: Callable, hooks: Sequence[tuple[nn.Module, Callable]], where: str, doing: str
) -> None:
    """Run one forward pass with these forward hooks, and undo all its effects on the module."""
    with _undisturbed(module), contextlib.ExitStack() as stack:
        for hooked, hook in hooks:
            stack.callback(hooked.register_forward_hook(hook).remove)
        try:
            module(*inputs())
        except UserError:
            raise
        except Exception as error:  # any backbone may fail in its own way with an image of this size
            shapes = _shapes(inputs())
            advice = (
                ' If it is the size that does not fit, give one that does: input_shape=(channels, height, width)'
                if where.startswith('model.backbone')
                else ''
            )
            raise UserError(
                f'{where}: {doing} failed in {type(module).__name__} with an input of {shapes} '
                f'({type(error).__name__}: {error}).{advice}'
            ) from error


def _shapes(values: Any) -> Any:
    return tuple(values.shape) if isinstance(values, Tensor) else ', '.join(str(_shapes(value)) for value in values)


def module_at(module: nn.Module, name: str) -> nn.Module:
    """The module of that dotted name inside, or the module itself for 'outputs'."""
    return module if name == OUTPUTS else module.get_submodule(name)


def _shape(value: Any, name: str, where: str, module: nn.Module) -> torch.Size:
    if isinstance(value, Tensor) and value.ndim == 4:
        return value.shape
    kind = f'a tensor of shape {tuple(value.shape)}' if isinstance(value, Tensor) else f'a {type(value).__name__}'
    if name == OUTPUTS:
        raise UserError(
            f'{where}: {type(module).__name__} returns {kind} among its outputs; plugins there need tensors of shape '
            '(N, C, H, W), one or a tuple of them. Choose modules inside.'
        )
    inside = [child for child, _ in module_at(module, name).named_children()]
    advice = f'a module inside ({abridge([f"{name}.{child}" for child in inside])})' if inside else 'another module'
    raise UserError(
        f'{where}: {name} ({type(module_at(module, name)).__name__}) returns {kind}; a plugin needs one tensor of '
        f"shape (N, C, H, W). Choose {advice} or after='{OUTPUTS}', the maps that the backbone returns."
    )


def check_by_dry_run(
    module: nn.Module, inputs: Callable, calls: dict[str, list], added: dict[str, list[nn.Module]], where: str
) -> None:
    """Check by another run that each plugin keeps the shape, and runs as often as the module that it follows."""
    counts: dict[nn.Module, int] = {}

    def hook(plugin: nn.Module, args: tuple, output: Any) -> None:
        counts[plugin] = counts.get(plugin, 0) + 1
        given = args[0].shape
        if not isinstance(output, Tensor) or output.shape != given:
            got = tuple(output.shape) if isinstance(output, Tensor) else f'a {type(output).__name__}'
            name = next(name for name, plugins in added.items() if plugin in plugins)
            raise UserError(
                f'{where}: {type(plugin).__name__} after {name} makes {got} of {tuple(given)}. A plugin must keep the '
                'shape: what follows expects it.'
            )

    hooks = [(plugin, hook) for plugins in added.values() for plugin in plugins]
    _forward(module, inputs, hooks, where, 'the dry run with the plugins')
    for name, plugins in added.items():
        expected = 1 if name == OUTPUTS else len(calls[name])
        if any(counts.get(plugin, 0) != expected for plugin in plugins):  # e.g. a ModuleDict that loops over its items
            raise UserError(
                f'{where}: {name} ({type(module_at(module, name)).__name__}) runs its children itself, the plugin too. '
                'Choose a module inside.'
            )
