"""Faster R-CNN, ResNet-50 with FPN, CBAM in all four stages: COCO, 1x schedule (12 epochs).

This is the plain twin, faster_rcnn_r50.py, and a CBAM in each residual block: after its last norm, before the addition.
_base_/cbam.py has the arguments of CBAM, dict(type='CBAM', reduction=16, gate='unit'), and says why they are chosen.
"""

_base_ = ['./faster_rcnn_r50.py', './_base_/cbam.py']

model = dict(
    backbone=dict(plugins=[dict(cfg=_base_.cbam, stages=(True, True, True, True), position='after_conv3')])
)
