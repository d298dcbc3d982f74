"""COCO's evaluation by pycocotools, by faster-coco-eval and by hotcoco, on the same detections: figures and time.

    python benchmarks/coco_eval.py [--images 5000] [--detections 100] [--rounds 2] [--out benchmarks/results/NAME]

Each is called through its metric, as a test of a detector does: MMDetection's `CocoMetric` and `FasterCocoMetric`, and
this package's `HotCocoMetric`. What is not installed is left out. The data are drawn here: boxes of 80 classes, some of
them crowds, and detections that find them more or less well or not at all. The time is that of `compute_metrics`, from
collected results to the table: the median of rounds in which all take their turn.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import cbam_mmdet  # noqa: F401  # isort: skip  (before mmdet)

import numpy as np
import torch
from mmdet.evaluation.metrics import coco_metric, faster_coco_metric
from mmdet.registry import METRICS
from record import machine, write

from cbam_mmdet.evaluation import coco_eval

CLASSES, SIZE = 80, (640, 480)
# COCO's own limits. MMDetection's default is 100, 300, 1000, and its metric names the recalls after those.
LIMITS = (1, 10, 100)
METRIC_ITEMS = [
    'mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l',
    'AR@100', 'AR@300', 'AR@1000', 'AR_s@1000', 'AR_m@1000', 'AR_l@1000',
]  # fmt: skip
FIGURES = [
    'AP', 'AP50', 'AP75', 'AP_small', 'AP_medium', 'AP_large',
    'AR@1', 'AR@10', 'AR@100', 'AR_small', 'AR_medium', 'AR_large',
]  # fmt: skip


def draw_boxes(random: np.random.Generator, count: int) -> np.ndarray:
    """Boxes of all of COCO's sizes: an array (count, 4) of x1, y1, x2, y2."""
    extent = np.minimum(np.exp(random.uniform(np.log(8), np.log(400), (count, 2))), np.array(SIZE) - 2)
    corner = random.uniform(0, 1, (count, 2)) * (np.array(SIZE) - extent)
    return np.hstack([corner, corner + extent])


def draw(images: int, detections: int) -> tuple[dict, list[dict]]:
    """Annotations in COCO's format, and the data samples of a detector for the metric."""
    random = np.random.default_rng(0)
    annotations, samples = [], []
    for image in range(1, images + 1):
        truth, labels = draw_boxes(random, count := random.poisson(7)), random.integers(CLASSES, size=count)
        for (x1, y1, x2, y2), label, crowd in zip(truth, labels, random.random(count) < 0.01, strict=True):
            width, height = x2 - x1, y2 - y1
            annotation = dict(id=len(annotations) + 1, image_id=image, category_id=int(label) + 1, iscrowd=int(crowd))
            annotations.append(dict(annotation, bbox=[x1, y1, width, height], area=width * height))
        near = np.repeat(truth, 3, 0)[:detections]
        near = near + random.normal(0, 0.08, near.shape) * np.tile(near[:, 2:] - near[:, :2], 2)
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        found = np.vstack([near, draw_boxes(random, detections - len(near))])
        right = random.random(len(near)) < 0.8
        known = np.where(right, np.repeat(labels, 3)[: len(near)], random.integers(CLASSES, size=len(near)))
        guessed = np.concatenate([known, random.integers(CLASSES, size=detections - len(near))])
        # In half precision some scores are equal, as those of a detector are.
        scores = np.concatenate([random.beta(3, 2, len(near)), random.beta(1, 6, detections - len(near))]).astype('f2')
        instances = dict(
            bboxes=torch.tensor(found).float(), scores=torch.tensor(scores).float(), labels=torch.tensor(guessed)
        )
        samples.append(dict(img_id=image, ori_shape=SIZE[::-1], pred_instances=instances))
    truth = dict(images=[dict(id=i + 1, width=SIZE[0], height=SIZE[1]) for i in range(images)], annotations=annotations,
                 categories=[dict(id=i + 1, name=f'class{i}') for i in range(CLASSES)])  # fmt: skip
    return truth, samples


# For each evaluator its metric, and the class whose figures are recorded before the metric rounds them.
EVALUATORS = {
    'pycocotools': ('CocoMetric', coco_metric, 'COCOeval'),
    'faster-coco-eval': ('FasterCocoMetric', faster_coco_metric, 'COCOeval_faster'),
    'hotcoco': ('cbam_mmdet.HotCocoMetric', coco_eval, 'HotCocoEval'),
}


def measure(evaluator: str, ann_file: str, samples: list[dict]) -> tuple[float, list[float], dict]:
    """The seconds, the twelve unrounded figures, and the result of the metric."""
    name, module, class_name = EVALUATORS[evaluator]
    unrounded = []

    class Recorded(getattr(module, class_name)):
        def summarize(self):
            super().summarize()
            unrounded.extend(float(figure) for figure in self.stats[:12])

    with contextlib.redirect_stdout(io.StringIO()), mock.patch.object(module, class_name, Recorded):
        metric = METRICS.build(
            dict(type=name, ann_file=ann_file, classwise=True, metric_items=METRIC_ITEMS, proposal_nums=LIMITS)
        )
        metric.dataset_meta = dict(classes=[f'class{i}' for i in range(CLASSES)])
        metric.process({}, samples)
        start = time.perf_counter()
        reported = metric.compute_metrics(metric.results)
        return time.perf_counter() - start, unrounded, reported


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--images', type=int, default=5000)
    parser.add_argument('--detections', type=int, default=100, help='of an image')
    parser.add_argument('--rounds', type=int, default=2)
    parser.add_argument('--out', type=Path, help='write NAME.json, NAME.md and NAME.png')
    args = parser.parse_args()

    packages = {'pycocotools': 'pycocotools', 'faster-coco-eval': 'faster_coco_eval', 'hotcoco': 'hotcoco'}
    evaluators = [name for name, module in packages.items() if importlib.util.find_spec(module)]
    about = machine('benchmarks/coco_eval.py', *packages, 'onedl-mmdetection')
    truth, samples = draw(args.images, args.detections)
    seconds = {name: [] for name in evaluators}
    figures, reported = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        ann_file = f'{folder}/truth.json'
        Path(ann_file).write_text(json.dumps(truth))
        for _ in range(args.rounds):
            for name in evaluators:
                took, figures[name], reported[name] = measure(name, ann_file, samples)
                seconds[name].append(took)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rows = [
        dict(
            figure=figure,
            **{name.replace('-', '_'): figures[name][i] for name in evaluators},
            greatest_difference=max(abs(figures[name][i] - figures['pycocotools'][i]) for name in evaluators),
        )
        for i, figure in enumerate(FIGURES)
    ]
    record = dict(
        **about,
        images=args.images,
        detections=args.detections,
        annotations=len(truth['annotations']),
        rounds=args.rounds,
        seconds={name: round(value, 2) for name, value in medians.items()},
        times_as_fast={name: round(medians['pycocotools'] / value, 1) for name, value in medians.items()},
        reported_figures_equal=all(value == reported['pycocotools'] for value in reported.values()),
        greatest_difference=max(row['greatest_difference'] for row in rows),
        rows=rows,
    )
    bars = {name: [value] for name, value in medians.items()}
    write(record, args.out, ['COCO evaluation'], bars, 'seconds')


if __name__ == '__main__':
    main()
