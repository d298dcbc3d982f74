"""Faster R-CNN, a ResNet-18 of half the width with CBAM, on BCCD: blood cells in 364 microscope photographs, annotated as Pascal VOC's.

    python tools/train.py configs/demo/bccd_r18_cbam.py --data-root /path/to/bccd

From scratch, on a CPU, in less than an hour of one core. The folder holds BCCD's VOC2007/ (its data set is MIT-licensed).
"""

_base_ = './faster_rcnn_cbam.py'

custom_imports = dict(imports=['cbam_mmdet', 'cbam_mmdet.evaluation'])

classes = ('RBC', 'WBC', 'Platelets')
data_root = 'data/bccd/'
image_size = (320, 240)
max_epochs = 40

model = dict(
    backbone=dict(
        _delete_=True,
        type='PluginBackbone',
        backbone=dict(type='ResNet', depth=18, base_channels=32, norm_eval=False, init_cfg=None),
        plugins=[dict(cfg=dict(type='CBAM', reduction=4), after='layer*.*.bn2')],
    ),
    neck=dict(in_channels=[32, 64, 128, 256]),
    roi_head=dict(bbox_head=dict(num_classes=len(classes))),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=image_size, keep_ratio=True),
    dict(type='RandomFlip', prob=[0.25, 0.25, 0.25], direction=['horizontal', 'vertical', 'diagonal']),  # cells have no right way up
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=image_size, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
images = dict(_delete_=True, type='VOCDataset', data_root=data_root, data_prefix=dict(sub_data_root='VOC2007/'), metainfo=dict(classes=classes))
train_dataloader = dict(
    dataset=dict(
        ann_file='VOC2007/ImageSets/Main/trainval.txt', filter_cfg=dict(filter_empty_gt=True, bbox_min_size=1), pipeline=train_pipeline, **images
    )
)
val_dataloader = dict(
    dataset=dict(ann_file='VOC2007/ImageSets/Main/test.txt', test_mode=True, pipeline=test_pipeline, **images)
)
test_dataloader = val_dataloader
val_evaluator = [dict(type='VOCDetectionMetric', eval_mode='area'), dict(type='SampleCocoMetric', proposal_nums=(1, 10, 100))]
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=max_epochs, val_interval=10)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', eta_min=1e-5, begin=0, end=max_epochs, T_max=max_epochs, by_epoch=True, convert_to_iter_based=True),
]
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=10, max_keep_ckpts=1))
