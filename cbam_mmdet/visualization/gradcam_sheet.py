"""Grad-CAM sheets of images, for one or two detectors side by side, as in figure 4 of CBAM's paper.

The maps are also written as arrays.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import mmcv
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
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
    require_explainable,
)
from cbam_mmdet.apis.infer import advice_on_scores
from cbam_mmdet.datasets.inputs import keep_inputs, unique_names
from cbam_mmdet.datasets.transforms.loading import read_image
from cbam_mmdet.errors import UserError, did_you_mean
from cbam_mmdet.utils.files import write_text
from cbam_mmdet.visualization.sheets import draw_box, draw_colour_bar, image_grid, save_sheet, show_image


@dataclass(frozen=True)
class Choice:
    """The choice of the boxes of an image that are explained.

    Attributes:
        class_name: the class of the boxes, or None for any.
        top: the number of detections, those with the best scores. None for all.
        box: x1, y1, x2, y2 in pixels, a box in place of detections. Without a class name, its class is the one that the
            detector finds there.
        score_thr: the lowest score of a detection.
    """

    class_name: str | None = None
    top: int | None = 1
    box: tuple[float, float, float, float] | None = None
    score_thr: float = 0.3


@dataclass(frozen=True)
class Explanation:
    """The maps of one detector for one image.

    Attributes:
        name: the name of the detector.
        layers: the names of the layers.
        maps: (layers, h, w) in 0..1.
        scores: the detector's score of each target.
        overlaps: the IoU of each target with the detector's candidate that has this score.
    """

    name: str
    layers: list[str]
    maps: np.ndarray
    scores: list[float]
    overlaps: list[float]


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
    """Write a sheet, the maps and the scores for each image.

    The sheet is `out_dir/NAME.png`. Each detector has `out_dir/raw/NAME_MODEL.npy`, of shape (layers, H, W), and
    `out_dir/raw/NAME_MODEL.json`: the layers, the boxes, and the score that the detector gives them. The first
    detector's detections are explained. The other detectors give their scores of the same boxes.

    Args:
        models: detectors from apis.infer.load_detector, by their names in the sheet.
        files: images.
        out_dir: the folder to write to.
        choice: the choice of the boxes.
        layers: names of layers, by default the last block of each stage of each detector's backbone.
        method: one of analysis.gradcam.METHODS.
        warn: called with a message for each image that is skipped because it has no detection or cannot be read, and
            for each map that is empty.

    Returns:
        The sheets that were written.

    Raises:
        UserError: for an unknown layer, class or method, for detectors of different classes, for a box and several
            images, for a single image that cannot be explained, and if a sheet would replace an input.
    """
    classes = _check(models, files, choice, method)
    layers_of = {name: find_layers(model, layers) for name, model in models.items()}
    out_dir = Path(out_dir)
    written = []
    sheets = [out_dir / f'{stem}.png' for stem in unique_names(files)]
    keep_inputs(files, sheets)
    progress = tqdm(files, desc='explaining', unit='image', disable=len(files) < 2)
    for file, sheet in zip(progress, sheets, strict=True):
        try:
            image, targets = _read(file, next(iter(models.values())), choice)
        except UserError as error:
            if len(files) == 1:
                raise
            warn(str(error))
            continue
        explanations = [
            _explain(name, model, image, targets, layers_of[name], method) for name, model in models.items()
        ]
        for it in explanations:
            if min(it.overlaps) < 0.5:
                warn(
                    f'{file}: {it.name} has no candidate that overlaps a box by half (IoU {min(it.overlaps):.2f}); the '
                    'nearest is taken'
                )
            for layer, map_ in zip(it.layers, it.maps, strict=True):
                if not map_.any():
                    warn(
                        f'{file}: {it.name}: the map of {layer} is empty: nothing there raises the score (a box uses '
                        'one level of the features only)'
                    )
            record = dict(image=str(file), method=method, targets=[_as_dict(target, classes) for target in targets])
            _write_raw(it, record, out_dir / 'raw', f'{sheet.stem}_{it.name}')
        title = f'{file.name}, {method}'
        written.append(draw_cams(image, targets, explanations, classes, sheet, title))
    return written


def _check(models: dict[str, nn.Module], files: Sequence[Path], choice: Choice, method: str) -> tuple[str, ...]:
    """Refuse arguments that do not fit together, and return the classes of the detectors."""
    method_class(method)
    for model in models.values():
        require_explainable(model)
    first, *others = models
    classes = tuple(models[first].dataset_meta['classes'])
    for name in others:
        if tuple(models[name].dataset_meta['classes']) != classes:
            raise UserError(f'--compare: {name} knows other classes than {first}: there is no score to compare')
    if choice.class_name is not None and choice.class_name not in classes:
        hint = did_you_mean(choice.class_name, classes)
        raise UserError(f'--class {choice.class_name}: the detector knows {", ".join(classes)}{hint}')
    if choice.box is not None and len(files) > 1:
        raise UserError(f'--box is a box of one image, {len(files)} were given')
    return classes


def _read(file: Path, model: nn.Module, choice: Choice) -> tuple[np.ndarray, list[Target]]:
    image = read_image(str(file))
    targets = choose_targets(model, image, choice)
    if not targets:
        what = f'detection of class {choice.class_name}' if choice.class_name else 'detection'
        advice = advice_on_scores(model, choice.score_thr)
        raise UserError(f'{file}: no {what} with a score of {choice.score_thr:g} or more: {advice}, or give --box')
    return image, targets


def _explain(
    name: str, model: nn.Module, image: np.ndarray, targets: Sequence[Target], layers: dict[str, nn.Module], method: str
) -> Explanation:
    prepared = prepare(model, image)
    scores = BoxScores(model, prepared, targets)
    maps = cam_maps(scores, prepared, layers, method)
    return Explanation(name, list(layers), maps, scores.probabilities, scores.overlaps)


def _as_dict(target: Target, classes: Sequence[str]) -> dict:
    return asdict(target) | dict(class_name=classes[target.label])


def _write_raw(explanation: Explanation, record: dict, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f'{name}.npy', explanation.maps)
    record = record | dict(layers=explanation.layers, scores=explanation.scores, overlaps=explanation.overlaps)
    write_text(folder / f'{name}.json', json.dumps(record, indent=1) + '\n')


def choose_targets(model: nn.Module, image: np.ndarray, choice: Choice) -> list[Target]:
    """The chosen boxes of an image, (H, W, 3) BGR. The list is empty if nothing is detected.

    Raises:
        UserError: if the box of the choice does not lie in the image, or the detector finds no class in it.
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
    explanations: Sequence[Explanation],
    classes: Sequence[str],
    out: Path,
    title: str = '',
) -> Path:
    """Draw a sheet with a line for each detector: the image with the boxes, then the map of each layer over the image.

    Args:
        image: (H, W, 3) BGR.
        targets: the boxes.
        explanations: one for each detector.
        classes: the names of the classes.
        out: the picture to write.
        title: the title of the sheet.

    Returns:
        out.
    """
    from pytorch_grad_cam.utils.image import show_cam_on_image

    rgb = np.float32(mmcv.bgr2rgb(image)) / 255
    height, width = image.shape[:2]
    columns = 1 + max(len(it.layers) for it in explanations)
    size = 2.3 * columns, len(explanations) * (2.3 * min(height / width, 2) + 0.45) + 0.4
    figure, grid = image_grid(len(explanations), columns, size)
    for line, it in zip(grid, explanations, strict=True):
        show_image(line[0], image)
        line[0].set_title(f'{it.name}\n{_scores_in_words(targets, it.scores, classes)}', fontsize=8)
        for axes, layer, map_ in zip(line[1:], it.layers, it.maps, strict=False):
            mask = np.clip(cv2.resize(map_, (width, height)), 0, 1)
            axes.imshow(show_cam_on_image(rgb, mask, use_rgb=True))
            axes.set_title(layer.removeprefix('backbone.') + ('' if map_.any() else ': empty'), fontsize=8)
        for axes in line[: 1 + len(it.layers)]:
            for target in targets:
                draw_box(axes, target.box, color='white', linewidth=1.2)
    # The library's colours.
    draw_colour_bar(figure, grid, ScalarMappable(Normalize(0, 1), 'jet'), "from the map's least value to its greatest")
    figure.suptitle(title, fontsize=9)
    return save_sheet(figure, out)


def _scores_in_words(targets: Sequence[Target], scores: Sequence[float], classes: Sequence[str], most: int = 3) -> str:
    shown = [f'{classes[target.label]} {score:.2f}' for target, score in zip(targets, scores, strict=True)][:most]
    return ', '.join(shown) + (f', ... ({len(targets)})' if len(targets) > most else '')
