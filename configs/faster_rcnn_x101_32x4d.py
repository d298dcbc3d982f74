"""The plain twin of faster_rcnn_x101_32x4d_cbam.py: MMDetection's ResNeXt-101 32x4d, COCO, 1x schedule."""

_base_ = './faster_rcnn_r50.py'

model = dict(
    backbone=dict(
        type='ResNeXt',
        depth=101,
        groups=32,
        base_width=4,
        init_cfg=dict(checkpoint='open-mmlab://resnext101_32x4d'),
    )
)
