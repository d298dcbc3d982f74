"""The served operators, against mmcv's published figures, plain loops, closed formulas and float64 gradients.

All of them are reached as a user reaches them, through ``mmcv.ops``. The figures are those of mmcv's own test suite
(``tests/test_ops``), the meaning of every operator that of its C++ and CUDA sources (``mmcv/ops/csrc``).
"""

import importlib.util
import itertools
import math
import os
import pkgutil
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch.autograd import gradcheck

from cbam_mmdet.compat import mmcv_ops

if not mmcv_ops.install_ops():
    pytest.skip('mmcv has its compiled operators here', allow_module_level=True)

import mmcv.utils
from mmcv import ops

HALVES = [torch.float16, torch.bfloat16]
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')


def rand(*shape, low=0.0, high=1.0, seed=0):
    """Uniform float64 numbers that bfloat16 holds as well, so that all types compute from the same input."""
    numbers = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (low + (high - low) * numbers).bfloat16().double()


def random_boxes(count, seed=0, size=64):
    """Boxes on whole pixels and scores in steps of 1/16: with equal boxes, equal scores and boxes without area."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(size, (count, 2, 2), generator=generator).float().sort(dim=1).values
    scores = torch.randint(1, 17, (count,), generator=generator).float() / 16
    return torch.cat((corners.flatten(1), corners[: count // 8].flatten(1))), torch.cat((scores, scores[: count // 8]))


def forward_backward(function, *inputs):
    """``[output, *gradients]`` for a fixed gradient of the output; no gradient for integers."""
    inputs = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in inputs]
    output = function(*inputs)
    output.backward(rand(*output.shape, low=-1, seed=99).to(output))
    return [output.detach(), *(tensor.grad for tensor in inputs if tensor.grad is not None)]


def assert_near(actual, expected, tolerance):
    """Each tensor is within ``tolerance`` times the greatest expected magnitude."""
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape
        one, other = one.cpu().double(), other.cpu().double()
        assert (one - other).abs().max() <= tolerance * other.abs().max()


ROIS = torch.tensor([[0, 0, 0, 15, 15], [1, 3.5, 2, 12, 7.25], [1, -4, 5, 30, 9], [0, 6, 6, 6.5, 40]]).double()
LABELS = torch.tensor([0, 4, 2, 5, 1, 5])  # 5: background


def roi_align_case(sampling_ratio, aligned):
    return lambda x: ops.roi_align(x, ROIS.to(x), (3, 2), 0.5, sampling_ratio, 'avg', aligned)


def deform_case(**kwargs):
    kwargs = dict(stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2, deform_groups=2) | kwargs
    return lambda x, offset, weight: ops.deform_conv2d(x, offset, weight, *kwargs.values())


def modulated_case(x, offset, weight, mask, bias=None):
    return ops.modulated_deform_conv2d(x, offset, mask, weight, bias, (2, 1), (1, 2), (1, 2), 2, 2)


# Distinct features, so that RoIPool's maxima are unique.
DISTINCT = torch.randperm(2 * 2 * 8 * 8, generator=torch.Generator().manual_seed(0)).double().view(2, 2, 8, 8) / 64
# Not close to whole pixels, where bilinear interpolation has no derivative.
OFFSET = (rand(2, 24, 3, 8, low=-2, high=2, seed=1).floor() + rand(2, 24, 3, 8, low=0.1, high=0.9)).bfloat16().double()
DEFORM = [rand(2, 4, 5, 6, low=-1), OFFSET, rand(6, 2, 3, 2, low=-1, seed=2)]  # input, offset, weight
MASK, BIAS = rand(2, 12, 3, 8, seed=3), rand(6, seed=4)
LOGITS = rand(6, 5, low=-3, high=3)
WEIGHT = torch.tensor([0.5, 1, 2, 0.25, 1.5])

LEVELS = torch.tensor([(3, 4), (2, 2)])  # height and width
VALUE = rand(2, 3 * 4 + 2 * 2, 2, 3, low=-1, seed=5)
# In steps that leave bilinear interpolation's kinks, at the pixels' centres, out; some places lie outside the image.
PLACES = (rand(2, 5, 2, 2, 3, 2, low=-4, high=28, seed=6).floor() + 0.5) / 24


def attention_case(value, places, weights):
    levels = LEVELS.to(value.device)
    starts = torch.tensor([0, 12], device=value.device)
    function = ops.multi_scale_deform_attn.MultiScaleDeformableAttnFunction
    return function.apply(value, levels, starts, places, weights, 64)


#: name: (function of mmcv.ops, its differentiable inputs in float64)
CASES = {
    'roi_align': (roi_align_case(2, True), [rand(2, 3, 8, 8)]),
    'roi_align_adaptive': (roi_align_case(0, True), [rand(2, 3, 8, 8)]),
    'roi_align_unaligned': (roi_align_case(2, False), [rand(2, 3, 8, 8)]),
    'roi_align_unaligned_adaptive': (roi_align_case(0, False), [rand(2, 3, 8, 8)]),
    'roi_pool': (lambda x: ops.roi_pool(x, ROIS.to(x), (3, 2), 0.5), [DISTINCT]),
    'sigmoid_focal_loss': (lambda x: ops.sigmoid_focal_loss(x, LABELS.to(x.device), 2.0, 0.25, None, 'mean'), [LOGITS]),
    'sigmoid_focal_loss_weight': (
        lambda x: ops.sigmoid_focal_loss(x, LABELS.to(x.device), 0.5, 0.75, WEIGHT.to(x), 'sum'),
        [LOGITS],
    ),
    'softmax_focal_loss': (lambda x: ops.softmax_focal_loss(x, LABELS.to(x.device), 2.0, 0.25, None, 'mean'), [LOGITS]),
    'softmax_focal_loss_weight': (
        lambda x: ops.softmax_focal_loss(x, LABELS.to(x.device), 0.5, 0.75, WEIGHT.to(x), 'sum'),
        [LOGITS],
    ),
    'deform_conv': (deform_case(), DEFORM),
    'modulated_deform_conv': (modulated_case, [*DEFORM, MASK]),
    'modulated_deform_conv_bias': (modulated_case, [*DEFORM, MASK, BIAS]),
    'ms_deform_attn': (attention_case, [VALUE, PLACES, rand(2, 5, 2, 2, 3, seed=7)]),
}


@pytest.mark.parametrize('case', CASES)
def test_gradients_are_the_derivatives(case):
    function, inputs = CASES[case]
    assert gradcheck(function, [tensor.clone().requires_grad_() for tensor in inputs])


@pytest.mark.parametrize('dtype', HALVES)
@pytest.mark.parametrize('case', CASES)
def test_16_bit_floats_are_near_float32(case, dtype):
    function, inputs = CASES[case]
    actual = forward_backward(function, *(tensor.to(dtype) for tensor in inputs))
    assert all(tensor.dtype == dtype for tensor in actual)
    assert_near(
        actual, forward_backward(function, *(tensor.float() for tensor in inputs)), tolerance=4 * torch.finfo(dtype).eps
    )


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize('case', CASES)
def test_cuda_is_near_cpu(case, dtype):
    function, inputs = CASES[case]
    expected = forward_backward(function, *(tensor.to(dtype) for tensor in inputs))
    actual = forward_backward(function, *(tensor.to('cuda', dtype) for tensor in inputs))
    assert all(tensor.is_cuda and tensor.dtype == dtype for tensor in actual)
    assert_near(actual, expected, tolerance=(8 if dtype in HALVES else 64) * torch.finfo(dtype).eps)


PUBLISHED_BOXES = torch.tensor([[6.0, 3, 8, 7], [3, 6, 9, 11], [3, 7, 10, 12], [1, 4, 13, 7]])
PUBLISHED_SCORES = torch.tensor([0.6, 0.9, 0.7, 0.2])


def test_published_nms():
    dets, indices = ops.nms(PUBLISHED_BOXES, PUBLISHED_SCORES, iou_threshold=0.3, offset=0)
    assert indices.tolist() == [1, 0, 3]
    torch.testing.assert_close(dets, torch.tensor([[3, 6, 9, 11, 0.9], [6, 3, 8, 7, 0.6], [1, 4, 13, 7, 0.2]]))


@pytest.mark.parametrize(
    'method, scores, indices',
    [
        ('linear', [0.9, 0.6, 0.29024392, 0.2], [1, 0, 2, 3]),
        ('gaussian', [0.9, 0.59630775, 0.35275510, 0.18650459], [1, 0, 2, 3]),
        ('naive', [0.9, 0.6, 0.2], [1, 0, 3]),
    ],
)
def test_published_soft_nms(method, scores, indices):
    dets, kept = ops.soft_nms(PUBLISHED_BOXES, PUBLISHED_SCORES, 0.3, sigma=0.5, min_score=0.01, method=method)
    assert kept.tolist() == indices
    torch.testing.assert_close(dets, torch.cat((PUBLISHED_BOXES[indices], torch.tensor(scores)[:, None]), dim=1))


def test_examples_of_mmcv_docstrings():
    boxes = np.array(
        [
            [49.1, 32.4, 51.0, 35.9],
            [49.3, 32.9, 51.0, 35.3],
            [49.2, 31.8, 51.0, 35.4],
            [35.1, 11.5, 39.1, 15.7],
            [35.6, 11.8, 39.3, 14.2],
            [35.3, 11.5, 39.9, 14.5],
            [35.2, 11.7, 39.7, 15.7],
        ],
        dtype=np.float32,
    )
    scores = np.array([0.9, 0.9, 0.5, 0.5, 0.5, 0.4, 0.3], dtype=np.float32)
    dets, indices = ops.nms(boxes, scores, 0.6)
    assert len(dets) == len(indices) == 3

    boxes = np.array([[4, 3, 5, 3], [4, 3, 5, 4], *[[3, 1, 3, 1]] * 4], dtype=np.float32)
    scores = np.array([0.9, 0.9, 0.5, 0.5, 0.4, 0.0], dtype=np.float32)
    dets, indices = ops.soft_nms(boxes, scores, 0.6, sigma=0.5)
    assert len(dets) == len(indices) == 5


def test_published_nms_match():
    dets = torch.tensor(
        [
            [49.1, 32.4, 51.0, 35.9, 0.9],
            [49.3, 32.9, 51.0, 35.3, 0.9],
            [35.3, 11.5, 39.9, 14.5, 0.4],
            [35.2, 11.7, 39.7, 15.7, 0.3],
        ]
    )
    groups = ops.nms_match(dets, 0.6)
    assert [group.tolist() for group in groups] == [[0, 1], [2, 3]]
    assert [group.tolist() for group in ops.nms_match(dets.numpy(), 0.6)] == [[0, 1], [2, 3]]
    assert [group[0] for group in groups] == ops.nms(dets[:, :4], dets[:, 4], 0.6)[1].tolist()


ROI_TABLE = [
    # features, RoI, RoIAlign, its gradient for ones, RoIPool, its gradient for ones; all with 2x2 bins
    (
        [[[1, 2], [3, 4]]],
        [0, 0, 0, 1, 1],
        [[[1, 1.25], [1.5, 1.75]]],
        [[[3.0625, 0.4375], [0.4375, 0.0625]]],
        [[[1, 2], [3, 4]]],
        [[[1, 1], [1, 1]]],
    ),
    (
        [[[1, 2], [3, 4]], [[4, 3], [2, 1]]],
        [0, 0, 0, 1, 1],
        [[[1, 1.25], [1.5, 1.75]], [[4, 3.75], [3.5, 3.25]]],
        [[[3.0625, 0.4375], [0.4375, 0.0625]]] * 2,
        [[[1, 2], [3, 4]], [[4, 3], [2, 1]]],
        [[[1, 1], [1, 1]]] * 2,
    ),
    (
        [[[1, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16]]],
        [0, 0, 0, 3, 3],
        [[[1.9375, 4.75], [7.5625, 10.375]]],
        [
            [
                [0.47265625, 0.4296875, 0.4296875, 0.04296875],
                [0.4296875, 0.390625, 0.390625, 0.0390625],
                [0.4296875, 0.390625, 0.390625, 0.0390625],
                [0.04296875, 0.0390625, 0.0390625, 0.00390625],
            ]
        ],
        [[[4, 8], [12, 16]]],
        [[[0, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0], [0, 1, 0, 1]]],
    ),
]


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize('row', ROI_TABLE)
def test_published_roi_align_and_roi_pool(row, dtype):
    features, roi, aligned, aligned_grad, pooled, pooled_grad = (torch.tensor(item, dtype=dtype)[None] for item in row)
    for function, output, grad in (
        (lambda x: ops.roi_align(x, roi, 2, 1.0, 2, 'avg', True), aligned, aligned_grad),
        (lambda x: ops.roi_pool(x, roi, 2, 1.0), pooled, pooled_grad),
    ):
        x = features.clone().requires_grad_()
        y = function(x)
        y.backward(torch.ones_like(y))
        torch.testing.assert_close(y.detach(), output)
        torch.testing.assert_close(x.grad, grad)


FOCAL_TABLE = [
    # logits, labels, loss and gradient of the softmax form, of the sigmoid form; gamma 2, alpha 0.25, mean over rows
    (
        [[1, 0], [0, 1]],
        [0, 1],
        0.00566451,
        [[-0.00657264, 0.00657264], [0.00657264, -0.00657264]],
        0.13562961,
        [[-0.00657264, 0.11185755], [0.11185755, -0.00657264]],
    ),
    (
        [[1, 0, -1], [0, 1, 2]],
        [2, 1],
        0.34956908,
        [[0.10165970, 0.03739851, -0.13905823], [0.01227554, -0.10298023, 0.09070466]],
        1.10251057,
        [[0.28808805, 0.11185755, -0.09602935], [0.11185755, -0.00657264, 0.40376765]],
    ),
    (
        [[1e-6, 2e-6, 3e-6], [4e-6, 5e-5, 6e-4], [7e-3, 8e-2, 9e-1]],
        [1, 2, 0],
        0.15754992,
        [
            [0.02590877, -0.05181759, 0.02590882],
            [0.02589641, 0.02589760, -0.05179400],
            [-0.07307514, 0.02234372, 0.05073142],
        ],
        0.42287254,
        [
            [0.07457182, -0.02485716, 0.07457201],
            [0.07457211, 0.07457669, -0.02483728],
            [-0.02462499, 0.08277918, 0.18050370],
        ],
    ),
]


@pytest.mark.parametrize('row', FOCAL_TABLE)
def test_published_focal_losses(row):
    logits, labels, *figures = map(torch.tensor, row)
    for function, loss, grad in ((ops.softmax_focal_loss, *figures[:2]), (ops.sigmoid_focal_loss, *figures[2:])):
        x = logits.float().clone().requires_grad_()
        y = function(x, labels, 2.0, 0.25, None, 'mean')
        y.backward()
        torch.testing.assert_close(y.detach(), loss, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(x.grad, grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_published_deform_conv(dtype):
    images = 10
    x = torch.tensor([[[[1.0, 2, 3], [0, 1, 2], [3, 5, 2]]]]).repeat(images, 1, 1, 1).to(dtype).requires_grad_()
    model = ops.DeformConv2dPack(1, 1, kernel_size=2, im2col_step=2).to(dtype)
    with torch.no_grad():
        model.conv_offset.weight.copy_(
            torch.tensor(
                [
                    [0.1, 0.4, 0.6, 0.1],
                    [0.3, 0.2, 0.1, 0.3],
                    [0.5, 0.5, 0.2, 0.8],
                    [0.8, 0.3, 0.9, 0.1],
                    [0.3, 0.1, 0.2, 0.5],
                    [0.3, 0.7, 0.5, 0.3],
                    [0.6, 0.2, 0.5, 0.3],
                    [0.4, 0.1, 0.8, 0.4],
                ]
            ).view(8, 1, 2, 2)
        )
        model.conv_offset.bias.copy_(torch.tensor([0.7, 0.1, 0.8, 0.5, 0.6, 0.5, 0.4, 0.7]))
        model.weight.copy_(torch.tensor([0.4, 0.2, 0.1, 0.9]).view(1, 1, 2, 2))
    y = model(x)
    y.backward(torch.ones_like(y))

    # float32 meets a kink of the bilinear weights that float64 does not; mmcv, too, allows it this much.
    close = dict(rtol=1e-3, atol=1e-3) if dtype == torch.float64 else dict(rtol=0.1, atol=0.01)
    for actual, expected in (
        (y.detach(), [[1.65, 0], [0, 0]]),
        (x.grad, [[-0.666, 0.204, 0], [0.03, -0.416, 0.012], [0, 0.252, 0.129]]),
    ):
        torch.testing.assert_close(actual, torch.tensor(expected, dtype=dtype).expand_as(actual), **close)
    for actual, expected in (
        (
            model.conv_offset.weight.grad.view(8, 4),
            [
                [1.44, 2.88, 0, 1.44],
                [-0.72, -1.44, 0, -0.72],
                [0] * 4,
                [0] * 4,
                [-0.1, -0.2, 0, -0.1],
                [-0.08, -0.16, 0, -0.08],
                [-0.54, -1.08, 0, -0.54],
                [-0.54, -1.08, 0, -0.54],
            ],
        ),
        (model.conv_offset.bias.grad, [1.44, -0.72, 0, 0, -0.1, -0.08, -0.54, -0.54]),
        (model.weight.grad.view(4), [3.62, 0, 0.4, 0.18]),
    ):
        torch.testing.assert_close(actual / images, torch.tensor(expected, dtype=dtype), **close)


def test_published_modulated_deform_conv():
    x = torch.tensor([[[[1.0, 2, 3]] * 3]]).requires_grad_()
    model = ops.ModulatedDeformConv2dPack(1, 1, kernel_size=(2, 2), padding=1, bias=False)
    model.weight.data.fill_(1)
    y = model(x)
    y.sum().backward()
    figures = (
        (y.detach(), [[0.5, 1.5, 2.5, 1.5], [1, 3, 5, 3], [1, 3, 5, 3], [0.5, 1.5, 2.5, 1.5]]),
        (x.grad, [[2] * 3] * 3),
        (model.weight.grad, [[9] * 2] * 2),
        (
            model.conv_offset.weight.grad,
            [
                [-7, -4, 0, 0],
                [-9, 7.5, -6, 5],
                [-4, -7, 0, 0],
                [-7.5, -9, -5, -6],
                [-7, -4, -7, -4],
                [-6, 5, -9, 7.5],
                [-4, -7, -4, -7],
                [-5, -6, -7.5, -9],
                [10.5, 6, 7, 4],
                [6, 10.5, 4, 7],
                [7, 4, 10.5, 6],
                [4, 7, 6, 10.5],
            ],
        ),
        (model.conv_offset.bias.grad, [-3, -1.5] * 4 + [4.5] * 4),
    )
    for actual, expected in figures:
        torch.testing.assert_close(actual, torch.tensor(expected).float().view_as(actual))


def loop_iou(a, b, offset):
    """IoU as mmcv's C++ computes it, in the type of the boxes' numbers; NaN for two boxes without area."""
    offset = type(a[0])(offset)
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]) + offset)
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]) + offset)
    area_a, area_b = ((box[2] - box[0] + offset) * (box[3] - box[1] + offset) for box in (a, b))
    union = area_a + area_b - width * height
    return width * height / union if union else math.nan


def loop_nms(boxes, scores, threshold, offset):
    order = sorted(range(len(boxes)), key=lambda i: -scores[i])
    keep = []
    for i in order:
        if not any(loop_iou(boxes[i], boxes[j], offset) > threshold for j in keep):
            keep.append(i)
    return keep


def loop_soft_nms(boxes, scores, threshold, sigma, min_score, method, offset):
    """The picked box is swapped to the front, a dropped one is replaced with the last, which is then weighted."""
    one, threshold, sigma, min_score = map(type(scores[0]), (1, threshold, sigma, min_score))
    rest = [[score, box, index] for index, (box, score) in enumerate(zip(boxes, scores, strict=True))]
    front = 0
    while front < len(rest):
        best = front
        for place in range(front + 1, len(rest)):
            if rest[best][0] < rest[place][0]:
                best = place
        rest[front], rest[best] = rest[best], rest[front]
        place = front + 1
        while place < len(rest):
            iou = loop_iou(rest[front][1], rest[place][1], offset)
            if method == 'gaussian':
                rest[place][0] *= np.exp(-(iou * iou) / sigma)
            elif iou >= threshold:
                rest[place][0] *= one - iou if method == 'linear' else 0
            if rest[place][0] < min_score:
                rest[place] = rest[-1]
                rest.pop()
            else:
                place += 1
        front += 1
    return [index for _, _, index in rest], [score for score, _, _ in rest]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('threshold', [0.3, 0.6])
def test_nms_equals_the_loop(threshold, offset, dtype):
    boxes, scores = random_boxes(120)
    expected = loop_nms(boxes.tolist(), scores.tolist(), threshold, offset)
    dets, indices = ops.nms(boxes.to(dtype), scores.to(dtype), threshold, offset)
    assert indices.dtype == torch.int64
    assert indices.tolist() == expected
    assert torch.equal(dets, torch.cat((boxes, scores[:, None]), dim=1).to(dtype)[expected])
    assert 10 < len(expected) < 120


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize(
    'boxes, iou',
    [
        (torch.tensor([[0.0, 0, 4, 1], [1, 0, 5, 1]]), 0.6),
        (torch.tensor([[0.0, 0, 17, 1], [3, 0, 20, 1]]), 0.7),
        (torch.tensor([[0.0, 0, 9, 1], [0, 0, 10, 1]]), 0.9),
    ],
)
def test_at_exactly_the_threshold_nms_keeps_and_the_others_suppress(boxes, iou, offset):
    scores = torch.tensor([0.9, 0.8])
    inclusive = boxes - torch.tensor([0, 0, offset, offset])
    assert ops.nms(inclusive, scores, iou, offset)[1].tolist() == [0, 1]
    assert ops.nms(inclusive, scores, iou - 1e-4, offset)[1].tolist() == [0]
    assert ops.soft_nms(inclusive, scores, iou, method='naive', offset=offset)[1].tolist() == [0]
    assert ops.soft_nms(inclusive, scores, iou + 1e-4, method='naive', offset=offset)[1].tolist() == [0, 1]
    groups = ops.nms_match(torch.cat((boxes, scores[:, None]), dim=1), iou)
    assert [group.tolist() for group in groups] == [[0, 1]]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('method', ['naive', 'linear', 'gaussian'])
def test_soft_nms_equals_the_loop(method, offset, dtype):
    boxes, scores = random_boxes(120)
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    expected, expected_scores = loop_soft_nms(boxes.numpy(), scores.numpy(), 0.3, 0.5, 0.05, method, offset)
    dets, indices = ops.soft_nms(boxes, scores, 0.3, 0.5, 0.05, method, offset)
    assert 10 < len(expected) < 135
    assert indices.tolist() == expected
    assert torch.equal(dets[:, :4], boxes[expected])
    torch.testing.assert_close(dets[:, 4], torch.tensor(expected_scores, dtype=dtype), equal_nan=True)


def test_soft_nms_of_16_bit_floats():
    boxes, scores = random_boxes(60)
    expected, indices = ops.soft_nms(boxes, scores, method='gaussian', min_score=0.05, offset=1)
    for dtype in HALVES:
        dets, kept = ops.soft_nms(boxes.to(dtype), scores.to(dtype), method='gaussian', min_score=0.05, offset=1)
        assert kept.tolist() == indices.tolist()
        assert torch.equal(dets, expected.to(dtype))


@pytest.mark.parametrize('function', [ops.nms, ops.soft_nms])
def test_boxes_that_require_gradients_may_be_suppressed(function):
    dets, indices = function(PUBLISHED_BOXES.clone().requires_grad_(), PUBLISHED_SCORES.clone().requires_grad_(), 0.3)
    expected = function(PUBLISHED_BOXES, PUBLISHED_SCORES, 0.3)
    assert torch.equal(dets, expected[0]) and torch.equal(indices, expected[1])


@pytest.mark.parametrize('count', [1, 2, 120])
def test_nms_match_equals_the_loop(count):
    boxes, scores = random_boxes(count)
    boxes, scores, groups = boxes.tolist(), scores.tolist(), {}
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        suppressor = next((j for j in groups if loop_iou(boxes[i], boxes[j], 0) >= 0.3), i)
        groups.setdefault(suppressor, []).append(i)
    dets = torch.cat((torch.tensor(boxes), torch.tensor(scores)[:, None]), dim=1)
    assert [group.tolist() for group in ops.nms_match(dets, 0.3)] == list(groups.values())


@pytest.mark.parametrize('class_agnostic, split_thr', [(False, 10000), (False, 50), (True, 10000)])
def test_batched_nms_equals_the_loop_by_class(class_agnostic, split_thr):
    boxes, _ = random_boxes(120)
    scores = torch.linspace(0.99, 0.01, len(boxes))
    classes = torch.arange(len(boxes)) % 3
    masks = [classes >= 0] if class_agnostic else [classes == index for index in range(3)]
    groups = [mask.nonzero()[:, 0] for mask in masks]
    kept = [int(group[i]) for group in groups for i in loop_nms(boxes[group].tolist(), scores[group].tolist(), 0.4, 0)]
    dets, indices = ops.batched_nms(
        boxes, scores, classes, dict(type='nms', iou_threshold=0.4, split_thr=split_thr), class_agnostic=class_agnostic
    )
    assert indices.tolist() == sorted(kept)
    assert torch.equal(dets, torch.cat((boxes, scores[:, None]), dim=1)[sorted(kept)])


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize('offset', [0, 1])
def test_suppression_on_cuda_equals_the_loop(offset, dtype):
    boxes, scores = random_boxes(120)
    cuda = boxes.to('cuda', dtype), scores.to('cuda', dtype)
    _, indices = ops.nms(*cuda, 0.3001, offset)
    assert indices.is_cuda and indices.dtype == torch.int64
    assert indices.tolist() == loop_nms(boxes.tolist(), scores.tolist(), 0.3001, offset)
    dets, indices = ops.soft_nms(*cuda, 0.3, 0.5, 0.05, 'linear', offset)
    assert dets.is_cuda and indices.is_cuda
    if dtype == torch.float32:
        expected, _ = loop_soft_nms(boxes.numpy(), scores.numpy(), 0.3, 0.5, 0.05, 'linear', offset)
        assert indices.tolist() == expected


@pytest.mark.parametrize('aligned', [False, True])
@pytest.mark.parametrize('sampling_ratio', [0, 3])
def test_roi_align_of_a_linear_image_is_its_value_at_the_bins_centres(sampling_ratio, aligned):
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(24.0), indexing='ij')
    scale, rois = 0.25, torch.tensor([[0, 8.5, 12, 60, 50], [0, 20, 20, 33, 71.5]])
    output = ops.roi_align((3 * x - 2 * y + 1)[None, None], rois, (5, 4), scale, sampling_ratio, 'avg', aligned)
    left, top, right, bottom = (rois[:, 1:] * scale - 0.5 * aligned).T[..., None]
    centres_x = left + (right - left) * (torch.arange(4) + 0.5) / 4
    centres_y = top + (bottom - top) * (torch.arange(5) + 0.5) / 5
    torch.testing.assert_close(output[:, 0], 3 * centres_x[:, None] - 2 * centres_y[:, :, None] + 1)


def test_roi_align_outside_the_image_is_zero():
    output = ops.roi_align(torch.ones(1, 1, 4, 4), torch.tensor([[0.0, 20, 20, 30, 30]]), 2, 1.0, 2, 'avg', True)
    assert torch.equal(output, torch.zeros(1, 1, 2, 2))


def test_roi_align_max_is_not_served():
    with pytest.raises(mmcv_ops.OperatorError, match="pool_mode='max'"):
        ops.roi_align(torch.ones(1, 1, 4, 4), torch.tensor([[0.0, 0, 0, 3, 3]]), 2, 1.0, 2, 'max', True)


@pytest.mark.parametrize('aligned', [False, True])
@pytest.mark.parametrize('sampling_ratio', [0, 2])
def test_deterministic_roi_align_gradient_equals_the_kernels(sampling_ratio, aligned):
    rois = torch.cat((ROIS, torch.tensor([[1.0, 5, 5, 5, 9], [0, 90, 90, 99, 99], [1, -40, -40, 60, 60]])))
    features = rand(3, 2, 8, 9).requires_grad_()  # no RoI in the last image
    output = ops.roi_align(features, rois, (3, 2), 0.5, sampling_ratio, 'avg', aligned)
    grad = rand(*output.shape, low=-1, seed=1)
    output.backward(grad)
    actual = mmcv_ops.roi_align_backward_by_products(grad, rois, features.shape, 0.5, sampling_ratio, aligned)
    torch.testing.assert_close(actual, features.grad)


@pytest.mark.gpu
@NEEDS_CUDA
def test_roi_gradients_under_deterministic_algorithms_on_cuda():
    """In a process of its own: cuBLAS reads CUBLAS_WORKSPACE_CONFIG once."""
    run_script(
        """
        install_ops()
        from mmcv import ops

        generator = torch.Generator().manual_seed(0)
        features = torch.rand(2, 16, 50, 60, generator=generator)
        corners = torch.rand(200, 4, generator=generator) * 300
        rois = torch.cat((torch.arange(200)[:, None] % 2, corners[:, :2], corners[:, :2] + corners[:, 2:]), dim=1)

        def grad(function, device):
            x = features.to(device).requires_grad_()
            function(x, rois.to(device)).square().sum().backward()
            return x.grad.cpu()

        for function in (lambda x, rois: ops.roi_align(x, rois, 7, 0.125, 0, 'avg', True),
                         lambda x, rois: ops.roi_pool(x, rois, 7, 0.125)):
            expected = grad(function, 'cpu')
            torch.use_deterministic_algorithms(True)
            with torch.autocast('cuda'):
                first, second = grad(function, 'cuda'), grad(function, 'cuda')
            torch.use_deterministic_algorithms(False)
            assert torch.equal(first, second)
            # Closer than float16 sums, which autocast would make of the products, can be.
            assert (first - expected).abs().max() <= 2e-5 * expected.abs().max()
    """,
        CUBLAS_WORKSPACE_CONFIG=':4096:8',
    )


@pytest.mark.parametrize('scale', [1.0, 0.5, 0.3])
def test_roi_pool_equals_the_loop(scale):
    """Including RoIs beyond the image, empty bins, and two without area, to which nothing flows back."""
    rois = torch.cat((ROIS, torch.tensor([[0.0, 5, 5, 4, 9], [1, 9, 9, 2, 2], [1, 40, 2, 50, 12]])))
    features = DISTINCT - 2  # of both signs
    expected, expected_grad = torch.zeros(len(rois), 2, 3, 2).double(), torch.zeros_like(features)
    grad = rand(*expected.shape, low=-1)
    for k, (image, x1, y1, x2, y2) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = x1 * scale, y1 * scale, (x2 + 1) * scale, (y2 + 1) * scale
        for c, i, j in np.ndindex(2, 3, 2):
            if x2 <= x1 or y2 <= y1:
                continue
            rows = range(max(math.floor(y1 + i * (y2 - y1) / 3), 0), min(math.ceil(y1 + (i + 1) * (y2 - y1) / 3), 8))
            columns = range(max(math.floor(x1 + j * (x2 - x1) / 2), 0), min(math.ceil(x1 + (j + 1) * (x2 - x1) / 2), 8))
            if not rows or not columns:
                continue
            plane = features[int(image), c]
            y, x = max(((y, x) for y in rows for x in columns), key=lambda place: plane[place])
            expected[k, c, i, j] = plane[y, x]
            expected_grad[int(image), c, y, x] += grad[k, c, i, j]
    features = features.requires_grad_()
    output = ops.roi_pool(features, rois, (3, 2), scale)
    output.backward(grad)
    assert torch.equal(output, expected)
    torch.testing.assert_close(features.grad, expected_grad)


@pytest.mark.parametrize('weight', [None, WEIGHT])
@pytest.mark.parametrize('gamma, alpha', [(2.0, 0.25), (0.0, 0.5), (0.5, 0.9)])
def test_focal_losses_equal_their_formula(gamma, alpha, weight):
    logits = rand(6, 5, low=-8, high=8, seed=5).float()
    labels = torch.tensor([0, 4, 2, 5, -7, 1])  # 5 and -7: background
    row_weight = torch.ones(6) if weight is None else torch.cat((weight, torch.ones(1)))[labels % 6]
    hit = F.one_hot(labels % 6, 6)[:, :5].bool()
    wide = logits.double()

    p_t = torch.where(hit, wide.sigmoid(), 1 - wide.sigmoid())
    expected = -torch.where(hit, alpha, 1 - alpha) * (1 - p_t) ** gamma * p_t.log() * row_weight[:, None]
    actual = ops.sigmoid_focal_loss(logits, labels, gamma, alpha, weight, 'none')
    torch.testing.assert_close(actual, expected.float())

    p = (wide.softmax(dim=1) * hit).sum(dim=1)
    expected = torch.where(p > 0, -alpha * (1 - p) ** gamma * p.log() * row_weight, 0.0)
    actual = ops.softmax_focal_loss(logits, labels, gamma, alpha, weight, 'none')
    torch.testing.assert_close(actual, expected.float())


def test_focal_losses_of_large_logits():
    """-log(1 - sigmoid(x)) tends to x, where 1 - sigmoid(x) is 0 in float32; the slopes tend to 1 and to 0."""
    logits = torch.tensor([[20.0, -20], [150, -150]], requires_grad=True)
    loss = ops.sigmoid_focal_loss(logits, torch.tensor([1, 1]), 2.0, 0.25, None, 'none')
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.tensor([[0.75 * 20, 0.25 * 20], [0.75 * 150, 0.25 * 150]]))
    torch.testing.assert_close(logits.grad, torch.tensor([[0.75, -0.25]] * 2))

    for gamma in (0.0, 0.5, 2.0):
        logits = torch.tensor([[200.0, 0]], requires_grad=True)
        loss = ops.softmax_focal_loss(logits, torch.tensor([0]), gamma, 0.25, None, 'sum')
        loss.backward()
        assert loss == 0
        assert torch.equal(logits.grad, torch.zeros(1, 2))


def test_softmax_focal_loss_of_an_impossible_class_is_bounded():
    """By FLT_MIN as the least probability, which is mmcv's bound."""
    logits = torch.tensor([[0.0, 200]], requires_grad=True)
    loss = ops.softmax_focal_loss(logits, torch.tensor([0]), 2.0, 0.25, None, 'sum')
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor(0.25 * 126 * math.log(2)))
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.25, 0.25]]))


