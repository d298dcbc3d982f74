"""PluginNeck: plugins such as CBAM at named places of any neck."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.registry import MODELS
from torch import Tensor, nn

from cbam_mmdet.errors import UserError
from cbam_mmdet.models.plugins.add import add_plugins
from cbam_mmdet.models.plugins.dry_run import zeros_for
from cbam_mmdet.models.plugins.inner import KEEP, build_inner
from cbam_mmdet.models.plugins.places import OUTPUTS


@MODELS.register_module()
def PluginNeck(
    neck: Mapping, plugins: Sequence[Mapping] | None, init_cfg: Mapping | None = KEEP, **others: Any
) -> nn.Module:
    """Build a neck, and insert plugins into it, as PluginBackbone does.

    The usual place is its outputs, which are the inputs of the heads.

    Args:
        neck: its config. The dry run's input has its `in_channels`.
        plugins: see PluginBackbone.
        init_cfg: see PluginBackbone.

    Raises:
        UserError: as PluginBackbone.
    """
    module, neck = build_inner('neck', neck, init_cfg, others)
    channels = neck.get('in_channels')
    if not channels:
        raise UserError(f'PluginNeck: a neck with in_channels is expected, got {dict(neck)}')
    channels = [channels] if isinstance(channels, int) else list(channels)
    if any(cls.__name__ == 'YOLOV3Neck' for cls in type(module).__mro__):  # it names them from deep to shallow
        channels.reverse()

    def inputs() -> tuple[tuple[Tensor, ...]]:
        sizes = [32 * 2**i for i in reversed(range(len(channels)))]
        return (tuple(zeros_for(module, (c, size, size)) for c, size in zip(channels, sizes, strict=True)),)

    return add_plugins(module, plugins, inputs, 'model.neck.plugins', [OUTPUTS])
