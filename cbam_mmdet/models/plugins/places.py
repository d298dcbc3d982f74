"""Places in a backbone: patterns of module names, and the usual place of CBAM in each kind of backbone.

In residual blocks it is the paper's place (figure 3): after the block's last norm, before the addition. If a norm and
its activation are one module, it is the end of the block or stage. Transformers, whose blocks hold tokens, have CBAM on
the feature maps that they return.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from torch import nn

OUTPUTS = 'outputs'  # stands for the maps that the backbone returns

BOTTLENECK, BASIC_BLOCK = ['layer*.*.bn3'], ['layer*.*.bn2']

# timm's networks differ in their modules alone.
TIMM = [
    [f'timm_model.{pattern}' for pattern in patterns]
    for patterns in (
        BOTTLENECK,
        BASIC_BLOCK,
        ['repeat*.*.conv2d', 'block8.conv2d'],  # Inception-ResNet-v2; the convolutions have no norm
        ['blocks*.**.ghost2'],  # GhostNet
        ['blocks.*.*.bn3', 'blocks.0.*.bn2'],  # MobileNetV3, EfficientNet
        ['stages*.**.blocks.*'],  # ConvNeXt
    )
]

# Class of the backbone -> lists of patterns. The first list with a match is used. Derived classes share the place.
# Those of ResNet are ResNeXt, Res2Net, ResNeSt, RegNet, and the ResNets of DetectoRS and TridentNet.
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
    'TIMMBackbone': TIMM,
    'TimmFeatures': TIMM,
}


def matches(pattern: str, name: str) -> bool:
    """Whether a dotted name matches a pattern.

    * ? [...] match within one segment, and ** matches any number of segments or none. Only 'outputs' matches 'outputs'.
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
    """The dotted names of all modules inside, in the order in which they are registered, and 'outputs'."""
    return [*(name for name, _ in backbone.named_modules() if name), OUTPUTS]


def usual_place(backbone: Any) -> list[str]:
    """The patterns for a backbone, by its class or its nearest known base class. Empty for an unknown backbone."""
    classes = [cls.__name__ for cls in type(backbone).__mro__]
    if 'VGG' in classes:
        return _before_pools(backbone.features)
    names = names_of(backbone)
    for patterns in next((PLACES[cls] for cls in classes if cls in PLACES), []):
        if any(matches(pattern, name) for pattern in patterns for name in names):
            return patterns
    return []


def _before_pools(features: nn.Sequential) -> list[str]:
    """The last module of each convolution stage of VGG: a ReLU, or a block that ends in one."""
    pools = [int(name) for name, m in features.named_children() if isinstance(m, nn.MaxPool2d)]
    return [f'features.{i - 1}' for i in pools]
