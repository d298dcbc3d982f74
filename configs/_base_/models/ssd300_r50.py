"""SSD300 on a ResNet-50: what changes in the model of MMDetection's SSD300.

C3 and C4 of the ResNet have the channels (512, 1024) and the sizes (38 and 19 for 300 pixels) of the two VGG maps that
SSD's neck takes. The other differences follow from the backbone:

- C5 is left out, because SSD's neck makes the smaller maps from C4.
- C3 is not L2-normalized, because blocks with batch normalization made it.
- Images are normalized as the ImageNet weights were trained.

The optimizer and its schedule stay SSD's.
"""

ssd300_r50 = dict(
    data_preprocessor=dict(std=[58.395, 57.12, 57.375]),
    backbone=dict(
        _delete_=True,
        type='ResNet',
        depth=50,
        num_stages=3,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(1, 2),
        frozen_stages=0,  # the stem alone: see ../cbam.py
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet50'),
    ),
    neck=dict(l2_norm_scale=None),
)
