"""A detector as one function of an image batch that can be traced: from uint8 pixels to boxes, scores and labels.

MMDetection's heads select detections image by image, in Python. Here the same steps run on the whole batch with shapes
that do not depend on the image: a list of detections is always as long as it may become, and what is not one has the
score -1. The parts that compute are MMDetection's own: networks, prior generators and coders.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.dense_heads.rpn_head import RPNHead
from mmdet.models.roi_heads import BBoxHead, CascadeRoIHead, ConvFCBBoxHead, StandardRoIHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmengine.config import ConfigDict
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms, roi_align

from cbam_mmdet.deploy.pixels import Pixels
from cbam_mmdet.errors import UserError

NONE = -1.0  # the score of a place in a list that holds no detection
OUTPUTS = ('boxes', 'scores', 'labels', 'masks')


class Found(NamedTuple):
    """Lists of candidates of B images, each N long: boxes (B, N, 4), scores (B, N), labels (B, N)."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


class DetectorGraph(nn.Module):
    """A detector from pixels to detections.

    Args:
        model: a detector of MMDetection in evaluation mode: Faster, Mask or Cascade R-CNN, or one whose dense head
            predicts as BaseDenseHead does (RetinaNet, SSD, FCOS, ATSS, RTMDet and others).

    Raises:
        UserError: for another kind of detector, or a step of its prediction that has no counterpart here.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        require_exportable(model)
        self.model = model
        self.pixels = Pixels(model.data_preprocessor)
        self.has_masks = bool(getattr(getattr(model, 'roi_head', None), 'with_mask', False))

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of what it returns."""
        return OUTPUTS if self.has_masks else OUTPUTS[:3]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Detect.

        Args:
            images: (B, H, W, 3), BGR, 0 to 255, uint8 or float. All images of a batch have one size.

        Returns:
            Boxes (B, K, 4), x1, y1, x2, y2 in pixels of the images; scores (B, K) in descending order, -1 where there
            is no detection; labels (B, K), -1 there; and for a detector with masks their probabilities within the
            boxes, (B, K, h, w).
        """
        limits = torch._shape_as_tensor(images)[[2, 1, 2, 1]].to(self.pixels.mean)  # W, H, W, H
        features = self.model.extract_feat(self.pixels(images))
        if hasattr(self.model, 'roi_head'):
            proposals = propose(self.model.rpn_head, features, limits)
            head = self.model.roi_head
            if isinstance(head, CascadeRoIHead):
                found = cascade_detections(head, features, proposals, limits)
            else:
                found = roi_detections(head, features, proposals, limits)
        else:
            found = dense_detections(self.model.bbox_head, features, limits)
        boxes, scores, labels = found
        there = scores > NONE
        labels = torch.where(there, labels, torch.full_like(labels, -1))
        boxes = boxes * there[..., None]
        if not self.has_masks:
            return boxes, scores, labels
        return boxes, scores, labels, masks_in(self.model.roi_head, features, boxes, labels)


def require_exportable(model: nn.Module) -> None:
    """Check that a detector's steps from features to detections are those of this module.

    Raises:
        UserError: if one is not. The message names it.
    """
    roi_head = getattr(model, 'roi_head', None)
    if roi_head is not None:
        if type(roi_head) not in (StandardRoIHead, CascadeRoIHead):
            raise UserError(f'{type(roi_head).__name__} cannot be exported, only StandardRoIHead and CascadeRoIHead')
        if type(getattr(model, 'rpn_head', None)) is not RPNHead:
            raise UserError(f'{type(model).__name__} without an RPNHead cannot be exported')
        if isinstance(roi_head, CascadeRoIHead) and roi_head.with_mask:
            raise UserError("a CascadeRoIHead with masks cannot be exported; Mask R-CNN's StandardRoIHead can")
        if getattr(roi_head, 'with_shared_head', False):
            raise UserError('a roi_head with a shared_head (as in the C4 detectors) cannot be exported')
        for head in roi_head.bbox_head if isinstance(roi_head.bbox_head, nn.ModuleList) else [roi_head.bbox_head]:
            _require_known_box_head(head)
        extractor = roi_head.bbox_roi_extractor
        for each in extractor if isinstance(extractor, nn.ModuleList) else [extractor]:
            if type(each) is not SingleRoIExtractor or type(each.roi_layers[0]).__name__ != 'RoIAlign':
                raise UserError(f'{type(each).__name__} cannot be exported, only SingleRoIExtractor with RoIAlign')
        _require_known_selection(model.rpn_head.test_cfg, 'model.test_cfg.rpn', ('nms_pre', 'max_per_img'))
        _require_known_selection(roi_head.test_cfg, 'model.test_cfg.rcnn', ('max_per_img',))
    else:
        head = getattr(model, 'bbox_head', None)
        steps = ('predict_by_feat', '_predict_by_feat_single', '_bbox_post_process')
        changed = [step for step in steps if getattr(type(head), step, None) is not getattr(BaseDenseHead, step)]
        if changed:
            raise UserError(
                f'{type(head).__name__} cannot be exported: its {changed[0]} is not that of BaseDenseHead, as it is in '
                'RetinaNet, SSD, FCOS, ATSS or RTMDet'
            )
        _require_known_selection(head.test_cfg, 'model.test_cfg', ('nms_pre', 'max_per_img'))


def _require_known_box_head(head: nn.Module) -> None:
    steps = dict(forward=(BBoxHead, ConvFCBBoxHead), predict_by_feat=(BBoxHead,), _predict_by_feat_single=(BBoxHead,))
    for step, owners in steps.items():
        if getattr(type(head), step, None) not in [getattr(owner, step) for owner in owners]:
            raise UserError(f"{type(head).__name__} cannot be exported: its {step} is not BBoxHead's")
    if getattr(head, 'custom_cls_channels', False):
        raise UserError(f'the classes of {type(head).__name__} are not those of a softmax: it cannot be exported')


# Settings of mmcv's nms, as they are here.
NMS_DEFAULTS = dict(type='nms', offset=0, score_threshold=0, max_num=-1)


def _require_known_selection(cfg: ConfigDict, where: str, counts: Sequence[str]) -> None:
    """Check how a head selects detections: lists of a length that is known, and the plain suppression."""
    for key in counts:
        if type(cfg.get(key)) is not int or cfg[key] < 1:
            raise UserError(
                f'{where}.{key}={cfg.get(key)!r} cannot be exported: the lists in a graph have a length, so give a '
                f'number from 1 on, as --cfg-options {where}.{key}=1000'
            )
    nms = cfg.get('nms')
    if not isinstance(nms, dict) or not isinstance(nms.get('iou_threshold'), (int, float)):
        raise UserError(f"{where}.nms={nms!r} cannot be exported, only dict(type='nms', iou_threshold=...)")
    if nms.get('type', 'nms') != 'nms':
        raise UserError(f"{where}.nms: the suppression {nms['type']!r} cannot be exported, only 'nms'")
    for key in nms.keys() - {'iou_threshold', 'class_agnostic', 'split_thr'}:
        if key not in NMS_DEFAULTS or nms[key] != NMS_DEFAULTS[key]:
            raise UserError(
                f'{where}.nms.{key}={nms[key]!r} cannot be exported: only type, iou_threshold and class_agnostic'
            )


def propose(head: RPNHead, features: Sequence[Tensor], limits: Tensor) -> Found:
    """The proposals of an RPNHead, as its predict_by_feat selects them. Labels are levels of the pyramid."""
    scores, deltas = head(features)[:2]
    levels = []
    for level, (score, delta, priors) in enumerate(zip(scores, deltas, priors_of(head, scores), strict=True)):
        score = activate(head, channels_last(score, head.cls_out_channels))[..., 0]
        score, index = best(score, head.test_cfg.nms_pre)
        levels.append((score, rows(channels_last(delta, 4), index), priors[index], torch.full_like(index, level)))
    score, delta, priors, level = (torch.cat(parts, 1) for parts in zip(*levels, strict=True))
    boxes = decode(head, priors, delta, limits)
    return suppress(Found(boxes, without_small(boxes, score, head.test_cfg), level), head.test_cfg)


def dense_detections(head: BaseDenseHead, features: Sequence[Tensor], limits: Tensor) -> Found:
    """The detections of a dense head, as BaseDenseHead.predict_by_feat selects them."""
    outputs = head(features)
    cfg, levels = head.test_cfg, []
    factors = outputs[2] if len(outputs) > 2 else [None] * len(outputs[0])
    for score, delta, factor, priors in zip(*outputs[:2], factors, priors_of(head, outputs[0]), strict=True):
        score = activate(head, channels_last(score, head.cls_out_channels))
        classes = score.shape[-1]
        score = score.flatten(1)
        score, index = best(torch.where(score > cfg.get('score_thr', 0), score, NONE), cfg.nms_pre)
        place = torch.div(index, classes, rounding_mode='floor')
        if factor is not None:
            weight = rows(channels_last(factor, 1), place)[..., 0].sigmoid()
            score = torch.where(score > NONE, score * weight, NONE)
        delta = rows(channels_last(delta, head.bbox_coder.encode_size), place)
        levels.append((score, delta, priors[place], index % classes))
    score, delta, priors, labels = (torch.cat(parts, 1) for parts in zip(*levels, strict=True))
    boxes = decode(head, priors, delta, limits)
    return suppress(Found(boxes, without_small(boxes, score, cfg), labels), cfg)


def roi_detections(head: StandardRoIHead, features: Sequence[Tensor], proposals: Found, limits: Tensor) -> Found:
    """The detections of the second stage of Faster R-CNN."""
    logits, deltas = second_stage(head.bbox_roi_extractor, head.bbox_head, features, proposals.boxes)
    return classified(head.bbox_head, proposals, logits, deltas, limits, head.test_cfg)


def cascade_detections(head: CascadeRoIHead, features: Sequence[Tensor], proposals: Found, limits: Tensor) -> Found:
    """The detections of Cascade R-CNN: each stage refines the boxes of the last one, and their scores are averaged."""
    every = []
    for stage in range(head.num_stages):
        bbox_head = head.bbox_head[stage]
        logits, deltas = second_stage(head.bbox_roi_extractor[stage], bbox_head, features, proposals.boxes)
        every.append(logits)
        if stage < head.num_stages - 1:
            best_class = logits[..., :-1].argmax(-1)
            if not bbox_head.reg_class_agnostic:
                deltas = deltas.gather(2, best_class[..., None, None].expand(-1, -1, 1, 4))
            boxes = decode(bbox_head, proposals.boxes, deltas[:, :, 0], limits)
            proposals = proposals._replace(boxes=boxes)
    logits = sum(every[1:], every[0]) / len(every)
    return classified(head.bbox_head[-1], proposals, logits, deltas, limits, head.test_cfg)


def second_stage(
    extractor: SingleRoIExtractor, bbox_head: nn.Module, features: Sequence[Tensor], boxes: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits (B, N, C + 1), and deltas (B, N, C, 4), or (B, N, 1, 4) for all classes."""
    logits, deltas = bbox_head(regions(extractor, features, boxes))
    count = boxes.shape[1]
    return logits.reshape(-1, count, logits.shape[-1]), deltas.reshape(-1, count, deltas.shape[-1] // 4, 4)


def classified(
    bbox_head: nn.Module, proposals: Found, logits: Tensor, deltas: Tensor, limits: Tensor, cfg: ConfigDict
) -> Found:
    """Detections from proposals and what the second stage says of them, as multiclass_nms selects them."""
    scores = logits.softmax(-1)[..., :-1]
    scores = torch.where((scores > cfg.score_thr) & (proposals.scores > NONE)[..., None], scores, NONE)
    classes = scores.shape[-1]
    priors = proposals.boxes[:, :, None].expand(-1, -1, deltas.shape[2], -1)
    boxes = decode(bbox_head, priors.flatten(1, 2), deltas.flatten(1, 2), limits)
    boxes = boxes.reshape(-1, scores.shape[1], deltas.shape[2], 4).expand(-1, -1, classes, -1).flatten(1, 2)
    labels = torch.arange(classes, device=boxes.device).expand_as(scores).flatten(1)
    return suppress(Found(boxes, scores.flatten(1), labels), cfg)


def masks_in(head: StandardRoIHead, features: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
    """(B, K, h, w), the probabilities of the mask of each box's class within the box."""
    logits = head.mask_head(regions(head.mask_roi_extractor, features, boxes))
    index = labels.clamp(min=0).flatten()
    if head.mask_head.class_agnostic:
        index = torch.zeros_like(index)
    chosen = logits.gather(1, index[:, None, None, None].expand(-1, 1, *logits.shape[-2:]))[:, 0]
    return chosen.sigmoid().reshape(-1, boxes.shape[1], *chosen.shape[-2:])


def regions(extractor: SingleRoIExtractor, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """The features in boxes, (B, N, 4) -> (B * N, C, h, w), each from the level of its size."""
    count = boxes.shape[1]
    image = torch.arange(boxes.shape[0], device=boxes.device)[:, None, None].expand(-1, count, 1)
    rois = torch.cat((image.to(boxes), boxes), -1).flatten(0, 1)
    features = features[: extractor.num_inputs]
    level = extractor.map_roi_levels(rois, len(features))
    size = extractor.roi_layers[0].output_size
    found = features[0].new_zeros(1, 1, 1, 1).expand(rois.shape[0], features[0].shape[1], *size)
    for i, (layer, feature) in enumerate(zip(extractor.roi_layers, features, strict=True)):
        chosen = (level == i).nonzero()[:, 0]
        there = roi_align(
            feature, rois[chosen], layer.output_size, layer.spatial_scale, max(layer.sampling_ratio, 0), layer.aligned
        )
        found = found.index_put((chosen,), there)
    return found


def priors_of(head: nn.Module, scores: Sequence[Tensor]) -> list[Tensor]:
    """The priors of each level, as many as its map has places."""
    sizes = [score.shape[-2:] for score in scores]
    return head.prior_generator.grid_priors(sizes, dtype=scores[0].dtype, device=scores[0].device)


def activate(head: nn.Module, logits: Tensor) -> Tensor:
    """(B, N, outputs) -> (B, N, classes), probabilities without the background's."""
    return logits.sigmoid() if head.use_sigmoid_cls else logits.softmax(-1)[..., :-1]


def channels_last(x: Tensor, channels: int) -> Tensor:
    """(B, A * channels, H, W) -> (B, H * W * A, channels)."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, channels)


def decode(head: nn.Module, priors: Tensor, deltas: Tensor, limits: Tensor) -> Tensor:
    """The boxes (B, N, 4) that a coder makes of priors (B, N, ...) and deltas (B, N, 4), cut at the image's edge."""
    boxes = head.bbox_coder.decode(priors, deltas, max_shape=None)
    if not getattr(head.bbox_coder, 'clip_border', True):
        return boxes
    return torch.minimum(boxes.clamp(min=0), limits.to(boxes))


def without_small(boxes: Tensor, scores: Tensor, cfg: ConfigDict) -> Tensor:
    """The scores, NONE for boxes that are not larger than `min_bbox_size`."""
    least = cfg.get('min_bbox_size', -1)
    if least < 0:
        return scores
    large = (boxes[..., 2:] - boxes[..., :2] > least).all(-1)
    return torch.where(large, scores, NONE)


def suppress(found: Found, cfg: ConfigDict) -> Found:
    """Non-maximum suppression among boxes of one label, and the best `max_per_img` of each image.

    As mmcv's batched_nms does, it moves the boxes of each label to a place of their own.
    """
    boxes, scores, labels = found
    apart = boxes
    if not cfg.nms.get('class_agnostic', False):
        there = (scores > NONE)[..., None]
        largest = torch.where(there, boxes, boxes.new_zeros(())).flatten(1).amax(1)
        apart = boxes + (labels.to(boxes) * (largest[:, None] + 1))[..., None]
    # Below the threshold are the places that hold no candidate.
    kept = NonMaximumSuppression.apply(apart, scores, float(cfg.nms.iou_threshold), NONE / 2)
    left = torch.full_like(scores, NONE).index_put((kept[:, 0], kept[:, 2]), scores[kept[:, 0], kept[:, 2]])
    left, index = best(left, cfg.max_per_img)
    return Found(rows(boxes, index), left, labels.gather(1, index))


def best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The best of scores (B, N), and their indices, (B, count). Where N is less the rest is NONE, with index 0."""
    top, index = F.pad(scores, (0, count), value=NONE).topk(count, 1)
    return top, torch.where(top > NONE, index, torch.zeros_like(index))


def rows(x: Tensor, index: Tensor) -> Tensor:
    """x (B, N, C), index (B, K) -> (B, K, C)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


class NonMaximumSuppression(torch.autograd.Function):
    """ONNX's operator of this name for boxes (B, N, 4) and scores (B, N) of one class.

    It gives (M, 3): image, 0, and index of each box that is kept. Boxes whose score is not greater than the threshold
    are left out.
    """

    @staticmethod
    def forward(ctx: Any, boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float) -> Tensor:
        kept = []
        for i, (box, score) in enumerate(zip(boxes, scores, strict=True)):
            above = (score > score_threshold).nonzero()[:, 0]
            chosen = above[nms(box[above], score[above], iou_threshold)]
            kept.append(torch.stack((torch.full_like(chosen, i), torch.zeros_like(chosen), chosen), 1))
        return torch.cat(kept)

    @staticmethod
    def symbolic(g: Any, boxes: Any, scores: Any, iou_threshold: float, score_threshold: float) -> Any:
        def constant(value: Any) -> Any:
            return g.op('Constant', value_t=torch.tensor([value]))

        one_class = g.op('Unsqueeze', scores, constant(1))
        everything = constant(torch.iinfo(torch.int64).max)
        limits = constant(iou_threshold), constant(score_threshold)
        return g.op('NonMaxSuppression', boxes, one_class, everything, *limits)
