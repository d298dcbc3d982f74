"""The plain twin of retinanet_r50_cbam.py: MMDetection's RetinaNet on a ResNet-50 with FPN, COCO, 1x schedule."""

_base_ = ['mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', './_base_/datasets/coco_detection.py']

custom_imports = dict(imports=['cbam_mmdet'])

model = dict(backbone=dict(frozen_stages=0))  # as with CBAM, so that the twins train the same layers

val_evaluator = _base_.coco_evaluator  # COCO's own twelve figures
test_evaluator = val_evaluator
