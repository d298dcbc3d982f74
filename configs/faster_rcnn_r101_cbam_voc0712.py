"""As faster_rcnn_r50_cbam_voc0712.py, with ResNet-101; the plain twin is faster_rcnn_r101_voc0712.py."""

_base_ = './faster_rcnn_r50_cbam_voc0712.py'

model = dict(backbone=dict(depth=101, init_cfg=dict(checkpoint='torchvision://resnet101')))
