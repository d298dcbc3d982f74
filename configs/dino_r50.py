"""The plain twin of dino_r50_cbam.py: MMDetection's DINO with four scales on a ResNet-50, COCO, 12 epochs."""

_base_ = ['mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py', './_base_/datasets/coco_detection.py']

custom_imports = dict(imports=['cbam_mmdet'])

model = dict(backbone=dict(frozen_stages=0))  # as with CBAM, so that the twins train the same layers

val_evaluator = _base_.coco_evaluator  # COCO's own twelve figures
test_evaluator = val_evaluator
