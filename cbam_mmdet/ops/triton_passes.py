"""The six passes of passes.py in Triton: each reads x (and g) once and writes at most one tensor of its size.

A kernel works on tiles of one image, channels by pixels; which of the two lies side by side in memory only decides a
tile's shape, so one kernel supports both layouts. Sums are taken in fp32 (fp64 for fp64). No atomics: where a sum is
shared out among programs, each writes its part and a sum over the parts follows, so results are the same in every
run.

Successive passes walk over the images in opposite directions: what one has read last, the next one reads first, and
finds in the L2 cache. With 60 MB of it (H200) that is most of a batch of two in a ResNet-50's first stage (68 MB in
bf16), without the launches that working image by image takes, and also where BatchNorm's statistics keep the images
together.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from cbam_mmdet.ops.passes import Passes, accumulate_dtype, as_operators, index_dtype

TILE = 2048  # elements of a tile: 16 for each thread of four warps
PROGRAMS_PER_PROCESSOR = 4  # below that a reduction is split up
ACCUMULATE = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def _program(REVERSE: tl.constexpr):
    program = tl.program_id(0)
    if REVERSE:
        program = tl.num_programs(0) - 1 - program
    return program


@triton.jit
def _offsets(rows, columns, row_stride, column_stride, WIDE: tl.constexpr):
    """Of a tile within its image, in 64 bits where an image has 2^31 elements."""
    if WIDE:
        rows, columns = rows.to(tl.int64), columns.to(tl.int64)
    return rows[:, None] * row_stride + columns[None, :] * column_stride


@triton.jit
def _pool_kernel(
    x, gate, bias, sign, pooled, argmax,
    image, kept, reduced, kept_stride, reduced_stride, kept_blocks, splits, span,
    GATED: tl.constexpr, BIASED: tl.constexpr, SIGNED: tl.constexpr, MEAN_FIRST: tl.constexpr,
    REVERSE: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Mean, maximum and argmax of x, or of x * gate[r] + bias[r], over one dimension (r), for each k of the other.

    With a sign[k] the maximum is that of x * sign[k]; the mean is without.
    pooled: (N, splits, 2, kept), the mean as a part of it: sum over the span / reduced. argmax: (N, splits, kept).
    """
    program = _program(REVERSE)
    split = program % splits
    block = program // splits % kept_blocks
    n = (program // splits // kept_blocks).to(tl.int64)
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    start = split * span
    end = tl.minimum(start + span, reduced)
    total = tl.zeros((BLOCK_K, BLOCK_R), ACC)
    best = tl.full((BLOCK_K, BLOCK_R), float('-inf'), ACC)
    at = tl.zeros((BLOCK_K, BLOCK_R), tl.int32) + start + tl.arange(0, BLOCK_R)[None, :]
    for first in range(start, end, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        inside = (k < kept)[:, None] & (r < end)[None, :]
        value = tl.load(x + n * image + _offsets(k, r, kept_stride, reduced_stride, WIDE), inside, 0.0).to(ACC)
        if GATED:
            value *= tl.load(gate + n * reduced + r, r < end, 0.0)[None, :]
        if BIASED:
            value += tl.load(bias + n * reduced + r, r < end, 0.0)[None, :]
        total += value
        if SIGNED:
            value *= tl.load(sign + k, k < kept, 0.0)[:, None]
        value = tl.where(inside, value, float('-inf'))
        # As torch has it: NaN is greater than all, and of equals the first is taken.
        better = (value > best) | ((value != value) & (best == best))
        best = tl.where(better, value, best)
        at = tl.where(better, r[None, :], at)
    nan = best != best
    has_nan = tl.max(nan.to(tl.int32), 1) > 0
    top = tl.max(tl.where(nan, float('-inf'), best), 1)
    greatest = tl.where(has_nan[:, None], nan, best == top[:, None])
    first = tl.min(tl.where(greatest, at, 2147483647), 1)
    top = tl.where(has_nan, float('nan'), top)
    mean = tl.sum(total, 1) / reduced
    row = n * splits + split
    pooled += row * 2 * kept + k
    tl.store(pooled, mean if MEAN_FIRST else top, k < kept)
    tl.store(pooled + kept, top if MEAN_FIRST else mean, k < kept)
    tl.store(argmax + row * kept + k, first.to(argmax.dtype.element_ty), k < kept)


@triton.jit
def _refine_kernel(
    x, c, s, bias, identity, y,
    image, channels, pixels, c_stride, p_stride, c_blocks, p_blocks,
    TAIL: tl.constexpr, REVERSE: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """y = x * c * s; as a block's tail relu((x * c + bias) * s + identity)."""
    program = _program(REVERSE)
    n = (program // c_blocks // p_blocks).to(tl.int64)
    ch = program // p_blocks % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    p = program % p_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (ch < channels)[:, None] & (p < pixels)[None, :]
    offsets = n * image + _offsets(ch, p, c_stride, p_stride, WIDE)
    gate_c = tl.load(c + n * channels + ch, ch < channels, 0.0)
    gate_s = tl.load(s + n * pixels + p, p < pixels, 0.0)
    value = tl.load(x + offsets, inside, 0.0).to(c.dtype.element_ty) * gate_c[:, None]
    if TAIL:
        value += tl.load(bias + n * channels + ch, ch < channels, 0.0)[:, None]
    value *= gate_s[None, :]
    if TAIL:
        value += tl.load(identity + offsets, inside, 0.0).to(value.dtype)
        value = tl.where(value <= 0, 0.0, value)  # NaN stays, as in torch
    tl.store(y + offsets, value.to(y.dtype.element_ty), inside)


@triton.jit
def _backward_maps_kernel(
    g, x, c, s, bias, y, dc, ds, dbias, h,
    image, channels, pixels, c_stride, p_stride, p_blocks, splits, span,
    TAIL: tl.constexpr, REVERSE: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """ds[p] = sum_c g*x*c and dc[c] = sum_p g*x*s, in parts: ds (N, splits, P), dc (N, p_blocks, C).

    As a block's tail: h = g where y > 0, in g's place; ds[p] = sum_c h*(x*c + bias), and dbias[c] = sum_p h*s like dc.
    """
    program = _program(REVERSE)
    split = program % splits
    block = program // splits % p_blocks
    n = (program // splits // p_blocks).to(tl.int64)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    gate_s = tl.load(s + n * pixels + p, p < pixels, 0.0)
    total = tl.zeros((BLOCK_C, BLOCK_P), ACC)
    start = split * span
    end = tl.minimum(start + span, channels)
    for first in range(start, end, BLOCK_C):
        ch = first + tl.arange(0, BLOCK_C)
        inside = (ch < end)[:, None] & (p < pixels)[None, :]
        offsets = n * image + _offsets(ch, p, c_stride, p_stride, WIDE)
        gradient = tl.load(g + offsets, inside, 0.0)
        part = (n * p_blocks + block) * channels + ch
        if TAIL:
            gradient = tl.where(tl.load(y + offsets, inside, 0.0) <= 0, 0.0, gradient)
            tl.store(h + offsets, gradient, inside)
            total += gradient.to(ACC) * tl.load(bias + n * channels + ch, ch < end, 0.0)[:, None]
            tl.store(dbias + part, tl.sum(gradient.to(ACC) * gate_s[None, :], 1), ch < end)
        product = gradient.to(ACC) * tl.load(x + offsets, inside, 0.0).to(ACC)
        total += product * tl.load(c + n * channels + ch, ch < end, 0.0)[:, None]
        tl.store(dc + part, tl.sum(product * gate_s[None, :], 1), ch < end)
    tl.store(ds + (n * splits + split) * pixels + p, tl.sum(total, 0), p < pixels)


@triton.jit
def _backward_pool_channels_kernel(
    x, dz, j, dc, dbias,
    image, channels, pixels, c_stride, p_stride, c_blocks, splits, span,
    TAIL: tl.constexpr, REVERSE: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dc[c] = sum_p x * (dmean / C + dtop where j == c), in parts: dc (N, splits, C).

    As a block's tail also dbias, which is the same sum without x.
    """
    program = _program(REVERSE)
    split = program % splits
    block = program // splits % c_blocks
    n = (program // splits // c_blocks).to(tl.int64)
    ch = block * BLOCK_C + tl.arange(0, BLOCK_C)
    dz += n * 2 * pixels
    total = tl.zeros((BLOCK_C, BLOCK_P), ACC)
    total_bias = tl.zeros((BLOCK_C, BLOCK_P), ACC)
    start = split * span
    end = tl.minimum(start + span, pixels)
    for first in range(start, end, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        inside = (ch < channels)[:, None] & (p < end)[None, :]
        value = tl.load(x + n * image + _offsets(ch, p, c_stride, p_stride, WIDE), inside, 0.0).to(ACC)
        dtop = tl.load(dz + p, p < end, 0.0)
        dmean = tl.load(dz + pixels + p, p < end, 0.0) / channels
        argmax = tl.load(j + n * pixels + p, p < end, -1)
        gradient = dmean[None, :] + tl.where(argmax[None, :] == ch[:, None], dtop[None, :], 0.0)
        total += value * gradient
        if TAIL:
            total_bias += gradient
    part = (n * splits + split) * channels + ch
    tl.store(dc + part, tl.sum(total, 1), ch < channels)
    if TAIL:
        tl.store(dbias + part, tl.sum(total_bias, 1), ch < channels)


@triton.jit
def _backward_input_kernel(
    g, c, s, dz, j, dpool, i, dx,
    image, channels, pixels, c_stride, p_stride, c_blocks, p_blocks,
    REVERSE: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dx = (g*s + dmean/C + dtop where j == c) * c + davg/P + dmax where i == p."""
    program = _program(REVERSE)
    n = (program // c_blocks // p_blocks).to(tl.int64)
    ch = program // p_blocks % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    p = program % p_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (ch < channels)[:, None] & (p < pixels)[None, :]
    offsets = n * image + _offsets(ch, p, c_stride, p_stride, WIDE)
    gate_c = tl.load(c + n * channels + ch, ch < channels, 0.0)
    davg = tl.load(dpool + n * 2 * channels + ch, ch < channels, 0.0) / pixels
    dmax = tl.load(dpool + n * 2 * channels + channels + ch, ch < channels, 0.0)
    argmax_p = tl.load(i + n * channels + ch, ch < channels, -1)
    gate_s = tl.load(s + n * pixels + p, p < pixels, 0.0)
    dtop = tl.load(dz + n * 2 * pixels + p, p < pixels, 0.0)
    dmean = tl.load(dz + n * 2 * pixels + pixels + p, p < pixels, 0.0) / channels
    argmax_c = tl.load(j + n * pixels + p, p < pixels, -1)
    value = tl.load(g + offsets, inside, 0.0).to(c.dtype.element_ty) * gate_s[None, :] + dmean[None, :]
    value += tl.where(argmax_c[None, :] == ch[:, None], dtop[None, :], 0.0)
    value = value * gate_c[:, None] + davg[:, None] + tl.where(argmax_p[:, None] == p[None, :], dmax[:, None], 0.0)
    tl.store(dx + offsets, value.to(dx.dtype.element_ty), inside)


def pool_pixels(x: Tensor, with_argmax: bool) -> tuple[Tensor, Tensor]:
    return _pool(x, torch.int32)


def pool_pixels_signed(x: Tensor, with_argmax: bool, sign: Tensor) -> tuple[Tensor, Tensor]:
    """[mean, x[i]] and i, the argmax of x * sign, sign (C,)."""
    descriptor, i = _pool(x, torch.int32, sign=sign)
    # Not the maximum times the sign, for that may be 0.
    return torch.stack([descriptor[:, 0], x.gather(2, i.long().unsqueeze(2)).squeeze(2).to(descriptor.dtype)], 1), i


def pool_channels(x: Tensor, with_argmax: bool, c: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return _pool(x, index_dtype(x.shape[1]), c.contiguous(), None if bias is None else bias.contiguous())


def _pool(
    x: Tensor, dtype: torch.dtype, gate: Tensor | None = None, bias: Tensor | None = None, sign: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Over the pixels without a gate, else over the channels: the descriptor and the argmax."""
    images, channels, pixels = x.shape
    kept, reduced = (channels, pixels) if gate is None else (pixels, channels)
    kept_stride, reduced_stride = _strides(x) if gate is None else _strides(x)[::-1]
    block_k, block_r = _tile(kept, reduced, kept_stride == 1)
    kept_blocks = triton.cdiv(kept, block_k)
    splits, span = _splits(x, images * kept_blocks, reduced, block_r)
    pooled = x.new_empty((images, splits, 2, kept), dtype=accumulate_dtype(x))
    argmax = x.new_empty((images, splits, kept), dtype=dtype)
    with torch.cuda.device_of(x):
        _pool_kernel[(images * kept_blocks * splits,)](
            x, gate, bias, sign, pooled, argmax,
            channels * pixels, kept, reduced, kept_stride, reduced_stride, kept_blocks, splits, span,
            GATED=gate is not None, BIASED=bias is not None, SIGNED=sign is not None,
            MEAN_FIRST=gate is None, REVERSE=gate is not None, WIDE=_wide(x),
            ACC=ACCUMULATE[pooled.dtype], BLOCK_K=block_k, BLOCK_R=block_r,
        )  # fmt: skip
    if splits == 1:
        return pooled[:, 0], argmax[:, 0]
    first, second = pooled.unbind(2)
    means, tops = (first, second) if gate is None else (second, first)
    top, which = tops.max(1, keepdim=True)  # of equals, and of NaN, the first again
    descriptor = [means.sum(1, keepdim=True), top]
    return torch.cat(descriptor if gate is None else descriptor[::-1], 1), argmax.gather(1, which).squeeze(1)


def refine(x: Tensor, s: Tensor, c: Tensor) -> Tensor:
    y = torch.empty_like(x)
    _elementwise(_refine_kernel, x, x, c.contiguous(), s.contiguous(), None, None, y, REVERSE=False, TAIL=False)
    return y


def refine_tail(x: Tensor, s: Tensor, c: Tensor, bias: Tensor, identity: Tensor) -> Tensor:
    """relu((x * c + bias) * s + identity), identity of x's dtype and strides."""
    y = torch.empty_like(x)
    small = (t.contiguous() for t in (c, s, bias))
    _elementwise(_refine_kernel, x, x, *small, identity, y, REVERSE=False, TAIL=True)
    return y


def backward_maps(g: Tensor, x: Tensor, s: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return _backward_maps(g, x, s, c)[:2]


def backward_maps_tail(g: Tensor, x: Tensor, s: Tensor, c: Tensor, bias: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """ds, dc, dbias, and h, the gradient before ReLU, which is the identity's."""
    return _backward_maps(g, x, s, c, bias.contiguous(), y)


def _backward_maps(g, x, s, c, bias=None, y=None):
    tail = y is not None
    images, channels, pixels = x.shape
    c_stride, p_stride = _strides(x)
    block_p, block_c = _tile(pixels, channels, p_stride == 1)
    p_blocks = triton.cdiv(pixels, block_p)
    splits, span = _splits(x, images * p_blocks, channels, block_c)
    dc = x.new_empty((images, p_blocks, channels), dtype=accumulate_dtype(x))
    ds = x.new_empty((images, splits, pixels), dtype=accumulate_dtype(x))
    dbias, h = (torch.empty_like(dc), torch.empty_like(g)) if tail else (None, None)
    with torch.cuda.device_of(x):
        _backward_maps_kernel[(images * p_blocks * splits,)](
            g, x, c.contiguous(), s.contiguous(), bias, y, dc, ds, dbias, h,
            channels * pixels, channels, pixels, c_stride, p_stride, p_blocks, splits, span,
            TAIL=tail, REVERSE=True, WIDE=_wide(x), ACC=ACCUMULATE[dc.dtype], BLOCK_C=block_c, BLOCK_P=block_p,
        )  # fmt: skip
    return ds.sum(1), dc.sum(1), dbias.sum(1) if tail else None, h


def backward_pool_channels(x: Tensor, dz: Tensor, j: Tensor) -> Tensor:
    return _backward_pool_channels(x, dz, j, tail=False)[0]


def backward_pool_channels_tail(x: Tensor, dz: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
    """dc and dbias."""
    return _backward_pool_channels(x, dz, j, tail=True)


def _backward_pool_channels(x, dz, j, tail):
    images, channels, pixels = x.shape
    c_stride, p_stride = _strides(x)
    block_c, block_p = _tile(channels, pixels, c_stride == 1)
    c_blocks = triton.cdiv(channels, block_c)
    splits, span = _splits(x, images * c_blocks, pixels, block_p)
    dc = x.new_empty((images, splits, channels), dtype=accumulate_dtype(x))
    dbias = torch.empty_like(dc) if tail else None
    with torch.cuda.device_of(x):
        _backward_pool_channels_kernel[(images * c_blocks * splits,)](
            x, dz.contiguous(), j, dc, dbias,
            channels * pixels, channels, pixels, c_stride, p_stride, c_blocks, splits, span,
            TAIL=tail, REVERSE=False, WIDE=_wide(x), ACC=ACCUMULATE[dc.dtype], BLOCK_C=block_c, BLOCK_P=block_p,
        )  # fmt: skip
    return dc.sum(1), dbias.sum(1) if tail else None


def backward_input(g: Tensor, c: Tensor, s: Tensor, dz: Tensor, j: Tensor, dpool: Tensor, i: Tensor) -> Tensor:
    dx = torch.empty_like(g)
    small = (t.contiguous() for t in (c, s, dz, j, dpool, i))
    _elementwise(_backward_input_kernel, g, g, *small, dx, REVERSE=True)
    return dx


def _elementwise(kernel, x: Tensor, *arguments: Tensor | None, **flags: bool) -> None:
    images, channels, pixels = x.shape
    c_stride, p_stride = _strides(x)
    if p_stride == 1:
        block_p = min(triton.next_power_of_2(pixels), 512)
        block_c = min(triton.next_power_of_2(channels), TILE // block_p)
    else:
        block_c = min(triton.next_power_of_2(channels), 512)
        block_p = min(triton.next_power_of_2(pixels), TILE // block_c)
    c_blocks, p_blocks = triton.cdiv(channels, block_c), triton.cdiv(pixels, block_p)
    with torch.cuda.device_of(x):
        kernel[(images * c_blocks * p_blocks,)](
            *arguments, channels * pixels, channels, pixels, c_stride, p_stride, c_blocks, p_blocks,
            WIDE=_wide(x), BLOCK_C=block_c, BLOCK_P=block_p, **flags,
        )  # fmt: skip


def _strides(x: Tensor) -> tuple[int, int]:
    """Of channels and of pixels. A dimension of size 1 may have any stride: the layout decides."""
    return (x.shape[2], 1) if x.is_contiguous() else (1, x.shape[1])


def _tile(kept: int, reduced: int, kept_side_by_side: bool) -> tuple[int, int]:
    """A tile of a reduction, kept by reduced: long where memory is contiguous."""
    if kept_side_by_side:
        block_k = min(triton.next_power_of_2(kept), 128)
        return block_k, min(triton.next_power_of_2(reduced), TILE // block_k)
    block_r = min(triton.next_power_of_2(reduced), 1024)
    return min(triton.next_power_of_2(kept), TILE // block_r), block_r


def _splits(x: Tensor, programs: int, reduced: int, block_r: int) -> tuple[int, int]:
    """Into how many spans to cut the dimension that is reduced, so that all processors are busy, and their length."""
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    steps = triton.cdiv(reduced, block_r)
    splits = min(triton.cdiv(PROGRAMS_PER_PROCESSOR * processors, programs), steps)
    span = triton.cdiv(steps, splits) * block_r
    return triton.cdiv(reduced, span), span


def _wide(x: Tensor) -> bool:
    return x.shape[1] * x.shape[2] >= 2**31


def tail_passes(sign: Tensor) -> Passes:
    """The passes of a block's tail, for a norm whose scale has this sign, (C,); see models/fused_tail.py."""
    first = functools.partial(pool_pixels_signed, sign=sign)
    return Passes(
        first,
        pool_channels,
        refine_tail,
        backward_maps_tail,
        backward_pool_channels_tail,
        backward_input,
        has_tail=True,
    )


EAGER_FUNCTIONS = Passes(pool_pixels, pool_channels, refine, backward_maps, backward_pool_channels, backward_input)
CUSTOM_OPERATORS = as_operators(EAGER_FUNCTIONS, 'triton')
