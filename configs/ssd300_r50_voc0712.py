"""SSD300 on a ResNet-50, Pascal VOC 07+12: the plain twin of ssd300_r50_cbam_voc0712.py.

_base_/models/ssd300_r50.py says how SSD sits on a ResNet.
"""

_base_ = ['./ssd300_vgg16_voc0712.py', './_base_/models/ssd300_r50.py']

model = _base_.ssd300_r50
