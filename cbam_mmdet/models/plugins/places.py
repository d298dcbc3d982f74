"""Places in a backbone: patterns of module names, and where CBAM usually goes in each kind of backbone.

In residual blocks that is the paper's place (figure 3): after the block's last norm, before the addition. Where a norm and its
activation are one module it is the end of the block or stage; for transformers, whose blocks hold tokens, the maps that they return.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from torch import nn

OUTPUTS = 'outputs'  # stands for the maps that the backbone returns

BOTTLENECK, BASIC_BLOCK = ['layer*.*.bn3'], ['layer*.*.bn2']

# Class of the backbone -> lists of patterns, of which the first that matches serves. Derived classes (ResNeXt, Res2Net, ResNeSt, RegNet,
# DetectoRS and Trident ResNets of ResNet) share the place.
PLACES: dict[str, list[list[str]]] = {
    'ResNet': [BOTTLENECK, BASIC_BLOCK],
    'HRNet': [['layer1.*.bn3', 'stage*.*.branches.*.*.bn2']],
    'HourglassNet': [['hourglass_modules.**.bn2']],
    'Darknet': [['conv_res_block*.res*.conv2']],
    'CSPDarknet': [['stage*.*.blocks.*.conv2']],
    'CSPNeXt': [['stage*.*.blocks.*.conv2']],
    'MobileNetV2': [['layer*.*.linear_conv.bn']],
    'EfficientNet': [['layers.*.*.linear_conv.bn']],
    'SwinTransformer': [[OUTPUTS]],
    'PyramidVisionTransformer': [[OUTPUTS]],
    'DenseNet': [['stages.*']],
    'InceptionV3': [['Mixed_*']],
}


def matches(pattern: str, name: str) -> bool:
    """Does a dotted name match a pattern? * ? [...] stay within one segment, ** takes any number of segments, none included.

    'outputs' is matched by itself alone.
    """
    if name == OUTPUTS:
        return pattern == OUTPUTS
    return _match(pattern.split('.'), name.split('.'))


def _match(pattern: list[str], name: list[str]) -> bool:
    if not pattern:
        return not name
    if pattern[0] == '**':
        return any(_match(pattern[1:], name[i:]) for i in range(len(name) + 1))
    return bool(name) and fnmatchcase(name[0], pattern[0]) and _match(pattern[1:], name[1:])


def names_of(backbone: nn.Module) -> list[str]:
    """The dotted names of all modules inside, in the order of their registration, and 'outputs'."""
    return [*(name for name, _ in backbone.named_modules() if name), OUTPUTS]


def usual_place(backbone: Any) -> list[str]:
    """The patterns for a backbone, by its class or the nearest one that it is derived from; none for a backbone that is not known."""
    classes = [cls.__name__ for cls in type(backbone).__mro__]
    if 'VGG' in classes:
        return _before_pools(backbone.features)
    names = names_of(backbone)
    for patterns in next((PLACES[cls] for cls in classes if cls in PLACES), []):
        if any(matches(pattern, name) for pattern in patterns for name in names):
            return patterns
    return []


def _before_pools(features: nn.Sequential) -> list[str]:
    """VGG: the last module of each convolution stage, a ReLU or a block that ends in one."""
    pools = [int(name) for name, m in features.named_children() if isinstance(m, nn.MaxPool2d)]
    return [f'features.{i - 1}' for i in pools]
