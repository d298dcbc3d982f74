"""The images of the report's page: test images, with boxes that the page draws over them, and spatial gates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cbam_mmdet.evaluation.scores import Box, Outcome
from cbam_mmdet.visualization.report.encoding import jpeg_uri, map_uri
from cbam_mmdet.visualization.report.evaluation import EvaluatedRun, image_of
from cbam_mmdet.visualization.sheets import scale_of


@dataclass(frozen=True)
class Picture:
    """A test image.

    Args:
        name: the name of its file.
        width, height: the size of the image, in the pixels that the boxes use.
        data: its data URI.
        parts: (run's name, outcome, outcome as text) for each run.
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


@dataclass(frozen=True)
class Attention:
    """The spatial gates of a run.

    Args:
        name: the name of the run.
        low, high: the values at the ends of the scale of colours, which all its maps share.
        images: (name, data URI, gates) of each image.
    """

    name: str
    low: float
    high: float
    images: list[tuple[str, str, list[Heat]]]


def make_picture(path: str, runs: Sequence[EvaluatedRun]) -> Picture:
    """A test image with the outcome of each run that was tested on it."""
    image = image_of(path, runs)
    height, width = image.shape[:2]
    parts = [(run.name, run.outcomes[path], _in_words(run.outcomes[path])) for run in runs if path in run.outcomes]
    return Picture(Path(path).name, width, height, jpeg_uri(image), parts)


def make_heats(runs: Sequence[EvaluatedRun], paths: Sequence[str]) -> list[Attention]:
    """The spatial gates of each run with CBAMs over these images."""
    shown = []
    for run in runs:
        maps = {path: spatial_gates(run, path) for path in paths}
        values = [map_ for each in maps.values() for _, map_ in each]
        if not values:
            continue
        low, high = scale_of(values).get_clim()
        rows = [
            (
                Path(path).name,
                jpeg_uri(image_of(path, runs), 240),
                [Heat(name, map_uri(map_, low, high), float(map_.min()), float(map_.max())) for name, map_ in each],
            )
            for path, each in maps.items()
            if each
        ]
        shown.append(Attention(run.name, low, high, rows))
    return shown


def spatial_gates(run: EvaluatedRun, path: str) -> list[tuple[str, np.ndarray]]:
    """(CBAM's name, (H, W)) for each spatial gate over an image."""
    gates = run.gates.get(path, {}).items()
    return [(name, map_.cpu().numpy()) for name, each in gates for map_ in each.spatial]


def _in_words(outcome: Outcome) -> str:
    count = len(outcome.objects)
    return (
        f'{count} {"object" if count == 1 else "objects"}, missed: {_counted(outcome.missed)}, '
        f'false: {_counted(outcome.false)}'
    )


def _counted(boxes: Sequence[Box]) -> str:
    counts = Counter(box.label for box in boxes)
    return f'{len(boxes)}' + (f' ({", ".join(f"{n} {name}" for name, n in counts.items())})' if boxes else '')
