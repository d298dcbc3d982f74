"""The plain twin of faster_rcnn_cbam.py: the same but for CBAM."""

_base_ = './faster_rcnn_cbam.py'

model = dict(backbone=dict(plugins=None))
