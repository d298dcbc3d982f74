"""Where CBAM usually goes in each backbone: what PluginBackbone takes for a plugin without `after`.

In residual blocks that is the paper's place (section 4.2 and figure 3): after the block's last norm, before the addition.
Elsewhere it is the end of a block or stage, and for transformers, whose blocks hold tokens, the maps that they return.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

BOTTLENECK, BASIC = ['layer*.*.bn3'], ['layer*.*.bn2']
CSP = ['stage*.*.blocks.*.conv2']

# Type of the backbone -> lists of patterns, of which the first that matches serves.
PLACES: dict[str, list[list[str]]] = {
    'ResNet': [BOTTLENECK, BASIC],
    'HRNet': [['layer1.*.bn3', 'stage*.*.branches.*.*.bn2']],
    'HourglassNet': [['**.bn2']],
    'Darknet': [['conv_res_block*.res*.conv2']],
    'CSPDarknet': [CSP],
    'CSPNeXt': [CSP],
    'MobileNetV2': [['layer1.*.conv.1.bn', 'layer*.*.conv.2.bn']],
    'EfficientNet': [['layers.*.*.linear_conv.bn']],
    'SwinTransformer': [['outputs']],
    'PyramidVisionTransformer': [['outputs']],
    'DenseNet': [['stages.*']],
    'InceptionV3': [['Mixed_*']],
}


def default_places(backbone: nn.Module) -> Sequence[Sequence[str]]:
    """Lists of patterns for a backbone: those of its class or the nearest class that it is derived from; none for an unknown one."""
    names = [cls.__name__ for cls in type(backbone).__mro__]
    if 'VGG' in names:
        return [_before_pools(backbone.features)]
    return next((PLACES[name] for name in names if name in PLACES), [])


def _before_pools(features: nn.Sequential) -> list[str]:
    """VGG: the last module of each convolution stage, a ReLU or a block that ends in one."""
    pools = [int(name) for name, m in features.named_children() if isinstance(m, nn.MaxPool2d)]
    return [f'features.{i - 1}' for i in pools]
