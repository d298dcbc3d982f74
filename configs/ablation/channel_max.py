"""Table 1, row 3: channel attention by max pooling alone."""

_base_ = './cbam.py'

_base_.model.backbone.plugins[0].cfg.update(pools=('max',), spatial=None)
