"""CBAM's six passes as Triton kernels, for CUDA. Nothing else of the package imports triton, and this only where it is used."""

from cbam_mmdet.kernels.triton_passes import PASSES
from cbam_mmdet.passes import as_operators

OPERATORS = as_operators(PASSES, 'triton')

__all__ = ['OPERATORS', 'PASSES']
