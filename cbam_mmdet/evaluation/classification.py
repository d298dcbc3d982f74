"""The error of a classifier, as the paper reports it."""

from __future__ import annotations

from mmpretrain.evaluation import Accuracy
from mmpretrain.registry import METRICS


@METRICS.register_module()
class TopKError(Accuracy):
    """Top-1 and top-5 error in percent, as in the paper's tables 4 and 5: 100 minus mmpretrain's accuracy."""

    default_prefix = 'error'

    def compute_metrics(self, results: list) -> dict[str, float]:
        return {name: 100 - value for name, value in super().compute_metrics(results).items()}
