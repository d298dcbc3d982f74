"""Faster R-CNN, ResNet-50 with FPN, CBAM in all four stages: COCO, 1x schedule (12 epochs).

Only what differs from MMDetection's own config stands here; its plain twin is faster_rcnn_r50.py.
"""

_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'

custom_imports = dict(imports=['cbam_mmdet'])

model = dict(
    backbone=dict(
        # MMDetection freezes the stem and stage 1. A CBAM in a frozen stage would never train, so only the stem is frozen.
        frozen_stages=0,
        plugins=[
            dict(
                # MMDetection's norm_eval=True holds CBAM's own BatchNorm at mean 0 and variance 1, too: it trains as an affine
                # layer. Set norm_eval=False with large batches, to normalize as in the paper.
                # 'unit' starts as the exact identity, so the ImageNet weights are not disturbed; 'sigmoid' is the paper's.
                cfg=dict(type='CBAM', reduction=16, gate='unit'),
                stages=(True, True, True, True),
                position='after_conv3',  # after the block's last norm, before the addition: the paper's place
            )
        ],
    )
)

# COCO's own twelve figures; MMDetection's default prints recalls at 100, 300 and 1000 detections.
val_evaluator = dict(proposal_nums=(1, 10, 100))
test_evaluator = val_evaluator
