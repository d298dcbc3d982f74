"""Plugins such as CBAM at named places of any backbone or neck, where MMDetection's `plugins=` reaches only Bottleneck ResNets.

    backbone=dict(type='PluginBackbone', backbone=dict(type='ResNet', depth=18, ...),
                  plugins=[dict(cfg=dict(type='CBAM', gate='unit'), after='layer*.*.bn2')])

What is built is the backbone itself, without a wrapper: each plugin becomes a child of the module that it follows and is
applied to that module's output, so every weight keeps its key and the checkpoints of the plain detector load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.registry import MODELS
from torch import Tensor, nn

from cbam_mmdet.errors import UserError
from cbam_mmdet.models.plugins.add import add_plugins
from cbam_mmdet.models.plugins.dry_run import zeros_for
from cbam_mmdet.models.plugins.inner import KEEP, build_inner
from cbam_mmdet.models.plugins.places import usual_place


@MODELS.register_module()
def PluginBackbone(
    backbone: Mapping,
    plugins: Sequence[Mapping] | None,
    input_shape: Sequence[int] | None = None,
    init_cfg: Mapping | None = KEEP,
    fuse_tail: bool = False,
    **others: Any,
) -> nn.Module:
    """Build a backbone, and put plugins into it.

    Args:
        backbone: its config: any backbone of the registries, e.g. of type 'ResNet', 'SSDVGG' or 'mmpretrain.VGG'.
        plugins: of each, `cfg` (type and arguments; a `postfix` makes its name unique) and `after`: the module that it follows, by its
            dotted name in the backbone. In a pattern, * ? [12] stand for characters within one segment of the name, ** for any
            number of segments. A list of patterns takes each module once. 'outputs' stands for each feature map that the backbone returns.
            Without `after` it is the usual place of this backbone (see backbone_places.py).
            Plugins at one module run in the order of this list. None or an empty list leaves the backbone plain.
        input_shape: (channels, height, width) of the image of the dry run that finds the channels; by default (in_channels or 3, 224, 224).
        init_cfg: in place of the backbone's own, so that an override reaches all backbones by the same key. Without a `type`
            (as in init_cfg.checkpoint=FILE) it is merged into the backbone's own.
        fuse_tail: let residual blocks that end in a CBAM (a plugin, or one of the backbone's own `plugins`) compute norm, CBAM, addition
            and ReLU in CBAM's own passes, on a GPU; see block_tail.fuse_tails.

    Returns:
        The backbone, with a child `cbam` (for a CBAM) in each chosen module, and `cbam0`, `cbam1`, ... in itself for 'outputs'.

    Raises:
        UserError: (a ValueError) for a pattern that matches nothing, with near matches; a chosen module whose output is not one tensor
            of shape (N, C, H, W); a plugin that changes the shape.

    What to know: a plugin that follows a norm goes with it where that is replaced (fuse_conv_bn folds BatchNorms away) and follows its mode
    (norm_eval=True holds a plugin's dropout, too); plugins at 'outputs' run where the backbone is called as such, not where a detector
    calls a part of it (RFP's rfp_forward).
    """
    module, backbone = build_inner('backbone', backbone, init_cfg, others)
    shape = input_shape or (backbone.get('in_channels', 3), 224, 224)
    if not isinstance(shape, Sequence) or len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise UserError(f'model.backbone.input_shape={input_shape!r}: expected (channels, height, width)')

    def inputs() -> tuple[Tensor]:
        return (zeros_for(module, shape),)

    add_plugins(module, plugins, inputs, 'model.backbone.plugins', usual_place(module))
    if fuse_tail:
        from cbam_mmdet.models.fused_tail import fuse_tails  # which loads MMDetection's backbones

        fuse_tails(module)
    return module
