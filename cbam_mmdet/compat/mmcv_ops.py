"""mmcv's compiled operators, served by torchvision and plain torch where ``mmcv._ext`` cannot be imported.

A plain ``pip install`` of mmcv brings no compiled operators, and those of an mmcv built for another torch do not load:
either way ``import mmcv.ops``, and with it nearly all of MMDetection, fails on ``mmcv._ext``. torchvision's wheels hold
most of what a detector needs, built for CPU and CUDA. :func:`install_ops` puts a module in place of the missing
``mmcv._ext`` whose functions keep the calling conventions of mmcv's C++ (``mmcv/ops/csrc/pytorch/pybind.cpp``):
parameter names and order, results written into tensors that the caller allocated, gradients added where mmcv adds them.
A compiled ``mmcv._ext`` that loads is never touched.

Served: NMS, soft-NMS, NMS matching, RoIAlign (average), RoIPool, sigmoid and softmax focal loss, deformable convolution
v1 and v2, multi-scale deformable attention (by the PyTorch form that mmcv itself has). Any other operator raises when
it is called, not when ``mmcv.ops`` is imported; :func:`unserved_layers` finds a model's layers that would call one.

Where the served operators differ from mmcv's own, on purpose:

- 16-bit floats are computed in float32, which is also what torchvision does under autocast: in 16 bits the kernels
  would round the sampling coordinates, too. mmcv's suppressions take float32 only, these take any float.
- NMS and NMS matching take boxes of equal score in their order; mmcv's sort leaves that open.
- The focal losses work on the CPU, too; the sigmoid one stays exact for large logits, where mmcv's float32 kernel
  rounds the probability to 1 and then takes the logarithm of FLT_MIN. Background (the label ``num_classes``) has class
  weight 1, and loss 0 in the softmax form, where mmcv reads beyond the end of its tensors.
- RoIPool works on the CPU, too, and a RoI without area gets no gradient, where mmcv sends it to the first pixel.
- Under ``torch.use_deterministic_algorithms`` (MMEngine's ``randomness=dict(deterministic=True)``) the gradients of
  RoIAlign and RoIPool are deterministic, and those of deformable convolution raise torch's error on CUDA, where mmcv
  continues with sums in random order.
"""

import ctypes
import functools
import importlib
import importlib.abc
import importlib.util
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cbam_mmdet.compat.patches import PERMANENT, patch, replaced
from cbam_mmdet.errors import OperatorError

__all__ = ['OPERATORS', 'install_ops', 'unserved_layers']

EXTENSION = 'mmcv._ext'

#: The served operators by name.
OPERATORS: dict[str, Callable] = {}


def install_ops() -> bool:
    """Make ``mmcv.ops`` importable: put the served operators in place of ``mmcv._ext`` if that cannot be imported.

    May be called any number of times, also after ``import mmcv.ops`` has failed. An ``mmcv._ext`` that is installed but
    broken (built for another torch, say) is replaced with a warning that says its error.

    To ``importlib.util.find_spec``, ``pkgutil.find_loader`` and so to MMEngine's ``mmcv_full_available`` the served
    module looks like an installed one, since ``from mmcv.ops import ...`` works.

    Returns:
        bool: True if the operators of this module serve, False if mmcv's compiled ones do.

    Raises:
        ImportError: If mmcv itself cannot be imported.
    """
    importlib.import_module('mmcv')
    try:
        module = importlib.import_module(EXTENSION)
    except Exception as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == EXTENSION
        if not absent:
            warnings.warn(
                f'{EXTENSION} is installed but cannot be imported ({type(error).__name__}: {error}); '
                f'{__name__} serves its operators instead.',
                stacklevel=2,
            )
        PERMANENT.enter_context(served_operators())
        return True
    return getattr(getattr(module, '__spec__', None), 'origin', None) == __name__


