"""Faster R-CNN, ResNet-50 with FPN, pretrained on ImageNet with CBAM in all four stages: Pascal VOC 07+12.

faster_rcnn_r50_cbam_in1k.py says more. The plain twin, from ImageNet weights without CBAM, is
faster_rcnn_r50_voc0712.py.
"""

_base_ = './faster_rcnn_r50_voc0712.py'

model = dict(
    backbone=dict(
        plugins=[dict(cfg=dict(type='CBAM', reduction=16, gate='sigmoid'), position='after_conv3')],
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://github.com/osmr/imgclsmob/releases/download/v0.0.537/'
            'cbam_resnet50-0505-d8cf8488.pth.zip',
        ),
    )
)
