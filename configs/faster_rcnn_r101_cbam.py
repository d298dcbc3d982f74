"""Faster R-CNN, ResNet-101 with FPN, CBAM in all four stages: COCO, 1x schedule (12 epochs).

The plain twin is faster_rcnn_r101.py.
"""

_base_ = ['./faster_rcnn_r101.py', './_base_/cbam.py']

model = dict(
    backbone=dict(plugins=[dict(cfg=_base_.cbam, stages=(True, True, True, True), position='after_conv3')])
)
