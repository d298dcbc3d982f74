"""The report of one run, or of several compared: an HTML file that needs nothing else, its tables and its figures.

Each run is read from its work dir, and its newest checkpoint detects in the config's test set (COCO's and VOC's configs test on
their validation images).
"""

from __future__ import annotations

import base64
import copy
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import matplotlib
import numpy as np
import torch
from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from mmengine.config import ConfigDict
from torch import Tensor

from cbam_mmdet import __version__
from cbam_mmdet.analysis.complexity import Complexity, measure
from cbam_mmdet.apis.infer import load_detector
from cbam_mmdet.apis.test import test
from cbam_mmdet.datasets.pointing import point_at_data
from cbam_mmdet.datasets.transforms.arrays import array_pipeline
from cbam_mmdet.datasets.transforms.loading import read_image
from cbam_mmdet.engine.checkpoint.files import find_checkpoint
from cbam_mmdet.engine.record import differences
from cbam_mmdet.engine.run_reader import TrainingRecord, read_results, read_runs
from cbam_mmdet.errors import UserError
from cbam_mmdet.evaluation.scores import Outcome, Scores, score
from cbam_mmdet.models.gates import Gates, find_cbams
from cbam_mmdet.utils.tables import Cell, Table, change
from cbam_mmdet.visualization.attention import gates_over
from cbam_mmdet.visualization.charts import COLOURS, COLOURS_ON_DARK, Chart, Line, save

WIDEST = 480  # pixels of a picture in the page
MOST_CLASSES = 12  # with a precision-recall curve of their own


@dataclass
class Evaluated:
    """A run, what its newest checkpoint detects, and what it costs.

    Args:
        cost: None where the network cannot be counted; `no_cost` says why.
        gates: by image file and CBAM.
    """

    run: TrainingRecord
    checkpoint: str
    scores: Scores
    outcomes: dict[str, Outcome]
    cost: Complexity | None
    no_cost: str
    gates: dict[str, dict[str, Gates]]

    @property
    def name(self) -> str:
        return self.run.name


@dataclass(frozen=True)
class Picture:
    """An image in the page.

    Args:
        name: of its file.
        width, height: of the image, in pixels; the boxes are in these.
        data: its data URI.
        parts: (run's name, outcome, outcome in words) for each run.
    """

    name: str
    width: int
    height: int
    data: str
    parts: list[tuple[str, Outcome, str]]


@dataclass(frozen=True)
class Heat:
    """A spatial gate as a picture: its CBAM, its data URI, its lowest and highest value."""

    name: str
    data: str
    low: float
    high: float


