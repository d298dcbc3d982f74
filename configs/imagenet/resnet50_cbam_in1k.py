"""ResNet-50 with CBAM on ImageNet-1K, the paper's table 4.

SGD with lr 0.1 for a batch of 256, divided by 10 every 30 of 100 epochs.

The checkpoint goes into a detector by init_cfg=dict(type='Pretrained', checkpoint=FILE, prefix='backbone.').
"""

_base_ = 'mmpretrain::resnet/resnet50_8xb32_in1k.py'

custom_imports = dict(imports=['cbam_mmdet', 'cbam_mmdet.evaluation.classification'])

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdet.ResNet',  # MMDetection's: the same weights by the same keys as in a detector
        depth=50,
        out_indices=(3,),
        frozen_stages=-1,
        norm_eval=False,
        zero_init_residual=False,  # as the authors; it would also hide CBAM from the gradient at the start
        plugins=[dict(cfg=dict(type='CBAM', reduction=16), position='after_conv3')],
    )
)

# A folder for each class, in train/ and val/.
data_root = 'data/imagenet/'
folder = dict(_delete_=True, type='CustomDataset', data_root=data_root)
train_dataloader = dict(dataset=dict(pipeline={{_base_.train_pipeline}}, data_prefix=dict(img_path='train'), **folder))
val_dataloader = dict(dataset=dict(pipeline={{_base_.test_pipeline}}, data_prefix=dict(img_path='val'), **folder))
test_dataloader = val_dataloader

val_evaluator = [dict(type='Accuracy', topk=(1, 5)), dict(type='TopKError', topk=(1, 5))]
test_evaluator = val_evaluator
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3))
