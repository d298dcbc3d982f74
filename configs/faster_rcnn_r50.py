"""The plain twin of faster_rcnn_r50_cbam.py: the same but for CBAM."""

_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'

custom_imports = dict(imports=['cbam_mmdet'])

model = dict(backbone=dict(frozen_stages=0))  # as with CBAM, so that the two train the same layers

# COCO's own twelve figures; MMDetection's default prints recalls at 100, 300 and 1000 detections.
val_evaluator = dict(proposal_nums=(1, 10, 100))
test_evaluator = val_evaluator