def write_report(
    work_dirs: Sequence[str | Path],
    out_dir: str | Path | None = None,
    *,
    data_root: str | None = None,
    num_images: int = 12,
    score_thr: float = 0.5,
    device: str | None = None,
    trust_checkpoint: bool = False,
) -> Path:
    """Write `report.html`, `tables/*.csv`, `tables/*.md`, `figures/*.png` and `figures/*.pdf`.

    Args:
        work_dirs: the --work-dir of each training; the others are compared with the first.
        out_dir: where to write; by default the folder `report` in the first work dir.
        data_root: folder of the test data, in place of the configs'.
        num_images: pictures of detections.
        score_thr: detections with a lower score are neither shown nor counted as found there; tables and curves take all.
        device: for the attention maps: 'cpu', 'cuda:0', ...; by default the GPU if there is one.
        trust_checkpoint: load checkpoints by full unpickling, which runs code from the file.

    Returns:
        The HTML file.

    Raises:
        UserError: for a work dir without log, config or checkpoint, and whatever keeps tools/test.py from testing.
    """
    read = [(run, find_checkpoint(str(run.work_dir))) for run in read_runs(work_dirs)]
    for run, _ in read:
        if run.tested.get('default_scope') == 'mmpretrain':
            raise UserError(f'{run.work_dir} is the work dir of a classifier: the report is for detectors')
    runs = [_evaluate(run, file, data_root, score_thr, trust_checkpoint) for run, file in read]
    worst = _worst_first(runs)
    for run in runs:
        files = [path for path in worst[:3] if path in run.outcomes]
        model = load_detector(run.run.tested, run.checkpoint, device, trust_checkpoint)
        if find_cbams(model):
            pipeline = array_pipeline(model.cfg)
            run.gates = {path: gates_over(model, read_image(path), pipeline) for path in files}

    out_dir = Path(out_dir or Path(work_dirs[0]) / 'report')
    tables, charts = _tables(runs, score_thr), _charts(runs)
    _write_tables([table for group in tables.values() for table in group], out_dir / 'tables')
    (out_dir / 'figures').mkdir(parents=True, exist_ok=True)
    for chart in (chart for group in charts.values() for chart in group):
        chart.draw(out_dir / 'figures')
    _draw_detections(runs, worst[: min(num_images, 4)], out_dir / 'figures')
    _draw_attention(runs, out_dir / 'figures')
    page = Environment(
        loader=PackageLoader('cbam_mmdet.visualization', '.'), autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template('report.html')
    html = page.render(
        title=f'{runs[0].name}: report'
        if len(runs) == 1
        else f'{len(runs)} runs compared: {", ".join(r.name for r in runs)}',
        runs=runs,
        notes=_notes(runs),
        tables=tables,
        charts=charts,
        pictures=[_picture(path, runs) for path in worst[:num_images]],
        num_tested=len(worst),
        attention=_attention(runs, worst[:3]),
        score_thr=score_thr,
        colours=list(zip(COLOURS, COLOURS_ON_DARK, strict=True)),
        written=f'{datetime.now():%Y-%m-%d %H:%M}',
        version=__version__,
    )
    path = out_dir / 'report.html'
    path.write_text(html, encoding='utf-8')
    return path


def _evaluate(run: TrainingRecord, checkpoint: str, data_root: str | None, score_thr: float, trust: bool) -> Evaluated:
    results = _detections(run, checkpoint, data_root, trust)
    cfg = copy.deepcopy(run.tested)
    point_at_data(cfg, data_root, None)
    scores = score(cfg, results, f"{run.name}'s results.pkl")
    try:
        cost, why = measure(cfg, run.name, device='cpu'), ''
    except UserError as error:
        cost, why = None, str(error)
    run.facts['Checkpoint'] = Path(checkpoint).name
    return Evaluated(run, checkpoint, scores, scores.outcomes(score_thr), cost, why, {})


def _detections(run: TrainingRecord, checkpoint: str, data_root: str | None, trust: bool) -> list[dict]:
    """What tools/test.py --out has written since the checkpoint; else the same is done now."""
    results = run.work_dir / 'results.pkl'
    if not data_root and results.is_file() and results.stat().st_mtime >= os.path.getmtime(checkpoint):
        run.facts['Detections'] = f'results.pkl of {datetime.fromtimestamp(results.stat().st_mtime):%Y-%m-%d %H:%M}'
        return read_results(results)
    run.facts['Detections'] = 'made for this report'
    with TemporaryDirectory() as folder:
        results = f'{folder}/results.pkl'
        cfg = copy.deepcopy(run.tested)
        # MMEngine keeps a visualizer by its name for the whole process: the next run needs its own, and none has to write.
        cfg.visualizer = ConfigDict(type='DetLocalVisualizer', name=folder, vis_backends=[])
        test(cfg, checkpoint, data_root=data_root, work_dir=folder, out=results, trust_checkpoint=trust)
        return read_results(results)


def _worst_first(runs: Sequence[Evaluated]) -> list[str]:
    """The image files by falling number of misses of all runs together, then of false detections."""
    missed, false = Counter(), Counter()
    for run in runs:
        for path, outcome in run.outcomes.items():
            missed[path] += len(outcome.missed)
            false[path] += len(outcome.false)
    return sorted(missed, key=lambda path: (-missed[path], -false[path], path))


def _notes(runs: Sequence[Evaluated]) -> list[str]:
    first, others = runs[0], runs[1:]
    return [
        f'{run.name} is tested on other images or other classes than {first.name}: their figures cannot be compared.'
        for run in others
        if run.scores.classes != first.scores.classes
        or {Path(path).name for path in run.outcomes} != {Path(path).name for path in first.outcomes}
    ]


# Tables


def _tables(runs: Sequence[Evaluated], score_thr: float) -> dict[str, list[Table]]:
    """By section."""
    return {
        'run': [_facts(runs), *_settings(runs)],
        'results': [_coco(runs), _voc(runs), _counts(runs, score_thr)],
        'classes': _classes(runs),
        'attention': _gate_tables(runs),
        'complexity': _costs(runs),
    }


def _compared(
    name: str,
    caption: str,
    first: str,
    rows: Sequence[tuple[str, Sequence[Cell]]],
    runs: Sequence[Evaluated],
    better=True,
) -> Table:
    """A value for each run, and how those of the others differ from the first's."""
    names = [run.name for run in runs]
    changes = ['difference'] if len(names) == 2 else [f'{name}, difference' for name in names[1:]]
    body = [[row, *values, *(change(values[0], value) for value in values[1:])] for row, values in rows]
    return Table(name, caption, [first, *names, *changes], body, better)


def _facts(runs: Sequence[Evaluated]) -> Table:
    names = dict.fromkeys(name for run in runs for name in run.run.facts)
    rows = [[name, *(run.run.facts.get(name) for run in runs)] for name in names]
    return Table('runs', 'Config, data, seed, versions, machine', ['', *(run.name for run in runs)], rows)


def _settings(runs: Sequence[Evaluated]) -> list[Table]:
    tables = []
    if len(runs) > 1:
        first = runs[0].run.trained
        found = {run.name: {s.name: s for s in differences(first, run.run.trained)} for run in runs[1:]}
        rows = []
        for name in dict.fromkeys(name for settings in found.values() for name in settings):
            before = next(settings[name].before for settings in found.values() if name in settings)
            values = [settings[name].after if name in settings else before for settings in found.values()]
            rows.append([name, before, *values])
        caption = 'Settings that differ between the runs' if rows else 'No setting differs between the runs'
        tables.append(Table('settings', caption, ['setting', *(run.name for run in runs)], rows))
    for i, run in enumerate(runs):
        if run.run.changes:
            caption = f'What {run.name} changes against its base, {", ".join(run.run.bases)}'
            tables.append(Table(f'settings-{i}', caption, ['setting', 'base', run.name], run.run.changes))
    return tables


def _coco(runs: Sequence[Evaluated]) -> Table:
    figures = [run.scores.figures for run in runs]
    rows = [(name, [each[name] for each in figures]) for name in figures[0]]
    return _compared(
        'coco',
        "COCO's figures: AP over IoUs of 0.50 to 0.95, at one IoU, and for small, medium and large objects; AR by detections an image",
        'figure',
        rows,
        runs,
    )


def _voc(runs: Sequence[Evaluated]) -> Table:
    def known(value: float | None) -> float | None:
        return None if value is None or math.isnan(value) else value

    names = dict.fromkeys(name for run in runs for name in run.scores.voc if name != 'mAP')
    rows = [(name.removeprefix('AP_'), [known(run.scores.voc.get(name)) for run in runs]) for name in names]
    modes = ', '.join(dict.fromkeys(run.scores.voc_mode for run in runs))
    return _compared(
        'voc',
        f"Pascal VOC's figures at an IoU of 0.5: mAP in both modes, AP of each class ({modes})",
        'figure',
        rows,
        runs,
    )


def _counts(runs: Sequence[Evaluated], score_thr: float) -> Table:
    def count(run: Evaluated, kind: str) -> int:
        return sum(len(getattr(outcome, kind)) for outcome in run.outcomes.values())

    kinds = {'objects': 'objects', 'found': 'found', 'missed': 'missed', 'false detections': 'false'}
    rows = [[label, *(count(run, kind) for run in runs)] for label, kind in kinds.items()]
    return Table(
        'counts',
        f'Objects found and missed, and false detections, at an IoU of 0.5 and a score of at least {score_thr:g}',
        ['', *(run.name for run in runs)],
        rows,
    )


def _class_names(runs: Sequence[Evaluated]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.scores.classes))


