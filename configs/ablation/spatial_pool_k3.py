"""Table 2, row 5: channel + spatial (avg & max, k=3)."""

_base_ = './cbam.py'

_base_.model.backbone.plugins[0].cfg.update(kernel_size=3)
