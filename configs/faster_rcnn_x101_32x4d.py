"""The plain twin of faster_rcnn_x101_32x4d_cbam.py: the same but for CBAM."""

_base_ = 'mmdet::faster_rcnn/faster-rcnn_x101-32x4d_fpn_1x_coco.py'

custom_imports = dict(imports=['cbam_mmdet'])

model = dict(backbone=dict(frozen_stages=0))

# COCO's own twelve figures; MMDetection's default prints recalls at 100, 300 and 1000 detections.
val_evaluator = dict(proposal_nums=(1, 10, 100))
test_evaluator = val_evaluator
