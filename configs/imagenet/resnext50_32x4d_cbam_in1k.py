"""ResNeXt-50 32x4d with CBAM on ImageNet-1K, the paper's table 4."""

_base_ = './resnet50_cbam_in1k.py'

model = dict(backbone=dict(type='mmdet.ResNeXt', depth=50, groups=32, base_width=4))
