"""Check `model.backbone.plugins` of MMDetection's own backbones before anything is built.

MMDetection's ResNets check them by asserts without a message. Its other backbones refuse or ignore them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS

from cbam_mmdet.errors import UserError, did_you_mean
from cbam_mmdet.models.plugins.backbone import PluginBackbone
from cbam_mmdet.utils.config import class_of

WHERE = 'model.backbone.plugins'
ANY = "Any backbone takes them inside type='PluginBackbone' (docs/any_backbone.md)."
POSITIONS = ('after_conv1', 'after_conv2', 'after_conv3')


def check_plugins(cfg: Config) -> None:
    """Check position, stages and type of the plugins of a config's backbone.

    PluginBackbone checks its own plugins when it is built.

    Raises:
        UserError: for a wrong plugin. The message names the key, what is allowed, and what to do.
    """
    backbone = cfg.model.get('backbone') or {}
    plugins = backbone.get('plugins')
    if not plugins:
        return
    from mmdet.registry import MODELS as DETECTION_MODELS  # MMDetection takes seconds to import

    cls = class_of(DETECTION_MODELS, backbone.get('type'))
    if cls is PluginBackbone and cfg.get('efficient_conv_bn_eval'):
        raise UserError(
            f'efficient_conv_bn_eval={cfg.efficient_conv_bn_eval!r} takes the norms of the backbone out of the '
            'network, and with them the plugins that PluginBackbone puts behind norms: set it to None'
        )
    if cls is None or cls is PluginBackbone:
        return  # for an unknown type the registry raises an error when the model is built
    _check_backbone(cls, backbone)
    for i, plugin in enumerate(plugins if isinstance(plugins, (list, tuple)) else [plugins]):
        _check_plugin(plugin, f'{WHERE}[{i}]', backbone, DETECTION_MODELS)


def _check_backbone(cls: Any, backbone: Mapping) -> None:
    """Refuse a backbone of MMDetection that takes no plugins."""
    name = cls.__name__
    if not any('plugins' in inspect.signature(base.__init__).parameters for base in cls.__mro__):
        raise UserError(f'{WHERE}: {name} takes no plugins; in MMDetection only its Bottleneck ResNets do. {ANY}')
    block = getattr(cls, 'arch_settings', {}).get(backbone.get('depth'))
    if isinstance(block, tuple) and getattr(block[0], 'expansion', 0) == 1:
        deep = [depth for depth, (block, _) in cls.arch_settings.items() if block.expansion > 1]
        raise UserError(
            f'{WHERE}: {name} of depth {backbone["depth"]} takes no plugins, its blocks are no Bottlenecks; '
            f'depth {deep} do. {ANY}'
        )


def _check_plugin(plugin: Any, key: str, backbone: Mapping, registry: Any) -> None:
    if not isinstance(plugin, dict) or not isinstance(plugin.get('cfg'), dict) or 'type' not in plugin['cfg']:
        raise UserError(f"{key}: expected dict(cfg=dict(type='CBAM'), position='after_conv3'), got {plugin}")
    if 'after' in plugin:
        raise UserError(
            f'{key}: `after` is for PluginBackbone; {_name(backbone)} takes `position`, one of {list(POSITIONS)}. {ANY}'
        )
    position, stages = plugin.get('position'), plugin.get('stages')
    if position not in POSITIONS:
        hint = did_you_mean(str(position), POSITIONS)
        raise UserError(f'{key}.position={position!r}: expected one of {list(POSITIONS)}{hint}')
    num_stages = backbone.get('num_stages', 4)
    if stages is not None and len(stages) != num_stages:
        raise UserError(
            f'{key}.stages={tuple(stages)} has {len(stages)} entries: expected {num_stages}, one for each stage of the '
            'backbone'
        )
    if class_of(registry, plugin['cfg']['type']) is None:
        name = plugin['cfg']['type']
        known = [*registry.module_dict, *MODELS.module_dict]
        raise UserError(f'{key}.cfg.type={name!r} is not a registered model{did_you_mean(name, known)}')


def _name(backbone: Mapping) -> str:
    kind = backbone['type']
    return kind if isinstance(kind, str) else kind.__name__
