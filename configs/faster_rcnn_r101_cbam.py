"""Faster R-CNN, ResNet-101 with FPN, CBAM in all four stages: COCO, 1x schedule (12 epochs).

See faster_rcnn_r50_cbam.py for the choices; the plain twin is faster_rcnn_r101.py.
"""

_base_ = 'mmdet::faster_rcnn/faster-rcnn_r101_fpn_1x_coco.py'

custom_imports = dict(imports=['cbam_mmdet'])

model = dict(
    backbone=dict(
        frozen_stages=0,
        plugins=[
            dict(
                cfg=dict(type='CBAM', reduction=16, gate='unit'),
                stages=(True, True, True, True),
                position='after_conv3',
            )
        ],
    )
)

# COCO's own twelve figures; MMDetection's default prints recalls at 100, 300 and 1000 detections.
val_evaluator = dict(proposal_nums=(1, 10, 100))
test_evaluator = val_evaluator
