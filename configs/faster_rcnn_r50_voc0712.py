"""The plain twin of faster_rcnn_r50_cbam_voc0712.py: MMDetection's ResNet-50 with FPN, Pascal VOC 07+12."""

_base_ = ['mmdet::pascal_voc/faster-rcnn_r50_fpn_1x_voc0712.py', './_base_/datasets/voc0712.py']

custom_imports = dict(imports=['cbam_mmdet', 'cbam_mmdet.evaluation'])

model = dict(backbone=dict(frozen_stages=0))  # as with CBAM, so that the twins train the same layers

# MMDetection ignores boxes under 32 pixels in training. Here only boxes without a size are ignored, so that the small
# objects of your own data count.
_base_.train_dataloader.dataset.dataset.datasets[0].filter_cfg.bbox_min_size = 1
_base_.train_dataloader.dataset.dataset.datasets[1].filter_cfg.bbox_min_size = 1

val_evaluator = _base_.voc_evaluator  # VOC's mAP in both modes, and COCO's figures
test_evaluator = val_evaluator
