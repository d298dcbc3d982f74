"""Translate the keys of other implementations: networks of the authors and of pytorchcv, modules of timm and MMYOLO.

The authors' networks (github.com/Jongchan/attention-module) are torchvision's ResNets with a CBAM at the end of each
block. With `plugins=`, a Bottleneck's keys are:

    theirs                                                    here
    module.layer1.0.conv1.weight                              layer1.0.conv1.weight
    module.layer1.0.cbam.ChannelGate.mlp.1.weight             layer1.0.cbam.channel.fc1.weight
    module.layer1.0.cbam.ChannelGate.mlp.3.weight             layer1.0.cbam.channel.fc2.weight
    module.layer1.0.cbam.SpatialGate.spatial.conv.weight      layer1.0.cbam.spatial.conv.weight
    module.layer1.0.cbam.SpatialGate.spatial.bn.weight        layer1.0.cbam.spatial.bn.weight

With PluginBackbone, which a BasicBlock needs, the CBAM is a child of the norm: layer1.0.bn2.cbam.channel.fc1.weight.

pytorchcv's networks (github.com/osmr/pytorchcv, models/cbamresnet.py) compute the same, with the stride of a Bottleneck
in its 3x3 convolution, as torchvision and style='pytorch' have it. Their keys:

    features.init_block.conv.bn.weight                        bn1.weight
    features.stage1.unit1.body.conv1.conv.weight              layer1.0.conv1.weight
    features.stage1.unit1.identity_conv.bn.weight             layer1.0.downsample.1.weight
    features.stage1.unit1.cbam.ch_gate.mlp.fc1.weight         layer1.0.cbam.channel.fc1.weight
    features.stage1.unit1.cbam.sp_gate.conv.bn.weight         layer1.0.cbam.spatial.bn.weight
    output.weight                                             fc.weight
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cbam_mmdet.errors import UserError
from cbam_mmdet.models.cbam import CBAM

DEPTHS: dict[tuple[str, tuple[int, ...]], int] = {
    ('BasicBlock', (2, 2, 2, 2)): 18,
    ('BasicBlock', (3, 4, 6, 3)): 34,
    ('Bottleneck', (3, 4, 6, 3)): 50,
    ('Bottleneck', (3, 4, 23, 3)): 101,
    ('Bottleneck', (3, 8, 36, 3)): 152,
}
OFFICIAL_PARTS = {
    'ChannelGate.mlp.1': 'channel.fc1',
    'ChannelGate.mlp.3': 'channel.fc2',
    'SpatialGate.spatial.conv': 'spatial.conv',
    'SpatialGate.spatial.bn': 'spatial.bn',
}
PYTORCHCV_STEM = {'conv1': 'features.init_block.conv.conv', 'bn1': 'features.init_block.conv.bn', 'fc': 'output'}
PYTORCHCV_PARTS = {
    **{f'conv{i}': f'body.conv{i}.conv' for i in (1, 2, 3)},
    **{f'bn{i}': f'body.conv{i}.bn' for i in (1, 2, 3)},
    'downsample.0': 'identity_conv.conv',
    'downsample.1': 'identity_conv.bn',
    'cbam.channel.fc1': 'cbam.ch_gate.mlp.fc1',
    'cbam.channel.fc2': 'cbam.ch_gate.mlp.fc2',
    'cbam.spatial.conv': 'cbam.sp_gate.conv.conv',
    'cbam.spatial.bn': 'cbam.sp_gate.conv.bn',
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


@dataclass(frozen=True)
class Networks:
    """ResNets with CBAM of one source.

    Attributes:
        whose: the source, in the genitive.
        depths: those that it has.
        mark: what only keys of these networks have.
        block: a pattern of how the keys of a block begin, with the number of its stage as the group.
        name: the key there of a key of torchvision's network with our CBAM in its blocks.
    """

    whose: str
    depths: tuple[int, ...]
    mark: str
    block: str
    name: Callable[[str], str]


def _authors_key(key: str) -> str:
    theirs = {new: old for old, new in OFFICIAL_PARTS.items()}
    found = re.fullmatch(r'(layer\d\.\d+\.cbam)\.(\w+\.\w+)\.(\w+)', key)
    return f'{found[1]}.{theirs[found[2]]}.{found[3]}' if found else key


def _pytorchcv_key(key: str) -> str:
    module, _, kind = key.rpartition('.')
    found = re.fullmatch(r'layer(\d)\.(\d+)\.(.+)', module)
    if not found:
        return f'{PYTORCHCV_STEM[module]}.{kind}'
    return f'features.stage{found[1]}.unit{int(found[2]) + 1}.{PYTORCHCV_PARTS[found[3]]}.{kind}'


AUTHORS = Networks("the authors'", (18, 34, 50, 101), '.ChannelGate.mlp.', r'layer([1-4])\.\d+\.', _authors_key)
PYTORCHCV = Networks(
    "pytorchcv's", (18, 34, 50, 101, 152), '.cbam.ch_gate.mlp.', r'features\.stage([1-4])\.unit\d+\.', _pytorchcv_key
)


def from_network(state_dict: Mapping[str, Tensor], in_norm: bool | None = None) -> Conversion | None:
    """Translate the state dict of a whole network of the authors or of pytorchcv. None if it is from neither.

    Args:
        state_dict: see from_official.
        in_norm: see from_official.

    Raises:
        UserError: see from_official.
    """
    for networks, convert in ((AUTHORS, from_official), (PYTORCHCV, from_pytorchcv)):
        if any(networks.mark in str(key) for key in state_dict):
            return convert(state_dict, in_norm)
    return None


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
    return _from_network(AUTHORS, state_dict, in_norm)


def from_pytorchcv(state_dict: Mapping[str, Tensor], in_norm: bool | None = None) -> Conversion:
    """Translate the state dict of pytorchcv's cbam_resnet18, 34, 50, 101 or 152. As from_official."""
    made = _from_network(PYTORCHCV, state_dict, in_norm)
    note = "its input is torchvision's: RGB, mean (123.675, 116.28, 103.53), std (58.395, 57.12, 57.375)"
    return replace(made, notes=(note,))


