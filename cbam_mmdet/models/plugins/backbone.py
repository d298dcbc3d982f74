"""PluginBackbone: plugins such as CBAM at named places of any backbone.

MMDetection's own `plugins=` supports only ResNets with Bottleneck blocks.

    backbone=dict(type='PluginBackbone', backbone=dict(type='ResNet', depth=18, ...),
                  plugins=[dict(cfg=dict(type='CBAM', gate='unit'), after='layer*.*.bn2')])

The result is the backbone itself, without a wrapper. Each plugin becomes a child of the module that it follows and is
applied to that module's output. So every weight keeps its key, and the checkpoints of the plain detector load.
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
    """Build a backbone, and insert plugins into it.

    Args:
        backbone: the config of any registered backbone, e.g. of type 'ResNet', 'SSDVGG' or 'mmpretrain.VGG'.
        plugins: a dict for each plugin, with two keys. `cfg` is its type and arguments, and a `postfix` to make its
            name unique. `after` is the dotted name in the backbone of the module that it follows, a pattern, or a list
            of patterns, which takes each module once. In a pattern * ? [12] match characters within one segment of the
            name, and ** matches any number of segments. 'outputs' means each feature map that the backbone returns.
            Without `after` the plugin goes to the usual place of this backbone (see places.py). Plugins at one module
            run in the order of this list. None or an empty list leaves the backbone plain.
        input_shape: (channels, height, width) of the image for the dry run that finds the channels. By default this is
            (in_channels or 3, 224, 224).
        init_cfg: takes the place of the backbone's own, so that the same key sets it for all backbones. Without a
            `type` (as in init_cfg.checkpoint=FILE) it is merged into the backbone's own.
        fuse_tail: on a GPU, let residual blocks that end in a CBAM (a plugin, or one of the backbone's own `plugins`)
            compute norm, CBAM, addition and ReLU in CBAM's own passes, see models.fused_tail.fuse_tails.

    Returns:
        The backbone. For a CBAM each chosen module has a child `cbam`. For 'outputs' the backbone has the children
        `cbam0`, `cbam1`, ...

    Raises:
        UserError: (a ValueError) for a pattern that matches no module, with similar names, for a chosen module whose
            output is not one tensor of shape (N, C, H, W), and for a plugin that changes the shape.

    A plugin that follows a norm is a part of it. It is lost if the norm is replaced (fuse_conv_bn removes BatchNorms),
    and it follows the norm's mode (norm_eval=True also disables a plugin's dropout). Plugins at 'outputs' run if the
    backbone is called as a module, but not if a detector calls a part of it (RFP's rfp_forward).
    """
    module, backbone = build_inner('backbone', backbone, init_cfg, others)
    shape = input_shape or (backbone.get('in_channels', 3), 224, 224)
    if not isinstance(shape, Sequence) or len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise UserError(f'model.backbone.input_shape={input_shape!r}: expected (channels, height, width)')

    def inputs() -> tuple[Tensor]:
        return (zeros_for(module, shape),)

    add_plugins(module, plugins, inputs, 'model.backbone.plugins', usual_place(module))
    if fuse_tail:
        from cbam_mmdet.models.fused_tail import fuse_tails  # it loads MMDetection's backbones

        fuse_tails(module)
    return module
