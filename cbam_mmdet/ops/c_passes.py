"""CBAM's passes over memory on a CPU, by the C library of cpu_kernels.c. What each computes: passes.py.

setup.py builds the library where it finds a C compiler, once for every CPU of its kind and once for those with AVX2.
It knows nothing of torch: it gets pointers, sizes and the number of threads by ctypes. It asks for `libgomp.so.1`,
which on Linux torch has loaded, so both share the same OpenMP threads.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.machinery
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from cbam_mmdet.compat.torch import assume_constant_result, is_compiling
from cbam_mmdet.ops.passes import Passes, accumulate_dtype, as_operators, index_dtype

DTYPES = {torch.float32: 'f32', torch.float64: 'f64', torch.bfloat16: 'bf16'}
NOT_BUILT = 'was not built when cbam-mmdet was installed: a C compiler with OpenMP, such as gcc, was missing or failed'
SWITCHED_OFF = 'is switched off by CBAM_CPU_KERNEL=0'
HUGE_PAGE = 2**21  # bytes, of Linux on x86-64 and most of arm64
SERIAL = 2**15  # elements: below, waking other threads costs more than they take over

_is_forked = False  # OpenMP's threads do not live on in a forked process, and GCC's OpenMP waits for them


def _note_fork() -> None:
    global _is_forked
    _is_forked = True


os.register_at_fork(after_in_child=_note_fork)


@assume_constant_result
def unavailable() -> str | None:
    """Why the C library does not serve; None where it does."""
    return _load()[1]


def obstacle(x: Tensor) -> str | None:
    """Why the kernels do not support x, a CPU tensor; None where they do."""
    if reason := unavailable():
        return f'needs the C library, which {reason}'
    if _is_forked:
        return 'needs OpenMP, whose threads do not live on in a forked process'
    if x.dtype not in DTYPES:
        return f'supports fp32, fp64 and bf16 on a CPU, not {x.dtype}'
    if not is_compiling():
        if type(x) not in (Tensor, nn.Parameter):
            return f'supports tensors with memory of their own, not {type(x).__name__}'
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return 'supports neither torch.func nor forward-mode differentiation'
    return None


def library() -> Path | None:
    """The file of the library that serves."""
    loaded = _load()[0]
    return None if loaded is None else Path(loaded._name)


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none."""
    return load_from(Path(__file__).parent)


def load_from(folder: Path) -> tuple[ctypes.CDLL | None, str | None]:
    """The library of that folder for this CPU, or why there is none."""
    if os.environ.get('CBAM_CPU_KERNEL') == '0':
        return None, SWITCHED_OFF
    names = ['_cpu_kernels']
    if torch.backends.cpu.get_cpu_capability() in ('AVX2', 'AVX512'):
        names.insert(0, '_cpu_kernels_avx2')
    files = [folder / (name + suffix) for name in names for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    built = [file for file in files if file.exists()]
    if not built:
        return None, NOT_BUILT
    try:
        loaded = ctypes.CDLL(str(built[0]))
        built_of = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(loaded, 'cbam_source'))).decode()
        sources = b''.join((folder / f'cpu_kernels.{ending}').read_bytes() for ending in 'ch')
    except (OSError, ValueError) as error:  # also where the sources are missing
        return None, f'cannot be loaded: {error}'
    if built_of != hashlib.sha256(sources).hexdigest()[:16]:
        return None, f'was built of other sources than those beside it ({built[0].name}): install cbam-mmdet again'
    return loaded, None


@functools.cache
def kernel(name: str, dtype: torch.dtype) -> Callable[..., None]:
    """The function of the library; its arguments: KERNELS."""
    function = getattr(_load()[0], f'cbam_{name}_{DTYPES[dtype]}')
    function.argtypes = [_ARGUMENTS[letter] for letter in KERNELS[name].replace(' ', '')]
    function.restype = None
    return function


def threads_for(elements: int) -> int:
    """How many threads a kernel is to use."""
    return 1 if elements < SERIAL else torch.get_num_threads()


# Of each kernel in C: pointers (p), sizes (s), and the number of threads (t).
_ARGUMENTS = dict(p=ctypes.c_void_p, s=ctypes.c_int64, t=ctypes.c_int)
KERNELS = dict(
    pool_rows='pp sss p s p t',
    pool_columns='pp sss p s pp t',
    scale='ppp sss p t',
    backward_maps='pppp sss ppp t',
    backward_pool_columns='ppp sss p t',
    backward_pool_rows='ppp sss pp t',
    backward_input_columns='ppppppp sss p t',
    backward_input_rows='ppppppp sss p t',
    convolve='pp ssssss pp t',
    convolve_weight='pp sssss pp t',
    mlp='ppppp ssss ppp',
    mlp_backward='pppppp ssss pppppp',
)


def _spans(rows: int, columns: int) -> int:
    return _load()[0].cbam_spans(ctypes.c_int64(rows), ctypes.c_int64(columns))


def _tiles(columns: int) -> int:
    return _load()[0].cbam_tiles(ctypes.c_int64(columns))


def _sizes(x: Tensor) -> tuple[int, int, int, bool]:
    """Images, rows, columns, and whether rows are channels (x is contiguous)."""
    images, channels, pixels = x.shape
    return (images, channels, pixels, True) if x.is_contiguous() else (images, pixels, channels, False)


