"""Table 3, row 4: channel and spatial attention in parallel."""

_base_ = './cbam.py'

_base_.model.backbone.plugins[0].cfg.update(order='parallel')
