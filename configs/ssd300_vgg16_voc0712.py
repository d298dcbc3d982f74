"""The plain twin of ssd300_vgg16_cbam_voc0712.py: MMDetection's own SSD300, VGG-16, Pascal VOC 07+12."""

_base_ = ['mmdet::pascal_voc/ssd300_voc0712.py', './_base_/datasets/voc0712.py']

custom_imports = dict(imports=['cbam_mmdet', 'cbam_mmdet.evaluation', 'cbam_mmdet.compat.ssd_head'])

val_evaluator = _base_.voc_evaluator  # VOC's mAP in both modes, and COCO's figures
test_evaluator = val_evaluator
