"""SSD300, VGG-16 with CBAM in its five convolution stages: COCO, MMDetection's schedule (120 epochs).

The plain twin is ssd300_vgg16_coco.py. In the paper's SSD, CBAM stands before the heads instead:
ssd300_vgg16_cbam_heads_voc0712.py.
"""

_base_ = ['./ssd300_vgg16_coco.py', './_base_/cbam.py']

# MMDetection's VGG takes no plugins. PluginBackbone puts them after the last ReLU of each convolution stage.
model = dict(backbone=dict(
    _delete_=True, type='PluginBackbone', backbone=_base_.model.backbone, plugins=[dict(cfg=_base_.cbam)]))
