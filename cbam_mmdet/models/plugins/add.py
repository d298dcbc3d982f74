"""Insert plugins into a module that is already built."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import nn

from cbam_mmdet.errors import UserError, did_you_mean
from cbam_mmdet.models.plugins.apply_child import insert
from cbam_mmdet.models.plugins.dry_run import check_by_dry_run, dry_run
from cbam_mmdet.models.plugins.init_weights import freeze_as_configured, reach_by_init_weights
from cbam_mmdet.models.plugins.places import OUTPUTS, matches, names_of
from cbam_mmdet.utils.text import abridge


def add_plugins(
    module: nn.Module,
    plugins: Sequence[Mapping] | None,
    inputs: Callable[[], tuple],
    where: str = 'plugins',
    usual: Sequence[str] = (),
) -> nn.Module:
    """Insert plugins into a module that is already built.

    Args:
        module: the module, which is changed in place.
        plugins: those of PluginBackbone.
        inputs: a function that returns the arguments of the module's forward for the dry run.
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
    calls = dry_run(module, inputs, chosen, where)
    added: dict[str, list[nn.Module]] = {}
    for i, (plugin, names) in enumerate(zip(plugins, places, strict=True)):
        uncalled = [name for name in names if not calls[name]]
        if len(uncalled) == len(names):
            raise UserError(
                f'{where}[{i}].after={plugin.get("after")!r}: {abridge(names)} never run as modules of their own '
                f'in a forward pass of {type(module).__name__} in eval mode (a container whose children are called one '
                'by one, perhaps). Choose modules inside.'
            )
        if uncalled:
            message = f'{where}[{i}]: left out, as they do not run in eval mode: {abridge(uncalled)}'
            print_log(message, logger='current', level=logging.WARNING)
        for name in names:
            if calls[name]:
                added.setdefault(name, []).extend(insert(module, name, plugin['cfg'], calls[name], f'{where}[{i}]'))
    check_by_dry_run(module, inputs, calls, added, where)
    reach_by_init_weights(module, [plugin for group in added.values() for plugin in group])
    freeze_as_configured(module)
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
                f'{where}[{i}] does not take {key!r}: it takes `cfg` and `after`, a pattern of module names in place '
                "of MMDetection's `position` and `stages`"
            )
        name = plugin['cfg']['type']
        if isinstance(name, str) and MODELS.get(name) is None:
            known = [name for registry in (MODELS, *MODELS.children.values()) for name in registry.module_dict]
            raise UserError(f'{where}[{i}].cfg.type={name!r} is not a registered model{did_you_mean(name, known)}')


def _places(module: nn.Module, plugin: Mapping, where: str, usual: Sequence[str]) -> list[str]:
    """The names of the modules that a plugin follows, in the order in which they are registered."""
    after = plugin.get('after') or usual
    names = names_of(module)
    if not after:
        raise UserError(
            f"{where}: no usual place for a plugin is known in {type(module).__name__}: say it, e.g. after='{OUTPUTS}' "
            f"(each map that it returns) or a pattern of its modules' names, which begin {abridge(names, 12)}"
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
    """The longest part of the pattern that matches, and the names of the modules there."""
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
        inside = f'{prefix!r} matches {abridge(reached)}, which hold' if prefix else 'it holds'
        return f', whose modules have other names: {inside} {abridge(list(children), 16)}{guess}'
    return ''
