"""Translate the keys of other implementations: the authors' ImageNet checkpoints, and CBAM in timm and MMYOLO.

The authors' networks (github.com/Jongchan/attention-module) are torchvision's ResNets with a CBAM at the end of each
block. With `plugins=`, a Bottleneck's keys are:

    theirs                                                    here
    module.layer1.0.conv1.weight                              layer1.0.conv1.weight
    module.layer1.0.cbam.ChannelGate.mlp.1.weight             layer1.0.cbam.channel.fc1.weight
    module.layer1.0.cbam.ChannelGate.mlp.3.weight             layer1.0.cbam.channel.fc2.weight
    module.layer1.0.cbam.SpatialGate.spatial.conv.weight      layer1.0.cbam.spatial.conv.weight
    module.layer1.0.cbam.SpatialGate.spatial.bn.weight        layer1.0.cbam.spatial.bn.weight

With PluginBackbone, which a BasicBlock needs, the CBAM is a child of the norm: layer1.0.bn2.cbam.channel.fc1.weight.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cbam_mmdet.errors import UserError
from cbam_mmdet.models.cbam import CBAM

DEPTHS: dict[tuple[str, tuple[int, ...]], int] = {
    ('BasicBlock', (2, 2, 2, 2)): 18,
    ('BasicBlock', (3, 4, 6, 3)): 34,
    ('Bottleneck', (3, 4, 6, 3)): 50,
    ('Bottleneck', (3, 4, 23, 3)): 101,
}
OFFICIAL_PARTS = {
    'ChannelGate.mlp.1': 'channel.fc1',
    'ChannelGate.mlp.3': 'channel.fc2',
    'SpatialGate.spatial.conv': 'spatial.conv',
    'SpatialGate.spatial.bn': 'spatial.bn',
}
TIMM_PARTS = {
    'channel.fc1': 'channel.fc1',
    'channel.fc2': 'channel.fc2',
    'spatial.conv.conv': 'spatial.conv',
    'spatial.conv.bn': 'spatial.bn',
}
MMYOLO_PARTS = {
    'channel_attention.fc.0.conv': 'channel.fc1',
    'channel_attention.fc.1.conv': 'channel.fc2',
    'spatial_attention.conv.conv': 'spatial.conv',
}


@dataclass(frozen=True)
class Conversion:
    """The result of a translation.

    Attributes:
        state_dict: the weights with the new keys, in the order of the old ones.
        origins: for each new key the old key, or None if the key was added.
        notes: messages about what could not be translated, or must be set in the config.
    """

    state_dict: dict[str, Tensor]
    origins: Mapping[str, str | None]
    notes: tuple[str, ...] = ()


def is_official(state_dict: Mapping) -> bool:
    """Whether this is a state dict of the authors' networks with CBAM."""
    return any('.ChannelGate.mlp.' in str(key) for key in state_dict)


def from_official(state_dict: Mapping[str, Tensor], in_norm: bool | None = None) -> Conversion:
    """Translate the authors' state dict into the keys of MMDetection's ResNet with CBAM.

    Args:
        state_dict: that of a ResNet-18, 34, 50 or 101 with CBAM, with or without DataParallel's prefix 'module.'.
        in_norm: whether the CBAMs here are children of each block's last norm (PluginBackbone), and not of the block
            (`plugins=`). By default they are children of the norm for BasicBlocks only.

    Raises:
        UserError: if it is not from such a network. The message names keys that are unknown, missing, or of another
            shape.
    """
    given = {key.removeprefix('module.'): key for key in state_dict}
    block, _ = _check_official({key: state_dict[old] for key, old in given.items()})
    in_norm = block == 'BasicBlock' if in_norm is None else in_norm
    last = ('bn2.' if block == 'BasicBlock' else 'bn3.') if in_norm else ''
    origins = {}
    for key, old in given.items():
        found = _official_cbam(key)
        new = f'{found[0]}.{last}cbam.{OFFICIAL_PARTS[found[1]]}.{found[2]}' if found else key
        origins[new] = old
    return Conversion({new: state_dict[old] for new, old in origins.items()}, origins)


