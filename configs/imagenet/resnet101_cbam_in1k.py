"""ResNet-101 with CBAM on ImageNet-1K, the paper's table 4."""

_base_ = './resnet50_cbam_in1k.py'

model = dict(backbone=dict(depth=101))
