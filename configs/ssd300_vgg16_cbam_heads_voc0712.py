"""SSD300, VGG-16 with CBAM right before the heads, one on each map that they see: the paper's place (section 5.4), Pascal VOC 07+12.

The plain twin is ssd300_vgg16_voc0712.py; with CBAM in the stages it is ssd300_vgg16_cbam_voc0712.py.
"""

_base_ = './ssd300_vgg16_voc0712.py'

model = dict(neck=dict(_delete_=True, type='PluginNeck', neck={{_base_.model.neck}}, plugins=[dict(cfg=dict(type='CBAM', gate='unit'), after='outputs')]))
