"""The plain twin of faster_rcnn_r101_cbam_voc0712.py."""

_base_ = './faster_rcnn_r50_voc0712.py'

model = dict(backbone=dict(depth=101, init_cfg=dict(checkpoint='torchvision://resnet101')))
