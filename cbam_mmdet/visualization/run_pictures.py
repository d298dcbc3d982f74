"""Two pictures of a run: its training curve, and a sheet of images with predicted and true boxes."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from mmdet.registry import DATASETS
from mmengine.config import Config

from cbam_mmdet.datasets.transforms.loading import read_image
from cbam_mmdet.engine.run_reader import read_results, read_scalars
from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.config import set_default_scope
from cbam_mmdet.visualization.curves import loss_charts, metric_charts
from cbam_mmdet.visualization.sheets import draw_box, image_grid, save_sheet, show_image

COLOURS = matplotlib.colormaps['tab10'].colors
TRUTH = dict(color='white', linestyle=(0, (4, 3)), linewidth=1.6)


def draw_curve(work_dir: str | Path, out: str | Path) -> Path:
    """Draw the loss over the iterations, and the mAP of each validation, for the newest training in a work dir.

    Args:
        work_dir: the --work-dir of tools/train.py.
        out: the picture to write.

    Returns:
        out.

    Raises:
        UserError: if the work dir holds no log of a training run, or no finite loss.
    """
    train, validations = read_scalars(work_dir)
    name = Path(work_dir).resolve().name
    loss = next((chart for chart in loss_charts({name: train}) if chart.name == 'loss'), None)
    if loss is None:
        raise UserError(f'{work_dir}: every loss that was logged is infinite or NaN, so there is no curve to draw')
    charts = [loss, *metric_charts({name: validations})[:1]]
    figure = Figure(figsize=(4.5 * len(charts), 3.5), layout='constrained')
    for chart, axes in zip(charts, figure.subplots(1, len(charts), squeeze=False).flat, strict=True):
        chart.plot(axes)
    return save_sheet(figure, out)


def draw_sheet(cfg: Config, results: str | Path, out: str | Path, num_images: int = 12, score_thr: float = 0.5) -> Path:
    """Draw the first images of the test set with true boxes (dashed) and predicted ones (by class, with score).

    Objects that the scores ignore (crowds, difficult ones) are left out.

    Args:
        cfg: the config. Its test dataloader names the images and the annotations.
        results: the file that `tools/test.py --out FILE.pkl` wrote.
        out: the picture to write.
        num_images: the number of images.
        score_thr: the lowest score of a prediction that is drawn.

    Returns:
        out.

    Raises:
        UserError: if the results are missing or do not belong to this test set.
    """
    predictions = {sample['img_id']: sample for sample in read_results(results)}
    set_default_scope(cfg)
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    infos = [dataset.get_data_info(i) for i in range(min(num_images, len(dataset)))]
    if any(not _is_of(predictions.get(info['img_id']), info) for info in infos):
        raise UserError(f"{results} lacks images of the config's test set: it was written for another one")

    columns = math.ceil(math.sqrt(len(infos) * 4 / 3))
    rows = math.ceil(len(infos) / columns)
    figure, grid = image_grid(rows, columns, (3 * columns, 3 * rows + 0.5))
    for axes, info in zip(grid.flat, infos, strict=False):
        _draw_image(axes, info, predictions[info['img_id']]['pred_instances'], score_thr)
    classes = dataset.metainfo['classes']
    legend = [Line2D([], [], **(TRUTH | dict(color='0.6')), label='truth')]
    legend += [Line2D([], [], color=COLOURS[i % 10], linewidth=2, label=name) for i, name in enumerate(classes[:10])]
    figure.legend(handles=legend, loc='outside lower center', ncols=len(legend), frameon=False, fontsize=9)
    return save_sheet(figure, out)


def _is_of(prediction: dict | None, info: dict) -> bool:
    """Whether a test wrote it of an image, wherever the data set lay then. The ids alone are 1, 2, ... anywhere."""
    if prediction is None:
        return False
    named = prediction.get('img_path')  # the config's meta_keys may leave it out
    return named is None or Path(str(named)).name == Path(info['img_path']).name


def _draw_image(axes: Axes, info: dict, prediction: dict, score_thr: float) -> None:
    show_image(axes, read_image(info['img_path'], size=(info['height'], info['width'])))
    for instance in info['instances']:
        if not instance['ignore_flag']:  # crowds and difficult ones, which no score counts
            draw_box(axes, tuple(instance['bbox']), **TRUTH)
    for box, label, score in zip(prediction['bboxes'], prediction['labels'], prediction['scores'], strict=True):
        if score >= score_thr:
            colour = COLOURS[int(label) % 10]
            x, y, *_ = corners = tuple(map(float, box))
            draw_box(axes, corners, color=colour, linewidth=1.8)
            background = dict(fc=colour, ec='none', pad=0.8)
            above = 'bottom' if y > 0.08 * info['height'] else 'top'  # inside the box where there is no place above
            axes.text(x, y, f'{float(score):.2f}', fontsize=7, color='white', va=above, bbox=background)
