"""Pictures of a run."""

from .run_pictures import draw_curve, draw_sheet, read_scalars

__all__ = ['draw_curve', 'draw_sheet', 'read_scalars']
