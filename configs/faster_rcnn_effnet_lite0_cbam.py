"""A detector for whoever has no GPU, with CBAM in each stage of the backbone that trains.

The plain twin is faster_rcnn_effnet_lite0.py, which says how to train it and where its weights come from.
"""

_base_ = './faster_rcnn_effnet_lite0.py'

# After the last norm of each block from stride 8 on. The blocks have few channels (40 to 320), hence the reduction.
model = dict(
    backbone=dict(
        _delete_=True,
        type='PluginBackbone',
        backbone=_base_.model.backbone,
        plugins=[dict(cfg=dict(type='CBAM', reduction=4, gate='unit'), after='timm_model.blocks.[2-6].*.bn3')],
    )
)
