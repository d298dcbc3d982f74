"""The images of the report's page: test images, with boxes that the page draws over them, and spatial gates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cbam_mmdet.evaluation.scores import Box, Outcome
from cbam_mmdet.visualization.report.encoding import jpeg_uri, map_uri
from cbam_mmdet.visualization.report.evaluation import EvaluatedRun, image_of


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


def make_picture(path: str, runs: Sequence[EvaluatedRun]) -> Picture:
    """A test image with the outcome of each run that was tested on it."""
    image = image_of(path, runs)
    height, width = image.shape[:2]
    parts = [(run.name, run.outcomes[path], _in_words(run.outcomes[path])) for run in runs if path in run.outcomes]
    return Picture(Path(path).name, width, height, jpeg_uri(image), parts)


def make_heats(
    runs: Sequence[EvaluatedRun], paths: Sequence[str]
) -> list[tuple[str, list[tuple[str, str, list[Heat]]]]]:
    """For each run with CBAMs its name, and (name, data URI, spatial gates) for each image."""
    shown = []
    for run in runs:
        rows = []
        for path in paths:
            heats = [
                Heat(name, *map_uri(map_.cpu().numpy()))
                for name, gates in run.gates.get(path, {}).items()
                for map_ in gates.spatial
            ]
            if heats:
                rows.append((Path(path).name, jpeg_uri(image_of(path, runs), 240), heats))
        if rows:
            shown.append((run.name, rows))
    return shown


def _in_words(outcome: Outcome) -> str:
    count = len(outcome.objects)
    return (
        f'{count} {"object" if count == 1 else "objects"}, missed: {_counted(outcome.missed)}, '
        f'false: {_counted(outcome.false)}'
    )


def _counted(boxes: Sequence[Box]) -> str:
    counts = Counter(box.label for box in boxes)
    return f'{len(boxes)}' + (f' ({", ".join(f"{n} {name}" for name, n in counts.items())})' if boxes else '')
