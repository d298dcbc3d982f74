"""Faster R-CNN, ResNet-101 with FPN, CBAM in all four stages: Pascal VOC 07+12; as faster_rcnn_r50_cbam_voc0712.py."""

_base_ = './faster_rcnn_r50_cbam_voc0712.py'

model = dict(backbone=dict(depth=101, init_cfg=dict(checkpoint='torchvision://resnet101')))