def _from_network(networks: Networks, state_dict: Mapping[str, Tensor], in_norm: bool | None) -> Conversion:
    given = {key.removeprefix('module.'): key for key in state_dict}
    block, names = _check_network(networks, {key: state_dict[old] for key, old in given.items()})
    in_norm = block == 'BasicBlock' if in_norm is None else in_norm
    last = ('bn2.' if block == 'BasicBlock' else 'bn3.') if in_norm else ''
    origins = {re.sub(r'^(layer\d\.\d+\.)(cbam\.)', rf'\1{last}\2', names[key]): old for key, old in given.items()}
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
    _check_network(AUTHORS, {new.removeprefix('module.'): state_dict[old] for new, old in origins.items()})
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
    """Translate a state dict of any of the four sources into the keys used here. None if it is from none of them."""
    made = from_network(state_dict)
    if made is not None:
        return made
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


def _check_network(networks: Networks, state_dict: Mapping[str, Tensor]) -> tuple[str, dict[str, str]]:
    """Compare with the keys and shapes of torchvision's network with CBAMs, as this source names them.

    Returns:
        'BasicBlock' or 'Bottleneck', and for each key of the state dict that of torchvision's network with our CBAM.
    """
    block = 'Bottleneck' if networks.name('layer1.0.conv3.weight') in state_dict else 'BasicBlock'
    blocks = {found[0]: found[1] for key in state_dict if (found := re.match(networks.block, key))}
    counts = tuple(sum(stage == str(number) for stage in blocks.values()) for number in range(1, 5))
    depth = DEPTHS.get((block, counts))
    if depth not in networks.depths:
        depths = ', '.join(map(str, networks.depths[:-1]))
        raise UserError(
            f'these are not the weights of a ResNet-{depths} or {networks.depths[-1]}: '
            f'stages of {", ".join(map(str, counts))} {block}s'
        )
    shapes = _shapes(networks, block, depth, state_dict)
    names = {networks.name(key): key for key in shapes}
    expected = {key: shapes[name] for key, name in names.items()}
    optional = {k for k, name in names.items() if name.endswith('num_batches_tracked') or name.startswith('fc.')}
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
            f'these are not the weights of {networks.whose} ResNet-{depth} with CBAM: {"; ".join(faults)}.{bam}'
        )
    return block, names


def _shapes(networks: Networks, block: str, depth: int, state_dict: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    import torchvision  # takes a second, and only this function needs it

    mlp = state_dict.get(networks.name('layer1.0.cbam.channel.fc1.weight'))
    reduction = mlp.shape[1] // mlp.shape[0] if mlp is not None and mlp.dim() == 2 else 16
    classes = state_dict.get(networks.name('fc.bias'))
    with torch.device('meta'):
        network = getattr(torchvision.models, f'resnet{depth}')(num_classes=1000 if classes is None else len(classes))
        for stage in range(1, 5):
            channels = 64 * 2 ** (stage - 1) * (4 if block == 'Bottleneck' else 1)
            for residual in getattr(network, f'layer{stage}'):
                residual.cbam = CBAM(channels, reduction=reduction)
    return {key: value.shape for key, value in network.state_dict().items()}
