"""CBAM as the configs of this folder use it on ImageNet weights. Like all of `_base_/`, this file only defines names.

A config takes them beside its plain twin:

    _base_ = ['./faster_rcnn_r50.py', './_base_/cbam.py']
    model = dict(backbone=dict(plugins=[dict(cfg=_base_.cbam, position='after_conv3')]))

The choices, and their reasons:

- `gate='unit'` starts as the exact identity, so CBAM does not disturb the ImageNet weights. 'sigmoid', the paper's, cost
  0.104 and 0.436 mAP on two small data sets; of the unit gate no loss is shown, nor a gain
  (docs/does_cbam_help.md).
- The place is the paper's: after the last norm of a residual block, before the addition. MMDetection's Bottleneck
  ResNets take CBAM there by `plugins`, at position='after_conv3'. `PluginBackbone` puts it into any other backbone, at
  the usual place of that backbone unless `after` names another.
- The plain twins freeze the stem alone (`frozen_stages=0`), where MMDetection freezes stage 1, too. A CBAM in a frozen
  stage would never train, and twins that are compared must train the same layers.
- MMDetection's `norm_eval=True` stays. It also holds CBAM's own BatchNorm at mean 0 and variance 1, where that trains
  as an affine layer. Set `norm_eval=False` with large batches, to normalize as in the paper.
"""

cbam = dict(type='CBAM', reduction=16, gate='unit')
