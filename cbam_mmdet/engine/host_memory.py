"""Keep freed memory for reuse on a CPU, where the first touch of fresh memory costs as much as the work on it.

PyTorch allocates on a CPU by malloc. glibc's malloc gives large blocks back to the system as soon as they are free, so
every feature map of every step is made of fresh pages, which the kernel must clear first. Kept, a ResNet-50's inference
takes little more than half the time (docs/speed.md).
"""

from __future__ import annotations

import ctypes
import os
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let glibc's malloc keep large blocks that are freed, until the process ends, where training runs on a CPU.

    It is left alone where PyTorch has a GPU, where another malloc serves (by LD_PRELOAD), where the environment sets
    it (MALLOC_..., GLIBC_TUNABLES), and with CBAM_KEEP_MEMORY=0.

    Returns:
        Whether it was set.
    """
    chosen = os.environ.get('CBAM_KEEP_MEMORY') == '0' or any(
        name.startswith('MALLOC_') or name in ('LD_PRELOAD', 'GLIBC_TUNABLES') for name in os.environ
    )
    if chosen or sys.platform != 'linux' or torch.cuda.is_available():
        return False
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)  # musl has none
    return bool(mallopt and mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, NEVER))
