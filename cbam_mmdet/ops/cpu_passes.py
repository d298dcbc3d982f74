"""CBAM's passes over memory on a CPU, from PyTorch's own operators: nothing to compile. What each computes: passes.py.

On a CPU the time goes into fetching the feature map and, more than that, into the first touch of fresh memory. So a
pass walks over x in blocks that stay in a core's cache, does in place all that it has to do to a block, and makes no
tensor of x's size but its result. Half precision is computed in fp32. No matrix products:
torch.set_float32_matmul_precision may round those.

The blocks are shared out among as many threads as PyTorch uses. Left to themselves, its operators would each split
every block among all cores and wait for the slowest: hundreds of times in a pass, and for milliseconds each where
other processes want the cores as well. Which thread computes a block changes nothing, so results do not depend on
their number.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from cbam_mmdet.ops.passes import Passes, accumulate_dtype, as_operators, index_dtype

BLOCK = (
    2**19
)  # elements: 2 MB in fp32, about a second-level cache; smaller ones cost more calls, larger ones more fetching
CHUNK = 64  # pixels: the first maximum is looked for only in the chunk that holds it


def pool_pixels(x: Tensor, with_argmax: bool) -> tuple[Tensor, Tensor]:
    images, channels, pixels = x.shape
    dtype = accumulate_dtype(x)
    sums = _partial_sums(x)
    tops = x.new_empty((images, -(-pixels // CHUNK), channels), dtype=dtype).transpose(1, 2)

    def work(ns, ps, piece, buffer):
        block = _load(x[ns, :, ps], buffer)
        sums[ns, piece] = block.sum(2)
        whole, rest = divmod(block.shape[2], CHUNK)
        chunks = tops[ns, :, ps.start // CHUNK :]
        if whole:
            torch.amax(block[:, :, : whole * CHUNK].unflatten(2, (whole, CHUNK)), 3, out=chunks[:, :, :whole])
        if rest:
            chunks[:, :, whole] = block[:, :, whole * CHUNK :].amax(2)

    _in_blocks(x, work)
    top, argmax = tops.contiguous().max(2, keepdim=True)
    if with_argmax:
        # Beyond the end the last pixel stands in: it comes after itself, so the first of equals is found all the same.
        candidates = (argmax * CHUNK + torch.arange(CHUNK)).clamp_(max=pixels - 1)
        argmax = candidates.gather(2, x.gather(2, candidates).max(2, keepdim=True).indices)
    return torch.stack([sums.sum(1) / pixels, top.squeeze(2)], 1), argmax.squeeze(2).to(torch.int32)


def pool_channels(x: Tensor, with_argmax: bool, c: Tensor) -> tuple[Tensor, Tensor]:
    images, channels, pixels = x.shape
    descriptor = x.new_empty((images, 2, pixels), dtype=c.dtype)
    argmax = x.new_empty((images, pixels), dtype=index_dtype(channels))
    countdown = torch.arange(channels, 0, -1, dtype=c.dtype)[:, None]

    def work(ns, ps, piece, buffer):
        u = torch.mul(_load(x[ns, :, ps], buffer), c[ns, :, None], out=buffer)
        top = u.amax(1, keepdim=True)
        descriptor[ns, :1, ps] = top
        descriptor[ns, 1, ps] = u.mean(1)
        if with_argmax:
            # Of the channels that equal the maximum the first has the highest number. Max with indices takes five
            # times as long.
            first = channels - u.eq_(top).mul_(countdown).amax(1)
            if (first == channels).any():  # NaN equals nothing
                first = (x[ns, :, ps] * c[ns, :, None]).max(1).indices
            argmax[ns, ps] = first.to(argmax.dtype)

    _in_blocks(x, work)
    return descriptor, argmax


def refine(x: Tensor, s: Tensor, c: Tensor) -> Tensor:
    y = torch.empty_like(x)

    def work(ns, ps, piece, buffer):
        block = _target(y[ns, :, ps], buffer)
        torch.mul(_load(x[ns, :, ps], buffer), c[ns, :, None], out=block).mul_(s[ns, None, ps])
        if block is buffer:
            y[ns, :, ps] = buffer

    _in_blocks(x, work)
    return y


def backward_maps(g: Tensor, x: Tensor, s: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    sums, ds = _partial_sums(x), torch.empty_like(s)

    def work(ns, ps, piece, product, other):
        torch.mul(_load(x[ns, :, ps], product), _load(g[ns, :, ps], other), out=product)
        ds[ns, ps] = torch.mul(product, c[ns, :, None], out=other).sum(1)
        sums[ns, piece] = product.mul_(s[ns, None, ps]).sum(2)

    _in_blocks(x, work, buffers=2)
    return ds, sums.sum(1)


def backward_pool_channels(x: Tensor, dz: Tensor, j: Tensor) -> Tensor:
    sums, dtop, dmean = _partial_sums(x), dz[:, :1], dz[:, 1:] / x.shape[1]

    def work(ns, ps, piece, buffer):
        sums[ns, piece] = torch.mul(_load(x[ns, :, ps], buffer), dmean[ns, :, ps], out=buffer).sum(2)

    _in_blocks(x, work)
    # One value a pixel: x itself there, not maximum / c, which is 0 / 0 where c is 0.
    j = j.long().unsqueeze(1)
    return sums.sum(1).scatter_add_(1, j.squeeze(1), (x.gather(1, j) * dtop).squeeze(1))


def backward_input(g: Tensor, c: Tensor, s: Tensor, dz: Tensor, j: Tensor, dpool: Tensor, i: Tensor) -> Tensor:
    dx = torch.empty_like(g)
    dtop, dmean = dz[:, :1], dz[:, 1:] / g.shape[1]
    davg, dmax = dpool[:, 0, :, None] / g.shape[2], dpool[:, 1]
    j = j.long().unsqueeze(1)

    def work(ns, ps, piece, buffer):
        block = _target(dx[ns, :, ps], buffer)
        torch.mul(_load(g[ns, :, ps], buffer), s[ns, None, ps], out=block).add_(dmean[ns, :, ps])
        block.scatter_add_(1, j[ns, :, ps], dtop[ns, :, ps]).mul_(c[ns, :, None]).add_(davg[ns])
        if block is buffer:
            dx[ns, :, ps] = buffer

    _in_blocks(g, work)
    # Not by scatter_add_, which in half precision copies dx to fp32 and back.
    maxima = torch.arange(dx.shape[0])[:, None], torch.arange(dx.shape[1]), i.long()
    dx[maxima] += dmax.to(dx.dtype)
    return dx


def _in_blocks(x: Tensor, work: Callable, buffers: int = 1) -> None:
    """Call work(images, pixels, piece, *buffers) for every block of x, from several threads.

    Images and pixels are slices, piece counts the blocks of an image, and the buffers have the block's shape and
    layout, and the dtype to compute in.
    """
    blocks = iter([*_blocks(*x.shape)])  # the threads draw from one iterator: who is slow gets less
    inference = torch.is_inference_mode_enabled()

    def draw() -> None:
        held: list[Tensor] = []
        with torch.inference_mode(inference), torch.no_grad():
            for ns, ps, piece in blocks:
                block = x[ns, :, ps]
                if not held or held[0].shape != block.shape:
                    held = [torch.empty_like(block, dtype=accumulate_dtype(x)) for _ in range(buffers)]
                work(ns, ps, piece, *held)

    threads = torch.get_num_threads()
    if threads == 1 or x.numel() <= BLOCK:
        draw()
        return
    helpers = [_helpers(threads - 1).submit(draw) for _ in range(threads - 1)]
    torch.set_num_threads(1)
    try:
        draw()
        for helper in helpers:
            helper.result()
    finally:
        # Only now: what a helper sets for itself when it starts is also the default of threads to come.
        torch.set_num_threads(threads)


def _pieces(channels: int, pixels: int) -> tuple[int, int]:
    """How many pixels a block has, and how many blocks an image."""
    step = max(BLOCK // channels // CHUNK, 1) * CHUNK
    return step, -(-pixels // step)


def _blocks(images: int, channels: int, pixels: int) -> Iterator[tuple[slice, slice, int]]:
    step, pieces = _pieces(channels, pixels)
    together = max(BLOCK // (channels * pixels), 1) if pieces == 1 else 1  # small images
    for n in range(0, images, together):
        for piece in range(pieces):
            yield slice(n, n + together), slice(piece * step, min((piece + 1) * step, pixels)), piece


def _partial_sums(x: Tensor) -> Tensor:
    """(N, pieces, C): a sum for each block."""
    images, channels, pixels = x.shape
    return x.new_empty((images, _pieces(channels, pixels)[1], channels), dtype=accumulate_dtype(x))


def _load(block: Tensor, buffer: Tensor) -> Tensor:
    """The block in the buffer's dtype: itself, or copied there."""
    return block if block.dtype == buffer.dtype else buffer.copy_(block)


def _target(block: Tensor, buffer: Tensor) -> Tensor:
    """Where to compute a block of the result: in place, or in the buffer where its dtype is not the result's."""
    return block if block.dtype == buffer.dtype else buffer


def _helpers(count: int) -> ThreadPoolExecutor:
    """Threads in which PyTorch's operators do not split themselves up."""
    global _pool
    if _pool is None or _pool[0] != count:
        _pool = count, ThreadPoolExecutor(count, 'cbam', initializer=torch.set_num_threads, initargs=(1,))
    return _pool[1]


def _forget_helpers() -> None:
    global _pool
    _pool = None


_pool: tuple[int, ThreadPoolExecutor] | None = None
os.register_at_fork(after_in_child=_forget_helpers)  # threads do not live on in a forked process

EAGER_FUNCTIONS = Passes(pool_pixels, pool_channels, refine, backward_maps, backward_pool_channels, backward_input)
CUSTOM_OPERATORS = as_operators(EAGER_FUNCTIONS, 'cpu')
