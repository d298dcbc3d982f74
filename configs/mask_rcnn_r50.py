"""The plain twin of mask_rcnn_r50_cbam.py: MMDetection's Mask R-CNN on a ResNet-50 with FPN, COCO, 1x schedule."""

_base_ = ['mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', './_base_/datasets/coco_detection.py']

custom_imports = dict(imports=['cbam_mmdet'])

model = dict(backbone=dict(frozen_stages=0))  # as with CBAM, so that the twins train the same layers

val_evaluator = _base_.coco_evaluator  # COCO's own twelve figures, of boxes and of masks
test_evaluator = val_evaluator
