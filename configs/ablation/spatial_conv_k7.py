"""Table 2, row 4: channel + spatial (1x1 conv, k=7)."""

_base_ = './cbam.py'

_base_.model.backbone.plugins[0].cfg.update(spatial='conv')
