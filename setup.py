"""Packaging of cbam-mmdet.

The plugin itself needs no dependency that an OpenMMLab user does not already have, so a plain
``pip install .`` installs this package alone into an existing environment. ``pip install '.[mmdet]'``
brings the stack that we test as well; ``-c constraints.txt`` pins it.
"""

import hashlib
import platform
import re
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r"__version__ = '(.+?)'", (ROOT / 'cbam_mmdet/version.py').read_text()).group(1)


def cpu_kernels(name: str, *flags: str) -> Extension:
    """CBAM's kernels for CPUs. Where no C compiler can build them, the installation goes on without.

    They need no header of Python or torch. CBAM_SOURCE says of which sources they were built (ops/c_passes.py).
    """
    sources = [f'cbam_mmdet/ops/cpu_kernels.{ending}' for ending in 'ch']
    digest = hashlib.sha256(b''.join((ROOT / source).read_bytes() for source in sources)).hexdigest()[:16]
    return Extension(
        f'cbam_mmdet.ops.{name}',
        sources[:1],
        depends=sources[1:],
        define_macros=[('CBAM_SOURCE', digest)],
        # No -ffast-math: where it is linked, the whole process takes small numbers for zero.
        extra_compile_args=['-O3', '-fopenmp', '-fno-fast-math', '-ffp-contract=off', '-Wno-psabi', *flags],
        extra_link_args=['-fopenmp'],
        optional=True,
        py_limited_api=True,
    )


# One library for every CPU, and one for those that have AVX2, which is chosen when it is loaded.
EXTENSIONS = [cpu_kernels('_cpu_kernels')]
if platform.machine().lower() in ('x86_64', 'amd64'):
    EXTENSIONS.append(cpu_kernels('_cpu_kernels_avx2', '-mavx2'))

setup(
    name='cbam-mmdet',
    version=VERSION,
    description='CBAM (Woo et al., ECCV 2018) as a backbone plugin of MMDetection',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.10',
    ext_modules=EXTENSIONS,
    packages=find_packages(include=['cbam_mmdet', 'cbam_mmdet.*']),
    # .mim/configs and .mim/tools are links to the folders of the repository: the wheel gets copies, as
    # OpenMMLab's packages have, so `_base_ = 'cbam_mmdet::faster_rcnn_r50_cbam.py'` works after an install.
    package_data={
        'cbam_mmdet': ['.mim/*.yml', '.mim/configs/**/*', '.mim/tools/*'],
        'cbam_mmdet.ops': ['cpu_kernels.[ch]'],
        'cbam_mmdet.visualization': ['*.html'],
        'cbam_mmdet.visualization.report': ['*.html', '*.css'],
    },
    extras_require={
        # The maintained forks; import names mmcv, mmdet, mmengine. No compiler: see cbam_mmdet/compat/mmcv_ops.py.
        'mmdet': [
            'torch>=2.4',
            'torchvision',
            'onedl-mmengine>=0.10.12',
            'onedl-mmcv>=2.3.6',
            'onedl-mmdetection>=3.5.1',
            'pycocotools',
            'tqdm',
        ],
        # PluginBackbone reaches these packages' backbones too.
        'backbones': ['onedl-mmpretrain', 'timm'],
        # COCO's evaluation in a fraction of the time, the figures the same, and the report's kinds of errors.
        'fast-eval': ['hotcoco>=1.3'],
        # tools/gradcam.py.
        'explain': ['grad-cam'],
        # tools/export.py, and ONNX files in tools/test.py and tools/infer.py.
        'deploy': ['onnx', 'onnxruntime'],
        # make docs: the site of docs/, with the reference from the docstrings.
        'docs': ['zensical', 'mkdocstrings-python'],
        'dev': ['globox', 'hypothesis', 'mypy', 'pytest', 'pytest-xdist', 'pytorchcv', 'ruff'],
    },
    classifiers=[
        'License :: OSI Approved :: Apache Software License',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
