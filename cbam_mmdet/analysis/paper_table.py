"""The paper's table of classification networks (section 4.2, ImageNet, 224x224), with our own counts beside it.

The networks are mmpretrain's, with CBAM inserted by PluginBackbone. Squeeze-and-Excitation is timm's, which was ported
from its authors' code.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from cbam_mmdet.analysis.complexity import Complexity, count
from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.tables import Column, Table

# With 'caffe' a Bottleneck has its stride in the first 1x1 convolution, as in the ResNet of 2015 and in the paper's
# GFLOPs. torchvision's stride in the 3x3 convolution costs 6 % more (12 % in a ResNeXt). A wide ResNet's stem keeps its
# 64 channels.
_RESNETS = {
    'ResNet-18': dict(type='ResNet', depth=18),
    'ResNet-34': dict(type='ResNet', depth=34),
    'ResNet-50': dict(type='ResNet', depth=50, style='caffe'),
    'ResNet-101': dict(type='ResNet', depth=101, style='caffe'),
    'Wide ResNet-18 (x1.5)': dict(type='ResNet', depth=18, stem_channels=64, base_channels=96),
    'Wide ResNet-18 (x2)': dict(type='ResNet', depth=18, stem_channels=64, base_channels=128),
    'ResNeXt-50 (32x4d)': dict(type='ResNeXt', depth=50, groups=32, width_per_group=4, style='caffe'),
    'ResNeXt-101 (32x4d)': dict(type='ResNeXt', depth=101, groups=32, width_per_group=4, style='caffe'),
}
_SE = {'ResNet-18': 'legacy_seresnet18', 'ResNet-50': 'legacy_seresnet50'}  # timm's names

# (Network, attention) -> (M parameters, GFLOPs), as printed in the paper.
PAPER: dict[tuple[str, str], tuple[float, float]] = {
    ('ResNet-18', ''): (11.69, 1.814),
    ('ResNet-18', 'SE'): (11.78, 1.814),
    ('ResNet-18', 'CBAM'): (11.78, 1.815),
    ('ResNet-34', ''): (21.80, 3.664),
    ('ResNet-34', 'CBAM'): (21.96, 3.665),
    ('ResNet-50', ''): (25.56, 3.858),
    ('ResNet-50', 'SE'): (28.09, 3.860),
    ('ResNet-50', 'CBAM'): (28.09, 3.864),
    ('ResNet-101', ''): (44.55, 7.570),
    ('ResNet-101', 'CBAM'): (49.33, 7.581),
    ('Wide ResNet-18 (x1.5)', ''): (25.88, 3.866),
    ('Wide ResNet-18 (x1.5)', 'CBAM'): (26.08, 3.868),
    ('Wide ResNet-18 (x2)', ''): (45.62, 6.696),
    ('Wide ResNet-18 (x2)', 'CBAM'): (45.97, 6.697),
    ('ResNeXt-50 (32x4d)', ''): (25.03, 3.768),
    ('ResNeXt-50 (32x4d)', 'CBAM'): (27.56, 3.774),
    ('ResNeXt-101 (32x4d)', ''): (44.18, 7.508),
    ('ResNeXt-101 (32x4d)', 'CBAM'): (48.96, 7.519),
}
NOTES = """\
GFLOPs: multiply-adds of convolutions and linear layers alone, as the paper counts them; "+ norms" is what
tools/complexity.py counts otherwise. Bottlenecks have their stride in the first 1x1 convolution, as the ResNet of 2015:
with torchvision's, in the 3x3, a ResNet-50 has 4.089 and a ResNeXt-50 4.230 GFLOPs, and the same parameters. Wide
ResNets keep a stem of 64 channels. The head is one linear layer to 1000 classes.
"""


@dataclass(frozen=True)
class Row:
    """A row: the paper's figures (`parameters` in M, `flops` in G) and our counts."""

    name: str
    parameters: float
    flops: float
    ours: Complexity

    @property
    def parameter_difference(self) -> float:
        """Ours minus the paper's, in M, with the paper's two decimals."""
        return round(self.ours.parameters / 1e6, 2) - self.parameters

    @property
    def flops_difference(self) -> float:
        """The relative difference of ours from the paper's."""
        return self.ours.flops_of_layers / 1e9 / self.flops - 1


def count_networks(names: Sequence[tuple[str, str]] = tuple(PAPER)) -> list[Row]:
    """Build each network, and count its parameters and multiply-adds.

    Args:
        names: keys of PAPER.

    Raises:
        UserError: if mmpretrain or timm is not installed.
    """
    if not all(map(find_spec, ('mmpretrain', 'timm'))):
        raise UserError("--paper needs mmpretrain and timm, for its networks: pip install 'cbam-mmdet[backbones]'")
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        import mmpretrain.models  # noqa: F401  (registers the networks)
    rows = []
    for network, attention in names:
        name = f'{network} + {attention}' if attention else network
        counted = count(_build(network, attention).eval(), torch.zeros(1, 3, 224, 224), [], name)
        rows.append(Row(name, *PAPER[network, attention], counted))
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """The paper's figures beside ours."""
    columns = {
        'network': lambda row: row.name,
        Column('M parameters', '.2f'): lambda row: row.parameters,
        Column('ours', '.2f'): lambda row: row.ours.parameters / 1e6,
        Column('GFLOPs', '.3f'): lambda row: row.flops,
        Column('ours', '.3f'): lambda row: row.ours.flops_of_layers / 1e9,
        Column('difference', '+.2%'): lambda row: row.flops_difference,
        Column('+ norms', '.3f'): lambda row: row.ours.flops / 1e9,
    }
    return Table.of(rows, columns).markdown()


def as_csv(rows: Sequence[Row]) -> str:
    """The same table with plain numbers."""
    columns = {
        'network': lambda row: row.name,
        'paper_parameters_m': lambda row: row.parameters,
        'parameters': lambda row: row.ours.parameters,
        'paper_gflops': lambda row: row.flops,
        'flops': lambda row: row.ours.flops_of_layers,
        'flops_with_norms': lambda row: row.ours.flops,
    }
    return Table.of(rows, columns).csv()


def _build(network: str, attention: str) -> nn.Module:
    init_default_scope('mmpretrain')
    plain = dict(_RESNETS[network], _scope_='mmpretrain')
    if attention == 'SE':
        import timm

        return _Classifier(timm.create_model(_SE[network]))
    backbone = plain
    if attention == 'CBAM':
        backbone = dict(type='PluginBackbone', backbone=plain, plugins=[dict(cfg=dict(type='CBAM'))])
    expansion = 4 if plain['depth'] >= 50 else 1
    head = dict(type='LinearClsHead', num_classes=1000, in_channels=plain.get('base_channels', 64) * 8 * expansion)
    return MODELS.build(
        dict(type='mmpretrain.ImageClassifier', backbone=backbone, neck=dict(type='GlobalAveragePooling'), head=head)
    )


class _Classifier(nn.Module):
    """A network of timm with the signature of MMEngine's models."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor, samples: list, mode: str) -> torch.Tensor:
        return self.network(image)
