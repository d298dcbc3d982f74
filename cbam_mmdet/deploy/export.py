"""Export a detector to ONNX, and compare what onnxruntime detects with what PyTorch does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import nn

import cbam_mmdet.compat.ssd_head  # noqa: F401  (SSD is mended)
from cbam_mmdet.datasets.transforms.arrays import array_pipeline
from cbam_mmdet.datasets.transforms.loading import read_image
from cbam_mmdet.deploy.onnx_detector import paste
from cbam_mmdet.deploy.onnx_file import open_session, run_session, write_onnx

NEAR = 1e-3, 1.0  # scores, and pixels of boxes, that differ by more are not those of one detection
NEAR_IN_HALF = 0.05, 4.0
EQUAL = 1e-5  # of scores that differ by less either may be the last one of a full list


@dataclass(frozen=True)
class Difference:
    """How the detections of a file differ from those of PyTorch, over some images.

    Attributes:
        images: the number of images.
        detections: the number of PyTorch's detections in them.
        unmatched: detections of either that the other lacks.
        boxes: the largest difference of a coordinate of two matched boxes, in pixels of the network's input.
        scores: the largest difference of two matched scores.
        masks: the largest share of two matched masks' pixels in which they differ. 0 without masks.
    """

    images: int
    detections: int
    unmatched: int
    boxes: float
    scores: float
    masks: float

    def within(self, boxes: float, scores: float, masks: float, unmatched: float = 0.01) -> bool:
        """Whether the detections are the same within these tolerances, but for a share of them.

        Two boxes may overlap by the threshold of the suppression but for rounding, and then one of them is in one list.
        """
        close = self.boxes <= boxes and self.scores <= scores and self.masks <= masks
        return close and self.unmatched <= unmatched * self.detections


def export_detector(
    model: nn.Module,
    out: str | Path,
    files: Sequence[str | Path],
    *,
    fixed_size: tuple[int, int] | None = None,
    fixed_batch: int | None = None,
    float_input: bool = False,
    half: bool = False,
) -> Difference:
    """Write a detector as an ONNX file (see deploy.onnx_file.write_onnx), and compare it with PyTorch on images.

    The images are resized by the test pipeline of the detector's config, and to `fixed_size` after it.

    Raises:
        UserError: as write_onnx, and for an image that cannot be read.
    """
    how = dict(fixed_size=fixed_size, fixed_batch=fixed_batch, float_input=float_input, half=half)
    write_onnx(model, out, **how)
    pipeline = array_pipeline(model.cfg)
    images = []
    for file in files:
        image = pipeline(dict(img=read_image(str(file)), img_id=0))['inputs'].permute(1, 2, 0).numpy()
        if fixed_size:
            image = cv2.resize(image, fixed_size[::-1])
        images.append(image)
    return compare(model, out, images, fixed_batch or 1, NEAR_IN_HALF if half else NEAR)


def compare(
    model: nn.Module,
    file: str | Path,
    images: Sequence[np.ndarray],
    batch: int = 1,
    near: tuple[float, float] = NEAR,
) -> Difference:
    """Compare the detections of a file with PyTorch's in images (H, W, 3), BGR, 0 to 255, as the network takes them.

    Args:
        model: the detector that was exported.
        file: the ONNX file.
        images: the images. Those of a batch, which follow each other, have one size.
        batch: the number of images in a batch. The last batch is filled up with its last image.
        near: see differences.
    """
    session = open_session(file)
    pairs = []
    for start in range(0, len(images), batch):
        some = list(images[start : start + batch])
        filled = np.stack(some + some[-1:] * (batch - len(some)))
        outputs = [torch.from_numpy(output) for output in run_session(session, filled)]
        for i, theirs in enumerate(detect(model, some)):
            there = outputs[2][i] >= 0
            boxes, scores, labels, *masks = (output[i][there] for output in outputs)
            ours = InstanceData(bboxes=boxes, scores=scores, labels=labels)
            if masks:
                ours.masks = paste(masks[0], boxes, some[i].shape[:2], model.roi_head.test_cfg.mask_thr_binary)
            pairs.append((theirs, ours))
    parts = [differences(*pair, near) for pair in pairs]
    boxes, scores, masks, unmatched = zip(*parts, strict=True)
    count = sum(len(theirs) for theirs, _ in pairs)
    return Difference(len(images), count, sum(unmatched), max(boxes), max(scores), max(masks))


def detect(model: nn.Module, images: Sequence[np.ndarray]) -> list[InstanceData]:
    """PyTorch's detections, in pixels of the images."""
    samples = [
        DetDataSample(metainfo=dict(img_shape=image.shape[:2], ori_shape=image.shape[:2], scale_factor=(1.0, 1.0)))
        for image in images
    ]
    inputs = [torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1) for image in images]
    data = model.data_preprocessor(dict(inputs=inputs, data_samples=samples), False)
    with torch.no_grad():
        return [it.pred_instances for it in model.predict(data['inputs'], data['data_samples'], rescale=False)]


def differences(
    theirs: InstanceData, ours: InstanceData, near: tuple[float, float] = NEAR
) -> tuple[float, float, float, int]:
    """The largest differences of boxes, scores and masks, and the number of detections without a counterpart.

    A counterpart has the same label and nearly the same score. Of several it is the one with the nearest box. Where
    both lists are as long, the last of either may lack one: equal scores compete for its place.

    Args:
        theirs: the detections of one image.
        ours: those that they are compared with.
        near: scores, and pixels of boxes, that differ by more are not those of one detection.
    """
    left, alone = list(range(len(ours))), []
    boxes, scores, masks = [0.0], [0.0], [0.0]
    for i in range(len(theirs)):
        gaps = (ours.scores - theirs.scores[i]).abs()
        distances = (ours.bboxes - theirs.bboxes[i]).abs().amax(1)
        close = (ours.labels == theirs.labels[i]) & (gaps < near[0]) & (distances < near[1])
        candidates = [j for j in left if close[j]]
        if not candidates:
            alone.append(i)
            continue
        j = min(candidates, key=lambda j: float(distances[j]))
        left.remove(j)
        boxes.append(float(distances[j]))
        scores.append(float(gaps[j]))
        if 'masks' in theirs:
            both, either = ours.masks[j] & theirs.masks[i], ours.masks[j] | theirs.masks[i]
            masks.append(1 - float(both.sum()) / max(int(either.sum()), 1) if either.any() else 0.0)
    last = min((float(it.scores.min()) for it in (theirs, ours) if len(it)), default=0.0) + EQUAL
    both_full = len(theirs) == len(ours)
    lost = [float(score) for score in [*theirs.scores[alone], *ours.scores[left]] if not (both_full and score <= last)]
    return max(boxes), max(scores), max(masks), len(lost)