def to_official(state_dict: Mapping[str, Tensor]) -> Conversion:
    """Translate back into the keys that the authors' code loads, with DataParallel's prefix.

    Args:
        state_dict: that of a ResNet with CBAM (keys from 'conv1.weight' on), or of a classifier of mmpretrain with such
            a backbone ('backbone.', 'head.fc.').

    Raises:
        UserError: if it does not fit the authors' networks. The message names keys that are unknown, missing, or of
            another shape.
    """
    theirs = {new: old for old, new in OFFICIAL_PARTS.items()}
    origins = {}
    for old in state_dict:
        key = old.removeprefix('backbone.').replace('head.fc.', 'fc.', 1)
        found = re.fullmatch(r'(layer\d\.\d+)\.(?:bn[23]\.)?cbam\.(\w+\.\w+)\.(\w+)', key)
        if found and found[2] in theirs:
            key = f'{found[1]}.cbam.{theirs[found[2]]}.{found[3]}'
        origins[f'module.{key}'] = old
    _check_official({new.removeprefix('module.'): state_dict[old] for new, old in origins.items()})
    return Conversion({new: state_dict[old] for new, old in origins.items()}, origins)


def from_timm(state_dict: Mapping[str, Tensor]) -> Conversion:
    """Translate the state dict of timm's CbamModule, or of a network with such modules. Other keys stay as they are.

    timm's MLP has no bias by default (zeros are added), and its layers are 1x1 convolutions. The input of its spatial
    convolution is [mean; max], where the authors' is [max; mean]. The outputs are the same.
    """
    notes = ['timm.LightCbamModule has the same keys and other equations: from one of those the outputs would differ']
    return _from_modules(state_dict, TIMM_PARTS, notes)


def from_mmyolo(state_dict: Mapping[str, Tensor]) -> Conversion:
    """Translate the state dict of MMYOLO's CBAM, or of a network with such modules. Other keys stay as they are.

    Its layers are 1x1 convolutions. The input of its spatial convolution is [mean; max]. The convolution has a bias and
    no BatchNorm, so it fits a CBAM with `norm_cfg=None`.
    """
    return _from_modules(state_dict, MMYOLO_PARTS, ['it has no BatchNorm: set norm_cfg=None in the config of CBAM'])


def translate(state_dict: Mapping[str, Tensor]) -> Conversion | None:
    """Translate a state dict of any of the three sources into the keys used here. None if it is from none of them."""
    if is_official(state_dict):
        return from_official(state_dict)
    for parts, convert in ((MMYOLO_PARTS, from_mmyolo), (TIMM_PARTS, from_timm)):
        if any(f'{_last(parts)}.weight' == _tail(key, parts) for key in state_dict):
            return convert(state_dict)
    return None


def _last(parts: Mapping[str, str]) -> str:
    return next(old for old, new in parts.items() if new == 'spatial.conv')


def _tail(key: str, parts: Mapping[str, str]) -> str | None:
    """The part of a key inside a CBAM module, or None if it is not a key of such a module."""
    found = re.search(rf'(?:^|\.)((?:{"|".join(map(re.escape, parts))})\.\w+)$', key)
    return found[1] if found else None


