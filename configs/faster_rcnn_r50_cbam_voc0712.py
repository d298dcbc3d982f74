"""Faster R-CNN, ResNet-50 with FPN, CBAM in all four stages: Pascal VOC 07+12, tested on VOC 2007.

The plain twin is faster_rcnn_r50_voc0712.py.
"""

_base_ = ['./faster_rcnn_r50_voc0712.py', './_base_/cbam.py']

model = dict(backbone=dict(plugins=[dict(cfg=_base_.cbam, position='after_conv3')]))
