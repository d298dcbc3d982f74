"""How the VOC configs are scored: VOC's own mAP in both modes, and COCO's on the same boxes.

A config takes it by `val_evaluator = {{_base_.voc_evaluation}}`.
"""

voc_evaluation = [
    # VOC2007 is scored by '11points'; 'area', of VOC2010 and later, stands beside it in every result.
    dict(type='VOCDetectionMetric', eval_mode='11points'),
    dict(type='SampleCocoMetric', proposal_nums=(1, 10, 100)),
]
