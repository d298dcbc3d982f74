"""MMDetection's SSD can predict again, once this module is imported.

Since MMDetection 3.2 every dense head is asked for its `loss_cls` when it predicts, and SSDHead has none: "'SSDHead' object has no
attribute 'loss_cls'" (open-mmlab/mmdetection issues 11063, 11305, 11780; open in 3.3.0 and in the maintained fork's 3.5.1). None
says what is true: no loss that activates the scores by itself.
"""

from mmdet.models.dense_heads import SSDHead

if not hasattr(SSDHead, 'loss_cls'):
    SSDHead.loss_cls = None
