"""The plain twin of bccd_r18_cbam.py: the same but for CBAM."""

_base_ = './bccd_r18_cbam.py'

model = dict(backbone=dict(plugins=None))
