"""Faster R-CNN, ResNet-18 with FPN, CBAM in all four stages: Pascal VOC 07+12; the plain twin is faster_rcnn_r18_voc0712.py."""

_base_ = './faster_rcnn_r18_voc0712.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='PluginBackbone',  # MMDetection's ResNet-18 takes no plugins
        backbone={{_base_.model.backbone}},
        # After the block's last norm, before the addition: the paper's place. See faster_rcnn_r50_cbam.py on the gate and on norm_eval.
        plugins=[dict(cfg=dict(type='CBAM', reduction=16, gate='unit'), after='layer*.*.bn2')],
    )
)