def _classes(runs: Sequence[Evaluated]) -> list[Table]:
    tables = []
    if len(runs) > 1:
        rows = [
            (name, [run.scores.class_ap(name) if name in run.scores.classes else None for run in runs])
            for name in _class_names(runs)
        ]
        tables.append(_compared('classes', 'AP of each class over IoUs of 0.50 to 0.95', 'class', rows, runs))
    for i, run in enumerate(runs):
        counts, ap = run.scores.num_objects, run.scores.class_ap
        rows = [
            [name, counts[name], ap(name), ap(name, 0.5), ap(name, 0.75), *(ap(name, area=area) for area in SIZES)]
            for name in run.scores.classes
        ]
        header = ['class', 'objects', 'AP', 'AP 50', 'AP 75', *SIZES]
        caption = f'{run.name}: AP of each class, and by the size of the objects (small below 32x32 pixels, large from 96x96 on)'
        tables.append(Table(f'classes-{i}', caption, header, rows))
    return tables


SIZES = ('small', 'medium', 'large')
BRANCHES = ('channel', 'spatial')


def _gate_tables(runs: Sequence[Evaluated]) -> list[Table]:
    tables = []
    for i, run in enumerate(runs):
        images = list(run.gates.values())
        if not images or not images[0]:
            continue
        rows = []
        for name in images[0]:
            branches = ([values for gates in images for values in getattr(gates[name], branch)] for branch in BRANCHES)
            rows.append([name, *(value for values in branches for value in _spread(values))])
        header = ['CBAM', *(f'{gate} {value}' for gate in BRANCHES for value in ('mean', 'min', 'max'))]
        caption = f'{run.name}: the values of the gates over the images above ({len(images)})'
        tables.append(Table(f'gates-{i}', caption, header, rows))
    return tables


