"""Grad-CAM for detectors (Selvaraju et al., ICCV 2017; section 4.3 of CBAM's paper), by the library `grad-cam`.

It explains the raw class score, before softmax, of chosen boxes. Each box, a detection or one that the user gives, is
matched with a candidate of the detector: a proposal of a two-stage detector, or an anchor of a dense one. This is the
candidate with the best score for the class among those with an IoU of at least 0.5 with the box. For a detection it is
the candidate that the detection came from. Boxes are constants: proposals and candidates are found once, without
gradients. The derivative is that of the candidate's score, through head, neck and backbone.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmdet.models.dense_heads import AnchorHead
from mmdet.models.roi_heads import StandardRoIHead
from mmdet.models.task_modules import DeltaXYWHBBoxCoder
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox2roi, bbox_overlaps
from torch import Tensor, nn

from cbam_mmdet.datasets.transforms.arrays import array_pipeline, place_of_image
from cbam_mmdet.errors import UserError, did_you_mean
from cbam_mmdet.models.plugins.places import OUTPUTS, matches, names_of, usual_place

# Our names, and the library's classes for them.
METHODS = {
    'gradcam': 'GradCAM',
    'gradcam++': 'GradCAMPlusPlus',
    'xgradcam': 'XGradCAM',
    'hirescam': 'HiResCAM',
    'layercam': 'LayerCAM',
    'elementwise': 'GradCAMElementWise',
    'eigencam': 'EigenCAM',
    'eigengradcam': 'EigenGradCAM',
}
# The library decomposes the activations with a square matrix with a row for each position in the map: 1 GiB for these.
EIGEN_POSITIONS = 128 * 128


@dataclass(frozen=True)
class Target:
    """A box whose class score is explained.

    Attributes:
        box: x1, y1, x2, y2 in pixels of the image.
        label: index of the class.
    """

    box: tuple[float, float, float, float]
    label: int


@dataclass
class Prepared:
    """An image as the input of a detector.

    Attributes:
        inputs: (1, 3, H, W), resized, normalized and padded.
        sample: its metainfo: `img_shape` (before the padding of the batch), `scale_factor` (width, height), ...
    """

    inputs: Tensor
    sample: DetDataSample


def prepare(model: nn.Module, image: np.ndarray) -> Prepared:
    """Apply the test pipeline and the data preprocessor of a detector to an image, (H, W, 3) BGR."""
    packed = array_pipeline(model.cfg)(dict(img=image, img_id=0))
    data = model.data_preprocessor(dict(inputs=[packed['inputs']], data_samples=[packed['data_samples']]), False)
    return Prepared(data['inputs'], data['data_samples'][0])


def best_detections(
    model: nn.Module, image: Prepared, label: int | None = None, top: int | None = 1, score_thr: float = 0.3
) -> list[Target]:
    """The detections with the best scores, as targets.

    Args:
        model: a detector.
        image: the image from :func:`prepare`.
        label: the index of a class, to take only its detections.
        top: the number of detections, or None for all.
        score_thr: the lowest score.

    Returns:
        At most `top` targets, in the order of their scores. The list is empty if nothing is detected.
    """
    with torch.no_grad():
        found = model.predict(image.inputs, [image.sample.clone()])[0].pred_instances
    found = found[found.scores >= score_thr]
    if label is not None:
        found = found[found.labels == label]
    found = found[found.scores.argsort(descending=True)][:top]
    return [Target(tuple(box), label) for box, label in zip(found.bboxes.tolist(), found.labels.tolist(), strict=True)]


class BoxScores(nn.Module):
    """A detector as a function of the image alone: the raw class scores of some boxes.

    Args:
        model: a detector with MMDetection's StandardRoIHead (Faster and Mask R-CNN) or an AnchorHead (SSD, RetinaNet,
            ...).
        image: the image from :func:`prepare`.
        targets: the boxes and their classes.

    Attributes:
        probabilities: (K,), the score of each target's candidate as the detector reports it, after softmax or sigmoid.
        overlaps: (K,), the IoU of each target with its candidate.

    Raises:
        UserError: for another kind of detector, or if it has no candidate at all.
    """

    def __init__(self, model: nn.Module, image: Prepared, targets: Sequence[Target]) -> None:
        super().__init__()
        self.model = model
        self.candidates = _candidates_of(model)
        self.labels = [target.label for target in targets]
        with torch.no_grad():
            boxes, probabilities = self.candidates.find(image)
            if not len(boxes):
                raise UserError('the detector proposes no box in this image: there is no score to explain')
            scale = boxes.new_tensor(image.sample.scale_factor).repeat(2)
            chosen, self.probabilities, self.overlaps = [], [], []
            for target in targets:
                of_class = probabilities[:, target.label]
                overlaps = bbox_overlaps(boxes.new_tensor([target.box]) * scale, _of_label(boxes, target.label))[0]
                # If no candidate has an IoU of 0.5, take the one with the greatest IoU.
                best = int((of_class * (overlaps >= 0.5) if overlaps.max() >= 0.5 else overlaps).argmax())
                chosen.append(best)
                self.probabilities.append(float(of_class[best]))
                self.overlaps.append(float(overlaps[best]))
        self.candidates.choose(chosen)

    def forward(self, inputs: Tensor) -> Tensor:
        """(1, 3, H, W) -> (1, K), the raw score of each target's class for its candidate."""
        scores = self.candidates.scores(inputs)
        return scores[torch.arange(len(self.labels)), self.labels][None]


