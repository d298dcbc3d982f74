"""SSD300 on a ResNet-50 with CBAM in its three stages, Pascal VOC 07+12; the plain twin, ssd300_r50_voc0712.py, says how SSD sits on a ResNet."""

_base_ = './ssd300_r50_voc0712.py'

model = dict(
    backbone=dict(
        # The last ResNet stage is not there, so three stages; see faster_rcnn_r50_cbam.py on the gate and on norm_eval.
        plugins=[dict(cfg=dict(type='CBAM', reduction=16, gate='unit'), stages=(True, True, True), position='after_conv3')],
    )
)
