"""Faster R-CNN, ResNet-18 with FPN, CBAM in all four stages: Pascal VOC 07+12.

The plain twin is faster_rcnn_r18_voc0712.py.
"""

_base_ = ['./faster_rcnn_r18_voc0712.py', './_base_/cbam.py']

# MMDetection's ResNet-18 takes no plugins. PluginBackbone puts them after the last norm of each residual block.
model = dict(backbone=dict(
    _delete_=True, type='PluginBackbone', backbone=_base_.model.backbone, plugins=[dict(cfg=_base_.cbam)]))