def label_at(model: nn.Module, image: Prepared, box: tuple[float, float, float, float]) -> int:
    """The class that a detector finds in a box: that of the best score among candidates with an IoU of at least 0.5.

    Raises:
        UserError: if there is no such candidate.
    """
    with torch.no_grad():
        boxes, probabilities = _candidates_of(model).find(image)
        target = boxes.new_tensor([box]) * boxes.new_tensor(image.sample.scale_factor).repeat(2)
        classes = len(model.dataset_meta['classes'])
        best, best_label = 0.0, None
        for label in range(classes if len(boxes) else 0):
            near_by = bbox_overlaps(target, _of_label(boxes, label))[0] >= 0.5
            if near_by.any() and probabilities[near_by, label].max() > best:
                best, best_label = float(probabilities[near_by, label].max()), label
    if best_label is None:
        raise UserError(
            f'--box {" ".join(f"{v:g}" for v in box)}: no candidate of the detector overlaps it by half; '
            'name the class by --class'
        )
    return best_label


def cam_maps(scores: BoxScores, image: Prepared, layers: dict[str, nn.Module], method: str = 'gradcam') -> np.ndarray:
    """The map of each layer that shows from which parts of the image the sum of the scores comes.

    Args:
        scores: the targets' scores.
        image: the image from :func:`prepare`.
        layers: layers of the same detector, from :func:`find_layers`.
        method: one of METHODS.

    Returns:
        (len(layers), H, W) float32. Each map is scaled from its least and greatest values over the image to 0..1; one
        that is the same everywhere, as of another level than the box's, is 0. Its size is that of the resized image
        without padding.

    Raises:
        UserError: if a layer gives no feature map, several ones, one too large for the method, or one that the scores
            do not depend on, or if the library is not installed.
    """
    make = method_class(method)
    inputs = image.inputs.detach().clone().requires_grad_()
    top, left, bottom, right = place_of_image(image.sample)
    maps = []
    with _no_parameter_gradients(scores):
        _check_layers(scores, inputs, layers, method)
        for layer in layers.values():
            # The copy keeps the activation intact, because the next layer may work in place.
            cam = make(scores, [layer], reshape_transform=torch.clone)
            try:
                maps.append(_scaled(cam(inputs, targets=[torch.sum])[0, top:bottom, left:right]))
            finally:
                cam.activations_and_grads.release()
    return np.stack(maps)


def _scaled(cam: np.ndarray) -> np.ndarray:
    """From 0 to 1 over the image. The library scales over the padding, too."""
    least, greatest = cam.min(), cam.max()
    return (cam - least) / (greatest - least) if greatest > least else np.zeros_like(cam)


def method_class(name: str) -> type:
    """The library's class for one of METHODS.

    Raises:
        UserError: for another name, or if the library is not installed.
    """
    if name not in METHODS:
        raise UserError(f'--method {name} is unknown, choose from {list(METHODS)}{did_you_mean(name, METHODS)}')
    if importlib.util.find_spec('pytorch_grad_cam') is None:
        raise UserError(
            "Grad-CAM needs the package grad-cam, which is not installed here (pip install 'cbam-mmdet[explain]')"
        )
    import pytorch_grad_cam

    return getattr(pytorch_grad_cam, METHODS[name])