def _spread(gates: list[Tensor]) -> list[float | None]:
    values = torch.cat([gate.flatten() for gate in gates]) if gates else None
    return [None] * 3 if values is None else [float(values.mean()), float(values.min()), float(values.max())]


def _costs(runs: Sequence[Evaluated]) -> list[Table]:
    known = [run for run in runs if run.cost]
    if not known:
        return []
    figures: dict[str, Callable[[Complexity], float]] = {
        'parameters (M)': lambda cost: cost.parameters / 1e6,
        'GFLOPs (multiply-adds)': lambda cost: cost.flops / 1e9,
        'CBAMs': lambda cost: float(cost.cbams),
        "CBAM's parameters (M)": lambda cost: cost.cbam_parameters / 1e6,
        "CBAM's parameters (%)": lambda cost: 100 * cost.cbam_parameters / cost.parameters,
        "CBAM's GFLOPs": lambda cost: cost.cbam_flops / 1e9,
        "CBAM's GFLOPs (%)": lambda cost: 100 * cost.cbam_flops / cost.flops,
    }
    rows = [(label, [figure(run.cost) for run in known]) for label, figure in figures.items()]
    sizes = ', '.join(dict.fromkeys(f'{run.cost.size[1]}x{run.cost.size[0]}' for run in known))
    tables = [
        _compared('complexity', f'What the networks cost for an image of {sizes} pixels', 'figure', rows, known, False)
    ]
    stages = [
        [run.name, stage.name, stage.cbams, stage.parameters / 1e6, stage.flops / 1e9]
        for run in known
        for stage in run.cost.stages
    ]
    if stages:
        header = ['run', 'stage', 'CBAMs', 'parameters (M)', 'GFLOPs']
        tables.append(Table('stages', "CBAM's cost in each stage", header, stages))
    return tables


