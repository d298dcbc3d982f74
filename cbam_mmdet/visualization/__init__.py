"""Pictures and reports of runs."""

from cbam_mmdet.visualization.run_pictures import draw_curve, draw_sheet, read_scalars

__all__ = ['draw_curve', 'draw_sheet', 'read_scalars']
