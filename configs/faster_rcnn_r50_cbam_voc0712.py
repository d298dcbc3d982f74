"""Faster R-CNN, ResNet-50 with FPN, CBAM in all four stages: Pascal VOC 2007 + 2012 (12 epochs), or one's own data in VOC's layout.

See faster_rcnn_r50_cbam.py for the choices; the plain twin is faster_rcnn_r50_voc0712.py. For own data:
--data-root DIR --classes auto. A DIR with one year only, or with JPEGImages/ directly in it, will do.
"""

_base_ = ['mmdet::pascal_voc/faster-rcnn_r50_fpn_1x_voc0712.py', './_base_/voc_evaluation.py']

custom_imports = dict(imports=['cbam_mmdet', 'cbam_mmdet.evaluation'])

model = dict(
    backbone=dict(
        frozen_stages=0,
        plugins=[
            dict(
                cfg=dict(type='CBAM', reduction=16, gate='unit'),
                stages=(True, True, True, True),
                position='after_conv3',
            )
        ],
    )
)

train_dataloader = dict(dataset=dict(dataset=dict(datasets=[
    dict(
        type='VOCDataset',
        data_root={{_base_.data_root}},
        ann_file=f'{year}/ImageSets/Main/trainval.txt',
        data_prefix=dict(sub_data_root=f'{year}/'),
        # MMDetection ignores training boxes below 32 pixels. Here only those without a size: small objects must train, too.
        filter_cfg=dict(filter_empty_gt=True, min_size=32, bbox_min_size=1),
        pipeline={{_base_.train_pipeline}},
    )
    for year in ('VOC2007', 'VOC2012')
])))

val_evaluator = {{_base_.voc_evaluation}}
test_evaluator = val_evaluator
