"""What is installed, and what serves what. A fact that cannot be found out says why."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from cbam_mmdet.apis.doctor.case import in_one_line, without_paths

# Import name -> the distributions that bring it, and whether the plugin needs it.
PACKAGES = {
    'torch': (('torch',), True),
    'torchvision': (('torchvision',), True),
    'mmcv': (('onedl-mmcv', 'mmcv', 'mmcv-lite', 'mmcv-full'), True),
    'mmengine': (('onedl-mmengine', 'mmengine'), True),
    'mmdet': (('onedl-mmdetection', 'mmdet'), True),
    'numpy': (('numpy',), True),
    'pycocotools': (('pycocotools',), False),
    'hotcoco': (('hotcoco',), False),
    'timm': (('timm',), False),
    'mmpretrain': (('onedl-mmpretrain', 'mmpretrain'), False),
    'triton': (('triton', 'pytorch-triton', 'triton-windows'), False),
}


@dataclass(frozen=True)
class Fact:
    """Something about the environment; with what to do about it, if it is wrong."""

    name: str
    value: str
    remedy: str = ''


def facts() -> list[Fact]:
    """Every fact, in the order of the page."""
    finders: dict[str, Callable[[], str]] = {
        'cbam-mmdet': _own_version,
        'Python': lambda: f'{platform.python_version()} on {platform.system()} {platform.machine()}',
        'CPU': _cpu,
        'GPU': _gpu,
    }
    found = [Fact(name, _or_why_not(finder)) for name, finder in finders.items()]
    for name, (distributions, needed) in PACKAGES.items():
        version = _version(name, distributions)
        if version is None and needed:
            remedy = f'pip install {distributions[0]}, or the whole stack: pip install ".[mmdet]" -c constraints.txt'
            found.append(Fact(name, 'not installed', remedy))
        else:
            found.append(Fact(name, version or 'not installed'))
        if name == 'torch':
            found.append(Fact('torch built for', _or_why_not(_torch_build)))
        if name == 'mmcv':
            found.append(Fact("mmcv's operators", _or_why_not(_mmcv_operators)))
    return [*found, Fact('CPU kernel', _or_why_not(_cpu_kernel)), Fact('GPU kernels', _or_why_not(_gpu_kernels))]


def _or_why_not(finder: Callable[[], str]) -> str:
    try:
        return without_paths(finder())
    except Exception as error:  # what is missing or broken is a fact, too
        return f'unknown ({in_one_line(error)})'


def _version(package: str, distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        return version if name == package else f'{version} ({name})'
    return None


def _own_version() -> str:
    from cbam_mmdet.version import __version__

    return __version__


def _cpu() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
    except OSError:
        lines = []
    model = next((line.partition(':')[2].strip() for line in lines if line.startswith('model name')), '')
    usable = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return f'{model or platform.processor() or platform.machine()}, {os.cpu_count()} cores, {usable} of them usable'


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return f'none that torch sees{_driver()}'
    gpus = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        memory = properties.total_memory / 2**30
        gpus.append(f'{properties.name} ({memory:.0f} GiB, compute capability {properties.major}.{properties.minor})')
    return f'{", ".join(gpus)}{_driver()}'


def _driver() -> str:
    try:
        text = Path('/proc/driver/nvidia/version').read_text(encoding='utf-8')
    except OSError:
        return ''
    found = re.search(r'\d+\.\d+(\.\d+)?', text)
    return f'; driver {found.group()}' if found else ''


def _torch_build() -> str:
    import torch

    built = f'CUDA {torch.version.cuda}' if torch.version.cuda else 'CPUs only'
    cudnn = torch.backends.cudnn.version() if torch.version.cuda else None  # 90100 is 9.1.0, 8902 is 8.9.2
    if cudnn:
        scale = 10000 if cudnn >= 90000 else 1000
        built += f', cuDNN {cudnn // scale}.{cudnn % scale // 100}.{cudnn % 100}'
    return f'{built}; on a CPU it uses {torch.get_num_threads()} of the cores'


def _mmcv_operators() -> str:
    extension = sys.modules.get('mmcv._ext') or importlib.import_module('mmcv._ext')
    if getattr(getattr(extension, '__spec__', None), 'origin', None) == 'cbam_mmdet.compat.mmcv_ops':
        return 'served by cbam_mmdet, from torchvision and PyTorch'
    return f'compiled, CUDA {extension.get_compiling_cuda_version()}'


def _cpu_kernel() -> str:
    from cbam_mmdet.ops import c_passes

    reason = c_passes.unavailable()
    return f'not used: it {reason}' if reason else f'built: {c_passes.library().name}'


def _gpu_kernels() -> str:
    from cbam_mmdet.ops.functional import HAS_TRITON, INTERPRETED

    if not HAS_TRITON:
        return 'none: Triton 3, which comes with torch 2.4, is not installed'
    return "Triton's, interpreted on the CPU (TRITON_INTERPRET=1)" if INTERPRETED else "Triton's"
