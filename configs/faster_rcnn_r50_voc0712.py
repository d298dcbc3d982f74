"""The plain twin of faster_rcnn_r50_cbam_voc0712.py: the same but for CBAM."""

_base_ = './faster_rcnn_r50_cbam_voc0712.py'

model = dict(backbone=dict(plugins=None))
