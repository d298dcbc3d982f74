"""The plain twin of ssd300_vgg16_cbam_coco.py: MMDetection's own SSD300, VGG-16, COCO."""

_base_ = ['mmdet::ssd/ssd300_coco.py', './_base_/datasets/coco_detection.py']

custom_imports = dict(imports=['cbam_mmdet', 'cbam_mmdet.compat.ssd_head'])

val_evaluator = _base_.coco_evaluator  # COCO's own twelve figures
test_evaluator = val_evaluator
