"""Build the backbone or neck inside a PluginBackbone or PluginNeck from its own config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine.registry import MODELS, DefaultScope
from torch import nn

from cbam_mmdet.errors import UserError

KEEP: Any = object()  # the default of `init_cfg`: keep that of the inner config


def build_inner(what: str, cfg: Mapping, init_cfg: Mapping | None, others: Mapping) -> tuple[nn.Module, Mapping]:
    """Build the backbone or neck inside.

    Args:
        what: 'backbone' or 'neck'.
        cfg: its config.
        init_cfg: takes the place of the config's own, unless it is KEEP. Without a `type` it is merged into that.
        others: the arguments that PluginBackbone or PluginNeck does not take.

    Returns:
        The module, and its config.

    Raises:
        UserError: if the config is not one, or if there are other arguments.
    """
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
    # Without a default scope MMEngine would only search its own models, but the name is one of MMDetection's registry.
    scope = {} if DefaultScope.get_current_instance() else {'_scope_': 'mmdet'}
    return MODELS.build({**scope, **cfg}), cfg
