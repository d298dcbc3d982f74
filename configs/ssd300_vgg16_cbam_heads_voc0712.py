"""SSD300, VGG-16 with CBAM right before the heads, one on each map that they see: Pascal VOC 07+12.

This is the paper's place (section 5.4). ssd300_vgg16_cbam_voc0712.py has CBAM in the stages. The plain twin of both is
ssd300_vgg16_voc0712.py.
"""

_base_ = './ssd300_vgg16_voc0712.py'

model = dict(
    neck=dict(
        _delete_=True,
        type='PluginNeck',
        neck=_base_.model.neck,
        plugins=[dict(cfg=dict(type='CBAM', gate='unit'), after='outputs')],
    )
)
