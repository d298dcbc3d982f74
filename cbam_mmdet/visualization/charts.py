"""Line charts that can be drawn in two ways: as SVG for the report, and by Matplotlib for a paper.

The report's page sets the colours of the SVG.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cbam_mmdet.visualization.sheets import write_figure

# By the number of the run, as --run-0, --run-1, ... in report.css. Colour-blind people can distinguish them, too.
COLOURS = ('#0062b1', '#c8500a', '#00795c', '#94388a', '#7a6400', '#4a4a52')
COLOURS_ON_DARK = ('#6cb6ff', '#ff9a5c', '#4fd0a8', '#e59adb', '#dcc35a', '#c2c2cc')
WIDTH, HEIGHT = 380, 230
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 8, 34
MOST_POINTS = 400


@dataclass(frozen=True)
class Line:
    """The line of a run.

    Args:
        label: its text in the legend.
        x, y: the points.
        run: the number of the run, which sets the colour.
        dashed: whether it is dashed, as the second line of the same run.
        marks: whether the points are marked, because they are few.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    run: int = 0
    dashed: bool = False
    marks: bool = False


@dataclass(frozen=True)
class Chart:
    """Lines over a common axis.

    Args:
        name: the name of its files, without suffix.
        title: its title.
        x_label, y_label: the labels of the axes.
        lines: at least one line.
        x_range, y_range: (low, high), by default from 0 to the greatest value of the lines.
        ends: whether a line's last value is of interest, so that the legend shows it.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    ends: bool = True

    @property
    def summary(self) -> str:
        """A description of the chart for screen readers."""
        ends = [f'{line.label}: {line.y[-1]:.3g} at {line.x[-1]:g}' for line in self.lines]
        return f'{self.y_label} over {self.x_label}' + (f'; last values: {"; ".join(ends)}' if self.ends else '')

    def svg(self) -> Markup:
        """The chart for report.html. It has CSS classes and no colours."""
        (x0, x1), (y0, y1) = self._ranges()
        width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

        def place(x: float, y: float) -> tuple[float, float]:
            return LEFT + width * (x - x0) / (x1 - x0), TOP + height * (1 - (y - y0) / (y1 - y0))

        parts = [
            f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(self.title)}: '
            f'{escape(self.summary)}">'
        ]
        for value in _ticks(y0, y1):
            _, y = place(x0, value)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}h{width}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{_short(value)}</text>')
        for value in _ticks(x0, x1):
            x, _ = place(value, y0)
            parts.append(f'<text x="{x:.1f}" y="{TOP + height + 15}" text-anchor="middle">{_short(value)}</text>')
        parts.append(f'<path class="axis" d="M{LEFT} {TOP + height}h{width}"/>')
        label_x, label_y = LEFT + width / 2, HEIGHT - 4
        parts.append(
            f'<text class="label" x="{label_x}" y="{label_y}" text-anchor="middle">{escape(self.x_label)}</text>'
        )
        for line in self.lines:
            points = [place(x, y) for x, y in _thinned(line)]
            style = f'run-{line.run % len(COLOURS)}{" dashed" if line.dashed else ""}'
            parts.append(f'<polyline class="{style}" points="{" ".join(f"{x:.2f},{y:.2f}" for x, y in points)}"/>')
            if line.marks or len(points) == 1:
                parts += [f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in points]
        parts.append('</svg>')
        return Markup(''.join(parts))

    def draw(self, folder: Path) -> None:
        """Write NAME.png and NAME.pdf with the width of a column. The PDF keeps text as text."""
        with matplotlib.rc_context({'pdf.fonttype': 42, 'font.size': 8}):
            figure = Figure(figsize=(3.4, 2.4), layout='constrained')
            self.plot(figure.add_subplot())
            save(figure, folder, self.name)

    def plot(self, axes: Axes) -> None:
        """Draw the chart into axes of Matplotlib."""
        x_range, y_range = self._ranges()
        for line in self.lines:
            style = dict(linestyle='--' if line.dashed else '-', marker='o' if line.marks else None, markersize=3)
            colour = COLOURS[line.run % len(COLOURS)]
            axes.plot(line.x, line.y, color=colour, linewidth=1.2, label=line.label, **style)
        axes.set(xlabel=self.x_label, ylabel=self.y_label, title=self.title, xlim=x_range, ylim=y_range)
        axes.spines[['top', 'right']].set_visible(False)
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.legend(frameon=False, fontsize='small')

    def _ranges(self) -> tuple[tuple[float, float], tuple[float, float]]:
        highest = [
            max(max(values) for values in axis) for axis in ([li.x for li in self.lines], [li.y for li in self.lines])
        ]
        x_range = self.x_range or (0.0, highest[0] or 1.0)
        return x_range, self.y_range or (0.0, highest[1] * 1.05 or 1.0)


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write a figure as NAME.png and NAME.pdf."""
    for suffix in ('png', 'pdf'):
        write_figure(figure, folder / f'{name}.{suffix}', dpi=200)


def _ticks(low: float, high: float) -> list[float]:
    ticks = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    slack = (high - low) * 1e-6
    return [float(tick) for tick in ticks if low - slack <= tick <= high + slack]


def _short(value: float) -> str:
    value = round(value, 12)
    return f'{value / 1000:g}k' if abs(value) >= 10000 else f'{value:g}'


def _thinned(line: Line) -> list[tuple[float, float]]:
    """The points without those inside a constant stretch, and at most about MOST_POINTS of them."""
    points = list(zip(line.x, line.y, strict=True))
    inner = [
        p for before, p, after in zip(points, points[1:], points[2:], strict=False) if not before[1] == p[1] == after[1]
    ]
    if line.marks or len(points) < 3:
        return points
    step = -(-len(inner) // MOST_POINTS) or 1
    return [points[0], *inner[::step], points[-1]]
