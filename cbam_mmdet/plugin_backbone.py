"""Plugins such as CBAM at named places of any backbone or neck, where MMDetection's `plugins=` reaches only Bottleneck ResNets.

    backbone=dict(type='PluginBackbone', backbone=dict(type='ResNet', depth=18, ...),
                  plugins=[dict(cfg=dict(type='CBAM', gate='unit'), after='layer*.*.bn2')])

What is built is the backbone itself, without a wrapper: each plugin becomes a child of the module that it follows and is
applied to that module's output, so every weight keeps its key and the checkpoints of the plain detector load.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mmcv.cnn import build_plugin_layer
from mmengine.logging import print_log
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from cbam_mmdet.backbone_places import OUTPUTS, matches, names_of, usual_place
from cbam_mmdet.errors import UserError, did_you_mean

KEEP = object()  # `init_cfg` was not given


@MODELS.register_module()
def PluginBackbone(
    backbone: Mapping,
    plugins: Sequence[Mapping] | None,
    input_shape: Sequence[int] | None = None,
    init_cfg: Mapping | None = KEEP,
    fuse_tail: bool = False,
    **others: Any,
) -> nn.Module:
    """Build a backbone, and put plugins into it.

    Args:
        backbone: its config: any backbone of the registries, e.g. of type 'ResNet', 'SSDVGG' or 'mmpretrain.VGG'.
        plugins: of each, `cfg` (type and arguments; a `postfix` makes its name unique) and `after`: the module that it follows, by its
            dotted name in the backbone. In a pattern, * ? [12] stand for characters within one segment of the name, ** for any
            number of segments. A list of patterns takes each module once. 'outputs' stands for each feature map that the backbone returns.
            Without `after` it is the usual place of this backbone (see backbone_places.py).
            Plugins at one module run in the order of this list. None or an empty list leaves the backbone plain.
        input_shape: (channels, height, width) of the image of the dry run that finds the channels; by default (in_channels or 3, 224, 224).
        init_cfg: in place of the backbone's own, so that an override reaches all backbones by the same key. Without a `type`
            (as in init_cfg.checkpoint=FILE) it is merged into the backbone's own.
        fuse_tail: let residual blocks that end in a CBAM (a plugin, or one of the backbone's own `plugins`) compute norm, CBAM, addition
            and ReLU in CBAM's own passes, on a GPU; see block_tail.fuse_tails.

    Returns:
        The backbone, with a child `cbam` (for a CBAM) in each chosen module, and `cbam0`, `cbam1`, ... in itself for 'outputs'.

    Raises:
        UserError: (a ValueError) for a pattern that matches nothing, with near matches; a chosen module whose output is not one tensor
            of shape (N, C, H, W); a plugin that changes the shape.

    What to know: a plugin that follows a norm goes with it where that is replaced (fuse_conv_bn folds BatchNorms away) and follows its mode
    (norm_eval=True holds a plugin's dropout, too); plugins at 'outputs' run where the backbone is called as such, not where a detector
    calls a part of it (RFP's rfp_forward).
    """
    module, backbone = _build_inner('backbone', backbone, init_cfg, others)
    shape = input_shape or (backbone.get('in_channels', 3), 224, 224)
    if not isinstance(shape, Sequence) or len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise UserError(f'model.backbone.input_shape={input_shape!r}: expected (channels, height, width)')

    def inputs() -> tuple[Tensor]:
        return (_zeros(module, shape),)

    add_plugins(module, plugins, inputs, 'model.backbone.plugins', usual_place(module))
    if fuse_tail:
        from cbam_mmdet.block_tail import fuse_tails  # which loads MMDetection's backbones

        fuse_tails(module)
    return module


@MODELS.register_module()
def PluginNeck(
    neck: Mapping, plugins: Sequence[Mapping] | None, init_cfg: Mapping | None = KEEP, **others: Any
) -> nn.Module:
    """Build a neck, and put plugins into it: as PluginBackbone; the usual place is its outputs, the maps that the heads see.

    Args:
        neck: its config; its `in_channels` shape the input of the dry run.
        plugins: see PluginBackbone.
        init_cfg: see PluginBackbone.

    Raises:
        UserError: as PluginBackbone.
    """
    module, neck = _build_inner('neck', neck, init_cfg, others)
    channels = neck.get('in_channels')
    if not channels:
        raise UserError(f'PluginNeck: a neck with in_channels is expected, got {dict(neck)}')
    channels = [channels] if isinstance(channels, int) else list(channels)

    def inputs() -> tuple[tuple[Tensor, ...]]:
        sizes = [32 * 2**i for i in reversed(range(len(channels)))]
        return (tuple(_zeros(module, (c, size, size)) for c, size in zip(channels, sizes, strict=True)),)

    return add_plugins(module, plugins, inputs, 'model.neck.plugins', [OUTPUTS])


def add_plugins(
    module: nn.Module,
    plugins: Sequence[Mapping] | None,
    inputs: Callable[[], tuple],
    where: str = 'plugins',
    usual: Sequence[str] = (),
) -> nn.Module:
    """Put plugins into a module that is already built.

    Args:
        module: what to put them into; it is changed in place.
        plugins: as PluginBackbone's.
        inputs: makes the arguments of the module's forward for the dry run.
        where: the config's key, for messages.
        usual: the patterns for a plugin without `after`.

    Returns:
        The same module.

    Raises:
        UserError: as PluginBackbone.
    """
    plugins = [plugins] if isinstance(plugins, Mapping) else plugins or []
    _check_plugin_configs(plugins, where)
    places = [_places(module, plugin, f'{where}[{i}]', usual) for i, plugin in enumerate(plugins)]
    chosen = list(dict.fromkeys(name for names in places for name in names))
    if not chosen:
        return module
    calls = _dry_run(module, inputs, chosen, where)
    added: dict[str, list[nn.Module]] = {}
    for i, (plugin, names) in enumerate(zip(plugins, places, strict=True)):
        uncalled = [name for name in names if not calls[name]]
        if len(uncalled) == len(names):
            raise UserError(
                f'{where}[{i}].after={plugin.get("after")!r}: {_some(names)} never run as modules of their own in a forward pass of '
                f'{type(module).__name__} in eval mode (a container whose children are called one by one, perhaps). Choose modules inside.'
            )
        if uncalled:
            message = f'{where}[{i}]: left out, as they do not run in eval mode: {_some(uncalled)}'
            print_log(message, logger='current', level=logging.WARNING)
        for name in names:
            if calls[name]:
                added.setdefault(name, []).extend(_insert(module, name, plugin['cfg'], calls[name], f'{where}[{i}]'))
    _check_by_dry_run(module, inputs, calls, added, where)
    _reach_by_init_weights(module, [plugin for group in added.values() for plugin in group])
    _freeze_as_configured(module)
    return module


def _check_plugin_configs(plugins: Sequence[Mapping], where: str) -> None:
    if not isinstance(plugins, (list, tuple)):
        raise UserError(
            f"{where}: expected a list like [dict(cfg=dict(type='CBAM'), after='layer*.*.bn2')], got {plugins}"
        )
    for i, plugin in enumerate(plugins):
        if not isinstance(plugin, Mapping) or not isinstance(plugin.get('cfg'), Mapping) or 'type' not in plugin['cfg']:
            raise UserError(f"{where}[{i}]: expected dict(cfg=dict(type='CBAM'), after='layer*.*.bn2'), got {plugin}")
        for key in set(plugin) - {'cfg', 'after'}:
            raise UserError(
                f"{where}[{i}] does not take {key!r}: it takes `cfg` and `after`, a pattern of module names in place of MMDetection's "
                '`position` and `stages`'
            )
        name = plugin['cfg']['type']
        if isinstance(name, str) and MODELS.get(name) is None:
            known = [name for registry in (MODELS, *MODELS.children.values()) for name in registry.module_dict]
            raise UserError(f'{where}[{i}].cfg.type={name!r} is not a registered model{did_you_mean(name, known)}')


def _places(module: nn.Module, plugin: Mapping, where: str, usual: Sequence[str]) -> list[str]:
    """The names of the modules that a plugin follows, in the order of the module's own registration."""
    after = plugin.get('after') or usual
    names = names_of(module)
    if not after:
        raise UserError(
            f"{where}: no usual place for a plugin is known in {type(module).__name__}: say it, e.g. after='{OUTPUTS}' (each map that it "
            f"returns) or a pattern of its modules' names, which begin {_some(names, 12)}"
        )
    patterns = [after] if isinstance(after, str) else after
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise UserError(
            f"{where}.after={after!r}: expected a pattern of module names, as 'layer*.*.bn2', or a list of patterns"
        )
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            raise UserError(
                f'{where}.after={pattern!r} matches no module of {type(module).__name__}{_hint(pattern, names)}'
            )
    return [name for name in names if any(matches(pattern, name) for pattern in patterns)]


def _hint(pattern: str, names: list[str]) -> str:
    """How far the pattern matches, and what is there."""
    segments = pattern.split('.')
    for length in range(len(segments) - 1, -1, -1):
        prefix = '.'.join(segments[:length])
        reached = [name for name in names if matches(prefix, name)] if prefix else ['']
        children = dict.fromkeys(
            name.rpartition('.')[2] for name in names if name.rpartition('.')[0] in reached and name not in reached
        )
        if not children:
            continue
        wrong = segments[length]
        guess = did_you_mean(wrong, [child for child in children if child != wrong])
        inside = f'{prefix!r} matches {_some(reached)}, which hold' if prefix else 'it holds'
        return f', whose modules have other names: {inside} {_some(list(children), 16)}{guess}'
    return ''


def _some(names: Sequence[str], most: int = 3) -> str:
    return ', '.join(names[:most]) + (f', ... ({len(names)} in all)' if len(names) > most else '')


# The dry run


def _zeros(module: nn.Module, shape: Sequence[int]) -> Tensor:
    weight = next(module.parameters(), torch.empty(0))
    return torch.zeros(1, *shape, dtype=weight.dtype, device=weight.device)


@contextlib.contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards modes, buffers and random states are as before."""
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


def _dry_run(module: nn.Module, inputs: Callable, names: list[str], where: str) -> dict[str, list[torch.Size]]:
    """The shapes that the named modules return, one for each call; for 'outputs', one for each map."""
    calls: dict[str, list[torch.Size]] = {name: [] for name in names}

    def record(name: str) -> Callable:
        def hook(_: nn.Module, __: tuple, output: Any) -> None:
            many = name == OUTPUTS and isinstance(output, (tuple, list))
            values = [value for value in output if value is not None] if many else [output]
            calls[name] += [_shape(value, name, where, module) for value in values]

        return hook

    hooks = [(_at(module, name), record(name)) for name in names]
    _forward(module, inputs, hooks, where, 'the dry run that finds the channels')
    for name, shapes in calls.items():
        channels = {shape[1] for shape in shapes}
        if name != OUTPUTS and len(channels) > 1:
            raise UserError(
                f'{where}: {name} runs several times, with {sorted(channels)} channels: one plugin cannot serve them. Choose another module.'
            )
    return calls


def _forward(
    module: nn.Module, inputs: Callable, hooks: Sequence[tuple[nn.Module, Callable]], where: str, doing: str
) -> None:
    """One forward pass that leaves no trace, with forward hooks for its time."""
    with _undisturbed(module), contextlib.ExitStack() as stack:
        for hooked, hook in hooks:
            stack.callback(hooked.register_forward_hook(hook).remove)
        try:
            module(*inputs())
        except UserError:
            raise
        except Exception as error:  # whatever a stranger's backbone does with an image of this size
            shapes = _shapes(inputs())
            raise UserError(
                f'{where}: {doing} failed in {type(module).__name__} with an input of {shapes} ({type(error).__name__}: {error}). If it is the '
                'size that does not fit, give one that does: input_shape=(channels, height, width)'
            ) from error


def _shapes(values: Any) -> Any:
    return tuple(values.shape) if isinstance(values, Tensor) else ', '.join(str(_shapes(value)) for value in values)


def _at(module: nn.Module, name: str) -> nn.Module:
    return module if name == OUTPUTS else module.get_submodule(name)


def _shape(value: Any, name: str, where: str, module: nn.Module) -> torch.Size:
    if isinstance(value, Tensor) and value.ndim == 4:
        return value.shape
    kind = f'a tensor of shape {tuple(value.shape)}' if isinstance(value, Tensor) else f'a {type(value).__name__}'
    if name == OUTPUTS:
        raise UserError(
            f'{where}: {type(module).__name__} returns {kind} among its outputs; plugins there need tensors of shape (N, C, H, W), one or a '
            'tuple of them. Choose modules inside.'
        )
    inside = [child for child, _ in _at(module, name).named_children()]
    advice = f'a module inside ({_some([f"{name}.{child}" for child in inside])})' if inside else 'another module'
    raise UserError(
        f'{where}: {name} ({type(_at(module, name)).__name__}) returns {kind}; a plugin needs one tensor of shape (N, C, H, W). Choose {advice} or '
        f"after='{OUTPUTS}', the maps that the backbone returns."
    )


# The plugins in their places


class ApplyChild:
    """A forward hook: apply the child of that name to the module's output."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        return getattr(module, self.name)(output)


class ApplyChildToEach:
    """A forward hook: apply one child to each of the module's outputs."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)

    def __call__(self, module: nn.Module, inputs: tuple, outputs: Any) -> Any:
        if isinstance(outputs, Tensor):
            return getattr(module, self.names[0])(outputs)
        maps = [i for i, output in enumerate(outputs) if output is not None]
        if len(maps) != len(self.names):
            raise UserError(
                f'{type(module).__name__} returns {len(maps)} maps here, and {len(self.names)} in the dry run in eval mode: plugins at '
                f"'{OUTPUTS}' need the same maps always. Choose modules inside."
            )
        refined = list(outputs)
        for i, name in zip(maps, self.names, strict=True):
            refined[i] = getattr(module, name)(refined[i])
        make = getattr(outputs, '_make', type(outputs))  # a NamedTuple, or a tuple or list
        return make(refined)


def _apply_after_conversion(module: nn.Module, name: str, child: nn.Module | None) -> None:
    """The conversion between BatchNorm and SyncBN builds new norms and hands the children over, but not the hooks."""
    is_norm = 'BatchNorm' in type(module).__name__
    if is_norm and name == getattr(child, '_follows_its_parent_as', None) and name not in _applied(module):
        module.register_forward_hook(ApplyChild(name))


def _applied(module: nn.Module) -> list[str]:
    return [hook.name for hook in module._forward_hooks.values() if isinstance(hook, ApplyChild)]


register_module_module_registration_hook(_apply_after_conversion)


def _insert(module: nn.Module, name: str, cfg: Mapping, shapes: list[torch.Size], where: str) -> list[nn.Module]:
    cfg = dict(cfg)
    postfix = cfg.pop('postfix', '')
    parent = _at(module, name)
    if name == OUTPUTS:
        built = [_build(cfg, shape[1], f'{postfix}{i}', parent, name, where) for i, shape in enumerate(shapes)]
        for child, plugin in built:
            parent.add_module(child, plugin)
        parent.register_forward_hook(ApplyChildToEach([child for child, _ in built]))
        return [plugin for _, plugin in built]
    child, plugin = _build(cfg, shapes[0][1], postfix, parent, name, where)
    parent.add_module(child, plugin)
    if type(parent).forward is not nn.Sequential.forward:  # which runs its last child after the others by itself
        plugin._follows_its_parent_as = child
        parent.register_forward_hook(ApplyChild(child))
    return [plugin]


def _build(cfg: dict, channels: int, postfix: str, parent: nn.Module, name: str, where: str) -> tuple[str, nn.Module]:
    child, plugin = build_plugin_layer(cfg, postfix=postfix, in_channels=channels)
    if hasattr(parent, child):
        raise UserError(
            f"{where}: {name} already has a child {child!r}. To put two of a kind at one place, name one: cfg=dict(type={cfg['type']!r}, postfix='_2', ...)"
        )
    weight = next(parent.parameters(), None)
    return child, plugin if weight is None else plugin.to(weight.device)


def _check_by_dry_run(
    module: nn.Module, inputs: Callable, calls: dict[str, list], added: dict[str, list[nn.Module]], where: str
) -> None:
    """Run once more, with the plugins: each keeps the shape, and runs as often as the module that it follows."""
    counts: dict[nn.Module, int] = {}

    def hook(plugin: nn.Module, args: tuple, output: Any) -> None:
        counts[plugin] = counts.get(plugin, 0) + 1
        given = args[0].shape
        if not isinstance(output, Tensor) or output.shape != given:
            got = tuple(output.shape) if isinstance(output, Tensor) else f'a {type(output).__name__}'
            name = next(name for name, plugins in added.items() if plugin in plugins)
            raise UserError(
                f'{where}: {type(plugin).__name__} after {name} makes {got} of {tuple(given)}. A plugin must keep the shape: what follows expects it.'
            )

    hooks = [(plugin, hook) for plugins in added.values() for plugin in plugins]
    _forward(module, inputs, hooks, where, 'the dry run with the plugins')
    for name, plugins in added.items():
        expected = 1 if name == OUTPUTS else len(calls[name])
        if any(counts.get(plugin, 0) != expected for plugin in plugins):  # e.g. a ModuleDict that loops over its items
            raise UserError(
                f'{where}: {name} ({type(_at(module, name)).__name__}) runs its children itself, the plugin too. Choose a module inside.'
            )


class InitWeights:
    """A backbone's init_weights, which reaches the plugins as MMEngine means it to.

    MMEngine's initialization descends only through its own modules, while a plugin often hangs on one of PyTorch's; and what a
    backbone's init_cfg says of a norm (`zero_init_residual`) would strike all that hangs on it.
    """

    def __init__(self, module: nn.Module, plugins: Sequence[nn.Module]) -> None:
        self.module, self.plugins = module, plugins

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        own = [{key: value.clone() for key, value in plugin.state_dict().items()} for plugin in self.plugins]
        with _seen_loading(self.plugins) as loaded:
            type(self.module).init_weights(self.module, *args, **kwargs)
        for plugin, state in zip(self.plugins, own, strict=True):
            if plugin not in loaded:
                plugin.load_state_dict(state)
                if hasattr(plugin, 'init_weights') and not getattr(plugin, 'is_init', False):
                    plugin.init_weights()


@contextlib.contextmanager
def _seen_loading(plugins: Sequence[nn.Module]) -> Iterator[set[nn.Module]]:
    """The plugins whose weights a state dict brings meanwhile (a pretrained backbone with plugins in it)."""
    loaded: set[nn.Module] = set()

    def watch(plugin: nn.Module) -> Any:
        def hook(state_dict: Mapping, prefix: str, *_: Any) -> None:
            if any(key.startswith(prefix) for key in state_dict):
                loaded.add(plugin)

        return plugin._register_load_state_dict_pre_hook(hook)

    with contextlib.ExitStack() as stack:
        for plugin in plugins:
            stack.callback(watch(plugin).remove)
        yield loaded


def _reach_by_init_weights(module: nn.Module, plugins: Sequence[nn.Module]) -> None:
    if isinstance(getattr(module, 'init_weights', None), InitWeights):  # there are plugins in it from before
        plugins = [*module.init_weights.plugins, *plugins]
    if plugins and hasattr(module, 'init_weights'):
        module.init_weights = InitWeights(module, plugins)


def _freeze_as_configured(module: nn.Module) -> None:
    """Backbones freeze stages when they are built, and again in train(): the second time the plugins are there."""
    modes = {m: m.training for m in module.modules()}
    module.train()
    for m, mode in modes.items():
        m.training = mode


def _build_inner(what: str, cfg: Mapping, init_cfg: Mapping | None, others: Mapping) -> tuple[nn.Module, Mapping]:
    """The backbone or neck inside, and its config."""
    where = f'model.{what}'
    if not isinstance(cfg, Mapping) or 'type' not in cfg:
        raise UserError(f"{where}.{what}: expected the {what}'s own config, as dict(type='ResNet', ...), got {cfg!r}")
    if others:
        key = next(iter(others))
        raise UserError(f'{where} has plugins around a {cfg["type"]}: {where}.{key} belongs to {where}.{what}.{key}')
    if init_cfg is not KEEP:
        own = cfg.get('init_cfg')
        if isinstance(init_cfg, Mapping) and 'type' not in init_cfg and isinstance(own, Mapping):
            init_cfg = {**own, **init_cfg}
        cfg = {**cfg, 'init_cfg': init_cfg}
    # Without a scope MMEngine would look among its own models; a name that MMDetection's registry was asked for is MMDetection's.
    scope = {} if DefaultScope.get_current_instance() else {'_scope_': 'mmdet'}
    return MODELS.build({**scope, **cfg}), cfg
