"""The plain twin of faster_rcnn_r101_cbam.py: MMDetection's ResNet-101, COCO, 1x schedule."""

_base_ = './faster_rcnn_r50.py'

model = dict(backbone=dict(depth=101, init_cfg=dict(checkpoint='torchvision://resnet101')))
