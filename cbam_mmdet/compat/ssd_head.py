"""MMDetection's SSD can predict again, once this module is imported.

Since MMDetection 3.2 every dense head is asked for its `loss_cls` when it predicts, and SSDHead has none: "'SSDHead'
object has no attribute 'loss_cls'" (open-mmlab/mmdetection issues 11063, 11305, 11780; open in 3.3.0 and in the
maintained fork's 3.5.1). None says what is true: no loss that activates the scores by itself.
"""

from __future__ import annotations

from collections.abc import Iterator

from mmdet.models.dense_heads import SSDHead

from cbam_mmdet.compat.patches import PERMANENT, patch, replaced


@patch('mmdet.models.dense_heads.SSDHead.loss_cls')
def ssd_predicts() -> Iterator[None]:
    """Give SSDHead the attribute that MMDetection asks for; a version whose SSDHead has it stays as it is."""
    if hasattr(SSDHead, 'loss_cls'):
        yield
    else:
        with replaced(SSDHead, loss_cls=None):
            yield


PERMANENT.enter_context(ssd_predicts())
