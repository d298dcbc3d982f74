"""SSD300, VGG-16 with CBAM after the last ReLU of each of its five convolution stages: Pascal VOC 07+12, MMDetection's schedule.

The plain twin is ssd300_vgg16_voc0712.py. The paper's place for its SSD, before the heads: ssd300_vgg16_cbam_heads_voc0712.py.
"""

_base_ = './ssd300_vgg16_voc0712.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='PluginBackbone',  # MMDetection's VGG takes no plugins
        backbone={{_base_.model.backbone}},
        plugins=[
            # 'unit' starts as the exact identity, so the ImageNet weights are not disturbed; 'sigmoid' is the paper's.
            dict(cfg=dict(type='CBAM', reduction=16, gate='unit'), after=['features.3', 'features.8', 'features.15', 'features.22', 'features.29']),
        ],
    )
)
