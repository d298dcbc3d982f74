"""The report of one run, or a comparison of several: one HTML file without dependencies, with tables and figures."""

from cbam_mmdet.visualization.report.write import write_report

__all__ = ['write_report']
