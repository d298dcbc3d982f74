"""The backbone or neck inside a PluginBackbone or PluginNeck, built from its own config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine.registry import MODELS, DefaultScope
from torch import nn

from cbam_mmdet.errors import UserError

KEEP: Any = object()  # `init_cfg` was not given


def build_inner(what: str, cfg: Mapping, init_cfg: Mapping | None, others: Mapping) -> tuple[nn.Module, Mapping]:
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
