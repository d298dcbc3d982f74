"""The kinds of errors that the report shows, against TIDE's definitions (Bolya et al., ECCV 2020)."""

import contextlib
import io

import numpy as np
import pytest
import torch
from tide import KINDS, tide

pytest.importorskip('hotcoco', reason="make setup installs it, or: pip install '.[fast-eval]'")

from cbam_mmdet.evaluation.metrics import SampleCocoMetric
from cbam_mmdet.evaluation.scores import Scores

CLASSES = ('cat', 'dog', 'bird')
BOX = (100, 100, 100, 100)  # x, y, width, height, of a cat in the first image
DOG = (300, 300, 100, 100)  # of a dog in it, which a detection finds
FOUND = [(0, 1, 0.5, DOG)]


def aside(iou, box=BOX):
    """A box that overlaps another with this IoU."""
    x, y, width, height = box
    return (x + width * (1 - iou) / (1 + iou), y, width, height)


def errors_of(objects, detections, classes=CLASSES):
    """The errors that the report shows, of (image, class, box) and (image, class, score, box), and the AP at 0.5."""
    samples = []
    for image in range(1 + max(it[0] for it in objects + detections)):
        truth = [it[1:] for it in objects if it[0] == image]
        found = [it[1:] for it in detections if it[0] == image]
        samples.append(
            dict(
                img_id=f'image{image}',
                ori_shape=(500, 500),
                gt_instances=instances([box for _, box in truth], [label for label, _ in truth]),
                ignored_instances=instances([], []),
                pred_instances={
                    **instances([box for *_, box in found], [label for label, *_ in found]),
                    'scores': torch.tensor([score for _, score, _ in found], dtype=torch.float64),
                },
            )
        )
    metric = SampleCocoMetric(proposal_nums=(1, 10, 100))
    metric.dataset_meta = dict(classes=classes)
    metric.process({}, samples)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = metric.evaluation(metric.results)
    return Scores(coco, {}, 'area', classes, {}).errors, coco.stats[1]


def instances(boxes, labels):
    boxes = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return dict(bboxes=boxes, labels=torch.tensor(labels).long())


@pytest.mark.parametrize(
    ('detections', 'counts', 'gains'),
    [
        # A cat that is found, and no error.
        ([(0, 0, 0.9, BOX)], {}, {}),
        # The cat's AP is 0, and 1 once the box is right. That of the dog is 1: their mean rises by a half.
        ([(0, 0, 0.9, aside(0.3))], dict(localization=1), dict(localization=1 / 2)),
        # In the dog's class it comes before the dog, whose AP is a half. With its class corrected both are 1.
        ([(0, 1, 0.9, BOX)], dict(classification=1), dict(classification=3 / 4)),
        # It is removed, and finds no cat: the dog's AP rises by a half, and the cat stays missed.
        ([(0, 1, 0.9, aside(0.3))], dict(both=1, missed=1), dict(both=1 / 4)),
        # The second one of the cat. It comes after every object is found, so it costs nothing.
        ([(0, 0, 0.9, BOX), (0, 0, 0.8, aside(0.8))], dict(duplicate=1), {}),
        # One on nothing, before the cat, whose AP is a half.
        ([(0, 0, 0.9, BOX), (0, 0, 0.95, (10, 10, 20, 20))], dict(background=1), dict(background=1 / 4)),
        ([(0, 0, 0.9, BOX), (1, 0, 0.95, BOX)], dict(background=1), dict(background=1 / 4)),
        # An object that is found cannot be found again by a corrected detection, which is removed.
        ([(0, 0, 0.9, BOX), (0, 0, 0.95, aside(0.3))], dict(localization=1), dict(localization=1 / 4)),
        # The better one of two takes the object.
        ([(0, 0, 0.9, aside(0.3)), (0, 0, 0.8, aside(0.3))], dict(localization=2), dict(localization=1 / 2)),
        # A little of the own class comes before much of another one.
        ([(0, 0, 0.9, BOX), (0, 1, 0.95, BOX), (0, 1, 0.95, aside(0.2, DOG))],
         dict(classification=1, localization=1), dict(classification=1 / 12, localization=1 / 12)),
    ],
)  # fmt: skip
def test_hand_made_cases(detections, counts, gains):
    errors, _ = errors_of([(0, 0, BOX), (0, 1, DOG)], FOUND + detections)
    assert {kind: it.count for kind, it in errors.items()} == {**dict.fromkeys(KINDS, 0), **counts}
    expected = {**dict.fromkeys(KINDS, 0), **gains}
    assert {kind: it.delta_ap for kind, it in errors.items()} == pytest.approx(expected, abs=1e-12)


def test_missed_objects_leave_the_count_of_objects():
    """Of two cats one is found. The AP of 101 recalls is 51/101, and 1 if the other cat did not exist."""
    errors, ap = errors_of([(0, 0, BOX), (0, 0, DOG)], [(0, 0, 0.9, BOX)], ('cat',))
    assert ap == pytest.approx(51 / 101)
    assert errors['missed'].count == 1
    assert errors['missed'].delta_ap == pytest.approx(50 / 101)


@pytest.mark.parametrize('seed', range(12))
def test_equals_the_definition(seed):
    random = np.random.default_rng(seed)
    objects, detections = [], []
    for image in range(12):
        for _ in range(random.integers(1, 5)):
            box, label = np.array([*random.uniform(0, 300, 2), *random.uniform(40, 120, 2)]), int(random.integers(3))
            objects.append((image, label, tuple(box)))
            for _ in range(random.integers(0, 4)):
                noise = random.normal(0, random.choice([0.03, 0.2, 0.4]), 4) * [1, 1, 0.3, 0.3]
                near = np.maximum(box + noise * np.tile(box[2:], 2), [-99, -99, 5, 5])
                named = label if random.random() < 0.7 else int(random.integers(3))
                detections.append((image, named, random.random(), tuple(near)))
    counts, gains = tide(objects, detections)
    assert sum(count > 0 for count in counts.values()) >= 5
    errors, _ = errors_of(objects, detections)
    assert {kind: it.count for kind, it in errors.items()} == counts
    assert {kind: it.delta_ap for kind, it in errors.items()} == pytest.approx(gains, abs=1e-9)
