"""Table 1, row 1: the baseline, without attention."""

_base_ = './cbam.py'

model = dict(backbone=dict(plugins=None))
