"""The report of one run, or of several compared: one HTML file that needs nothing else, its tables and its figures."""

from cbam_mmdet.visualization.report.write import write_report

__all__ = ['write_report']
