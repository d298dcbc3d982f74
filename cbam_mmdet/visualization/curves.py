"""The curves of trainings over the iterations: each loss, and the mAPs of the validations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from cbam_mmdet.visualization.charts import Chart, Line

METRICS = {
    'coco/bbox_mAP': "COCO's mAP",
    'coco/bbox_mAP_50': "COCO's mAP at an IoU of 0.5",
    'pascal_voc/mAP': "Pascal VOC's mAP",
}


def loss_charts(rows: Mapping[str, Sequence[dict]]) -> list[Chart]:
    """A chart for each loss that was logged.

    Args:
        rows: the rows of losses of each run, by the run's name (see engine.run_reader.read_scalars).
    """
    losses = dict.fromkeys(key for each in rows.values() for row in each for key in row if 'loss' in key)
    charts = [
        Chart(key.replace('.', '_'), key, 'iteration', 'loss', _lines(rows, key, math.isfinite, few=3))
        for key in losses
    ]
    return [chart for chart in charts if chart.lines]


def metric_charts(rows: Mapping[str, Sequence[dict]]) -> list[Chart]:
    """A chart for each of METRICS that was measured. COCO's figures are -1 if there is nothing to measure.

    Args:
        rows: the rows of metrics of each run, by the run's name.
    """
    charts = [
        Chart(key.replace('/', '_'), title, 'iteration', 'mAP', _lines(rows, key, lambda m: m >= 0), y_range=(0, 1))
        for key, title in METRICS.items()
    ]
    return [chart for chart in charts if chart.lines]


def _lines(
    rows: Mapping[str, Sequence[dict]], key: str, known: Callable[[float], bool], few: float = math.inf
) -> list[Line]:
    """A line for each run that has known values. Its points are marked if they are fewer than `few`."""
    lines = []
    for i, (name, each) in enumerate(rows.items()):
        points = [(row['step'], row[key]) for row in each if key in row and known(row[key])]
        if points:
            steps, values = map(list, zip(*points, strict=True))
            lines.append(Line(name, steps, values, i, marks=len(points) < few))
    return lines
