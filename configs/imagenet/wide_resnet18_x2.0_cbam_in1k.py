"""Wide ResNet-18, 2.0 times as wide, with CBAM on ImageNet-1K, the paper's table 4."""

_base_ = './resnet18_cbam_in1k.py'

model = dict(backbone=dict(backbone=dict(base_channels=128, stem_channels=64)), head=dict(in_channels=1024))
