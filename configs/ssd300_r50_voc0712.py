"""SSD300 on a ResNet-50, Pascal VOC 07+12: the plain twin of ssd300_r50_cbam_voc0712.py; ssd300_r50_coco.py says how SSD sits on a ResNet."""

_base_ = 'mmdet::pascal_voc/ssd300_voc0712.py'

custom_imports = dict(imports=['cbam_mmdet', 'cbam_mmdet.evaluation', 'cbam_mmdet.compat.ssd_head'])

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
        frozen_stages=0,
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet50'),
    ),
    neck=dict(l2_norm_scale=None),
)

# VOC's mAP in both modes with each class's AP, and COCO's figures.
val_evaluator = [dict(type='VOCDetectionMetric', eval_mode='11points'), dict(type='SampleCocoMetric', proposal_nums=(1, 10, 100))]
test_evaluator = val_evaluator
