"""DINO with four scales, ResNet-50, CBAM in all four stages: COCO, 12 epochs.

This is the plain twin, dino_r50.py, and a CBAM in each residual block: after its last norm, before the addition.
DINO's optimizer gives the backbone a tenth of the learning rate, and so CBAM in it.
"""

_base_ = ['./dino_r50.py', './_base_/cbam.py']

model = dict(
    backbone=dict(plugins=[dict(cfg=_base_.cbam, stages=(True, True, True, True), position='after_conv3')])
)
