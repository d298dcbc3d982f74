"""Faster R-CNN, a ResNet-18 of half the width with CBAM, on BCCD: blood cells in 364 microscope photographs.

    python tools/train.py configs/demo/bccd_r18_cbam.py --data-root /path/to/bccd

It trains from scratch in less than an hour of one CPU core. The plain twin is bccd_r18.py.
"""

_base_ = './bccd_r18.py'

# MMDetection's ResNet-18 takes no plugins. PluginBackbone puts them after the last norm of each residual block.
model = dict(backbone=dict(
    _delete_=True,
    type='PluginBackbone',
    backbone=_base_.model.backbone,
    plugins=[dict(cfg=dict(type='CBAM', reduction=4))]))
