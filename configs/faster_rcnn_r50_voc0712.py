"""The plain twin of faster_rcnn_r50_cbam_voc0712.py: MMDetection's own, but for what is said here."""

_base_ = 'mmdet::pascal_voc/faster-rcnn_r50_fpn_1x_voc0712.py'

custom_imports = dict(imports=['cbam_mmdet', 'cbam_mmdet.evaluation'])

model = dict(backbone=dict(frozen_stages=0))  # as with CBAM, so that the two train the same layers

# MMDetection ignores boxes under 32 pixels in training; here only those without a size: small objects of one's own data count.
_base_.train_dataloader.dataset.dataset.datasets[0].filter_cfg.bbox_min_size = 1
_base_.train_dataloader.dataset.dataset.datasets[1].filter_cfg.bbox_min_size = 1

# VOC's mAP in both modes with each class's AP, and COCO's figures.
val_evaluator = [dict(type='VOCDetectionMetric', eval_mode='11points'), dict(type='SampleCocoMetric', proposal_nums=(1, 10, 100))]
test_evaluator = val_evaluator
