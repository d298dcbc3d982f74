"""Sheets of images: axes without frames, with images and boxes in them, written as one picture."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import mmcv
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from cbam_mmdet.utils.files import AtomicLocalBackend


def image_grid(rows: int, columns: int, size: tuple[float, float], **layout: Any) -> tuple[Figure, np.ndarray]:
    """Make a figure, and its axes of shape (rows, columns) without frames and ticks.

    Args:
        rows, columns: the numbers of axes.
        size: (width, height) of the figure in inches.
        layout: further arguments of Figure.subplots.
    """
    figure = Figure(figsize=size, layout='constrained')
    grid = figure.subplots(rows, columns, squeeze=False, **layout)
    for axes in grid.flat:
        axes.axis('off')
    return figure, grid


def show_image(axes: Axes, image: np.ndarray) -> None:
    """Show an image, (H, W, 3) BGR."""
    axes.imshow(mmcv.bgr2rgb(image))


def scale_of(maps: Iterable[np.ndarray]) -> ScalarMappable:
    """One scale of colours for maps, from the least of their values to the greatest. Without a map it is 0 to 1."""
    ends = [(float(values.min()), float(values.max())) for values in maps] or [(0.0, 1.0)]
    return ScalarMappable(Normalize(min(low for low, _ in ends), max(high for _, high in ends)), 'viridis')


def draw_colour_bar(figure: Figure, grid: np.ndarray, colours: ScalarMappable, label: str) -> None:
    """Draw what the colours of the maps in these axes mean, to the right of them."""
    shrink = min(1, 3 / figure.get_figheight())
    bar = figure.colorbar(colours, ax=list(grid.flat), shrink=shrink, pad=0.01, fraction=0.03)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def draw_box(axes: Axes, box: tuple[float, float, float, float], **style: Any) -> None:
    """Draw the edges of a box, x1, y1, x2, y2 in pixels of the image that the axes show."""
    x1, y1, x2, y2 = box
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, **style))


def box_corners(xywh: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    """x, y, width, height -> x1, y1, x2, y2."""
    x, y, width, height = xywh
    return x, y, x + width, y + height


def write_figure(figure: Figure, path: Path, dpi: int) -> None:
    """Write a figure completely or not at all, in the format that the path's suffix names.

    Its texts are texts: a $ in a class name begins no formula.
    """
    content = io.BytesIO()
    with matplotlib.rc_context({'text.parse_math': False}):  # for the labels of ticks, which are made when it is drawn
        for text in figure.findobj(Text):
            text.set_parse_math(False)
        figure.savefig(content, dpi=dpi, format=path.suffix.lstrip('.'))
    AtomicLocalBackend().put(content.getvalue(), path)


def save_sheet(figure: Figure, out: str | Path) -> Path:
    """Write a figure as a picture for the screen, and create its folder if it does not exist."""
    out = Path(out)
    write_figure(figure, out, dpi=100)
    return out
