"""The demo: faster_rcnn.py, a small Faster R-CNN on the built-in shapes, with CBAM in all four stages.

The network is trained from scratch, so the gate is the paper's. The reduction is small because the layers are narrow.
"""

_base_ = './faster_rcnn.py'

model = dict(backbone=dict(plugins=[dict(cfg=dict(type='CBAM', reduction=4), position='after_conv3')]))
