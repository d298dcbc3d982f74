"""Metrics, and the scores of a run."""

from cbam_mmdet.evaluation.metrics import SampleCocoMetric, VOCDetectionMetric

__all__ = ['SampleCocoMetric', 'VOCDetectionMetric']