@patch("sys.modules['mmcv._ext']", 'mmcv._ext')
def served_operators() -> Iterator[None]:
    """Let ``import mmcv._ext`` find the operators of this module."""
    mmcv = importlib.import_module('mmcv')
    module = importlib.util.module_from_spec(ModuleSpec(EXTENSION, _Loader(), origin=__name__))
    module.__spec__.loader.exec_module(module)
    modules, name = sys.modules, EXTENSION  # when Python ends, globals may be gone before this generator is
    before = modules.get(name)
    modules[name] = module
    try:
        with replaced(mmcv, _ext=module):
            yield
    finally:
        modules.pop(name, None)  # at the end of Python there may be none any more
        if before is not None:
            modules[name] = before


class _Loader(importlib.abc.Loader):
    """Fills the module; being in its ``__spec__`` it also lets ``pkgutil.find_loader`` find something."""

    def exec_module(self, module) -> None:
        vars(module).update(
            OPERATORS,
            __getattr__=_unserved,
            __doc__=__doc__,
            get_compiler_version=get_compiler_version,
            get_compiling_cuda_version=get_compiling_cuda_version,
        )


def get_compiler_version() -> str:
    """What MMEngine's and MMDetection's environment reports show as 'MMCV Compiler'."""
    return f'not compiled, served by {__name__}'


def get_compiling_cuda_version() -> str:
    """What the reports show as 'MMCV CUDA Compiler': the words of an mmcv compiled without CUDA."""
    return 'not available'


def _unserved(name: str) -> Callable:
    """The served module's ``__getattr__``: mmcv asks for all its operators at import, so complain only when called."""
    if name.startswith('_'):
        raise AttributeError(f'module {EXTENSION!r} has no attribute {name!r}')

    def operator(*args, **kwargs):
        raise OperatorError(
            f'The mmcv operator {name!r} needs a compiled mmcv, and this installation has none that fits '
            f'torch {torch.__version__}. Without compiling, cbam_mmdet serves only {", ".join(OPERATORS)}. '
            'Install an mmcv compiled for this very torch: a prebuilt wheel, if there is one '
            '(`pip install -U openmim && mim install mmcv`), or your own build (needs a C++ compiler '
            'and, for CUDA, nvcc; takes a while): `MMCV_WITH_OPS=1 pip install --force-reinstall --no-cache-dir '
            '--no-deps --no-build-isolation --no-binary :all: onedl-mmcv` (or mmcv).'
        )

    operator.__name__ = operator.__qualname__ = name
    return operator


# mmcv calls these in old versions of torch alone: since 1.5 torch.cummax takes their place.
SIDES, WAYS = ('bottom', 'left', 'right', 'top'), ('forward', 'backward')
REPLACED_BY_TORCH = {f'{side}_pool_{way}' for side in SIDES for way in WAYS}


def unserved_layers(model: nn.Module) -> dict[str, list[str]]:
    """The layers of a model that would call an operator which is not served: name -> operators, none twice.

    Empty where mmcv's compiled operators serve.
    """
    if getattr(sys.modules.get(EXTENSION), '__getattr__', None) is not _unserved:
        return {}
    lacking = {}
    for name, layer in model.named_modules():
        module = type(layer).__module__
        if module.startswith('mmcv.ops.'):
            called = re.findall(r'\bext_module\.(\w+)', inspect.getsource(sys.modules[module]))
            if unserved := sorted({*called} - {*OPERATORS} - REPLACED_BY_TORCH):
                lacking[name] = unserved
    return lacking


def _operator(function: Callable) -> Callable:
    """Serve ``function`` under its name, out of sight of autograd and autocast, as a compiled operator is."""

    @functools.wraps(function)
    def operator(*args, **kwargs):
        device = next(filter(torch.is_tensor, (*args, *kwargs.values()))).device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return function(*args, **kwargs)

    OPERATORS[function.__name__] = operator
    return operator


