"""Table 1, row 4, and table 2, row 2: channel attention by average and max pooling, no spatial attention."""

_base_ = './cbam.py'

_base_.model.backbone.plugins[0].cfg.update(spatial=None)