@pytest.mark.parametrize('function', [ops.sigmoid_focal_loss, ops.softmax_focal_loss])
def test_focal_losses_reject_labels_beyond_background(function):
    with pytest.raises(ValueError, match=r'num_classes = 5 .*got 6'):
        function(LOGITS, torch.tensor([0, 1, 2, 3, 4, 6]))


def test_deform_conv_without_offsets_is_a_convolution():
    x, offset, weight = DEFORM
    expected = F.conv2d(x, weight, None, (2, 1), (1, 2), (1, 2), groups=2)
    torch.testing.assert_close(deform_case()(x, torch.zeros_like(offset), weight), expected)
    torch.testing.assert_close(
        modulated_case(x, torch.zeros_like(offset), weight, torch.full_like(MASK, 0.5), BIAS),
        0.5 * expected + BIAS[:, None, None],
    )


def test_deform_conv_offset_moves_where_each_group_looks():
    """A 1x1 kernel that sums its channels: the first half is read one row lower, the second half a column before."""
    x = rand(1, 4, 6, 6)
    offset = torch.tensor([1.0, 0, 0, -1]).double().view(1, 4, 1, 1).expand(1, 4, 6, 6).contiguous()
    output = ops.deform_conv2d(x, offset, torch.ones(1, 4, 1, 1).double(), 1, 0, 1, 1, 2)
    expected = F.pad(x[:, :2, 1:], (0, 0, 0, 1)).sum(dim=1) + F.pad(x[:, 2:, :, :-1], (1, 0)).sum(dim=1)
    torch.testing.assert_close(output[:, 0], expected)


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), float('-inf')])
def test_deform_conv_at_a_place_that_is_no_number_sees_nothing(bad):
    """As mmcv, whose kernel adds only places inside the image; torchvision alone reads foreign memory at NaN."""
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    offset = torch.zeros(1, 2, 8, 8)
    offset[0, 0, 2, 3] = bad
    offset.requires_grad_()
    output = ops.deform_conv2d(x, offset, torch.ones(1, 4, 1, 1), 1, 0, 1, 1, 1)
    expected = x.detach().sum(1, keepdim=True)
    expected[0, 0, 2, 3] = 0
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    assert x.grad[0, 0, 2, 3] == 0 and x.grad.sum() == 63 * 4
    assert offset.grad[0, 0, 2, 3] == 0 and offset.grad.isfinite().all()


