"""The tables of the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cbam_mmdet.analysis.complexity import Complexity
from cbam_mmdet.engine.record import differences
from cbam_mmdet.evaluation.scores import ERRORS
from cbam_mmdet.utils.tables import Cell, Column, Table, change
from cbam_mmdet.visualization.report.evaluation import EvaluatedRun

SIZES = ('small', 'medium', 'large')
BRANCHES = ('channel', 'spatial')
COSTS: dict[str, Callable[[Complexity], float]] = {
    'parameters (M)': lambda cost: cost.parameters / 1e6,
    'GFLOPs (multiply-adds)': lambda cost: cost.flops / 1e9,
    'CBAMs': lambda cost: float(cost.cbams),
    "CBAM's parameters (M)": lambda cost: cost.cbam_parameters / 1e6,
    "CBAM's parameters (%)": lambda cost: 100 * cost.cbam_parameters / cost.parameters,
    "CBAM's GFLOPs": lambda cost: cost.cbam_flops / 1e9,
    "CBAM's GFLOPs (%)": lambda cost: 100 * cost.cbam_flops / cost.flops,
}


def make_tables(runs: Sequence[EvaluatedRun], score_thr: float) -> dict[str, list[Table]]:
    """The tables of each section."""
    return {
        'run': [_facts(runs), *_differing_settings(runs), *_changed_settings(runs)],
        'results': [_coco(runs), _voc(runs), _counts(runs, score_thr)],
        'classes': [*_compared_classes(runs), *_classes(runs)],
        'errors': _errors(runs),
        'attention': _gates(runs),
        'complexity': [*_costs(runs), *_stages(runs)],
    }


def class_names(runs: Sequence[EvaluatedRun]) -> list[str]:
    """The classes of all runs, in the order of the runs."""
    return list(dict.fromkeys(name for run in runs for name in run.scores.classes))


def _names(runs: Sequence[EvaluatedRun]) -> list[str]:
    return [run.name for run in runs]


def _compare(
    runs: Sequence[EvaluatedRun],
    first: str,
    rows: Sequence[tuple[str, Sequence[Cell]]],
    name: str,
    caption: str,
    style: str = '',
) -> Table:
    """A table with a value for each run, and the difference of each other run from the first one."""
    names = _names(runs)
    changes = ['difference'] if len(names) == 2 else [f'{name}, difference' for name in names[1:]]
    body = [[row, *values, *(change(values[0], value) for value in values[1:])] for row, values in rows]
    # A lower cost and fewer errors are better, so changes of them have no colour.
    header = [first, *names, *(Column(each, style) for each in changes)]
    return Table(header, body, name, caption, better=name not in ('complexity', 'errors', 'error-counts'))


def _facts(runs: Sequence[EvaluatedRun]) -> Table:
    facts = dict.fromkeys(name for run in runs for name in run.record.facts)
    rows = [[name, *(run.record.facts.get(name) for run in runs)] for name in facts]
    return Table(['', *_names(runs)], rows, 'runs', 'Config, data, seed, versions, machine')


def _differing_settings(runs: Sequence[EvaluatedRun]) -> list[Table]:
    """The settings that differ between the trainings of several runs."""
    if len(runs) == 1:
        return []
    first = runs[0].record.trained
    found = [{setting.name: setting for setting in differences(first, run.record.trained)} for run in runs[1:]]
    rows = []
    for name in dict.fromkeys(name for settings in found for name in settings):
        before = next(settings[name].before for settings in found if name in settings)
        rows.append([name, before, *(settings[name].after if name in settings else before for settings in found)])
    caption = 'Settings that differ between the runs' if rows else 'No setting differs between the runs'
    return [Table(['setting', *_names(runs)], rows, 'settings', caption)]


def _changed_settings(runs: Sequence[EvaluatedRun]) -> list[Table]:
    """The settings that each run changes in the configs that its own config inherits from."""
    tables = []
    for i, run in enumerate(runs):
        if run.record.changes:
            caption = f'What {run.name} changes against its base, {", ".join(run.record.bases)}'
            tables.append(Table(['setting', 'base', run.name], run.record.changes, f'settings-{i}', caption))
    return tables


def _coco(runs: Sequence[EvaluatedRun]) -> Table:
    figures = [run.scores.figures for run in runs]
    rows = [(name, [each[name] for each in figures]) for name in figures[0]]
    caption = (
        "COCO's figures: AP over IoUs of 0.50 to 0.95, at one IoU, and for small, medium and large objects; AR by "
        'detections an image'
    )
    return _compare(runs, 'figure', rows, 'coco', caption)


def _voc(runs: Sequence[EvaluatedRun]) -> Table:
    def known(value: float | None) -> float | None:
        return None if value is None or math.isnan(value) else value

    names = dict.fromkeys(name for run in runs for name in run.scores.voc if name != 'mAP')
    rows = [(name.removeprefix('AP_'), [known(run.scores.voc.get(name)) for run in runs]) for name in names]
    modes = ', '.join(dict.fromkeys(run.scores.voc_mode for run in runs))
    caption = f"Pascal VOC's figures at an IoU of 0.5: mAP in both modes, AP of each class ({modes})"
    return _compare(runs, 'figure', rows, 'voc', caption)


def _counts(runs: Sequence[EvaluatedRun], score_thr: float) -> Table:
    def count(run: EvaluatedRun, kind: str) -> int:
        return sum(len(getattr(outcome, kind)) for outcome in run.outcomes.values())

    kinds = {'objects': 'objects', 'found': 'found', 'missed': 'missed', 'false detections': 'false'}
    rows = [[label, *(count(run, kind) for run in runs)] for label, kind in kinds.items()]
    caption = f'Objects found and missed, and false detections, at an IoU of 0.5 and a score of at least {score_thr:g}'
    return Table(['', *_names(runs)], rows, 'counts', caption)


def _compared_classes(runs: Sequence[EvaluatedRun]) -> list[Table]:
    if len(runs) == 1:
        return []
    rows = [
        (name, [run.scores.class_ap(name) if name in run.scores.classes else None for run in runs])
        for name in class_names(runs)
    ]
    return [_compare(runs, 'class', rows, 'classes', 'AP of each class over IoUs of 0.50 to 0.95')]


def _classes(runs: Sequence[EvaluatedRun]) -> list[Table]:
    tables = []
    for i, run in enumerate(runs):
        counts, ap = run.scores.num_objects, run.scores.class_ap
        rows = [
            [name, counts[name], ap(name), ap(name, 0.5), ap(name, 0.75), *(ap(name, area=area) for area in SIZES)]
            for name in run.scores.classes
        ]
        caption = (
            f'{run.name}: AP of each class, and by the size of the objects (small below 32x32 pixels, large from 96x96 '
            'on)'
        )
        tables.append(Table(['class', 'objects', 'AP', 'AP 50', 'AP 75', *SIZES], rows, f'classes-{i}', caption))
    return tables


def _errors(runs: Sequence[EvaluatedRun]) -> list[Table]:
    """What the kinds of errors cost, and how many there are. There is no table without hotcoco."""
    errors = [run.scores.errors for run in runs]
    if None in errors:
        return []
    costs = [(kind, [each[kind].delta_ap for each in errors]) for kind in ERRORS]
    counts = [(kind, [each[kind].count for each in errors]) for kind in ERRORS]
    caption = 'What each kind of error costs: the gain of the AP at an IoU of 0.5 if there were no error of this kind'
    return [
        _compare(runs, 'error', costs, 'errors', caption),
        _compare(runs, 'error', counts, 'error-counts', 'The number of errors of each kind, at all scores', '.0f'),
    ]


def _gates(runs: Sequence[EvaluatedRun]) -> list[Table]:
    tables = []
    for i, run in enumerate(runs):
        images = list(run.gates.values())
        if not images or not images[0]:
            continue
        rows = []
        for name in images[0]:
            branches = ([values for gates in images for values in getattr(gates[name], branch)] for branch in BRANCHES)
            rows.append([name, *(value for values in branches for value in _mean_and_range(values))])
        header = ['CBAM', *(f'{gate} {value}' for gate in BRANCHES for value in ('mean', 'min', 'max'))]
        caption = f'{run.name}: the values of the gates over the images above ({len(images)})'
        tables.append(Table(header, rows, f'gates-{i}', caption))
    return tables


def _mean_and_range(gates: list[Tensor]) -> list[float | None]:
    values = torch.cat([gate.flatten() for gate in gates]) if gates else None
    return [None] * 3 if values is None else [float(values.mean()), float(values.min()), float(values.max())]


def _costs(runs: Sequence[EvaluatedRun]) -> list[Table]:
    known = [run for run in runs if run.cost]
    if not known:
        return []
    rows = [(label, [figure(run.cost) for run in known]) for label, figure in COSTS.items()]
    sizes = ', '.join(dict.fromkeys(f'{run.cost.size[1]}x{run.cost.size[0]}' for run in known))
    return [_compare(known, 'figure', rows, 'complexity', f'What the networks cost for an image of {sizes} pixels')]


def _stages(runs: Sequence[EvaluatedRun]) -> list[Table]:
    rows = [
        [
            run.name,
            stage.name,
            f'{stage.size[1]}x{stage.size[0]}',
            stage.cbams,
            stage.parameters / 1e6,
            stage.flops / 1e9,
        ]
        for run in runs
        if run.cost
        for stage in run.cost.stages
    ]
    header = ['run', 'stage', 'map', 'CBAMs', 'parameters (M)', 'GFLOPs']
    return [Table(header, rows, 'stages', "CBAM's cost in each stage")] if rows else []
