"""Table 1, row 2, and row 1 of tables 2 and 3: channel attention by average pooling alone, Squeeze-and-Excitation's."""

_base_ = './cbam.py'

_base_.model.backbone.plugins[0].cfg.update(pools=('avg',), spatial=None)
