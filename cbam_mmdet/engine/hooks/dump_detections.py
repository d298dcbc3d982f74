"""A hook that writes the detections of a test into a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement


class DumpDetectionsHook(Hook):
    """Give all outputs of a test to a metric that writes them, whatever evaluator the config has.

    MMDetection's tools/test.py appends such a metric to those of the evaluator. Its MultiDatasetsEvaluator takes as
    many metrics as it has data sets, and leaves out others without a word.

    Args:
        dump: DumpResults, or a subclass.
    """

    def __init__(self, dump: BaseMetric) -> None:
        self.dump = dump

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Sequence[BaseDataElement] | None = None
    ) -> None:
        self.dump.process(data_batch, [sample.to_dict() for sample in outputs or ()])

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self.dump.evaluate(len(runner.test_dataloader.dataset))
