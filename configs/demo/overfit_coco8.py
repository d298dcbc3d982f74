"""Can the whole pipeline learn real photographs? The demo's detector on the first 8 images of COCO.

    python tools/train.py configs/demo/overfit_coco8.py --data-root /path/to/coco

It is tested on the same 8 images. The mAP does not measure how good the detector is. All that counts is that it comes
close to 1.
"""

_base_ = './faster_rcnn_cbam.py'

data_root = 'data/coco/'
max_epochs = 250
images = dict(
    data_root=data_root,
    ann_file='annotations/instances_train2017.json',
    data_prefix=dict(img='train2017/'),
    metainfo=dict(_delete_=True),  # COCO's own 80 classes
    indices=8,
)

model = dict(
    backbone=dict(base_channels=32),
    neck=dict(in_channels=[128, 256, 512, 1024], num_outs=5),
    rpn_head=dict(anchor_generator=dict(scales=[2, 4, 8], strides=[4, 8, 16, 32, 64])),
    roi_head=dict(
        bbox_roi_extractor=dict(featmap_strides=[4, 8, 16, 32], finest_scale=28),
        bbox_head=dict(num_classes=80),
    ),
    train_cfg=dict(rpn=dict(sampler=dict(num=128)), rcnn=dict(sampler=dict(num=128))),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=(448, 448), keep_ratio=True),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(448, 448), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    # Without an annotation file of its own, the metric takes the truth from the data set: these 8 images alone.
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'instances'),
    ),
]
train_dataloader = dict(batch_size=8, dataset=dict(pipeline=train_pipeline, **images))
val_dataloader = dict(batch_size=4, dataset=dict(pipeline=test_pipeline, **images))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=None)
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=max_epochs, val_interval=50)
_base_.param_scheduler[0].update(end=20)  # of the warm-up's iterations
_base_.param_scheduler[1].update(end=max_epochs, T_max=max_epochs)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=50, max_keep_ckpts=1))
