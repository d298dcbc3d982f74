"""Insert a plugin as a child of the module that it follows. A forward hook applies it to that module's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmcv.cnn import build_plugin_layer
from torch import Tensor, nn

from cbam_mmdet.errors import UserError
from cbam_mmdet.models.plugins.dry_run import module_at
from cbam_mmdet.models.plugins.places import OUTPUTS

# Where the norms are from that a conversion builds.
CONVERTED = ('torch.nn.', 'mmengine.', 'mmcv.')


class ApplyChild:
    """A forward hook that applies the child of that name to the module's output."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        return getattr(module, self.name)(output)


class ApplyChildToEach:
    """A forward hook that applies one child to each of the module's outputs."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)

    def __call__(self, module: nn.Module, inputs: tuple, outputs: Any) -> Any:
        if isinstance(outputs, Tensor):
            return getattr(module, self.names[0])(outputs)
        maps = [i for i, output in enumerate(outputs) if output is not None]
        if len(maps) != len(self.names):
            raise UserError(
                f'{type(module).__name__} returns {len(maps)} maps here, and {len(self.names)} in the dry run in eval '
                f"mode: plugins at '{OUTPUTS}' need the same maps always. Choose modules inside."
            )
        refined = list(outputs)
        for i, name in zip(maps, self.names, strict=True):
            refined[i] = getattr(module, name)(refined[i])
        make = getattr(outputs, '_make', type(outputs))  # for a NamedTuple, or for a tuple or list
        return make(refined)


def apply_after_conversion(module: nn.Module, name: str, child: nn.Module | None) -> None:
    """Register the hook on a norm that gets a plugin as its child, or the children of timm's BatchNormAct2d.

    The conversion between BatchNorm and SyncBN builds new norms. It keeps the children, but not the hooks, nor what
    BatchNormAct2d does with its children `drop` and `act`: the network would lose its activations.
    `import cbam_mmdet` lets torch call this function for every child that is registered.
    """
    if 'BatchNorm' not in type(module).__name__:
        return
    followers: tuple[str, ...] = ()
    if name == getattr(child, '_follows_its_parent_as', None):
        followers = (name,)
    elif name == 'act' and 'drop' in module._modules and type(module).__module__.startswith(CONVERTED):
        followers = ('drop', 'act')
    for follower in followers:
        if follower not in _applied(module):
            module.register_forward_hook(ApplyChild(follower))


def _applied(module: nn.Module) -> list[str]:
    return [hook.name for hook in module._forward_hooks.values() if isinstance(hook, ApplyChild)]


def insert(module: nn.Module, name: str, cfg: Mapping, shapes: list[torch.Size], where: str) -> list[nn.Module]:
    """Build a plugin and insert it after the module of that name, or one after each output for 'outputs'.

    Args:
        module: the backbone or neck.
        name: the dotted name of the module inside, or 'outputs'.
        cfg: the plugin's config.
        shapes: the shapes (N, C, H, W) of that module's outputs.
        where: the config's key, for messages.

    Returns:
        The plugins.

    Raises:
        UserError: if the module already has a child with the plugin's name.
    """
    cfg = dict(cfg)
    postfix = cfg.pop('postfix', '')
    parent = module_at(module, name)
    if name == OUTPUTS:
        built = [_build(cfg, shape[1], f'{postfix}{i}', parent, name, where) for i, shape in enumerate(shapes)]
        for child, plugin in built:
            parent.add_module(child, plugin)
        parent.register_forward_hook(ApplyChildToEach([child for child, _ in built]))
        return [plugin for _, plugin in built]
    child, plugin = _build(cfg, shapes[0][1], postfix, parent, name, where)
    parent.add_module(child, plugin)
    if type(parent).forward is not nn.Sequential.forward:  # it runs its last child after the others by itself
        plugin._follows_its_parent_as = child
        parent.register_forward_hook(ApplyChild(child))
    return [plugin]


def _build(cfg: dict, channels: int, postfix: str, parent: nn.Module, name: str, where: str) -> tuple[str, Any]:
    child, plugin = build_plugin_layer(cfg, postfix=postfix, in_channels=channels)
    if hasattr(parent, child):
        raise UserError(
            f'{where}: {name} already has a child {child!r}. To put two of a kind at one place, name one: '
            f"cfg=dict(type={cfg['type']!r}, postfix='_2', ...)"
        )
    weight = next(parent.parameters(), None)
    return child, plugin if weight is None else plugin.to(weight.device)
