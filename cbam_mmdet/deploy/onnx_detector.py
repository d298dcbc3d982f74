"""An ONNX file in the place of a detector: for MMEngine's Runner, and for mmdet.apis.inference_detector."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask
from mmdet.models.utils import samplelist_boxtype2tensor
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.model import BaseDataPreprocessor
from mmengine.structures import InstanceData
from torch import Tensor, nn

from cbam_mmdet.deploy.onnx_file import facts_of, open_session, run_session
from cbam_mmdet.errors import UserError


def paste(masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float) -> Tensor:
    """Masks of an image, (N, H, W), from their probabilities within the boxes, (N, h, w)."""
    found = torch.zeros(len(masks), *size, dtype=torch.bool)
    for i in range(len(masks)):
        one = slice(i, i + 1)
        part, place = _do_paste_mask(masks[one, None], boxes[one], *size, skip_empty=True)
        found[(one, *place)] = part >= threshold
    return found


@MODELS.register_module()
class OnnxDetector(nn.Module):
    """Detect by onnxruntime, on the CPU, with the file that tools/export.py wrote.

    Args:
        file: an ONNX file.

    Attributes:
        dataset_meta: its class names, as a detector of MMDetection has them.

    Raises:
        UserError: if the file is not one that tools/export.py wrote, or onnxruntime is not installed.
    """

    def __init__(self, file: str) -> None:
        super().__init__()
        self.file = file
        self.session = open_session(file)
        self.facts = facts_of(self.session, file)
        self.dataset_meta = dict(classes=tuple(self.facts['classes']))
        self.data_preprocessor = BaseDataPreprocessor()  # of which inference_detector asks the device
        self.nothing = nn.Parameter(torch.zeros(0), requires_grad=False)

    def test_step(self, data: dict[str, Any]) -> list[DetDataSample]:
        """Detect in a batch as a data loader gives it: `inputs`, images (3, H, W), and their `data_samples`."""
        samplelist_boxtype2tensor(data['data_samples'])  # as MMDetection's own preprocessor does, for the metrics
        return [self._detect(image, sample) for image, sample in zip(data['inputs'], data['data_samples'], strict=True)]

    val_step = test_step

    def _detect(self, image: Tensor, sample: DetDataSample) -> DetDataSample:
        boxes, scores, labels, *masks = (
            torch.from_numpy(np.ascontiguousarray(output[0]))
            for output in run_session(self.session, image.permute(1, 2, 0)[None].numpy())
        )
        there = labels >= 0
        if len(labels) and int(labels.max()) >= len(self.facts['classes']):
            raise UserError(
                f'{self.file} gives label {int(labels.max())}, and names {len(self.facts["classes"])} classes'
            )
        if not (torch.isfinite(boxes[there]).all() and torch.isfinite(scores[there]).all()):
            raise UserError(f'{self.file} gives boxes or scores that are not numbers: export the detector again')
        boxes = boxes[there] / boxes.new_tensor(sample.scale_factor).repeat(2)
        found = InstanceData(bboxes=boxes, scores=scores[there], labels=labels[there])
        if masks:
            found.masks = paste(masks[0][there], boxes, sample.ori_shape, self.facts['mask_threshold'])
        sample.pred_instances = found
        return sample
