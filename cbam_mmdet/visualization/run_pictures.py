"""What a run did, in two pictures: its training curve, and a sheet of images with predicted and true boxes."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import matplotlib
import mmcv
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from mmdet.registry import DATASETS
from mmengine.config import Config

from cbam_mmdet.engine.run_reader import read_results, read_scalars
from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.config import set_default_scope

COLOURS = matplotlib.colormaps['tab10'].colors
TRUTH = dict(color='white', linestyle=(0, (4, 3)), linewidth=1.6)


def draw_curve(work_dir: str | Path, out: str | Path) -> Path:
    """Draw the loss over the iterations, and the mAP of each validation, of the newest run in a work dir.

    Args:
        work_dir: where tools/train.py wrote.
        out: the picture to write.

    Returns:
        out.

    Raises:
        UserError: if the work dir holds no log of a training run.
    """
    train, validations = read_scalars(work_dir)
    metric = next((key for key in ('coco/bbox_mAP', 'pascal_voc/mAP') if any(key in row for row in validations)), None)
    validated = [(row['step'], row[metric]) for row in validations if metric in row]

    figure = Figure(figsize=(8, 4), layout='constrained')
    axes = figure.add_subplot()
    axes.plot([row['step'] for row in train], [row['loss'] for row in train], color=COLOURS[0], label='training loss')
    axes.set(xlabel='iteration', ylabel='loss', ylim=(0, None))
    axes.grid(alpha=0.3)
    lines = axes.get_lines()
    if validated:
        right = axes.twinx()
        right.plot(*zip(*validated, strict=True), 'o-', color=COLOURS[1], label='mAP (validation)')
        right.set(ylabel='mAP', ylim=(0, 1))
        lines = [*lines, *right.get_lines()]
    axes.legend(handles=lines, loc='upper center', ncols=2, frameon=False)
    return _save(figure, out)


def draw_sheet(cfg: Config, results: str | Path, out: str | Path, num_images: int = 12, score_thr: float = 0.5) -> Path:
    """Draw the first images of the test set with true boxes (dashed) and predicted ones (by class, with score).

    Args:
        cfg: the config; its test dataloader names the images and the truth.
        results: what `tools/test.py --out FILE.pkl` wrote.
        out: the picture to write.
        num_images: how many images.
        score_thr: predictions below are not drawn.

    Returns:
        out.

    Raises:
        UserError: if the results are missing or not of this test set.
    """
    predictions = {sample['img_id']: sample for sample in read_results(results)}
    set_default_scope(cfg)
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    infos = [dataset.get_data_info(i) for i in range(min(num_images, len(dataset)))]
    if any(info['img_id'] not in predictions for info in infos):
        raise UserError(f"{results} lacks images of the config's test set: it was written for another one")

    columns = math.ceil(math.sqrt(len(infos) * 4 / 3))
    rows = math.ceil(len(infos) / columns)
    figure = Figure(figsize=(3 * columns, 3 * rows + 0.5), layout='constrained')
    for cell, info in zip(
        figure.subplots(rows, columns, squeeze=False).flat, infos + [None] * (rows * columns - len(infos)), strict=True
    ):
        cell.axis('off')
        if info is not None:
            prediction = predictions[info['img_id']]['pred_instances']
            _draw_image(cell, info, prediction, score_thr)
    classes = dataset.metainfo['classes']
    legend = [Line2D([], [], **(TRUTH | dict(color='0.6')), label='truth')]
    legend += [Line2D([], [], color=COLOURS[i % 10], linewidth=2, label=name) for i, name in enumerate(classes[:10])]
    figure.legend(handles=legend, loc='outside lower center', ncols=len(legend), frameon=False, fontsize=9)
    return _save(figure, out)


def _draw_image(axes: matplotlib.axes.Axes, info: dict, prediction: dict, score_thr: float) -> None:
    axes.imshow(cv2.cvtColor(mmcv.imread(info['img_path']), cv2.COLOR_BGR2RGB))
    for instance in info['instances']:
        _draw_box(axes, instance['bbox'], **TRUTH)
    for box, label, score in zip(prediction['bboxes'], prediction['labels'], prediction['scores'], strict=True):
        if score >= score_thr:
            colour = COLOURS[int(label) % 10]
            x, y = _draw_box(axes, np.asarray(box), color=colour, linewidth=1.8)
            axes.text(
                x,
                y,
                f'{float(score):.2f}',
                fontsize=7,
                color='white',
                va='bottom',
                bbox=dict(fc=colour, ec='none', pad=0.8),
            )


def _draw_box(axes: matplotlib.axes.Axes, box: np.ndarray, **style) -> tuple[float, float]:
    x1, y1, x2, y2 = map(float, box)
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, **style))
    return x1, y1


def _save(figure: Figure, out: str | Path) -> Path:
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)
    return out