def _write_tables(tables: Sequence[Table], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for table in tables:
        (folder / f'{table.name}.csv').write_text(table.csv(), encoding='utf-8')
        (folder / f'{table.name}.md').write_text(f'{table.caption}\n\n{table.markdown()}', encoding='utf-8')


# Charts


def _charts(runs: Sequence[Evaluated]) -> dict[str, list[Chart]]:
    """By section."""
    losses = dict.fromkeys(key for run in runs for row in run.run.train for key in row if 'loss' in key)
    curves = [
        Chart(key.replace('.', '_'), key, 'iteration', 'loss', lines)
        for key in losses
        if (lines := _train_lines(runs, key))
    ]
    measured = [
        Chart(key.replace('/', '_'), title, 'iteration', 'mAP', lines, y_range=(0, 1))
        for key, title in (
            ('coco/bbox_mAP', "COCO's mAP"),
            ('coco/bbox_mAP_50', "COCO's mAP at an IoU of 0.5"),
            ('pascal_voc/mAP', "Pascal VOC's mAP"),
        )
        if (lines := _validation_lines(runs, key))
    ]
    return {'curves': measured + curves, 'pr': _precision_recall(runs)}


def _train_lines(runs: Sequence[Evaluated], key: str) -> list[Line]:
    rows = {i: [row for row in run.run.train if math.isfinite(row.get(key, math.nan))] for i, run in enumerate(runs)}
    return [Line(runs[i].name, *_columns(found, key), i, marks=len(found) < 3) for i, found in rows.items() if found]


def _validation_lines(runs: Sequence[Evaluated], key: str) -> list[Line]:
    """COCO's figures are -1 where there is nothing to measure."""
    rows = {i: [row for row in run.run.validations if row.get(key, -1) >= 0] for i, run in enumerate(runs)}
    return [Line(runs[i].name, *_columns(found, key), i, marks=True) for i, found in rows.items() if found]


def _columns(rows: Sequence[dict], key: str) -> tuple[list[float], list[float]]:
    return [row['step'] for row in rows], [row[key] for row in rows]


def _precision_recall(runs: Sequence[Evaluated]) -> list[Chart]:
    def chart(name: str, title: str, ious: Sequence[float], of: str | None) -> Chart | None:
        lines = []
        for i, run in enumerate(runs):
            for iou in ious if of is None or of in run.scores.classes else ():
                curve = run.scores.precision_recall(iou, of)
                if curve:
                    label = f'{run.name}, IoU {iou:.2f}' if len(ious) > 1 else run.name
                    lines.append(Line(label, *(values.tolist() for values in curve), i, dashed=iou != 0.5))
        return Chart(name, title, 'recall', 'precision', lines, (0, 1), (0, 1.02), ends=False) if lines else None

    objects = Counter()
    for run in runs:
        objects.update(run.scores.num_objects)
    most = [name for name, _ in objects.most_common(MOST_CLASSES)]
    charts = [chart('precision-recall', 'mean of the classes', (0.5, 0.75), None)]
    shown = [name for name in _class_names(runs) if name in most]
    charts += [chart(f'precision-recall-{i}', name, (0.5,), name) for i, name in enumerate(shown)]
    return [each for each in charts if each]


# Pictures


def _picture(path: str, runs: Sequence[Evaluated]) -> Picture:
    image = read_image(path)
    height, width = image.shape[:2]
    parts = [(run.name, run.outcomes[path], _in_words(run.outcomes[path])) for run in runs if path in run.outcomes]
    return Picture(Path(path).name, width, height, _jpeg(image), parts)


def _in_words(outcome: Outcome) -> str:
    def several(boxes: Sequence) -> str:
        counted = Counter(box.label for box in boxes)
        return f'{len(boxes)}' + (f' ({", ".join(f"{n} {name}" for name, n in counted.items())})' if boxes else '')

    return (
        f'{len(outcome.objects)} {"object" if len(outcome.objects) == 1 else "objects"}, missed: {several(outcome.missed)}, '
        f'false: {several(outcome.false)}'
    )


def _attention(runs: Sequence[Evaluated], paths: Sequence[str]) -> list[tuple[str, list[tuple[str, str, list[Heat]]]]]:
    """For each run with CBAMs its name, and for each image: name, data URI, spatial gates."""
    shown = []
    for run in runs:
        rows = []
        for path in paths:
            maps = [
                _heat(name, map_.cpu().numpy())
                for name, gates in run.gates.get(path, {}).items()
                for map_ in gates.spatial
            ]
            if maps:
                rows.append((Path(path).name, _jpeg(read_image(path), 240), maps))
        if rows:
            shown.append((run.name, rows))
    return shown


# What the page shows by SVG and CSS, for a paper
BOXES = {
    'found': dict(edgecolor='#0a58c2', linewidth=0.9),
    'false': dict(edgecolor='#a34a00', linewidth=1.1, linestyle=':'),
    'missed': dict(edgecolor='#c4005f', linewidth=1.1, linestyle='--'),
}


def _draw_detections(runs: Sequence[Evaluated], paths: Sequence[str], folder: Path) -> None:
    figure = Figure(figsize=(1.8 * len(runs) + 0.3, 1.9 * len(paths) + 0.3), layout='constrained')
    grid = figure.subplots(len(paths), len(runs), squeeze=False)
    for path, row in zip(paths, grid, strict=True):
        image = read_image(path)[..., ::-1]
        for run, axes in zip(runs, row, strict=True):
            axes.axis('off')
            axes.imshow(image)
            for kind, style in BOXES.items():
                for box in getattr(run.outcomes[path], kind) if path in run.outcomes else ():
                    x, y, width, height = box.xywh
                    axes.add_patch(Rectangle((x, y), width, height, fill=False, **style))
    for run, axes in zip(runs, grid[0], strict=True):
        axes.set_title(run.name, fontsize=8)
    keys = [Patch(fill=False, label=kind, **style) for kind, style in BOXES.items()]
    figure.legend(handles=keys, loc='outside lower center', ncols=3, frameon=False, fontsize=7)
    save(figure, folder, 'detections')


def _draw_attention(runs: Sequence[Evaluated], folder: Path) -> None:
    for i, run in enumerate(runs):
        maps = {
            path: {name: map_.cpu().numpy() for name, each in gates.items() for map_ in each.spatial}
            for path, gates in run.gates.items()
        }
        names = list(next(iter(maps.values()), {}))
        if not names:
            continue
        figure = Figure(figsize=(0.9 * (len(names) + 1), 1.1 * len(maps)), layout='constrained')
        grid = figure.subplots(len(maps), len(names) + 1, squeeze=False)
        for (path, gates), row in zip(maps.items(), grid, strict=True):
            row[0].imshow(read_image(path)[..., ::-1])
            for name, axes in zip(names, row[1:], strict=True):
                axes.imshow(gates[name], cmap='viridis')
            for axes in row:
                axes.axis('off')
        for name, axes in zip(names, grid[0][1:], strict=True):
            axes.set_title(name.removeprefix('backbone.').removesuffix('.cbam'), fontsize=6)
        save(figure, folder, f'attention-{i}')


def _heat(name: str, gate: np.ndarray) -> Heat:
    low, high = float(gate.min()), float(gate.max())
    scaled = (gate - low) / max(high - low, 1e-6)
    rgb = (matplotlib.colormaps['viridis'](scaled)[..., :3] * 255).round().astype(np.uint8)
    return Heat(name, _uri('png', cv2.imencode('.png', rgb[..., ::-1])[1]), low, high)


def _jpeg(image: np.ndarray, widest: int = WIDEST) -> str:
    scale = min(1, widest / image.shape[1])
    image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else image
    return _uri('jpeg', cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, 82])[1])


def _uri(kind: str, data: np.ndarray) -> str:
    return f'data:image/{kind};base64,{base64.b64encode(data.tobytes()).decode()}'
