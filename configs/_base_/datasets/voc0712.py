"""What the configs for Pascal VOC 07+12 add to MMDetection's: VOC's mAP and COCO's figures.

The metrics are registered by custom_imports = dict(imports=['cbam_mmdet', 'cbam_mmdet.evaluation']).
"""

_base_ = './coco_detection.py'

voc_evaluator = [
    dict(type='VOCDetectionMetric', eval_mode='11points'),  # in both modes, with the AP of each class
    dict(type='SampleCocoMetric', proposal_nums=_base_.proposal_nums),
]
