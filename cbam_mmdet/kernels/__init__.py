"""CBAM's six passes as Triton kernels, for CUDA. Nothing else of the package imports triton, and this only where it is used."""

from ..passes import as_operators
from .triton_passes import PASSES

OPERATORS = as_operators(PASSES, 'triton')

__all__ = ['OPERATORS', 'PASSES']
