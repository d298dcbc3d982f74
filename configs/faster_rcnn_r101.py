"""The plain twin of faster_rcnn_r101_cbam.py: the same but for CBAM."""

_base_ = 'mmdet::faster_rcnn/faster-rcnn_r101_fpn_1x_coco.py'

custom_imports = dict(imports=['cbam_mmdet'])

model = dict(backbone=dict(frozen_stages=0))
