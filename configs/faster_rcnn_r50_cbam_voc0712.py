"""Faster R-CNN, ResNet-50 with FPN, CBAM in all four stages: Pascal VOC 07+12, tested on VOC 2007.

The plain twin is faster_rcnn_r50_voc0712.py; faster_rcnn_r50_cbam.py says why the gate, the place and the frozen stages are so.
"""

_base_ = './faster_rcnn_r50_voc0712.py'

model = dict(backbone=dict(plugins=[dict(cfg=dict(type='CBAM', reduction=16, gate='unit'), position='after_conv3')]))
