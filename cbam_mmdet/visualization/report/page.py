"""Render the page of the report from its template report.html."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from cbam_mmdet.version import __version__
from cbam_mmdet.visualization.charts import COLOURS, COLOURS_ON_DARK
from cbam_mmdet.visualization.report.evaluation import EvaluatedRun


def render_page(runs: Sequence[EvaluatedRun], **parts: Any) -> str:
    """The page's HTML.

    Args:
        runs: the runs. The others are compared with the first one.
        parts: the other arguments of the template: `tables`, `charts`, `pictures`, `attention`, `num_tested` and
            `score_thr`.
    """
    loader = PackageLoader('cbam_mmdet.visualization.report', '.')
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template('report.html').render(
        title=_title(runs),
        runs=runs,
        notes=_notes(runs),
        colours=list(zip(COLOURS, COLOURS_ON_DARK, strict=True)),
        written=f'{datetime.now():%Y-%m-%d %H:%M}',
        version=__version__,
        **parts,
    )


def _title(runs: Sequence[EvaluatedRun]) -> str:
    if len(runs) == 1:
        return f'{runs[0].name}: report'
    return f'{len(runs)} runs compared: {", ".join(run.name for run in runs)}'


def _notes(runs: Sequence[EvaluatedRun]) -> list[str]:
    first, others = runs[0], runs[1:]
    length = {run.name: run.record.facts['Length'] for run in runs}
    lengths = [
        f'{run.name} was trained for {length[run.name]}, and {first.name} for {length[first.name]}: their figures may '
        'differ for that alone.'
        for run in others
        if length[run.name] != length[first.name]
    ]
    return lengths + [
        f'{run.name} is tested on other images or other classes than {first.name}: their figures cannot be compared.'
        for run in others
        if run.scores.classes != first.scores.classes or _file_names(run) != _file_names(first)
    ]


def _file_names(run: EvaluatedRun) -> set[str]:
    return {Path(path).name for path in run.outcomes}
