"""Table 3, row 3: spatial + channel, the spatial attention first."""

_base_ = './cbam.py'

_base_.model.backbone.plugins[0].cfg.update(order='spatial-channel')
