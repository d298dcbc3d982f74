"""Grad-CAM of images: a sheet for each, one or two detectors side by side as in figure 4 of CBAM's paper, and the maps as arrays."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import mmcv
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import nn
from tqdm import tqdm

from cbam_mmdet.analysis.gradcam import (
    BoxScores,
    Target,
    best_detections,
    cam_maps,
    find_layers,
    label_at,
    method_class,
    prepare,
)
from cbam_mmdet.datasets.inputs import unique_names
from cbam_mmdet.datasets.transforms.loading import read_image
from cbam_mmdet.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Choice:
    """What of an image is explained.

    Attributes:
        class_name: boxes of this class only.
        top: the detections with the best scores, so many; None for all.
        box: x1, y1, x2, y2 in pixels: this box in place of detections; without a class name, the class that the detector sees there.
        score_thr: no detection with a lower score.
    """

    class_name: str | None = None
    top: int | None = 1
    box: tuple[float, float, float, float] | None = None
    score_thr: float = 0.3


def explain_images(
    models: dict[str, nn.Module],
    files: Sequence[Path],
    out_dir: str | Path,
    choice: Choice,
    *,
    layers: Sequence[str] | None = None,
    method: str = 'gradcam++',
    warn: Callable[[str], None] = print,
) -> list[Path]:
    """Write `out_dir/NAME.png`, `out_dir/raw/NAME_MODEL.npy` (layers, H, W), and `out_dir/raw/NAME_MODEL.json`: the layers, the boxes,
    and the score that the model gives them.

    The first detector's detections are explained; the others are asked for their score of the same boxes.

    Args:
        models: detectors from inference.load_detector, by the names that the sheet shows.
        files: images.
        out_dir: where to write.
        choice: what is explained.
        layers: by their names; by default the last block of each stage of each detector's backbone.
        method: one of gradcam.METHODS.
        warn: is told of each image without a detection, or that cannot be read; the others go on.

    Returns:
        The sheets that were written.

    Raises:
        UserError: for a layer, class or method that does not exist; detectors of different classes; a box and several images; a single image
            that cannot be explained.
    """
    method_class(method)
    first = next(iter(models.values()))
    classes = tuple(first.dataset_meta['classes'])
    for name, model in models.items():
        if tuple(model.dataset_meta['classes']) != classes:
            raise UserError(
                f'--compare: {name} knows other classes than {next(iter(models))}: there is no score to compare'
            )
    if choice.class_name is not None and choice.class_name not in classes:
        raise UserError(
            f'--class {choice.class_name}: the detector knows {", ".join(classes)}{did_you_mean(choice.class_name, classes)}'
        )
    if choice.box is not None and len(files) > 1:
        raise UserError(f'--box is a box of one image, {len(files)} were given')
    found_layers = {name: find_layers(model, layers) for name, model in models.items()}
    out_dir = Path(out_dir)
    (out_dir / 'raw').mkdir(parents=True, exist_ok=True)
    written = []
    for file, stem in zip(
        tqdm(files, desc='explaining', unit='image', disable=len(files) < 2), unique_names(files), strict=True
    ):
        try:
            image = read_image(str(file))
            targets = choose_targets(first, image, choice)
            if not targets:
                what = f'detection of class {choice.class_name}' if choice.class_name else 'detection'
                raise UserError(
                    f'{file}: no {what} with a score of {choice.score_thr:g} or more: lower --score-thr, or give --box'
                )
        except UserError as error:
            if len(files) == 1:
                raise
            warn(str(error))
            continue
        rows = []
        for name, model in models.items():
            prepared = prepare(model, image)
            scores = BoxScores(model, prepared, targets)
            if min(scores.overlaps) < 0.5:
                warn(
                    f'{file}: {name} has no candidate that overlaps a box by half (IoU {min(scores.overlaps):.2f}); the nearest is taken'
                )
            maps = cam_maps(scores, prepared, found_layers[name], method)
            rows.append((name, list(found_layers[name]), maps, scores.probabilities))
            raw = out_dir / 'raw' / f'{stem}_{name}'
            np.save(f'{raw}.npy', maps)
            record = dict(
                image=str(file),
                method=method,
                layers=list(found_layers[name]),
                targets=[asdict(t) | dict(class_name=classes[t.label]) for t in targets],
                scores=scores.probabilities,
                overlaps=scores.overlaps,
            )
            Path(f'{raw}.json').write_text(json.dumps(record, indent=1) + '\n', encoding='utf-8')
        written.append(draw_cams(image, targets, rows, classes, out_dir / f'{stem}.png', f'{file.name}, {method}'))
    return written


def choose_targets(model: nn.Module, image: np.ndarray, choice: Choice) -> list[Target]:
    """The boxes of an image, (H, W, 3) BGR, that a choice stands for; none where nothing is detected.

    Raises:
        UserError: if a given box is no box in the image, or no class is seen in it.
    """
    classes = list(model.dataset_meta['classes'])
    label = None if choice.class_name is None else classes.index(choice.class_name)
    if choice.box is None:
        return best_detections(model, prepare(model, image), label, choice.top, choice.score_thr)
    x1, y1, x2, y2 = choice.box
    height, width = image.shape[:2]
    if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
        given = ' '.join(f'{v:g}' for v in choice.box)
        raise UserError(f'--box {given}: expected x1 < x2 and y1 < y2 inside the image of {width} x {height} pixels')
    return [Target(choice.box, label_at(model, prepare(model, image), choice.box) if label is None else label)]


def draw_cams(
    image: np.ndarray,
    targets: Sequence[Target],
    rows: Sequence[tuple[str, Sequence[str], np.ndarray, Sequence[float]]],
    classes: Sequence[str],
    out: Path,
    title: str = '',
) -> Path:
    """One sheet: a line for each detector, with the image and the boxes, then the map of each layer over the image.

    Args:
        image: (H, W, 3) BGR.
        targets: the boxes.
        rows: for each detector its name, its layers, its maps (layers, h, w) in 0..1, and its score of each box.
        classes: names of the classes.
        out: the picture to write.
        title: of the sheet.

    Returns:
        out.
    """
    from pytorch_grad_cam.utils.image import show_cam_on_image

    rgb = mmcv.bgr2rgb(image)
    height, width = image.shape[:2]
    columns = 1 + max(len(layers) for _, layers, _, _ in rows)
    tall = 2.3 * min(height / width, 2)
    figure = Figure(figsize=(2.3 * columns, len(rows) * (tall + 0.45) + 0.4), layout='constrained')
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes in grid.flat:
        axes.axis('off')
    for line, (name, layers, maps, scores) in zip(grid, rows, strict=True):
        told = ', '.join(f'{classes[t.label]} {p:.2f}' for t, p in list(zip(targets, scores, strict=True))[:3])
        more = f', ... ({len(targets)})' if len(targets) > 3 else ''
        line[0].imshow(rgb)
        line[0].set_title(f'{name}\n{told}{more}', fontsize=8)
        for axes, layer, map_ in zip(line[1:], layers, maps, strict=False):
            mask = np.clip(cv2.resize(map_, (width, height)), 0, 1)
            axes.imshow(show_cam_on_image(np.float32(rgb) / 255, mask, use_rgb=True))
            axes.set_title(layer.removeprefix('backbone.'), fontsize=8)
        for axes in line[: 1 + len(layers)]:
            for x1, y1, x2, y2 in (target.box for target in targets):
                axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color='white', linewidth=1.2))
    figure.suptitle(title, fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)
    return out
