"""Table 2, row 3: channel + spatial (1x1 conv, k=3)."""

_base_ = './cbam.py'

_base_.model.backbone.plugins[0].cfg.update(spatial='conv', kernel_size=3)
