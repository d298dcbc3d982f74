"""The charts of the report: the curves of the trainings, and precision over recall."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from cbam_mmdet.visualization.charts import Chart, Line
from cbam_mmdet.visualization.curves import loss_charts, metric_charts
from cbam_mmdet.visualization.report.evaluation import EvaluatedRun
from cbam_mmdet.visualization.report.tables import class_names

MOST_CLASSES = 12  # the number of classes with a precision-recall curve


def make_charts(runs: Sequence[EvaluatedRun]) -> dict[str, list[Chart]]:
    """The charts of each section."""
    losses = loss_charts({run.name: run.record.train for run in runs})
    metrics = metric_charts({run.name: run.record.validations for run in runs})
    return {'curves': metrics + losses, 'pr': _precision_recall(runs)}


def _precision_recall(runs: Sequence[EvaluatedRun]) -> list[Chart]:
    objects = Counter()
    for run in runs:
        objects.update(run.scores.num_objects)
    most = [name for name, _ in objects.most_common(MOST_CLASSES)]
    charts = [_chart(runs, 'precision-recall', 'mean of the classes', (0.5, 0.75), None)]
    shown = [name for name in class_names(runs) if name in most]
    charts += [_chart(runs, f'precision-recall-{i}', name, (0.5,), name) for i, name in enumerate(shown)]
    return [chart for chart in charts if chart.lines]


def _chart(runs: Sequence[EvaluatedRun], name: str, title: str, ious: Sequence[float], class_name: str | None) -> Chart:
    """Precision over recall of one class, or the mean of all. It has no line for a run without an object."""
    lines = []
    for i, run in enumerate(runs):
        for iou in ious if class_name is None or class_name in run.scores.classes else ():
            curve = run.scores.precision_recall(iou, class_name)
            if curve:
                label = f'{run.name}, IoU {iou:.2f}' if len(ious) > 1 else run.name
                lines.append(Line(label, *(values.tolist() for values in curve), i, dashed=iou != 0.5))
    return Chart(name, title, 'recall', 'precision', lines, (0, 1), (0, 1.02), ends=False)