@pytest.mark.parametrize('pack', [ops.DeformConv2dPack, ops.ModulatedDeformConv2dPack])
def test_deform_conv_under_autocast_is_near_float32(pack):
    torch.manual_seed(0)
    model = pack(4, 6, 3, padding=1)
    torch.nn.init.normal_(model.conv_offset.weight, std=0.05)
    x = rand(2, 4, 8, 8).float()
    expected = model(x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        output = model(x)
        output.float().sum().backward()
    assert output.dtype == torch.bfloat16  # that of the offsets, as mmcv has it
    assert_near([output.detach()], [expected.detach()], tolerance=0.03)
    assert model.weight.grad.dtype == torch.float32 and model.weight.grad.abs().sum() > 0


def test_deformable_attention_equals_the_loop():
    """Equation 3 of Deformable DETR, a sampled pixel at a time."""
    weights = CASES['ms_deform_attn'][1][2]
    expected = torch.zeros(2, 5, 2, 3).double()
    for n, q, m, level, k in np.ndindex(*weights.shape):
        height, width = LEVELS[level].tolist()
        image = VALUE[n, [slice(0, 12), slice(12, 16)][level], m].reshape(height, width, 3)
        x, y = (PLACES[n, q, m, level, k] * torch.tensor([width, height]) - 0.5).tolist()
        for column, row in itertools.product((math.floor(x), math.floor(x) + 1), (math.floor(y), math.floor(y) + 1)):
            if 0 <= column < width and 0 <= row < height:
                share = (1 - abs(x - column)) * (1 - abs(y - row))
                expected[n, q, m] += weights[n, q, m, level, k] * share * image[row, column]
    torch.testing.assert_close(attention_case(VALUE, PLACES, weights), expected.flatten(2))


def test_empty_inputs():
    boxes, scores = torch.zeros(0, 4), torch.zeros(0)
    for function in (ops.nms, ops.soft_nms):
        dets, indices = function(boxes, scores, 0.5)
        assert dets.shape == (0, 5) and indices.shape == (0,) and indices.dtype == torch.int64
    assert ops.nms_match(torch.zeros(0, 5), 0.5) == []

    for function in (
        lambda x: ops.roi_align(x, torch.zeros(0, 5), 2, 1.0, 0, 'avg', True),
        lambda x: ops.roi_pool(x, torch.zeros(0, 5), 2, 1.0),
    ):
        output, grad = forward_backward(function, torch.ones(1, 3, 4, 4))
        assert output.shape == (0, 3, 2, 2)
        assert torch.equal(grad, torch.zeros(1, 3, 4, 4))

    for function in (ops.sigmoid_focal_loss, ops.softmax_focal_loss):
        loss, grad = forward_backward(
            lambda x, function=function: function(x, torch.zeros(0).long(), 2.0, 0.25, None, 'sum'), torch.zeros(0, 5)
        )
        assert loss == 0 and grad.shape == (0, 5)


def test_backward_adds_where_mmcv_adds_and_overwrites_where_it_overwrites():
    served = mmcv_ops.OPERATORS
    x, offset, weight = DEFORM
    grad = rand(2, 6, 3, 8, low=-1, seed=6)
    sizes = dict(kW=2, kH=3, dW=1, dH=2, padW=2, padH=1, dilationW=2, dilationH=1)
    sizes |= dict(group=2, deformable_group=2, im2col_step=1)
    leaves = [tensor.clone().requires_grad_() for tensor in DEFORM]
    deform_case()(*leaves).backward(grad)
    by_input, by_offset, by_weight = (leaf.grad for leaf in leaves)
    unused = torch.empty(0)

    sums, written = torch.ones_like(x), torch.ones_like(offset)
    served['deform_conv_backward_input'](x, offset, grad, sums, written, weight, unused, **sizes)
    torch.testing.assert_close(sums, by_input + 1)
    torch.testing.assert_close(written, by_offset)
    sums = torch.ones_like(weight)
    served['deform_conv_backward_parameters'](x, offset, grad, sums, unused, unused, scale=0.5, **sizes)
    torch.testing.assert_close(sums, 0.5 * by_weight + 1)

    features = rand(2, 3, 8, 8).requires_grad_()
    output = roi_align_case(2, True)(features)
    output.sum().backward()
    sums = torch.ones_like(features)
    served['roi_align_backward'](
        torch.ones_like(output),
        ROIS,
        unused,
        unused,
        sums,
        aligned_height=3,
        aligned_width=2,
        spatial_scale=0.5,
        sampling_ratio=2,
        pool_mode=1,
        aligned=True,
    )
    torch.testing.assert_close(sums, features.grad + 1)


def test_install_again_changes_nothing():
    module = sys.modules['mmcv._ext']
    assert mmcv_ops.install_ops() is True
    assert sys.modules['mmcv._ext'] is module is mmcv._ext


def test_an_operator_that_is_not_served_says_so_when_called():
    dets, scores = torch.rand(3, 5), torch.rand(3)
    with pytest.raises(mmcv_ops.OperatorError, match="'nms_rotated' needs a compiled mmcv") as error:
        ops.nms_rotated(dets, scores, 0.5)
    message = str(error.value)
    assert torch.__version__ in message and 'roi_align_forward' in message and 'MMCV_WITH_OPS=1 pip install' in message


def test_layers_that_call_an_operator_which_is_not_served_are_found():
    model = torch.nn.ModuleDict(
        dict(
            served=ops.DeformConv2dPack(4, 4, 3),
            upsample=ops.CARAFEPack(4, 2),
            attention=ops.MultiScaleDeformableAttention(8, 2),
            corner=ops.CornerPool('top'),
            mask=ops.MaskedConv2d(4, 4, 3),
        )
    )
    found = mmcv_ops.unserved_layers(model)
    assert list(found) == ['upsample', 'mask']
    assert found['mask'] == ['masked_col2im_forward', 'masked_im2col_forward']
    assert model.corner(torch.rand(1, 2, 4, 4)).shape == (1, 2, 4, 4), 'by torch'
    with pytest.raises(mmcv_ops.OperatorError):
        model.upsample(torch.rand(1, 4, 4, 4))


def test_the_served_module_has_no_other_attributes():
    """Python and tools look for such names on any module, and must not find functions."""
    assert not any(hasattr(sys.modules['mmcv._ext'], name) for name in ('__path__', '__wrapped__', '_repr_html_'))


def test_the_served_module_counts_as_installed():
    from mmengine.utils.dl_utils import mmcv_full_available

    assert importlib.util.find_spec('mmcv._ext').origin == 'cbam_mmdet.compat.mmcv_ops'
    assert mmcv_full_available()
    if hasattr(pkgutil, 'find_loader'):  # gone in Python 3.14, and with it this question of mmcv's
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', DeprecationWarning)
            assert mmcv.utils.ext_loader.check_ops_exist()


def test_environment_report():
    report = mmcv.utils.collect_env()
    assert 'cbam_mmdet.compat.mmcv_ops' in report['MMCV Compiler']
    assert report['MMCV CUDA Compiler'] == 'not available'


def run_script(script, *arguments, **environment):
    """Run a script in a process that has ``install_ops`` but, unlike the package, has not called it."""
    prelude = f"""
        import sys, types, warnings
        # As in an environment without the files of cbam_mmdet/compat/startup.py.
        sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, '__module__', '') != 'cbam_mmdet_startup']
        import mmcv, torch
        # The package without what its __init__.py does.
        sys.modules['cbam_mmdet'] = types.ModuleType('cbam_mmdet')
        sys.modules['cbam_mmdet'].__path__ = [{str(ROOT / 'cbam_mmdet')!r}]
        from cbam_mmdet.compat import mmcv_ops
        from cbam_mmdet.compat.mmcv_ops import install_ops
    """
    done = subprocess.run(
        [sys.executable, '-c', textwrap.dedent(prelude) + textwrap.dedent(script), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_an_absent_extension_is_served_even_after_a_failed_import():
    run_script("""
        try:
            import mmcv.ops
        except ImportError as error:
            assert error.name == 'mmcv._ext', error
        else:
            raise SystemExit('mmcv.ops was importable without install_ops')
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            assert install_ops() is True
        assert 'torchvision' not in sys.modules
        from mmcv.ops import nms
        assert nms(torch.tensor([[0., 0, 2, 2], [0, 0, 2, 2]]), torch.tensor([0.1, 0.9]), 0.5)[1].tolist() == [1]
    """)


def test_a_working_extension_is_left_alone(tmp_path):
    (tmp_path / '_ext.py').write_text('nms = "compiled"\n')
    run_script(
        """
        mmcv.__path__.append(sys.argv[1])
        assert install_ops() is False
        assert install_ops() is False
        module = sys.modules['mmcv._ext']
        assert module.nms == 'compiled' and not hasattr(module, 'softnms')
        assert module.__file__.startswith(sys.argv[1])
    """,
        str(tmp_path),
    )


def test_a_broken_extension_is_replaced_with_a_warning(tmp_path):
    for name, file, content in (
        ('module', '_ext.py', 'raise OSError("undefined symbol: _ZN2at4_ops")'),
        ('library', '_ext.so', 'built for something else'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(content)
    script = """
        for name, reason in ('module', 'OSError: undefined symbol: _ZN2at4_ops'), ('library', 'ImportError'):
            sys.modules.pop('mmcv._ext', None)
            mmcv.__path__.append(f'{sys.argv[1]}/{name}')
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter('always')
                assert install_ops() is True
                assert install_ops() is True
            messages = [str(warning.message) for warning in caught if 'mmcv._ext' in str(warning.message)]
            assert len(messages) == 1 and reason in messages[0], messages
            assert sys.modules['mmcv._ext'].nms is mmcv_ops.nms
            mmcv.__path__.pop()
    """
    run_script(script, str(tmp_path))
