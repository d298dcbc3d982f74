"""RetinaNet, ResNet-50 with FPN, CBAM in all four stages: COCO, 1x schedule (12 epochs).

This is the plain twin, retinanet_r50.py, and a CBAM in each residual block: after its last norm, before the addition.
"""

_base_ = ['./retinanet_r50.py', './_base_/cbam.py']

model = dict(
    backbone=dict(plugins=[dict(cfg=_base_.cbam, stages=(True, True, True, True), position='after_conv3')])
)