def _result_like(x: Tensor) -> Tensor:
    """Memory for a result of x's shape, dtype and strides; on Linux in huge pages, where it fills half of one.

    A network's freed memory goes back to Linux, and fresh pages of 4 KiB cost more than a pass. In exchange up to a
    huge page before the result, and half of one behind it, may be in use as long as the result lives. Its storage
    belongs to NumPy: it cannot be resized.
    """
    size = x.numel() * x.element_size()
    if sys.platform != 'linux' or size < HUGE_PAGE // 2:
        return torch.empty_like(x)
    whole = (size + HUGE_PAGE // 2) // HUGE_PAGE * HUGE_PAGE
    memory = np.empty(max(size, whole) + HUGE_PAGE, np.uint8)
    offset = -memory.ctypes.data % HUGE_PAGE
    _load()[0].cbam_expect_writes(ctypes.c_void_p(memory.ctypes.data + offset), ctypes.c_int64(whole))
    # The storage holds the result's own bytes only, so that a copy and a file do.
    storage = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=offset).untyped_storage()
    return x.new_empty(0).set_(storage, 0, x.shape, x.stride())


def _places(x: Tensor, j: Tensor) -> Tensor:
    return j.to(torch.int64 if x.dtype == torch.float64 else torch.int32)


def _pool(x: Tensor, by_rows: bool, weight: Tensor | None, mean_at: int, with_argmax: bool) -> tuple[Tensor, Tensor]:
    """Mean and maximum of each row, or of each column: (N, 2, kept), the mean at mean_at, and the argmax."""
    images, rows, columns, _ = _sizes(x)
    kept = rows if by_rows else columns
    pooled = x.new_empty((images, 2, kept), dtype=accumulate_dtype(x))
    argmax = x.new_empty((images, kept), dtype=torch.int32)
    arguments = [x.data_ptr(), None if weight is None else weight.data_ptr(), images, rows, columns,
                 pooled.data_ptr(), mean_at, argmax.data_ptr() if with_argmax else None]  # fmt: skip
    threads = threads_for(x.numel())
    if by_rows:
        kernel('pool_rows', x.dtype)(*arguments, threads)
    else:
        parts = pooled.new_empty(3 * images * _spans(rows, columns) * columns)
        kernel('pool_columns', x.dtype)(*arguments, parts.data_ptr(), threads)
    return pooled, argmax


def pool_pixels(x: Tensor, with_argmax: bool) -> tuple[Tensor, Tensor]:
    return _pool(x, x.is_contiguous(), None, 0, with_argmax)


def pool_channels(x: Tensor, with_argmax: bool, c: Tensor) -> tuple[Tensor, Tensor]:
    descriptor, argmax = _pool(x, not x.is_contiguous(), c.contiguous(), 1, with_argmax)
    return descriptor, argmax.to(index_dtype(x.shape[1]))


def refine(x: Tensor, s: Tensor, c: Tensor) -> Tensor:
    images, rows, columns, by_channel = _sizes(x)
    y = _result_like(x)
    c, s = c.contiguous(), s.contiguous()
    by_row, by_column = (c, s) if by_channel else (s, c)
    kernel('scale', x.dtype)(
        x.data_ptr(),
        by_row.data_ptr(),
        by_column.data_ptr(),
        images,
        rows,
        columns,
        y.data_ptr(),
        threads_for(x.numel()),
    )
    return y


def backward_maps(g: Tensor, x: Tensor, s: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    images, rows, columns, by_channel = _sizes(x)
    c, s = c.contiguous(), s.contiguous()
    ds, dc = torch.empty_like(s), torch.empty_like(c)
    parts = c.new_empty(images * (_spans(rows, columns) * columns + _tiles(columns) * rows))
    small = (c, s, dc, ds) if by_channel else (s, c, ds, dc)
    by_row, by_column, of_row, of_column = (t.data_ptr() for t in small)
    kernel('backward_maps', x.dtype)(
        g.data_ptr(), x.data_ptr(), by_row, by_column, images, rows, columns, of_row, of_column, parts.data_ptr(),
        threads_for(x.numel()),
    )  # fmt: skip
    return ds, dc


def backward_pool_channels(x: Tensor, dz: Tensor, j: Tensor) -> Tensor:
    images, rows, columns, by_channel = _sizes(x)
    dc, dz, j = dz.new_empty(x.shape[:2]), dz.contiguous(), _places(x, j).contiguous()
    arguments = x.data_ptr(), dz.data_ptr(), j.data_ptr(), images, rows, columns, dc.data_ptr()
    threads = threads_for(x.numel())
    if by_channel:
        kernel('backward_pool_columns', x.dtype)(*arguments, threads)
    else:
        parts = dz.new_empty(images * _spans(rows, columns) * columns)
        kernel('backward_pool_rows', x.dtype)(*arguments, parts.data_ptr(), threads)
    return dc


def backward_input(g: Tensor, c: Tensor, s: Tensor, dz: Tensor, j: Tensor, dpool: Tensor, i: Tensor) -> Tensor:
    images, rows, columns, by_channel = _sizes(g)
    dx = _result_like(g)
    small = [t.contiguous() for t in (c, s, dz, _places(g, j), dpool, i)]
    kernel('backward_input_columns' if by_channel else 'backward_input_rows', g.dtype)(
        g.data_ptr(), *(t.data_ptr() for t in small), images, rows, columns, dx.data_ptr(), threads_for(g.numel())
    )
    return dx


EAGER_FUNCTIONS = Passes(pool_pixels, pool_channels, refine, backward_maps, backward_pool_channels, backward_input)
CUSTOM_OPERATORS = as_operators(EAGER_FUNCTIONS, 'c')
