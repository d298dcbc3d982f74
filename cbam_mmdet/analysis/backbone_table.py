"""The cost of CBAM in each kind of backbone: the table that tools/list_backbones.py prints."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import mmdet.models  # noqa: F401  (registers the backbones)
from mmengine.logging import print_log
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from cbam_mmdet.models.gates import find_cbams
from cbam_mmdet.models.plugins.backbone import PluginBackbone
from cbam_mmdet.models.plugins.places import usual_place
from cbam_mmdet.utils.tables import Column, Table, code

FOUR_STAGES = dict(num_stages=4, strides=(1, 2, 2, 2), dilations=(1, 1, 1, 1), out_indices=(0, 1, 2, 3))


def _hrnet(width: int) -> dict:
    def stage(branches: int, modules: int) -> dict:
        blocks, channels = (4,) * branches, tuple(width * 2**i for i in range(branches))
        return dict(num_modules=modules, num_branches=branches, block='BASIC', num_blocks=blocks, num_channels=channels)

    first = dict(num_modules=1, num_branches=1, block='BOTTLENECK', num_blocks=(4,), num_channels=(64,))
    return dict(type='HRNet', extra=dict(stage1=first, stage2=stage(2, 1), stage3=stage(3, 4), stage4=stage(4, 3)))


def _timm(name: str) -> dict:
    """As a detector uses it: it returns a map of each stage."""
    return dict(type='mmpretrain.TIMMBackbone', model_name=name, features_only=True)


# Name -> (config, place). The place None is the usual one.
BACKBONES: dict[str, tuple[dict, list[str] | None]] = {
    'ResNet-18': (dict(type='ResNet', depth=18), None),
    'ResNet-34': (dict(type='ResNet', depth=34), None),
    'ResNet-50': (dict(type='ResNet', depth=50), None),
    'ResNet-101': (dict(type='ResNet', depth=101), None),
    'ResNetV1d-50': (dict(type='ResNetV1d', depth=50), None),
    'ResNeXt-50 32x4d': (dict(type='ResNeXt', depth=50, groups=32, base_width=4), None),
    'Wide ResNet-50-2': (dict(type='ResNeXt', depth=50, groups=1, base_width=128), None),
    'Res2Net-50': (dict(type='Res2Net', depth=50, scales=4, base_width=26), None),
    'ResNeSt-50': (dict(type='ResNeSt', depth=50, stem_channels=64), None),
    'RegNetX-3.2GF': (dict(type='RegNet', arch='regnetx_3.2gf'), None),
    'DetectoRS ResNet-50': (
        dict(
            type='DetectoRS_ResNet',
            depth=50,
            conv_cfg=dict(type='ConvAWS'),
            sac=dict(type='SAC', use_deform=True),
            stage_with_sac=(False, True, True, True),
        ),
        None,
    ),
    'DetectoRS ResNeXt-50': (dict(type='DetectoRS_ResNeXt', depth=50, groups=32, base_width=4), None),
    'TridentResNet-50': (
        dict(
            type='TridentResNet',
            depth=50,
            num_stages=3,
            strides=(1, 2, 2),
            dilations=(1, 1, 1),
            trident_dilations=(1, 2, 3),
            num_branch=3,
            test_branch_idx=1,
            out_indices=(2,),
        ),
        None,
    ),
    'HRNet-W18': (_hrnet(18), None),
    'Hourglass-52': (
        dict(
            type='HourglassNet',
            num_stacks=1,
            stage_channels=(256, 256, 384, 384, 384, 512),
            stage_blocks=(2, 2, 2, 2, 2, 4),
        ),
        None,
    ),
    'Darknet-53': (dict(type='Darknet', depth=53, out_indices=(3, 4, 5)), None),
    'CSPDarknet-s': (dict(type='CSPDarknet', deepen_factor=0.33, widen_factor=0.5), None),
    'CSPNeXt-s': (dict(type='CSPNeXt', deepen_factor=0.33, widen_factor=0.5), None),
    'MobileNetV2': (dict(type='MobileNetV2', out_indices=(1, 2, 4, 6)), None),
    'EfficientNet-B0': (dict(type='EfficientNet', arch='b0', out_indices=(3, 4, 5)), None),
    'SSD VGG-16': (
        dict(type='SSDVGG', depth=16, ceil_mode=True, out_indices=(3, 4), out_feature_indices=(22, 34)),
        None,
    ),
    'Swin-T': (dict(type='SwinTransformer', embed_dims=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)), None),
    'PVT-Tiny': (dict(type='PyramidVisionTransformer', num_layers=[2, 2, 2, 2]), None),
    'PVTv2-B0': (dict(type='PyramidVisionTransformerV2', embed_dims=32, num_layers=[2, 2, 2, 2]), None),
    'VGG-16 (mmpretrain)': (
        dict(type='mmpretrain.VGG', depth=16, norm_cfg=dict(type='BN'), out_indices=(2, 3, 4)),
        None,
    ),
    'DenseNet-121 (mmpretrain)': (dict(type='mmpretrain.DenseNet', arch='121', out_indices=(0, 1, 2, 3)), None),
    'Inception-v3 (mmpretrain)': (dict(type='mmpretrain.InceptionV3', aux_logits=False), None),
    'Inception-v4 (timm)': (dict(type='mmpretrain.TIMMBackbone', model_name='inception_v4'), ['timm_model.features.*']),
    'Xception-41 (timm)': (dict(type='mmpretrain.TIMMBackbone', model_name='xception41'), ['timm_model.blocks.*']),
    'Inception-ResNet-v2 (timm)': (_timm('inception_resnet_v2'), None),
    'ResNet-50-D (timm)': (_timm('resnet50d'), None),
    'MobileNetV3-Large (timm)': (_timm('mobilenetv3_large_100'), None),
    'EfficientNet-Lite0 (timm)': (_timm('tf_efficientnet_lite0'), None),
    'EfficientNet-Lite0 (timm, whole)': (dict(type='TimmFeatures', model_name='tf_efficientnet_lite0'), None),
    'GhostNet (timm)': (_timm('ghostnet_100'), None),
    'ConvNeXt-T (timm)': (_timm('convnext_tiny'), None),
}


@dataclass
class Row:
    """A row of the table. `cbams` is a number of modules, `added` and `plain` are numbers of parameters."""

    name: str
    type: str
    place: list[str]
    cbams: int
    added: int
    plain: int


def measure(name: str, **cbam: object) -> Row:
    """Build one of BACKBONES with CBAM (and its arguments), and count its modules and parameters."""
    cfg, place = BACKBONES[name]
    model = build_with_cbam(name, **cbam)
    cbams = find_cbams(model).values()
    added = sum(p.numel() for cbam in cbams for p in cbam.parameters())
    total = sum(p.numel() for p in model.parameters())
    return Row(name, cfg['type'], place or usual_place(model), len(cbams), added, total - added)


def measure_all(names: Iterable[str]) -> list[Row]:
    """Rows for several names. If mmpretrain is not installed, its backbones are left out and logged."""
    init_default_scope('mmdet')
    rows = []
    for name in names:
        if BACKBONES[name][0]['type'].startswith('mmpretrain.') and not all(map(find_spec, ('mmpretrain', 'timm'))):
            print_log(
                f"{name}: not built, mmpretrain and timm are not installed (pip install 'cbam-mmdet[backbones]')",
                logger='current',
            )
            continue
        rows.append(measure(name))
    return rows


def build_with_cbam(name: str, input_shape: Sequence[int] | None = None, **cbam: object) -> nn.Module:
    """Build one of BACKBONES with CBAM (and its arguments) at its place. PluginBackbone explains input_shape."""
    cfg, place = BACKBONES[name]
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='A CBAM with its initial weights')  # frozen by a backbone's default
        return PluginBackbone(cfg, [dict(cfg=dict(type='CBAM', **cbam), after=place)], input_shape)


def build_plain(name: str) -> nn.Module:
    """Build one of BACKBONES without CBAM."""
    return MODELS.build(dict(BACKBONES[name][0]))


def as_markdown(rows: list[Row]) -> str:
    """The table with a row for each backbone."""
    columns = {
        'backbone': lambda row: row.name,
        '`type`': lambda row: code(row.type),
        'after': lambda row: ', '.join(map(code, row.place)),
        'CBAMs': lambda row: row.cbams,
        Column('parameters added', number=True): lambda row: f'{row.added / 1e6:.2f} M ({row.added / row.plain:.1%})',
    }
    return Table.of(rows, columns).markdown()