def _from_modules(state_dict: Mapping[str, Tensor], parts: Mapping[str, str], notes: list[str]) -> Conversion:
    weights: dict[str, Tensor] = {}
    origins: dict[str, str | None] = {}
    reductions: set[int] = set()
    # 'channel.fc1' alone may belong to any module. Only a module that also has a spatial convolution is a CBAM.
    mark = f'{_last(parts)}.weight'
    modules = {key[: -len(mark)] for key in state_dict if _tail(key, parts) == mark}
    for old, value in state_dict.items():
        tail = _tail(old, parts)
        prefix = old[: -len(tail)] if tail else None
        if prefix not in modules:
            weights[old], origins[old] = value, old
            continue
        part, _, kind = tail.rpartition('.')
        new = f'{prefix}{parts[part]}.{kind}'
        if parts[part].startswith('channel.') and kind == 'weight':
            if value.dim() != 4 or value.shape[2:] != (1, 1):
                raise UserError(f'{old} has the shape {tuple(value.shape)}; a 1x1 convolution is expected')
            value = value.flatten(1)
            if parts[part] == 'channel.fc1':
                reductions.add(value.shape[1] // value.shape[0])
        if parts[part] == 'spatial.conv' and kind == 'weight':
            if value.dim() != 4 or value.shape[:2] != (1, 2):
                raise UserError(f'{old} has the shape {tuple(value.shape)}; (1, 2, K, K) is expected')
            value = value.flip(1)
        weights[new], origins[new] = value, old
        bias = f'{prefix}{parts[part]}.bias'
        if parts[part].startswith('channel.') and f'{prefix}{part}.bias' not in state_dict:
            weights[bias], origins[bias] = value.new_zeros(value.shape[0]), None
    notes = [*notes, f'set reduction={", ".join(map(str, sorted(reductions)))} in the config of CBAM']
    return Conversion(weights, origins, tuple(notes))


def _official_cbam(key: str) -> tuple[str, str, str] | None:
    """The parts ('layer1.0', 'ChannelGate.mlp.1', 'weight') of a key of the authors' CBAM, or None."""
    found = re.fullmatch(rf'(layer\d\.\d+)\.cbam\.({"|".join(map(re.escape, OFFICIAL_PARTS))})\.(\w+)', key)
    return (found[1], found[2], found[3]) if found else None


def _check_official(state_dict: Mapping[str, Tensor]) -> tuple[str, int]:
    """Compare with the keys and shapes of torchvision's network with CBAMs.

    Returns:
        'BasicBlock' or 'Bottleneck', and the depth.
    """
    block = 'Bottleneck' if 'layer1.0.conv3.weight' in state_dict else 'BasicBlock'
    blocks = {found[0] for key in state_dict if (found := re.match(r'layer([1-4])\.(\d+)\.', key))}
    counts = tuple(sum(name.startswith(f'layer{stage}.') for name in blocks) for stage in range(1, 5))
    depth = DEPTHS.get((block, counts))
    if depth is None:
        raise UserError(
            f'these are not the weights of a ResNet-18, 34, 50 or 101: stages of {", ".join(map(str, counts))} {block}s'
        )
    expected = _official_shapes(block, depth, state_dict)
    optional = {key for key in expected if key.endswith('num_batches_tracked') or key.startswith('fc.')}
    faults = []
    for what, keys in (
        ('no such network has', [key for key in state_dict if key not in expected]),
        ('missing', [key for key in expected if key not in state_dict and key not in optional]),
        ('of another shape', [k for k, shape in expected.items() if k in state_dict and state_dict[k].shape != shape]),
    ):
        if keys:
            shown = ', '.join(
                f'{key} ({tuple(state_dict[key].shape)}, expected {tuple(expected[key])})' if 'shape' in what else key
                for key in keys[:3]
            )
            faults.append(f'{len(keys)} keys {what}: {shown}{", ..." if len(keys) > 3 else ""}')
    if faults:
        bam = ' A model with BAM has no counterpart here.' if any(key.startswith('bam') for key in state_dict) else ''
        raise UserError(
            f"these are not the weights of the authors' ResNet-{depth} with CBAM: {'; '.join(faults)}.{bam}"
        )
    return block, depth


def _official_shapes(block: str, depth: int, state_dict: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    import torchvision  # takes a second, and only this function needs it

    mlp = state_dict.get('layer1.0.cbam.ChannelGate.mlp.1.weight')
    reduction = mlp.shape[1] // mlp.shape[0] if mlp is not None and mlp.dim() == 2 else 16
    classes = len(state_dict['fc.bias']) if 'fc.bias' in state_dict else 1000
    with torch.device('meta'):
        network = getattr(torchvision.models, f'resnet{depth}')(num_classes=classes)
        for stage in range(1, 5):
            channels = 64 * 2 ** (stage - 1) * (4 if block == 'Bottleneck' else 1)
            for residual in getattr(network, f'layer{stage}'):
                residual.cbam = CBAM(channels, reduction=reduction)
    theirs = {new: old for old, new in OFFICIAL_PARTS.items()}
    shapes = {}
    for key, value in network.state_dict().items():
        found = re.fullmatch(r'(layer\d\.\d+\.cbam)\.(\w+\.\w+)\.(\w+)', key)
        shapes[f'{found[1]}.{theirs[found[2]]}.{found[3]}' if found else key] = value.shape
    return shapes
