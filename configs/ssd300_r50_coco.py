"""SSD300 on a ResNet-50, COCO: the plain twin of ssd300_r50_cbam_coco.py.

_base_/models/ssd300_r50.py says how SSD sits on a ResNet.
"""

_base_ = ['./ssd300_vgg16_coco.py', './_base_/models/ssd300_r50.py']

model = _base_.ssd300_r50
