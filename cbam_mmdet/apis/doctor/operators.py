"""Self-tests of mmcv's operators, whoever serves them, against plain formulas and loops in float64 on the CPU.

Each is reached as a user reaches it, by mmcv.ops, in float32. Where it has a gradient, that of every floating-point
input is compared with the one that autograd derives from the formula.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cbam_mmdet.apis.doctor.case import Case, Skip
from cbam_mmdet.compat.mmcv_ops import install_ops

install_ops()  # once more, in case that `import cbam_mmdet` failed before it
from mmcv import ops  # noqa: E402

TOLERANCE = 1e-4  # of the greatest value of a result: float32, summed in any order
REMEDY = (
    'install a torchvision made for this torch, which serves these operators, or an mmcv compiled for it; if it stays '
    'wrong, please report it with this page'
)


def cases(devices: list[str]) -> Iterator[Case]:
    """A self-test for each operator and device."""
    for device in devices:
        for name, test in TESTS.items():
            yield Case(f'{name}, {device}', functools.partial(_served, test, device), REMEDY)


def _served(test: Callable[[str], str | None], device: str) -> str | None:
    try:
        return test(device)
    except RuntimeError as error:
        # A compiled mmcv has some operators for CUDA only, or was compiled without it.
        said = str(error).lower()
        if any(part in said for part in ('not implemented on', 'is not compiled with', 'implementation for device')):
            raise Skip(f'the compiled mmcv has none on {device}') from error
        raise


def spread(*shape: int, step: float, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Different float64 numbers between low and high that float32 holds as well, and that no random state gives."""
    count = math.prod(shape)
    part = (torch.arange(1, count + 1, dtype=torch.float64) * step) % 1
    return (low + (high - low) * part).float().double().view(shape)


def compare(actual: Callable[..., Tensor], formula: Callable[..., Tensor], device: str, *inputs: Tensor) -> str | None:
    """What differs between a function of mmcv and its formula: the result, or the gradient of an input."""
    there, here = ([t.detach().clone().to(*to).requires_grad_() for t in inputs]
                   for to in ((device, torch.float32), ('cpu', torch.float64)))  # fmt: skip
    y, y64 = actual(*there), formula(*here)
    grad = spread(*y64.shape, step=0.7548776662)
    y.backward(grad.to(y)), y64.backward(grad)
    pairs = {'the result': (y.detach(), y64.detach())}
    pairs |= {
        f'the gradient of input {i}': (t.grad, t64.grad) for i, (t, t64) in enumerate(zip(there, here, strict=True), 1)
    }
    for what, (value, exact) in pairs.items():
        if value is None or value.shape != exact.shape:
            return f'{what} has a wrong shape, or is not there'
        error = float((value.cpu().double() - exact).abs().max() / exact.abs().max())
        if not error <= TOLERANCE:  # nor is NaN
            return f'{what} differs by {error:.1e} of its greatest value'
    return None


def _boxes(count: int = 40) -> tuple[Tensor, Tensor]:
    """Boxes that overlap, and a different score for each."""
    corner, extent = (
        spread(count, 2, step=0.6180339887, low=0, high=40),
        spread(count, 2, step=0.4142135624, low=8, high=30),
    )
    scores = (spread(count, step=0.7320508076, low=0, high=1)).argsort().argsort() / (2 * count) + 0.4
    return torch.cat([corner, corner + extent], 1), scores.float().double()


def _iou(a: list[float], b: list[float], offset: int = 0) -> float:
    width, height = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i]) + offset) for i in (0, 1))
    area_a, area_b = ((box[2] - box[0] + offset) * (box[3] - box[1] + offset) for box in (a, b))
    return width * height / (area_a + area_b - width * height)


def _greedy(boxes: list[list[float]], scores: list[float], threshold: float, offset: int = 0) -> dict[int, list[int]]:
    """The kept boxes in the order of their scores, and those that each suppresses."""
    groups: dict[int, list[int]] = {}
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        suppressor = next((k for k in groups if _iou(boxes[k], boxes[i], offset) > threshold), None)
        if suppressor is None:
            groups[i] = []
        else:
            groups[suppressor].append(i)
    return groups


def _same_indices(actual: list, expected: list) -> str | None:
    return None if actual == expected else f'keeps {actual}, and not {expected}'


