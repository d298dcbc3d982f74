"""ResNet-18 with CBAM on ImageNet-1K, the paper's table 4."""

_base_ = './resnet50_cbam_in1k.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='PluginBackbone',  # MMDetection's ResNet-18 takes no plugins
        backbone=dict(
            type='mmdet.ResNet',
            depth=18,
            out_indices=(3,),
            frozen_stages=-1,
            norm_eval=False,
            zero_init_residual=False,
        ),
        plugins=[dict(cfg=dict(type='CBAM', reduction=16))],  # after the last norm of each residual block
    ),
    head=dict(in_channels=512),
)
