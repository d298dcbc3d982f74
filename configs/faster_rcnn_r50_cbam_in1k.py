"""Faster R-CNN, ResNet-50 with FPN, pretrained on ImageNet with CBAM in all four stages: COCO, 1x schedule (12 epochs).

This is faster_rcnn_r50.py with the ImageNet weights of pytorchcv's cbam_resnet50, a CBAM in each residual block
included. faster_rcnn_r50_cbam.py starts from ImageNet weights without CBAM, and so takes another gate. What these
weights were trained with is kept: the paper's gate, the stride in the 3x3 convolution (style='pytorch', MMDetection's
default) and torchvision's normalization of RGB images (that of MMDetection's base config).

The file is downloaded at the first start. Without a network, give its path, the .zip or the .pth in it:
--cfg-options model.backbone.init_cfg.checkpoint=FILE
"""

_base_ = './faster_rcnn_r50.py'

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
