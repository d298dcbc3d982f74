"""Not in the paper, but in the authors' code: channel attention by L2 pooling alone."""

_base_ = './cbam.py'

_base_.model.backbone.plugins[0].cfg.update(pools=('lp',), spatial=None)
