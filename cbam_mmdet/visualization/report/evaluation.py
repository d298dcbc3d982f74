"""Evaluate the newest checkpoint of a run: its detections in the test set, their scores, and the network's cost.

The test set is that of the test which wrote results.pkl, or else that of the training's config. The configs for COCO
and VOC test on their validation images.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from mmengine.config import Config, ConfigDict

from cbam_mmdet.analysis.complexity import Complexity, measure
from cbam_mmdet.apis.infer import load_detector
from cbam_mmdet.apis.test import test
from cbam_mmdet.datasets.transforms.arrays import array_pipeline
from cbam_mmdet.datasets.transforms.loading import read_image
from cbam_mmdet.engine.run_reader import RESULTS, TrainingRecord, data_of, read_results, was_made_of
from cbam_mmdet.errors import UserError
from cbam_mmdet.evaluation.scores import Outcome, Scores, score
from cbam_mmdet.models.gates import RecordedGates, find_cbams
from cbam_mmdet.utils.config import split_datasets
from cbam_mmdet.visualization.attention import gates_over

OF_TRAINING = ('train_cfg', 'init_cfg', 'frozen_stages', 'norm_eval', 'with_cp')


@dataclass
class EvaluatedRun:
    """A training with the detections of its newest checkpoint and the cost of its network.

    Args:
        record: the training.
        checkpoint: its newest checkpoint.
        scores: the scores of the detections.
        outcomes: the objects found and missed, by image file.
        cost: the cost of the network, or None if it cannot be counted.
        no_cost: the reason why it cannot be counted, or ''.
        gates: the gates by image file and CBAM.
    """

    record: TrainingRecord
    checkpoint: str
    scores: Scores
    outcomes: dict[str, Outcome]
    cost: Complexity | None
    no_cost: str = ''
    gates: dict[str, dict[str, RecordedGates]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.record.name


def evaluate(
    record: TrainingRecord, checkpoint: str, *, data_root: str | None, score_thr: float, trust_checkpoint: bool
) -> EvaluatedRun:
    """Score the detections of a checkpoint. write_report explains the arguments."""
    with TemporaryDirectory() as folder:
        detections, cfg = _detections(record, checkpoint, data_root, trust_checkpoint, folder)
        scores = score(cfg, detections, f"{record.name}'s results.pkl")
    cost, no_cost = None, ''
    try:
        cost = measure(copy.deepcopy(record.trained), record.name, device='cpu')
    except UserError as error:
        no_cost = str(error)
    record.facts['Test data'] = '; '.join(data_of(cfg, 'test'))
    record.facts['Checkpoint'] = Path(checkpoint).name
    return EvaluatedRun(record, checkpoint, scores, scores.outcomes(score_thr), cost, no_cost)


def image_of(path: str, runs: Sequence[EvaluatedRun]) -> np.ndarray:
    """A test image, (H, W, 3) BGR, in the frame of its boxes."""
    return read_image(path, size=next((run.outcomes[path].size for run in runs if path in run.outcomes), None))


def worst_first(runs: Sequence[EvaluatedRun]) -> list[str]:
    """The image files, sorted by the missed objects of all runs, most first, and then by the false detections."""
    missed, false = Counter(), Counter()
    for run in runs:
        for path, outcome in run.outcomes.items():
            missed[path] += len(outcome.missed)
            false[path] += len(outcome.false)
    return sorted(missed, key=lambda path: (-missed[path], -false[path], path))


def add_gates(runs: Sequence[EvaluatedRun], paths: Sequence[str], device: str | None, trust_checkpoint: bool) -> None:
    """Record the gates of each run over those of the images that are in its test set."""
    for run in runs:
        model = load_detector(run.record.trained, run.checkpoint, device, trust_checkpoint)
        if find_cbams(model):
            pipeline = array_pipeline(model.cfg)
            shown = {path: read_image(path, size=run.outcomes[path].size) for path in paths if path in run.outcomes}
            run.gates = {path: gates_over(model, image, pipeline) for path, image in shown.items()}


def _detects_alike(tested: Config, trained: Config) -> bool:
    """Whether a test detected by the settings of the training's config, not by others or with augmentation."""

    def parts(cfg: Config) -> tuple:
        return _of_inference(cfg.model), [dataset.get('pipeline') for dataset in split_datasets(cfg, 'test')]

    return parts(tested) == parts(trained)


def _of_inference(node: object) -> object:
    """The settings of a model without those that only a training reads."""
    if isinstance(node, Mapping):
        kept = {key: value for key, value in node.items() if key not in OF_TRAINING and not str(key).startswith('loss')}
        return {key: _of_inference(value) for key, value in kept.items()}
    return [_of_inference(item) for item in node] if isinstance(node, (list, tuple)) else node


def _detections(
    record: TrainingRecord, checkpoint: str, data_root: str | None, trust_checkpoint: bool, folder: str
) -> tuple[list[dict], Config]:
    """The detections that tools/test.py --out wrote of this checkpoint, and the config that names their data.

    If there are none, detect now, and write into a folder.
    """
    results = record.work_dir / RESULTS
    known = not data_root and results.is_file() and was_made_of(results, record.work_dir, checkpoint)
    if known and _detects_alike(record.tested, record.trained):
        written = datetime.fromtimestamp(results.stat().st_mtime)
        record.facts['Detections'] = f'{RESULTS} of {written:%Y-%m-%d %H:%M}'
        return read_results(results), copy.deepcopy(record.tested)
    record.facts['Detections'] = 'made for this report'
    if known:
        record.facts['Detections'] += ': the last test had other settings than the training'
    results = f'{folder}/{RESULTS}'
    cfg = copy.deepcopy(record.trained)
    # MMEngine keeps a visualizer by its name as long as the process lives, so each run needs another name.
    cfg.visualizer = ConfigDict(type='DetLocalVisualizer', name=folder, vis_backends=[])
    test(cfg, checkpoint, data_root=data_root, work_dir=folder, out=results, trust_checkpoint=trust_checkpoint)
    return read_results(results), cfg
