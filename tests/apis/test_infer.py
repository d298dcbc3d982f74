"""Detection on a user's own images: the pictures."""

import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import nn

from cbam_mmdet.apis.infer import LEGIBLE, _Painter


def test_a_small_image_is_drawn_larger():
    """Its labels would be as large as its objects."""
    model = nn.Module()
    model.dataset_meta = dict(classes=('star',), palette=[(255, 0, 0)])
    mask = torch.zeros(1, 48, 64, dtype=torch.bool)
    mask[:, 20:40, 10:30] = True
    found = InstanceData(
        bboxes=torch.tensor([[10.0, 20.0, 30.0, 40.0]]),
        labels=torch.tensor([0]),
        scores=torch.tensor([0.9]),
        masks=mask,
    )
    sample = DetDataSample(pred_instances=found)
    picture = _Painter(model, 0.5)(np.zeros((48, 64, 3), np.uint8), sample)
    factor = picture.shape[1] // 64
    assert picture.shape == (48 * factor, 64 * factor, 3) and LEGIBLE <= picture.shape[1] < LEGIBLE + 64
    rows, columns = np.nonzero(picture[:, :, 2] > 200)  # the box's edge
    box = np.array([columns.min(), rows.min(), columns.max(), rows.max()]) / factor
    assert np.allclose(box, [10, 20, 30, 40], atol=0.6)
    assert picture[30 * factor, 20 * factor].any() and not picture[10 * factor, 50 * factor].any()  # the mask
    assert sample.pred_instances.bboxes.tolist() == [[10.0, 20.0, 30.0, 40.0]]  # what is written is not enlarged
