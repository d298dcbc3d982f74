"""COCO's evaluation by pycocotools and by faster-coco-eval, side by side on the same detections: figures and time.

    python benchmarks/coco_eval.py [--images 5000] [--detections 100] [--out benchmarks/results/NAME]

Both are called through MMDetection's metrics, as a test of a detector does: `CocoMetric`, and `FasterCocoMetric` of
the maintained fork. The data are drawn here: boxes of 80 classes, some of them crowds, and detections that find
them more or less well or not at all. The time is that of `compute_metrics`, from collected results to the table.
"""

import argparse
import json
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


def measure(name: str, module, evaluator: str, ann_file: str, samples: list[dict]) -> tuple[float, list[float], dict]:
    """The seconds, the twelve unrounded figures, and the result of the metric."""
    metric = METRICS.build(dict(type=name, ann_file=ann_file, metric_items=METRIC_ITEMS, proposal_nums=LIMITS))
    metric.dataset_meta = dict(classes=[f'class{i}' for i in range(CLASSES)])
    metric.process({}, samples)
    unrounded = []

    class Recorded(getattr(module, evaluator)):
        def summarize(self):
            super().summarize()
            unrounded.extend(float(figure) for figure in self.stats[:12])

    with mock.patch.object(module, evaluator, Recorded):
        start = time.perf_counter()
        reported = metric.compute_metrics(metric.results)
        return time.perf_counter() - start, unrounded, reported


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--images', type=int, default=5000)
    parser.add_argument('--detections', type=int, default=100, help='of an image')
    parser.add_argument('--out', type=Path, help='write NAME.json, NAME.md and NAME.png')
    args = parser.parse_args()

    truth, samples = draw(args.images, args.detections)
    with tempfile.TemporaryDirectory() as folder:
        ann_file = f'{folder}/truth.json'
        Path(ann_file).write_text(json.dumps(truth))
        slow = measure('CocoMetric', coco_metric, 'COCOeval', ann_file, samples)
        fast = measure('FasterCocoMetric', faster_coco_metric, 'COCOeval_faster', ann_file, samples)
    rows = [
        dict(figure=name, pycocotools=a, faster_coco_eval=b, difference=abs(a - b))
        for name, a, b in zip(FIGURES, slow[1], fast[1], strict=True)
    ]
    record = dict(
        **machine('benchmarks/coco_eval.py', 'pycocotools', 'faster-coco-eval', 'onedl-mmdetection'),
        images=args.images,
        detections=args.detections,
        annotations=len(truth['annotations']),
        pycocotools_seconds=round(slow[0], 1),
        faster_coco_eval_seconds=round(fast[0], 1),
        ratio=round(slow[0] / fast[0], 2),
        reported_figures_equal=slow[2] == fast[2],
        greatest_difference=max(row['difference'] for row in rows),
        rows=rows,
    )
    bars = {'pycocotools': [slow[0]], 'faster-coco-eval': [fast[0]]}
    write(record, args.out, ['COCO evaluation'], bars, 'seconds')


if __name__ == '__main__':
    main()
