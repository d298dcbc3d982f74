"""The figures of the page as PNG and PDF files for a paper: charts, detections and attention maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.patches import Patch

from cbam_mmdet.visualization.charts import Chart, save
from cbam_mmdet.visualization.report.evaluation import EvaluatedRun, image_of
from cbam_mmdet.visualization.report.pictures import spatial_gates
from cbam_mmdet.visualization.sheets import (
    box_corners,
    draw_box,
    draw_colour_bar,
    image_grid,
    scale_of,
    show_image,
)

BOXES = {
    'found': dict(edgecolor='#0a58c2', linewidth=0.9),
    'false': dict(edgecolor='#a34a00', linewidth=1.1, linestyle=':'),
    'missed': dict(edgecolor='#c4005f', linewidth=1.1, linestyle='--'),
}


def write_figures(runs: Sequence[EvaluatedRun], charts: Sequence[Chart], paths: Sequence[str], folder: Path) -> None:
    """Write the charts, the detections in some images, and the attention maps."""
    folder.mkdir(parents=True, exist_ok=True)
    for chart in charts:
        chart.draw(folder)
    _draw_detections(runs, paths, folder)
    for i, run in enumerate(runs):
        _draw_attention(run, folder, f'attention-{i}')


def _draw_detections(runs: Sequence[EvaluatedRun], paths: Sequence[str], folder: Path) -> None:
    figure, grid = image_grid(len(paths), len(runs), (1.8 * len(runs) + 0.3, 1.9 * len(paths) + 0.3))
    for path, row in zip(paths, grid, strict=True):
        image = image_of(path, runs)
        for run, axes in zip(runs, row, strict=True):
            show_image(axes, image)
            for kind, style in BOXES.items():
                for box in getattr(run.outcomes[path], kind) if path in run.outcomes else ():
                    draw_box(axes, box_corners(box.xywh), **style)
    for run, axes in zip(runs, grid[0], strict=True):
        axes.set_title(run.name, fontsize=8)
    keys = [Patch(fill=False, label=kind, **style) for kind, style in BOXES.items()]
    figure.legend(handles=keys, loc='outside lower center', ncols=3, frameon=False, fontsize=7)
    save(figure, folder, 'detections')


def _draw_attention(run: EvaluatedRun, folder: Path, name: str) -> None:
    maps = {path: dict(spatial_gates(run, path)) for path in run.gates}
    cbams = list(next(iter(maps.values()), {}))
    if not cbams:
        return
    colours = scale_of(map_ for gates in maps.values() for map_ in gates.values())
    figure, grid = image_grid(len(maps), len(cbams) + 1, (0.9 * (len(cbams) + 1), 1.1 * len(maps)))
    for (path, gates), row in zip(maps.items(), grid, strict=True):
        show_image(row[0], image_of(path, [run]))
        for cbam, axes in zip(cbams, row[1:], strict=True):
            axes.imshow(gates[cbam], cmap=colours.cmap, norm=colours.norm)
    for cbam, axes in zip(cbams, grid[0][1:], strict=True):
        axes.set_title(cbam.removeprefix('backbone.').removesuffix('.cbam'), fontsize=6)
    draw_colour_bar(figure, grid, colours, 'spatial gate')
    save(figure, folder, name)
