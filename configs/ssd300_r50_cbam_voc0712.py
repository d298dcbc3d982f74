"""SSD300 on a ResNet-50 with CBAM in its three stages, Pascal VOC 07+12; the plain twin is ssd300_r50_voc0712.py."""

_base_ = ['./ssd300_r50_voc0712.py', './_base_/cbam.py']

model = dict(backbone=dict(plugins=[dict(cfg=_base_.cbam, stages=(True, True, True), position='after_conv3')]))
