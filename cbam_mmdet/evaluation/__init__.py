"""Metrics, and the scores of a run."""

from cbam_mmdet.evaluation.metrics import HotCocoMetric, SampleCocoMetric, VOCDetectionMetric

__all__ = ['HotCocoMetric', 'SampleCocoMetric', 'VOCDetectionMetric']