def nms(device: str) -> str | None:
    boxes, scores = _boxes()
    for offset in (0, 1):
        kept = ops.nms(boxes.to(device).float(), scores.to(device).float(), 0.31, offset)[1].tolist()
        wrong = _same_indices(kept, list(_greedy(boxes.tolist(), scores.tolist(), 0.31, offset)))
        if wrong:
            return wrong
    return None


def batched_nms(device: str) -> str | None:
    boxes, scores = _boxes()
    classes = torch.arange(len(boxes)) % 3
    expected = []
    for one in range(3):
        mine = (classes == one).nonzero()[:, 0]
        groups = _greedy(boxes[mine].tolist(), scores[mine].tolist(), 0.31)
        expected += [int(mine[i]) for i in groups]
    expected.sort(key=lambda i: -float(scores[i]))
    tensors = boxes.to(device).float(), scores.to(device).float(), classes.to(device)
    return _same_indices(ops.batched_nms(*tensors, dict(type='nms', iou_threshold=0.31))[1].tolist(), expected)


def soft_nms(device: str) -> str | None:
    boxes, scores = _boxes()
    for method in ('naive', 'linear', 'gaussian'):
        left, kept, new = dict(enumerate(scores.tolist())), [], []
        while left:
            best = max(left, key=lambda i: left[i])
            kept.append(best), new.append(left.pop(best))
            for i in list(left):
                iou = _iou(boxes[best].tolist(), boxes[i].tolist())
                if method == 'gaussian':
                    left[i] *= math.exp(-iou * iou / 0.5)
                elif iou >= 0.31:
                    left[i] *= 1 - iou if method == 'linear' else 0
                if left[i] < 0.05:
                    del left[i]
        tensors = boxes.to(device).float(), scores.to(device).float()
        dets, indices = ops.soft_nms(*tensors, 0.31, sigma=0.5, min_score=0.05, method=method)
        wrong = _same_indices(indices.tolist(), kept)
        if wrong or not torch.allclose(dets[:, 4].cpu().double(), torch.tensor(new).double(), atol=TOLERANCE):
            return f'{method}: {wrong or "the new scores differ"}'
    return None


def nms_match(device: str) -> str | None:
    boxes, scores = _boxes()
    dets = torch.cat([boxes, scores[:, None]], 1).to(device).float()
    groups = _greedy(boxes.tolist(), scores.tolist(), 0.31)
    expected = [[kept, *suppressed] for kept, suppressed in groups.items()]
    return _same_indices([group.tolist() for group in ops.nms_match(dets, 0.31)], expected)


ROIS = torch.tensor([[0, 1.3, 0.7, 14.2, 15.1], [1, 3.5, 2.1, 12.4, 7.3], [1, -4.2, 5.1, 30.3, 9.4]]).double()


def roi_align(device: str) -> str | None:
    features = spread(2, 3, 8, 9, step=0.6180339887)
    for samples, aligned in ((2, True), (0, False)):
        wrong = compare(
            lambda x: ops.roi_align(x, ROIS.to(x), (3, 2), 0.5, samples, 'avg', aligned),  # noqa: B023
            lambda x: _roi_align(x, samples, aligned),  # noqa: B023
            device,
            features,
        )
        if wrong:
            return f'sampling_ratio={samples}, aligned={aligned}: {wrong}'
    return None


def _roi_align(x: Tensor, samples: int, aligned: bool) -> Tensor:
    """Means of bilinear samples on a grid in each bin: along y and along x, a matrix of weights each."""
    outputs = []
    for image, *corners in ROIS.tolist():
        x1, y1, x2, y2 = (corner * 0.5 - (0.5 if aligned else 0) for corner in corners)
        weights = []
        for low, high, bins, pixels in ((y1, y2, 3, x.shape[2]), (x1, x2, 2, x.shape[3])):
            size = (high - low if aligned else max(high - low, 1)) / bins
            count = samples or math.ceil(size)
            at = low + size * ((torch.arange(bins * count).double() + 0.5) / count)
            tents = (1 - (at.clamp(0, pixels - 1)[:, None] - torch.arange(pixels)).abs()).clamp(min=0)
            tents = tents * ((at >= -1) & (at <= pixels))[:, None]
            weights.append(tents.view(bins, count, pixels).mean(1))
        outputs.append(weights[0] @ x[int(image)] @ weights[1].T)
    return torch.stack(outputs)


