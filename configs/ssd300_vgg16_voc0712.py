"""The plain twin of ssd300_vgg16_cbam_voc0712.py: MMDetection's own SSD300, VGG-16, Pascal VOC 07+12."""

_base_ = 'mmdet::pascal_voc/ssd300_voc0712.py'

custom_imports = dict(imports=['cbam_mmdet', 'cbam_mmdet.evaluation', 'cbam_mmdet.compat.ssd_head'])

# VOC's mAP in both modes with each class's AP, and COCO's figures.
val_evaluator = [dict(type='VOCDetectionMetric', eval_mode='11points'), dict(type='SampleCocoMetric', proposal_nums=(1, 10, 100))]
test_evaluator = val_evaluator
