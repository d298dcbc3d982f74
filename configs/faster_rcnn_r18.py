"""The plain twin of faster_rcnn_r18_cbam.py: MMDetection's ResNet-18, COCO, 1x schedule."""

_base_ = './faster_rcnn_r50.py'

model = dict(
    backbone=dict(depth=18, init_cfg=dict(checkpoint='torchvision://resnet18')),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