def roi_pool(device: str) -> str | None:
    return compare(
        lambda x: ops.roi_pool(x, ROIS.to(x), (3, 2), 0.5), _roi_pool, device, spread(2, 3, 8, 9, step=0.6180339887)
    )


def _roi_pool(x: Tensor) -> Tensor:
    """Maxima over the pixels that a bin touches; 0 of none."""
    outputs = []
    for image, *corners in ROIS.tolist():
        x1, y1, x2, y2 = corners[0] * 0.5, corners[1] * 0.5, (corners[2] + 1) * 0.5, (corners[3] + 1) * 0.5
        rows, columns = _bins(y1, y2, 3, x.shape[2]), _bins(x1, x2, 2, x.shape[3])
        plane = x[int(image)]
        outputs += [plane[:, r, c].flatten(1) for r in rows for c in columns]
    maxima = [pixels.amax(1) if pixels.numel() else x.new_zeros(x.shape[1]) for pixels in outputs]
    return torch.stack(maxima).view(len(ROIS), 3, 2, x.shape[1]).permute(0, 3, 1, 2)


def _bins(low: float, high: float, bins: int, pixels: int) -> list[slice]:
    edges = [low + i * (high - low) / bins for i in range(bins + 1)]
    clip = functools.partial(min, pixels)
    return [slice(clip(max(math.floor(a), 0)), clip(max(math.ceil(b), 0))) for a, b in itertools.pairwise(edges)]


LABELS = torch.tensor([0, 4, 2, 5, 1, 5])  # 5 is background
WEIGHTS = torch.tensor([0.5, 1, 2, 0.25, 1.5])


def _focal_loss(p: Tensor, weight: float | Tensor) -> Tensor:
    """Equation 5 of the paper, with gamma 2."""
    return -weight * (1 - p) ** 2 * p.log()


def sigmoid_focal_loss(device: str) -> str | None:
    hit = torch.nn.functional.one_hot(LABELS, 6)[:, :5].double()
    rows = torch.cat([WEIGHTS, torch.ones(1)]).double()[LABELS][:, None]

    def formula(x):
        p = hit * x.sigmoid() + (1 - hit) * (1 - x.sigmoid())
        return _focal_loss(p, (0.25 * hit + 0.75 * (1 - hit)) * rows)

    return compare(
        lambda x: ops.sigmoid_focal_loss(x, LABELS.to(device), 2.0, 0.25, WEIGHTS.to(x), 'none'),
        formula,
        device,
        spread(6, 5, step=0.6180339887, low=-3, high=3),
    )


def softmax_focal_loss(device: str) -> str | None:
    labels = LABELS % 5  # none is background, which mmcv's own kernel takes for one class more

    def formula(x):
        return _focal_loss(x.softmax(1).gather(1, labels[:, None])[:, 0], 0.25 * WEIGHTS.double()[labels]).sum()

    return compare(  # the sum: mmcv's own gradient of 'none' fails
        lambda x: ops.softmax_focal_loss(x, labels.to(device), 2.0, 0.25, WEIGHTS.to(x), 'sum'),
        formula,
        device,
        spread(6, 5, step=0.6180339887, low=-3, high=3),
    )


# Two groups of channels with offsets of their own, a kernel of 3x2, strides 2 and 1, paddings 1 and 2, dilations 1, 2.
GEOMETRY = dict(stride=(2, 1), padding=(1, 2), dilation=(1, 2))


def _deformed(device: str, masked: bool) -> str | None:
    x, weight = spread(2, 4, 5, 6, step=0.6180339887), spread(6, 2, 3, 2, step=0.4142135624)
    # Not close to whole pixels, where a bilinear sample has no derivative.
    offset = spread(2, 24, 3, 8, step=0.7320508076, low=-2, high=2).floor() + spread(
        2, 24, 3, 8, step=0.2360679775, low=0.1, high=0.9
    )
    offset = offset.float().double()
    if not masked:

        def plain(x, offset, weight):
            return ops.deform_conv2d(x, offset, weight, *GEOMETRY.values(), 2, 2)

        return compare(plain, _deform_conv, device, x, offset, weight)
    mask, bias = spread(2, 12, 3, 8, step=0.1622776602, low=0), spread(6, step=0.3166247904)

    def modulated(x, offset, weight, mask, bias):
        return ops.modulated_deform_conv2d(x, offset, mask, weight, bias, *GEOMETRY.values(), 2, 2)

    return compare(modulated, _deform_conv, device, x, offset, weight, mask, bias)