def find_layers(model: nn.Module, names: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """Layers of a detector by their dotted names. Without names, the last block of each stage of its backbone.

    Of a timm network, whose stages have no names in common, it is the module whose output each returned map is.

    Raises:
        UserError: for an unknown name, with similar ones, or for a backbone whose stages are not known.
    """
    modules = dict(model.named_modules())
    for name in names or ():
        if name not in modules or not name:
            hint = did_you_mean(name, filter(None, modules))
            raise UserError(f'--layers {name}: this {type(model).__name__} has no such layer{hint}')
    if names:
        return {name: modules[name] for name in names}
    backbone = model.backbone
    if timm := _timm_stages(backbone):
        return {name: modules[name] for name in timm}
    patterns = [pattern for pattern in usual_place(backbone) if pattern != OUTPUTS]
    last: dict[str, str] = {}
    for name in names_of(backbone):
        if any(matches(pattern, name) for pattern in patterns):
            parts = name.split('.')
            # For STAGE.BLOCK.norm it is the block, whose output is the sum. Otherwise it is the place itself.
            stage = parts[0] if len(parts) > 2 else name
            last[stage] = '.'.join(parts[:2]) if len(parts) == 3 else name
    if not last:
        raise UserError(f'the stages of a {type(backbone).__name__} are not known: name layers by --layers')
    return {f'backbone.{name}': modules[f'backbone.{name}'] for name in last.values()}


def _timm_stages(backbone: nn.Module) -> list[str]:
    """Empty for another backbone, and for a network whose place of CBAM is not known: its maps may be (N, H, W, C)."""
    network: Any = getattr(backbone, 'timm_model', None)
    info = getattr(network, 'feature_info', None)
    if info is None or getattr(network, 'output_fmt', 'NCHW') != 'NCHW' or not usual_place(backbone):
        return []
    if isinstance(info, list):
        maps = [info[i]['module'] for i in backbone.out_indices]
    else:  # mmpretrain's TIMMBackbone, whose network knows which maps it returns, and may name its children otherwise
        children = dict(network.named_children())
        maps = [name.replace('.', '_') if name.replace('.', '_') in children else name for name in info.module_name()]
    names = [f'timm_model.{name}' for name in maps]
    return [f'backbone.{name}' for name in names] if {*names} <= {*names_of(backbone)} else []


class _Proposals:
    """The candidates of a two-stage detector: its proposals, with a box for each class."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def find(self, image: Prepared) -> tuple[Tensor, Tensor]:
        """Boxes (M, C, 4), or (M, 1, 4) for all classes, in the network's pixels, and probabilities (M, C + 1)."""
        head = self.model.roi_head
        features = self.model.extract_feat(image.inputs)
        proposals = self.model.rpn_head.predict(features, [image.sample], rescale=False)
        self.rois = bbox2roi([found.bboxes for found in proposals])
        if not len(self.rois):
            return self.rois.new_empty(0, 1, 4), self.rois.new_empty(0, 1)
        found = head._bbox_forward(features, self.rois)
        bbox_head = head.bbox_head
        deltas = found['bbox_pred'].view(len(self.rois), -1, bbox_head.bbox_coder.encode_size)
        rois = self.rois[:, None, 1:].expand(-1, deltas.shape[1], -1)
        boxes = bbox_head.bbox_coder.decode(
            rois.reshape(-1, 4), deltas.flatten(0, 1), max_shape=image.sample.img_shape[:2]
        )
        scores = found['cls_score']
        custom = bbox_head.loss_cls.get_activation if bbox_head.custom_cls_channels else None
        return boxes.view(len(rois), -1, 4), custom(scores) if custom else scores.softmax(-1)

    def choose(self, chosen: list[int]) -> None:
        self.rois = self.rois[chosen]

    def scores(self, inputs: Tensor) -> Tensor:
        """(1, 3, H, W) -> (K, C + 1), the raw scores of the chosen candidates."""
        return self.model.roi_head._bbox_forward(self.model.extract_feat(inputs), self.rois)['cls_score']


class _Anchors:
    """The candidates of a dense detector: its anchors of all levels, with one box for all classes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def find(self, image: Prepared) -> tuple[Tensor, Tensor]:
        """Boxes (M, 1, 4) in the network's pixels, and probabilities (M, C), or (M, C + 1) with a background class."""
        head = self.model.bbox_head
        scores, deltas = head(self.model.extract_feat(image.inputs))
        sizes = [level.shape[-2:] for level in scores]
        anchors = torch.cat(head.prior_generator.grid_priors(sizes, scores[0].dtype, scores[0].device))
        boxes = head.bbox_coder.decode(anchors, self._flat(deltas, 4), max_shape=image.sample.img_shape[:2])
        scores = self._flat(scores, head.cls_out_channels)
        return boxes[:, None], scores.sigmoid() if head.use_sigmoid_cls else scores.softmax(-1)

    def choose(self, chosen: list[int]) -> None:
        self.chosen = chosen

    def scores(self, inputs: Tensor) -> Tensor:
        """(1, 3, H, W) -> (K, C) or (K, C + 1), the raw scores of the chosen candidates."""
        head = self.model.bbox_head
        return self._flat(head(self.model.extract_feat(inputs))[0], head.cls_out_channels)[self.chosen]

    @staticmethod
    def _flat(levels: Sequence[Tensor], channels: int) -> Tensor:
        return torch.cat([level[0].permute(1, 2, 0).reshape(-1, channels) for level in levels])


def require_explainable(model: nn.Module) -> None:
    """Check that a detector is of a kind whose candidates are known.

    Raises:
        UserError: if it is not.
    """
    _candidates_of(model)


def _candidates_of(model: nn.Module) -> _Proposals | _Anchors:
    if type(getattr(model, 'roi_head', None)) is StandardRoIHead and getattr(model, 'rpn_head', None) is not None:
        return _Proposals(model)
    head = getattr(model, 'bbox_head', None)
    # Those with a third output (ATSS and its kin) multiply the class score with it. Others code their boxes otherwise.
    plain = isinstance(getattr(head, 'bbox_coder', None), DeltaXYWHBBoxCoder) and not hasattr(head, 'loss_centerness')
    if isinstance(head, AnchorHead) and plain:
        return _Anchors(model)
    kind = type(getattr(model, 'roi_head', None) or head).__name__
    raise UserError(
        'Grad-CAM supports Faster R-CNN, Mask R-CNN, and detectors with anchors such as SSD and RetinaNet, not '
        f'{type(model).__name__} with a {kind}'
    )


def _of_label(boxes: Tensor, label: int) -> Tensor:
    return boxes[:, label if boxes.shape[1] > 1 else 0]


@contextlib.contextmanager
def _no_parameter_gradients(model: nn.Module) -> Iterator[None]:
    """Disable the gradients of parameters inside this context, to save time and memory."""
    training = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in training:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in training:
            parameter.requires_grad_(True)


def _check_layers(scores: BoxScores, inputs: Tensor, layers: dict[str, nn.Module], method: str) -> None:
    calls: dict[str, list] = {name: [] for name in layers}
    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            hook = layer.register_forward_hook(lambda _, __, output, name=name: calls[name].append(output))
            stack.callback(hook.remove)
        score = scores(inputs).sum()
    for name, outputs in calls.items():
        if len(outputs) > 1:
            raise UserError(
                f'--layers {name}: it runs {len(outputs)} times for an image, as all levels share it; Grad-CAM needs a '
                'layer that gives one feature map'
            )
        if name.startswith('roi_head.'):
            raise UserError(
                f'--layers {name}: its maps are of regions, not of the image; take a layer that comes before'
            )
        output = outputs[0] if outputs else None
        if not isinstance(output, Tensor) or output.dim() != 4 or len(output) != 1:
            shape = (
                'is not run'
                if output is None
                else f'gives {tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__}'
            )
            raise UserError(f'--layers {name}: {shape}; Grad-CAM needs a layer that gives one feature map (1, C, H, W)')
        if method.startswith('eigen') and output[0, 0].numel() > EIGEN_POSITIONS:
            size = ' x '.join(map(str, output.shape[2:]))
            raise UserError(
                f'--method {method}: the map of {name}, {size}, is too large to be decomposed; name later layers by '
                '--layers, or take another method'
            )
        # The layer comes after the choice of the candidates, or belongs to a level that the box does not use.
        if (
            not output.requires_grad
            or torch.autograd.grad(score, output, retain_graph=True, allow_unused=True)[0] is None
        ):
            raise UserError(f'--layers {name}: the score of this box does not depend on it; take one that comes before')
