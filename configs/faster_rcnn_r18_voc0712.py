"""The plain twin of faster_rcnn_r18_cbam_voc0712.py."""

_base_ = './faster_rcnn_r50_voc0712.py'

model = dict(
    backbone=dict(depth=18, init_cfg=dict(checkpoint='torchvision://resnet18')),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
