"""SSD300 on a ResNet-50, COCO: the plain twin of ssd300_r50_cbam_coco.py.

C3 and C4 of the ResNet have the channels (512, 1024) and the sizes (38, 19 of 300 pixels) of the two VGG maps that SSD's neck takes.
For the rest: C5 is left out, as SSD's neck makes the smaller maps from C4; C3 is not L2-normalized, as batch-normalized
blocks made it; images are normalized as the ImageNet weights were trained; the optimizer and its schedule stay SSD's.
"""

_base_ = 'mmdet::ssd/ssd300_coco.py'

custom_imports = dict(imports=['cbam_mmdet', 'cbam_mmdet.compat.ssd_head'])

model = dict(
    data_preprocessor=dict(std=[58.395, 57.12, 57.375]),
    backbone=dict(
        _delete_=True,
        type='ResNet',
        depth=50,
        num_stages=3,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(1, 2),
        frozen_stages=0,  # a CBAM in a frozen stage would never train
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet50'),
    ),
    neck=dict(l2_norm_scale=None),
)

# COCO's own twelve figures; MMDetection's default prints recalls at 100, 300 and 1000 detections.
val_evaluator = dict(proposal_nums=(1, 10, 100))
test_evaluator = val_evaluator
