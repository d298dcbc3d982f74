"""The demo's Faster R-CNN with a ResNet-18 of half the width, on BCCD: the plain twin of bccd_r18_cbam.py.

BCCD is 364 microscope photographs of blood cells, annotated as Pascal VOC's (MIT-licensed). The data folder holds its
VOC2007/.
"""

_base_ = './faster_rcnn.py'

custom_imports = dict(imports=['cbam_mmdet', 'cbam_mmdet.evaluation'])

classes = ('RBC', 'WBC', 'Platelets')
data_root = 'data/bccd/'
image_size = (320, 240)
max_epochs = 40

model = dict(
    backbone=dict(_delete_=True, type='ResNet', depth=18, base_channels=32, norm_eval=False, init_cfg=None),
    neck=dict(in_channels=[32, 64, 128, 256]),
    roi_head=dict(bbox_head=dict(num_classes=len(classes))),
)

# The demo's pipelines, with larger images. Cells have no right way up.
train_pipeline = _base_.train_pipeline
train_pipeline[2].scale = image_size
train_pipeline[3].update(prob=[0.25, 0.25, 0.25], direction=['horizontal', 'vertical', 'diagonal'])
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = image_size

images = dict(
    _delete_=True,
    type='VOCDataset',
    data_root=data_root,
    data_prefix=dict(sub_data_root='VOC2007/'),
    metainfo=dict(classes=classes),
)
train_dataloader = dict(
    dataset=dict(
        ann_file='VOC2007/ImageSets/Main/trainval.txt',
        filter_cfg=dict(filter_empty_gt=True, bbox_min_size=1),
        pipeline=train_pipeline,
        **images,
    )
)
val_dataloader = dict(
    dataset=dict(ann_file='VOC2007/ImageSets/Main/test.txt', test_mode=True, pipeline=test_pipeline, **images)
)
test_dataloader = val_dataloader
val_evaluator = [
    dict(type='VOCDetectionMetric', eval_mode='area'),
    dict(type='SampleCocoMetric', proposal_nums=_base_.proposal_nums),
]
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=max_epochs, val_interval=10)
_base_.param_scheduler[1].update(end=max_epochs, T_max=max_epochs)
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=10, max_keep_ckpts=1))