def _deform_conv(
    x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """The sum over the kernel's places of weight * mask * x, sampled bilinearly beside the place by the offset."""
    images, channels, height, width = x.shape
    kernel, (out_height, out_width) = weight.shape[2:], offset.shape[2:]
    y = []
    offset = offset.view(images, 2, *kernel, 2, out_height, out_width)
    for axis, (size, out) in enumerate(((height, out_height), (width, out_width))):
        stride, padding, dilation = (value[axis] for value in GEOMETRY.values())
        shape = [(out_height if axis == 0 else 1), (out_width if axis == 1 else 1)]
        place = (torch.arange(out).double() * stride - padding).view(1, 1, 1, 1, *shape)
        tap = (torch.arange(kernel[axis]).double() * dilation).view(1, 1, *([-1, 1] if axis == 0 else [1, -1]), 1, 1)
        at = place + tap + offset[:, :, :, :, axis]  # (N, groups, kh, kw, H', W')
        y.append((1 - (at[..., None] - torch.arange(size)).abs()).clamp(min=0))  # outside, nothing
    x = x.view(images, 2, channels // 2, height, width)
    sampled = torch.einsum('ngijhwy,ngijhwx,ngcyx->ngcijhw', *y, x)
    if mask is not None:
        sampled = sampled * mask.view(images, 2, 1, *kernel, out_height, out_width)
    sampled = sampled.flatten(1, 2).view(images, 2, channels // 2, *kernel, out_height, out_width)
    weight = weight.view(2, -1, *weight.shape[1:])  # the convolution's own groups
    result = torch.einsum('ngcijhw,gocij->ngohw', sampled, weight).flatten(1, 2)
    return result if bias is None else result + bias[:, None, None]


def deform_conv(device: str) -> str | None:
    return _deformed(device, masked=False)


def modulated_deform_conv(device: str) -> str | None:
    return _deformed(device, masked=True)


LEVELS = torch.tensor([[3, 4], [2, 2]])  # heights and widths


def ms_deform_attn(device: str) -> str | None:
    value = spread(2, 16, 2, 3, step=0.6180339887)
    # Never at the pixels' centres, where a bilinear sample has no derivative; some lie outside.
    places = spread(2, 5, 2, 2, 3, 2, step=0.7320508076, low=-4, high=28).floor() / 24 + 1 / 48
    starts = torch.tensor([0, 12], device=device)

    def attention(value: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        function = ops.multi_scale_deform_attn.MultiScaleDeformableAttnFunction
        return function.apply(value, LEVELS.to(device), starts, places, weights, 64)

    return compare(attention, _attention, device, value, places.float().double(), spread(2, 5, 2, 2, 3, step=0.4142))


def _attention(value: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Equation 3 of Deformable DETR: the sum over levels and places of weight * value, sampled bilinearly there."""
    result = value.new_zeros(())
    for level, (size, pixels) in enumerate(zip(LEVELS.tolist(), value.split([12, 4], 1), strict=True)):
        x, y = (
            (1 - (places[:, :, :, level, :, axis, None] * extent - 0.5 - torch.arange(extent)).abs()).clamp(min=0)
            for axis, extent in enumerate(reversed(size))
        )
        image = pixels.unflatten(1, size)
        result = result + torch.einsum('nqmk,nqmky,nqmkx,nyxmd->nqmd', weights[:, :, :, level], y, x, image)
    return result.flatten(2)


# What mmcv.ops calls it -> its self-test.
TESTS: dict[str, Callable[[str], str | None]] = {
    'nms': nms,
    'batched_nms': batched_nms,
    'soft_nms': soft_nms,
    'nms_match': nms_match,
    'roi_align': roi_align,
    'roi_pool': roi_pool,
    'sigmoid_focal_loss': sigmoid_focal_loss,
    'softmax_focal_loss': softmax_focal_loss,
    'deform_conv2d': deform_conv,
    'modulated_deform_conv2d': modulated_deform_conv,
    'multi_scale_deform_attn': ms_deform_attn,
}
