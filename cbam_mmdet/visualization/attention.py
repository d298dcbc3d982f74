"""Attention maps: each CBAM's spatial gate over an image, the distribution of its channel gate, and figures of both.

They are for one image, or averages over several.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import cv2
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from mmdet.apis import inference_detector
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from cbam_mmdet.datasets.inputs import keep_inputs, unique_names
from cbam_mmdet.datasets.transforms.arrays import array_pipeline, place_of_image
from cbam_mmdet.datasets.transforms.loading import read_image
from cbam_mmdet.errors import UserError
from cbam_mmdet.models.gates import SATURATED, RecordedGates, gate_figures, record_gates
from cbam_mmdet.utils.files import write_text
from cbam_mmdet.utils.tables import Column, Table, code
from cbam_mmdet.visualization.sheets import draw_colour_bar, image_grid, save_sheet, scale_of, show_image

# A gate whose values vary by less than this share of its range is dead: it does not depend on its input.
DEAD = 0.01
BINS = 40
COLUMNS = 6
NOTES = (
    '`mean` and `spread` (standard deviation) of all values of all images, each image counting the same; '
    f'`closed`: share below {SATURATED:g} of the range, `open`: share above {1 - SATURATED:g} of it, '
    '`saturated`: both; `distance` from identity: mean of |gate - 1|; '
    f'`dead`: channels whose value differs by less than {DEAD:g} of the range between any two images (unknown for one '
    'image), or images over which the spatial gate differs by less than that. The range is (0, 1) for the sigmoid '
    'gate, (0, 2) for the unit gate.'
)


@dataclass(frozen=True)
class GateRow:
    """The statistics of one gate of one CBAM over some images, as models.gates.gate_figures defines them.

    Attributes:
        name: the CBAM's dotted name. `stage` and `block` are its parts.
        gate: 'channel' or 'spatial'.
        images: the number of images.
        mean: mean over the images.
        spread: standard deviation of all values, each image counting the same.
        closed: share of values below 0.05 of the range.
        open: share above 0.95 of the range.
        saturated: closed + open.
        distance: from identity, the mean of |value - 1|.
        dead: for the channel gate, the share of channels whose value differs by less than 0.01 of the range between any
            two images (None for a single image). For the spatial gate, the share of images over which the map differs
            by less than that.
    """

    name: str
    stage: str
    block: str
    gate: str
    images: int
    mean: float
    spread: float
    closed: float
    open: float
    saturated: float
    distance: float
    dead: float | None


class GateAverage:
    """A running average of the gates of one CBAM over images. It keeps no map except the average.

    Attributes:
        map: (H, W), the mean spatial gate. The maps of all images are resized to the first one's size. None without a
            spatial branch.
        counts: (BINS,), the histogram of all values of the channel gate over (0, upper).
    """

    def __init__(self, name: str, upper: float) -> None:
        self.name, self.upper = name, upper
        self.stage, self.block = stage_and_block(name)
        self.map: Tensor | None = None
        self.counts = torch.zeros(BINS)
        self._figures: dict[str, list[Tensor]] = {'channel': [], 'spatial': []}
        self._lowest = self._highest = None
        self._flat = 0

    def add(self, gates: RecordedGates) -> None:
        """Add the images of a recording."""
        for values in gates.channel:
            values = values.float().cpu()
            self._figures['channel'].append(gate_figures(values, self.upper))
            self.counts += torch.histc(values, BINS, 0, self.upper)
            self._lowest = values if self._lowest is None else torch.minimum(self._lowest, values)
            self._highest = values if self._highest is None else torch.maximum(self._highest, values)
        for values in gates.spatial:
            values = values.float().cpu()
            self._figures['spatial'].append(gate_figures(values, self.upper))
            self._flat += bool(values.max() - values.min() < DEAD * self.upper)
            seen = len(self._figures['spatial'])
            if self.map is None:
                self.map = values
            else:
                values = F.interpolate(values[None, None], self.map.shape, mode='bilinear', antialias=True)[0, 0]
                self.map = self.map + (values - self.map) / seen

    def rows(self) -> list[GateRow]:
        """A row for each gate with at least one image."""
        rows = []
        for gate, figures in self._figures.items():
            if not figures:
                continue
            means, spreads, closed, opened, distance = torch.stack(figures).double().unbind(1)
            # The variance of all values is that within the images plus that between them.
            spread = (spreads.square().mean() + means.var(correction=0)).sqrt()
            images = len(figures)
            if gate == 'spatial':
                dead = self._flat / images
            else:
                moves = self._highest - self._lowest >= DEAD * self.upper
                dead = None if images == 1 else 1 - moves.double().mean().item()
            shares = closed.mean().item(), opened.mean().item(), (closed + opened).mean().item()
            rows.append(
                GateRow(self.name, self.stage, self.block, gate, images, means.mean().item(), spread.item(), *shares,
                        distance.mean().item(), dead)
            )  # fmt: skip
        return rows


def stage_and_block(name: str) -> tuple[str, str]:
    """'backbone.layer1.0.cbam' -> ('backbone.layer1', '0'); 'neck.cbam3' -> ('neck', 'cbam3')."""
    parts = name.removesuffix('.cbam').split('.')
    at = 2 if len(parts) > 2 else 1
    return '.'.join(parts[:at]), '.'.join(parts[at:])


def gates_over(model: nn.Module, image: np.ndarray, pipeline: Callable) -> dict[str, RecordedGates]:
    """The gates of a detector over one image, without what the pipeline and the batch pad.

    Args:
        model: a detector from apis.infer.load_detector.
        image: (H, W, 3) BGR.
        pipeline: the result of array_pipeline(model.cfg).

    Raises:
        UserError: if the model holds no CBAM.
    """
    with record_gates(model) as recorded:
        sample = inference_detector(model, image, pipeline)
    place = place_of_image(sample)
    padded = sample.metainfo.get('batch_input_shape', sample.img_shape[:2])
    for gates in recorded.values():
        gates.spatial = [_inside(map_, place, padded) for map_ in gates.spatial]
    return recorded


def _inside(map_: np.ndarray, place: Sequence[int], padded: Sequence[int]) -> np.ndarray:
    """What of a map is of a part, (top, left, bottom, right), of the (height, width) that it is of."""
    rows, columns = (
        slice(math.floor(first * side / pixels), math.ceil(last * side / pixels))
        for first, last, side, pixels in zip(place[:2], place[2:], map_.shape, padded, strict=True)
    )
    return map_[rows, columns]


def attend(
    model: nn.Module,
    files: Sequence[Path],
    out_dir: str | Path,
    *,
    sizes: Mapping[Path, tuple[int, int] | None] | None = None,
    pictures: int = 8,
    warn: Callable[[str], None] = print,
) -> list[GateRow]:
    """Write the attention maps of a detector over images, as pictures and tables.

    It writes `out_dir/vis/NAME.png` for each of the first images, `out_dir/average.png`, `gates.md` and `gates.csv` for
    all images together, and `gates_by_image.csv` with the figures of each image.

    Args:
        model: a detector from apis.infer.load_detector.
        files: images.
        out_dir: the folder to write to.
        sizes: the (height, width) of images that are annotated, see datasets.transforms.loading.read_image.
        pictures: the number of images that get a picture.
        warn: called with a message for each image that cannot be read, which is skipped.

    Returns:
        The rows of the table.

    Raises:
        UserError: if the model holds no CBAM, no image can be read, or a picture would replace an input.
    """
    out_dir = Path(out_dir)
    names = unique_names(files)
    keep_inputs(files, [out_dir / 'average.png', *(out_dir / 'vis' / f'{name}.png' for name in names)])
    out_dir.mkdir(parents=True, exist_ok=True)
    pipeline = array_pipeline(model.cfg)
    averages: dict[str, GateAverage] = {}
    by_image, drawn = [], 0
    for file, name in zip(tqdm(files, desc='looking', unit='image', disable=len(files) < 2), names, strict=True):
        try:
            image = read_image(str(file), size=(sizes or {}).get(file))
        except UserError as error:
            warn(str(error))
            continue
        alone = {}
        for path, gates in gates_over(model, image, pipeline).items():
            alone[path] = GateAverage(path, gates.upper)
            for average in (alone[path], averages.setdefault(path, GateAverage(path, gates.upper))):
                average.add(gates)
        by_image += [(str(file), row) for average in alone.values() for row in average.rows()]
        if drawn < pictures:
            draw_gates(alone.values(), out_dir / 'vis' / f'{name}.png', image, file.name)
            drawn += 1
    if not averages:
        raise UserError(f'none of the {len(files)} images can be read')
    rows = [row for average in averages.values() for row in average.rows()]
    draw_gates(averages.values(), out_dir / 'average.png', title=f'average of {rows[0].images} images')
    write_text(out_dir / 'gates.md', markdown(rows))
    columns = [field.name for field in fields(GateRow)]
    write_text(out_dir / 'gates.csv', Table(columns, list(map(astuple, rows))).csv())
    single = Table(['file', *columns], [(file, *astuple(row)) for file, row in by_image])
    write_text(out_dir / 'gates_by_image.csv', single.csv())
    return rows


def draw_gates(averages: Iterable[GateAverage], out: Path, image: np.ndarray | None = None, title: str = '') -> Path:
    """Draw a sheet with the spatial gate (over the image, if given) and the channel gate's distribution of each CBAM.

    Each stage starts a new line. All maps share one scale of colours, from their least value to their greatest.
    Those of a map stand above it.

    Args:
        averages: an average for each CBAM, in order.
        out: the picture to write.
        image: (H, W, 3) BGR.
        title: the title of the sheet.

    Returns:
        out.
    """
    lines: list[list[GateAverage | None]] = []
    if image is not None:
        lines.append([None])
    stage = None
    for average in averages:
        if (average.stage != stage and not (stage is None and lines)) or len(lines[-1]) == COLUMNS:
            lines.append([])
        stage = average.stage
        lines[-1].append(average)
    columns = max(map(len, lines))
    maps = [average.map for line in lines for average in line if average is not None and average.map is not None]
    shape = image.shape[:2] if image is not None else maps[0].shape if maps else (1, 2)
    height = 1.9 * min(shape[0] / shape[1], 2) if maps else 0.2
    size = (2.0 * columns + 0.3, len(lines) * (height + 1.25) + 0.7)
    ratios = [max(height, 0.2), 0.6] * len(lines)
    figure, grid = image_grid(2 * len(lines), columns, size, height_ratios=ratios)
    colours = scale_of(map_.numpy() for map_ in maps)
    for i, line in enumerate(lines):
        for above, below, average in zip(grid[2 * i], grid[2 * i + 1], line, strict=False):
            if average is None:
                show_image(above, image)
                above.set_title('image', fontsize=8)
            else:
                _draw_map(above, average, image, colours)
                _draw_distribution(below, average)
    if maps:
        draw_colour_bar(figure, grid, colours, 'spatial gate')
    note = 'maps: spatial gate · below: distribution of the channel gate, identity dashed, saturated grey'
    figure.suptitle(f'{title}\n{note}', fontsize=9)
    return save_sheet(figure, out)


def markdown(rows: Sequence[GateRow]) -> str:
    """The table with a line for each gate, and an explanation of its columns."""
    columns = {
        Column('stage', code): lambda row: row.stage,
        Column('block', code): lambda row: row.block,
        'gate': lambda row: row.gate,
        'mean': lambda row: row.mean,
        'spread': lambda row: row.spread,
        Column('closed', '.1%'): lambda row: row.closed,
        Column('open', '.1%'): lambda row: row.open,
        Column('saturated', '.1%'): lambda row: row.saturated,
        'distance': lambda row: row.distance,
        Column('dead', '.1%'): lambda row: row.dead,
    }
    images = f'{rows[0].images} image{"s" if rows[0].images > 1 else ""}'
    return f'{Table.of(rows, columns, nothing="-").markdown()}\nOver {images}. {NOTES}\n'


def _draw_map(axes: Axes, average: GateAverage, image: np.ndarray | None, colours: ScalarMappable) -> None:
    label = f'{average.stage}.{average.block}'.removeprefix('backbone.')
    if average.map is None:
        axes.set_title(f'{label}\nno spatial gate', fontsize=8)
        return
    map_ = average.map.numpy()
    axes.set_title(f'{label}\n{map_.min():.2f} to {map_.max():.2f}', fontsize=8)
    if image is None:
        axes.imshow(map_, cmap=colours.cmap, norm=colours.norm)
        return
    height, width = image.shape[:2]
    axes.imshow(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cmap='gray', vmin=0, vmax=255)
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axes.imshow(map_, cmap=colours.cmap, norm=colours.norm, alpha=0.7, extent=extent, interpolation='bilinear')


def _draw_distribution(axes: Axes, average: GateAverage) -> None:
    upper = average.upper
    axes.axis('on')
    for start in (0, (1 - SATURATED) * upper):
        axes.axvspan(start, start + SATURATED * upper, color='0.85')
    edges = np.linspace(0, upper, BINS + 1)
    axes.stairs((average.counts / average.counts.sum()).numpy(), edges, fill=True, color='tab:blue')
    axes.axvline(1, color='black', linestyle='--', linewidth=1)
    axes.set(xlim=(-0.02 * upper, 1.02 * upper), xticks=[0, upper / 2, upper], yticks=[])
    axes.tick_params(labelsize=6)
    axes.spines[['top', 'left', 'right']].set_visible(False)