def _widen(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the type to compute in: float64 if any of them is, else float32."""
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return [tensor.to(dtype) for tensor in tensors]


@functools.cache
def _torchvision():
    """torchvision's operators, imported at the first call: where the compiled mmcv works, none is ever needed."""
    importlib.import_module('torchvision')
    return torch.ops.torchvision


@_operator
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Greedy non-maximum suppression.

    Args:
        boxes (Tensor): Boxes (x1, y1, x2, y2), shape (N, 4).
        scores (Tensor): Shape (N,).
        iou_threshold (float): A box goes if its IoU with a better one is greater than this.
        offset (int): 0, or 1 where a box's width is x2 - x1 + 1.

    Returns:
        Tensor: int64 indices of the kept boxes by descending score, shape (K,); equal scores stay in order.
    """
    boxes, scores = _widen(boxes, scores)
    if offset:
        boxes = torch.cat((boxes[:, :2], boxes[:, 2:] + offset), dim=1)
    if boxes.dtype == torch.float32:
        # torchvision compares in double: a float32 IoU of 0.6 is greater than the double 0.6, and mmcv keeps that box.
        iou_threshold = ctypes.c_float(iou_threshold).value
    return _torchvision().nms(boxes, scores, iou_threshold)


@_operator
def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS (Bodla et al., ICCV 2017): lower the scores of overlapping boxes instead of dropping them.

    Args:
        boxes (Tensor): Boxes (x1, y1, x2, y2), shape (N, 4).
        scores (Tensor): Shape (N,).
        dets (Tensor): Shape (N, 5). Written: the K kept boxes with their new scores in its first K rows.
        iou_threshold (float): 'naive' and 'linear' act on boxes of at least this IoU.
        sigma (float): Width of 'gaussian'.
        min_score (float): A box whose score falls below this is dropped.
        method (int): 0 'naive', 1 'linear', 2 'gaussian'.
        offset (int): 0, or 1 where a box's width is x2 - x1 + 1.

    Returns:
        Tensor: int64 indices of the kept boxes by descending new score, shape (K,).

    Raises:
        ValueError: If ``method`` is none of these.
    """
    if method not in (0, 1, 2):
        raise ValueError(f"soft-NMS's method must be 0 (naive), 1 (linear) or 2 (gaussian), but got {method!r}")
    wide_boxes, wide_scores = _widen(boxes.cpu(), scores.cpu())
    table = np.vstack((wide_boxes.numpy().T, wide_scores.numpy()))  # rows x1, y1, x2, y2, score
    index = np.arange(len(wide_boxes))
    iou_threshold, sigma, min_score = map(table.dtype.type, (iou_threshold, sigma, min_score))

    # Equal scores are picked in the order that the C++ leaves them in: it swaps the picked box to the front, and fills
    # the place of a dropped box with the last one.
    picked, count = 0, len(index)
    while picked < count:
        best = picked + _first_highest(table[4, picked:count])
        table[:, [picked, best]] = table[:, [best, picked]]
        index[[picked, best]] = index[[best, picked]]
        box, rest = table[:4, picked : picked + 1], table[:, picked + 1 : count]
        iou = _iou(box, rest[:4], offset)
        if method == 0:
            rest[4, iou >= iou_threshold] = 0
        elif method == 1:
            rest[4] *= np.where(iou >= iou_threshold, 1 - iou, 1)
        else:
            rest[4] *= np.exp(-(iou * iou) / sigma)

        kept = ~(rest[4] < min_score)
        survivors = np.count_nonzero(kept)
        gaps = np.flatnonzero(~kept[:survivors])
        fillers = survivors + np.flatnonzero(kept[survivors:])[::-1]
        rest[:, gaps] = rest[:, fillers]
        index[picked + 1 + gaps] = index[picked + 1 + fillers]
        picked += 1
        count = picked + survivors

    dets[:count] = torch.from_numpy(table[:, :count].T).to(dets)
    return torch.from_numpy(index[:count]).to(boxes.device)


@_operator
def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Greedy NMS that tells which boxes each kept box has suppressed.

    Args:
        dets (Tensor): Boxes with scores (x1, y1, x2, y2, score), shape (N, 5).
        iou_threshold (float): A box goes if its IoU with a better one is at least this.

    Returns:
        list[list[int]]: For each kept box its index and then those it suppressed, all by descending score.
    """
    (dets,) = _widen(dets.cpu())
    boxes = dets[:, :4].T.numpy()
    iou_threshold = boxes.dtype.type(iou_threshold)
    order = dets[:, 4].sort(descending=True, stable=True).indices.numpy()
    groups = []
    while order.size:
        best, order = order[:1], order[1:]
        matched = _iou(boxes[:, best], boxes[:, order], offset=0) >= iou_threshold
        groups.append([*best.tolist(), *order[matched].tolist()])
        order = order[~matched]
    return groups


def _iou(box: np.ndarray, others: np.ndarray, offset: int) -> np.ndarray:
    """IoU, shape (N,), of one box, shape (4, 1), with N others, shape (4, N); NaN for two boxes without area."""
    width, height = (np.minimum(box[2:], others[2:]) - np.maximum(box[:2], others[:2]) + offset).clip(min=0)
    (area,) = np.prod(box[2:] - box[:2] + offset, axis=0)
    areas = np.prod(others[2:] - others[:2] + offset, axis=0)
    overlap = width * height
    with np.errstate(divide='ignore', invalid='ignore'):
        return overlap / (area + areas - overlap)


def _first_highest(scores: np.ndarray) -> int:
    """Index of the first highest score, as a loop with ``<`` finds it: no score is greater than a NaN or less."""
    return 0 if np.isnan(scores[0]) else int(np.where(np.isnan(scores), -np.inf, scores).argmax())


@_operator
def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign (He et al., ICCV 2017), averaging.

    Args:
        input (Tensor): Features, shape (B, C, H, W).
        rois (Tensor): RoIs (image index, x1, y1, x2, y2), shape (K, 5).
        output (Tensor): Shape (K, C, aligned_height, aligned_width). Overwritten.
        argmax_y (Tensor): Not used (max pooling).
        argmax_x (Tensor): Not used (max pooling).
        aligned_height (int): Bins along y.
        aligned_width (int): Bins along x.
        spatial_scale (float): From the RoIs' coordinates to the features'.
        sampling_ratio (int): Samples along each side of a bin; 0: one per pixel, rounded up.
        pool_mode (int): 1, averaging.
        aligned (bool): Whether pixel centres lie at half coordinates.

    Raises:
        OperatorError: If ``pool_mode`` is 0, max pooling.
    """
    _check_averaging(pool_mode)
    features, boxes = _widen(input, rois)
    bins = aligned_height, aligned_width
    output.copy_(_torchvision().roi_align(features, boxes, spatial_scale, *bins, sampling_ratio, bool(aligned)))


@_operator
def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Add RoIAlign's gradient to ``grad_input``, shape (B, C, H, W); the rest as in :func:`roi_align_forward`."""
    _check_averaging(pool_mode)
    grad, boxes = _widen(grad_output, rois)
    if grad.is_cuda and torch.are_deterministic_algorithms_enabled():
        # torchvision's kernel, which adds up atomically, refuses to run.
        grad = roi_align_backward_by_products(grad, boxes, grad_input.shape, spatial_scale, sampling_ratio, aligned)
    else:
        grad = _torchvision()._roi_align_backward(
            grad, boxes, spatial_scale, aligned_height, aligned_width, *grad_input.shape, sampling_ratio, bool(aligned)
        )
    grad_input.add_(grad)


def _check_averaging(pool_mode: int) -> None:
    if pool_mode != 1:
        raise OperatorError(
            "RoIAlign with pool_mode='max' needs a compiled mmcv: torchvision, whose operators serve here, only "
            "averages. Set pool_mode='avg', or install an mmcv compiled for this torch."
        )


def roi_align_backward_by_products(
    grad: Tensor, rois: Tensor, shape: torch.Size, spatial_scale: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    """RoIAlign's gradient by matrix products, which unlike atomic sums give the same result every time.

    The average of bilinear samples on a grid is separable: ``output = rows @ input @ columns.T`` for each RoI, with one
    matrix of weights for each axis. So ``grad_input`` is the sum over the image's RoIs of ``rows.T @ grad @ columns``.
    """
    _, _, height, width = shape
    bins_y, bins_x = grad.shape[2:]
    corners = rois[:, 1:] * spatial_scale - (0.5 if aligned else 0)
    start, size = corners[:, :2], corners[:, 2:] - corners[:, :2]
    if not aligned:
        size = size.clamp(min=1)
    grad_input = grad.new_zeros(shape)
    for image in rois[:, 0].unique():
        # By parts, as the intermediate result takes (RoIs, bins_y, C, width).
        for part in (rois[:, 0] == image).nonzero()[:, 0].split(64):
            rows = _average_weights(start[part, 1], size[part, 1], bins_y, sampling_ratio, height)
            columns = _average_weights(start[part, 0], size[part, 0], bins_x, sampling_ratio, width)
            spread = torch.einsum('kcyx,kxw->kycw', grad[part], columns)
            grad_input[int(image)] += torch.einsum('kyh,kycw->chw', rows, spread)
    return grad_input


def _average_weights(start: Tensor, size: Tensor, bins: int, sampling_ratio: int, pixels: int) -> Tensor:
    """Weights, shape (K, bins, pixels), of the pixels of one axis in RoIAlign's bins; start and size: shape (K,)."""
    bin_size = size / bins
    samples = torch.full_like(size, sampling_ratio) if sampling_ratio > 0 else bin_size.ceil()
    divisor = samples.clamp(min=1)[:, None, None]
    step = torch.arange(int(samples.max()), device=size.device)
    in_bins = torch.arange(bins, device=size.device)[:, None] + (step + 0.5) / divisor  # (K, bins, samples)
    position = start[:, None, None] + in_bins * bin_size[:, None, None]
    inside = (step < samples[:, None, None]) & (position >= -1) & (position <= pixels)
    distance = position.clamp(0, pixels - 1)[..., None] - torch.arange(pixels, device=size.device)
    weights = (1 - distance.abs()).clamp(min=0) * inside[..., None]
    return weights.sum(dim=2) / divisor


@_operator
def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """RoIPool (Girshick, ICCV 2015), with mmcv's bins: RoIs are not rounded, their bins are, outwards.

    Args:
        input (Tensor): Features, shape (B, C, H, W).
        rois (Tensor): RoIs (image index, x1, y1, x2, y2), x2 and y2 inclusive, shape (K, 5).
        output (Tensor): Maxima, shape (K, C, pooled_height, pooled_width); 0 for an empty bin. Overwritten.
        argmax (Tensor): int32, shape as ``output``: y * W + x of each maximum, -1 for none. Overwritten.
        pooled_height (int): Bins along y.
        pooled_width (int): Bins along x.
        spatial_scale (float): From the RoIs' coordinates to the features'.
    """
    features, boxes = _widen(input, rois)
    count, channels, height, width = len(rois), *features.shape[1:]
    start = boxes[:, 1:3] * spatial_scale
    size = (boxes[:, 3:5] + 1) * spatial_scale - start
    left, right = _bin_edges(start[:, 0], size[:, 0], pooled_width, width)
    top, bottom = _bin_edges(start[:, 1], size[:, 1], pooled_height, height)

    # torchvision rounds RoIs to pixels before it divides them, so each bin goes to it as a RoI with a single bin.
    bins = torch.stack(
        torch.broadcast_tensors(
            boxes[:, None, None, 0], left[:, None], top[:, :, None], right[:, None] - 1, bottom[:, :, None] - 1
        ),
        dim=-1,
    )
    maxima, places = (
        tensor.view(count, pooled_height, pooled_width, channels).permute(0, 3, 1, 2)
        for tensor in _torchvision().roi_pool(features, bins.flatten(0, 2), 1.0, 1, 1)
    )
    filled = (right > left)[:, None] & (bottom > top)[:, :, None] & (size > 0).all(dim=1)[:, None, None]
    output.copy_(maxima.where(filled[:, None], maxima.new_zeros(())))
    argmax.copy_(places.where(filled[:, None], places.new_full((), -1)))


def _bin_edges(start: Tensor, size: Tensor, bins: int, pixels: int) -> tuple[Tensor, Tensor]:
    """First pixels and ends of RoIPool's bins along one axis, shape (K, bins); start and size: shape (K,)."""
    edges = torch.arange(bins + 1, device=start.device) * (size / bins)[:, None] + start[:, None]
    return edges[:, :-1].floor().clamp(0, pixels), edges[:, 1:].ceil().clamp(0, pixels)


@_operator
def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Add RoIPool's gradient to ``grad_input``, shape (B, C, H, W); the rest as in :func:`roi_pool_forward`."""
    (grad,) = _widen(grad_output)
    channels, height, width = grad_input.shape[1:]
    plane = rois[:, :1].long() * channels + torch.arange(channels, device=rois.device)
    place = plane[:, :, None, None] * (height * width) + argmax.clamp(min=0)
    # In one dimension, scatter_add_ has a deterministic form on CUDA.
    total = grad.new_zeros(grad_input.numel()).scatter_add_(0, place.flatten(), (grad * (argmax >= 0)).flatten())
    grad_input.add_(total.view(grad_input.shape))


@_operator
def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Focal loss (Lin et al., ICCV 2017, equation 5) of independent classes.

    Args:
        input (Tensor): Logits, shape (N, C).
        target (Tensor): int64 labels, shape (N,); C, or a negative one, is background.
        weight (Tensor): Weight of each class, shape (C,), or empty. A whole row takes the weight of its label.
        output (Tensor): Losses, shape (N, C). Overwritten.
        gamma (float): How much less well classified examples count.
        alpha (float): Weight of the labelled class; 1 - alpha is that of the others.

    Raises:
        ValueError: If a label is greater than C.
    """
    _check_labels(target, num_classes=input.size(1))
    _, z, alpha_t = _signed_logits(input, target, alpha)
    loss = -alpha_t * torch.sigmoid(-z) ** gamma * F.logsigmoid(z)
    output.copy_(loss * _row_weight(weight, target)[:, None])


@_operator
def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the losses' derivatives into ``grad_input``, shape (N, C); see :func:`sigmoid_focal_loss_forward`."""
    sign, z, alpha_t = _signed_logits(input, target, alpha)
    p_t, miss = torch.sigmoid(z), torch.sigmoid(-z)
    grad = -sign * alpha_t * miss**gamma * (miss - gamma * p_t * F.logsigmoid(z))
    grad_input.copy_(grad * _row_weight(weight, target)[:, None])


def _signed_logits(input: Tensor, target: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """The sign s = 1 for the labelled class, else -1; z = s * logit, so p_t = sigmoid(z); and alpha_t: all (N, C)."""
    (logits,) = _widen(input)
    labelled = target[:, None] == torch.arange(input.size(1), device=input.device)
    sign = labelled.to(logits.dtype) * 2 - 1
    return sign, sign * logits, 0.5 + sign * (alpha - 0.5)


@_operator
def softmax_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Focal loss of exclusive classes.

    Args:
        input (Tensor): Probabilities, that is after softmax, shape (N, C).
        target (Tensor): int64 labels, shape (N,). C, or a negative one, is background, whose loss is 0.
        weight (Tensor): Weight of each class, shape (C,), or empty.
        output (Tensor): Losses, shape (N,). Overwritten.
        gamma (float): How much less well classified examples count.
        alpha (float): Factor of all losses.

    Raises:
        ValueError: If a label is greater than C.
    """
    _check_labels(target, num_classes=input.size(1))
    p, log_p, factor = _labelled_probability(input, target, weight, alpha)
    output.copy_(-factor * (1 - p) ** gamma * log_p)


@_operator
def softmax_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the losses' derivatives by the logits into ``grad_input``, shape (N, C).

    ``buff``, shape (N,), gets p * dloss/dp, p being the labelled class's probability; the rest is as in
    :func:`softmax_focal_loss_forward`.
    """
    p, log_p, factor = _labelled_probability(input, target, weight, alpha)
    # At p = 1 the second term is 0, but its power is infinite if gamma < 1.
    steep = torch.where(p < 1, gamma * (1 - p) ** (gamma - 1) * p * log_p, torch.zeros_like(p))
    slope = factor * (steep - (1 - p) ** gamma)
    buff.copy_(slope)
    (probabilities,) = _widen(input)
    labelled = target[:, None] == torch.arange(input.size(1), device=input.device)
    grad_input.copy_(slope[:, None] * (labelled.to(slope.dtype) - probabilities))


def _labelled_probability(input: Tensor, target: Tensor, weight: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Probability p of each row's label, log(p), and the loss's factor, which is 0 for background: all (N,)."""
    num_classes = input.size(1)
    foreground = (target >= 0) & (target < num_classes)
    (probabilities,) = _widen(input)
    p = probabilities.gather(1, target.clamp(0, num_classes - 1)[:, None])[:, 0]
    log_p = p.clamp(min=torch.finfo(torch.float32).tiny).log()
    return p, log_p, alpha * foreground.to(p.dtype) * _row_weight(weight, target)


def _row_weight(weight: Tensor, target: Tensor) -> Tensor:
    """The class weight of each label, shape (N,): 1 for background, and for all if there are no weights."""
    (weight,) = _widen(weight)
    table = torch.cat((weight, weight.new_ones(1)))
    background = weight.numel()
    return table[target.clamp(max=background).where(target >= 0, target.new_tensor(background))]


def _check_labels(target: Tensor, num_classes: int) -> None:
    if target.numel() and target.max() > num_classes:
        raise ValueError(f'labels must be at most num_classes = {num_classes} (background), but got {target.max()}')


@_operator
def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Deformable convolution (Dai et al., ICCV 2017).

    Args:
        input (Tensor): Shape (N, C, H, W).
        weight (Tensor): Shape (O, C / group, kH, kW).
        offset (Tensor): Shape (N, 2 * deformable_group * kH * kW, H', W'), dy and dx by turns.
        output (Tensor): Shape (N, O, H', W'). Overwritten.
        columns (Tensor): Not used.
        ones (Tensor): Not used.
        kW, kH (int): Size of the kernel.
        dW, dH (int): Strides.
        padW, padH (int): Paddings.
        dilationW, dilationH (int): Dilations.
        group (int): Groups of the convolution.
        deformable_group (int): Groups of channels with offsets of their own.
        im2col_step (int): Not used: torchvision divides the batch by itself.
    """
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    output.copy_(_deform_conv(geometry, input, weight, offset))


@_operator
def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradInput: Tensor,
    gradOffset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Add to ``gradInput`` and overwrite ``gradOffset``; the arguments are those of :func:`deform_conv_forward`."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    grad_input, _, grad_offset, _, _ = _deform_conv_backward(gradOutput, geometry, input, weight, offset)
    gradInput.add_(grad_input)
    gradOffset.copy_(grad_offset)


@_operator
def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradWeight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """Add ``scale`` times the weight's gradient to ``gradWeight``; otherwise as :func:`deform_conv_backward_input`."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    # The weight's gradient does not depend on the weight, which mmcv does not pass: anything of its shape will do.
    _, grad_weight, _, _, _ = _deform_conv_backward(gradOutput, geometry, input, gradWeight, offset)
    gradWeight.add_(grad_weight, alpha=scale)


@_operator
def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Modulated deformable convolution (Zhu et al., CVPR 2019): :func:`deform_conv_forward` with a mask and a bias.

    ``mask``, shape (N, deformable_group * kernel_h * kernel_w, H', W'), scales what each place of the kernel sees;
    ``bias``, shape (O,), counts only ``with_bias``.
    """
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    output.copy_(_deform_conv(geometry, input, weight, offset, mask, bias if with_bias else None))


@_operator
def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Add to the gradients of input, weight and (``with_bias``) bias; overwrite those of offset and mask."""
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    gradients = _deform_conv_backward(grad_output, geometry, input, weight, offset, mask)
    by_input, by_weight, by_offset, by_mask, by_bias = gradients
    grad_input.add_(by_input)
    grad_weight.add_(by_weight)
    grad_offset.copy_(by_offset)
    grad_mask.copy_(by_mask)
    if with_bias:
        grad_bias.add_(by_bias)


@_operator
def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Multi-scale deformable attention (Zhu et al., ICLR 2021, equation 3).

    Args:
        value (Tensor): Shape (N, S, M, D): S pixels of all levels together, M heads.
        value_spatial_shapes (Tensor): int64 height and width of each level, shape (L, 2).
        value_level_start_index (Tensor): Not used: the shapes say it.
        sampling_locations (Tensor): x and y from 0 to 1, shape (N, Q, M, L, K, 2).
        attention_weights (Tensor): Shape (N, Q, M, L, K).
        im2col_step (int): Not used.

    Returns:
        Tensor: Shape (N, Q, M * D), of value's dtype.
    """
    attention = importlib.import_module('mmcv.ops.multi_scale_deform_attn').multi_scale_deformable_attn_pytorch
    wide_value, *wide = _widen(value, sampling_locations, attention_weights)
    return attention(wide_value, value_spatial_shapes, *wide).to(value.dtype)


@_operator
def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Add to ``grad_value``, overwrite the other two; the rest as in :func:`ms_deform_attn_forward`."""
    inputs = [tensor.detach().requires_grad_() for tensor in _widen(value, sampling_locations, attention_weights)]
    attention = importlib.import_module('mmcv.ops.multi_scale_deform_attn').multi_scale_deformable_attn_pytorch
    with torch.enable_grad():
        output = attention(inputs[0], value_spatial_shapes, *inputs[1:])
    by_value, by_locations, by_weights = torch.autograd.grad(output, inputs, grad_output.to(output.dtype))
    grad_value.add_(by_value)
    grad_sampling_loc.copy_(by_locations)
    grad_attn_weight.copy_(by_weights)


OUTSIDE = -30000.0  # pixels; left of and above every image, and a number that fp16 has


def _deform_conv(
    geometry: tuple[int, ...],
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    tensors = _deform_conv_tensors(input, weight, offset, mask, bias)
    return _torchvision().deform_conv2d(*tensors, *geometry, mask is not None)


def _deform_conv_backward(
    grad_output: Tensor,
    geometry: tuple[int, ...],
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The gradients of input, weight, offset, mask and bias; the bias itself matters to none of them."""
    grad_output, *tensors = _widen(grad_output, *_deform_conv_tensors(input, weight, offset, mask, None))
    gradients = _torchvision()._deform_conv2d_backward(grad_output, *tensors, *geometry, mask is not None)
    _flatten_outer_edge(gradients[2], tensors[2], weight.shape[2:], geometry)
    return gradients


def _flatten_outer_edge(grad_offset: Tensor, offset: Tensor, kernel: torch.Size, geometry: tuple[int, ...]) -> None:
    """Set the gradient of dy to 0 where the kernel looks at exactly y = -1, and that of dx at x = -1, in place.

    There the padded image begins to rise. torchvision takes the slope on the inner side, mmcv that on the outer, 0. It
    matters: with offsets of 0, as the layers start, a padding of 1 puts whole borders there.
    """
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, _, groups = geometry
    (kernel_h, kernel_w), (height, width) = kernel, offset.shape[2:]
    arange = functools.partial(torch.arange, device=offset.device)
    rows = arange(height) * stride_h - pad_h + arange(kernel_h)[:, None] * dilation_h  # (kernel_h, height)
    columns = arange(width) * stride_w - pad_w + arange(kernel_w)[:, None] * dilation_w  # (kernel_w, width)
    shape = (len(offset), groups, kernel_h, kernel_w, 2, height, width)
    dy, dx = offset.reshape(shape).unbind(4)
    by_dy, by_dx = grad_offset.view(shape).unbind(4)
    by_dy.masked_fill_(dy + rows[:, None, :, None] == -1, 0)
    by_dx.masked_fill_(dx + columns[:, None] == -1, 0)


def _deform_conv_tensors(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, bias: Tensor | None
) -> list[Tensor]:
    """The tensors that torchvision's operators begin with; they want something in place of an absent mask and bias."""
    if mask is None:
        mask = input.new_zeros(len(input), 1)
    if bias is None:
        bias = input.new_zeros(len(weight))
    # As mmcv, a place that is not a number sees nothing; torchvision would read memory there that is not its own.
    offset = offset.nan_to_num(nan=OUTSIDE, posinf=OUTSIDE, neginf=OUTSIDE)
    return _widen(input, weight, offset, mask, bias)
