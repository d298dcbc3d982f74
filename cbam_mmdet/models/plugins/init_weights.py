"""Initialize and freeze plugins together with the backbone that holds them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine.model import BaseModule
from torch import nn


class InitWeights:
    """A backbone's init_weights that also initializes the plugins.

    MMEngine's initialization descends only through its own modules, but a plugin is often a child of a module of
    PyTorch. Also, the backbone's init_cfg for a norm (`zero_init_residual`) would overwrite the weights of a plugin
    inside that norm. So each plugin is initialized after the backbone, again if it was already.
    """

    def __init__(self, module: Any, plugins: Sequence[nn.Module]) -> None:
        self.module, self.plugins = module, plugins

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        own = [{key: value.clone() for key, value in plugin.state_dict().items()} for plugin in self.plugins]
        with _seen_loading(self.plugins) as loaded:
            type(self.module).init_weights(self.module, *args, **kwargs)
        for plugin, state in zip(self.plugins, own, strict=True):
            if plugin not in loaded:
                plugin.load_state_dict(state)
                for part in plugin.modules():
                    if isinstance(part, BaseModule):
                        part._is_init = False
                if hasattr(plugin, 'init_weights'):
                    plugin.init_weights()
                self._tell(plugin)

    def _tell(self, plugin: nn.Module) -> None:
        """Correct what MMEngine's log of the initialization would say of a plugin: what the norm around it got."""
        told = getattr(self.module, '_params_init_info', {})
        for parameter in plugin.parameters():
            if parameter in told:
                mean = parameter.data.mean().cpu()
                told[parameter].update(init_info=f'by {type(plugin).__name__} itself', tmp_mean_value=mean)


@contextlib.contextmanager
def _seen_loading(plugins: Sequence[nn.Module]) -> Iterator[set[nn.Module]]:
    """The plugins whose weights are loaded inside this context, from a pretrained backbone with plugins in it."""
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


def reach_by_init_weights(module: Any, plugins: Sequence[nn.Module]) -> None:
    """Replace a backbone's init_weights, so that it also initializes these plugins."""
    if isinstance(getattr(module, 'init_weights', None), InitWeights):  # it already holds other plugins
        plugins = [*module.init_weights.plugins, *plugins]
    if plugins and hasattr(module, 'init_weights'):
        module.init_weights = InitWeights(module, plugins)


def freeze_as_configured(module: nn.Module) -> None:
    """Freeze the plugins in frozen stages. Backbones freeze stages when they are built, and again in train()."""
    modes = {m: m.training for m in module.modules()}
    module.train()
    for m, mode in modes.items():
        m.training = mode
