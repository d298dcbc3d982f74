"""Evaluate runs, and write their report, for tools/report.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cbam_mmdet.engine.checkpoint.files import find_checkpoint
from cbam_mmdet.engine.run_reader import TrainingRecord, read_runs
from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.files import write_text
from cbam_mmdet.utils.tables import Table
from cbam_mmdet.visualization.report.charts import make_charts
from cbam_mmdet.visualization.report.evaluation import add_gates, evaluate, worst_first
from cbam_mmdet.visualization.report.figures import write_figures
from cbam_mmdet.visualization.report.page import render_page
from cbam_mmdet.visualization.report.pictures import make_heats, make_picture
from cbam_mmdet.visualization.report.tables import make_tables

ATTENTION_IMAGES = 3  # the number of images with attention maps
FIGURE_IMAGES = 4  # the number of images with detections in the figure for a paper


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
        work_dirs: the --work-dir of each training. The others are compared with the first one.
        out_dir: the folder to write to, by default `report` in the first work dir.
        data_root: the folder of the test data, in place of the configs'.
        num_images: the number of pictures of detections.
        score_thr: the lowest score of detections in the pictures and counts. The other tables and curves use all.
        device: the device for the attention maps: 'cpu', 'cuda:0', ..., by default the GPU if there is one.
        trust_checkpoint: load checkpoints by full unpickling, which runs code from the file.

    Returns:
        The HTML file.

    Raises:
        UserError: for a work dir without log, config or checkpoint, and for errors of tools/test.py.
    """
    records = read_runs(work_dirs)
    checkpoints = [find_checkpoint(str(record.work_dir)) for record in records]
    _check_detectors(records)
    how = dict(data_root=data_root, score_thr=score_thr, trust_checkpoint=trust_checkpoint)
    runs = [evaluate(record, file, **how) for record, file in zip(records, checkpoints, strict=True)]
    paths = worst_first(runs)
    add_gates(runs, paths[:ATTENTION_IMAGES], device, trust_checkpoint)

    out_dir = Path(out_dir or Path(work_dirs[0]) / 'report')
    tables, charts = make_tables(runs, score_thr), make_charts(runs)
    _write_tables([table for section in tables.values() for table in section], out_dir / 'tables')
    every_chart = [chart for section in charts.values() for chart in section]
    write_figures(runs, every_chart, paths[: min(num_images, FIGURE_IMAGES)], out_dir / 'figures')
    page = out_dir / 'report.html'
    html = render_page(
        runs,
        tables=tables,
        charts=charts,
        pictures=[make_picture(path, runs) for path in paths[:num_images]],
        attention=make_heats(runs, paths[:ATTENTION_IMAGES]),
        num_tested=len(paths),
        score_thr=score_thr,
    )
    write_text(page, html)
    return page


def _check_detectors(records: Sequence[TrainingRecord]) -> None:
    for record in records:
        if record.trained.get('default_scope') == 'mmpretrain':
            raise UserError(f'{record.work_dir} is the work dir of a classifier: the report is for detectors')


def _write_tables(tables: Sequence[Table], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for table in tables:
        table.write(folder)
