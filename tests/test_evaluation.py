"""VOC's mAP against the devkit's definition, written out here; COCO's on VOC data against pycocotools on a file of our own making."""

import json

import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cbam_mmdet.errors import UserError
from cbam_mmdet.evaluation import PascalVOCMetric, VOCCocoMetric, average_precision

CLASSES = ('cat', 'dog', 'no objects', 'no detections', 'neither', 'only difficult')


def devkit_ap(detections, objects, mode):
    """VOCevaldet.m for one class: detections (image, score, box), objects image -> [box, difficult]; the AP, or None with no object."""
    claimed = {(image, i): False for image, boxes in objects.items() for i in range(len(boxes))}
    npos = sum(not difficult for boxes in objects.values() for _, difficult in boxes)
    if not npos:
        return None
    tp, fp = [], []
    for image, _, (x1, y1, x2, y2) in sorted(detections, key=lambda d: -d[1]):
        ovmax, jmax = -np.inf, None
        for j, ((gx1, gy1, gx2, gy2), _) in enumerate(objects.get(image, [])):
            iw = min(x2, gx2) - max(x1, gx1) + 1
            ih = min(y2, gy2) - max(y1, gy1) + 1
            if iw > 0 and ih > 0:
                union = (x2 - x1 + 1) * (y2 - y1 + 1) + (gx2 - gx1 + 1) * (gy2 - gy1 + 1) - iw * ih
                if iw * ih / union > ovmax:
                    ovmax, jmax = iw * ih / union, j
        tp.append(0)
        fp.append(0)
        if ovmax >= 0.5:
            if not objects[image][jmax][1]:
                if claimed[image, jmax]:
                    fp[-1] = 1
                else:
                    tp[-1] = 1
                    claimed[image, jmax] = True
        else:
            fp[-1] = 1
    tp, fp = np.cumsum(tp), np.cumsum(fp)
    pairs = [(int(t), t / (t + f) if t + f else 0.0) for t, f in zip(tp, fp, strict=True)]  # (hits, precision)
    if mode == '11points':  # a recall of hits / npos is at least k / 10
        return sum(max([p for t, p in pairs if 10 * t >= k * npos], default=0.0) for k in range(11)) / 11
    mrec = [0.0, *(t / npos for t, _ in pairs), 1.0]
    mpre = [0.0, *(p for _, p in pairs), 0.0]
    for i in range(len(mpre) - 2, -1, -1):
        mpre[i] = max(mpre[i], mpre[i + 1])
    return sum((mrec[i] - mrec[i - 1]) * mpre[i] for i in range(1, len(mrec)) if mrec[i] != mrec[i - 1])


def boxes(rng, n):
    corner = rng.integers(0, 60, (n, 2))
    return np.hstack([corner, corner + rng.integers(0, 40, (n, 2))]).astype(float)


def random_images(seed, n=25):
    """Per image: the true (box, label, difficult) and the detected (box, label, score), half of them near a true box."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(n):
        truth = [
            (box, int(label), bool(rng.random() < 0.3))
            for box, label in zip(boxes(rng, 6), rng.choice([0, 1, 3, 5], 6), strict=True)
        ]
        truth = [(box, label, difficult or label == 5) for box, label, difficult in truth][: rng.integers(0, 7)]
        found = [
            (box, int(label), rng.random())
            for box, label in zip(boxes(rng, 4), rng.choice([0, 1, 2, 5], 4), strict=True)
        ]
        for box, label, _ in truth:
            if label != 3:
                for _ in range(rng.integers(0, 3)):  # none, one, or a duplicate
                    found.append((box + rng.integers(-2, 3, 4), label, rng.random()))
        images.append((truth, found))
    return images


def samples(images):
    """As MMDetection's evaluator hands them to a metric."""
    made = []
    for i, (truth, found) in enumerate(images):
        split = {flag: [(box, label) for box, label, difficult in truth if difficult is flag] for flag in (False, True)}
        fields = {
            key: InstanceData(
                bboxes=torch.tensor(np.array([box for box, _ in split[flag]]).reshape(-1, 4)),
                labels=torch.tensor([label for _, label in split[flag]], dtype=torch.long),
            )
            for flag, key in ((False, 'gt_instances'), (True, 'ignored_instances'))
        }
        fields['pred_instances'] = InstanceData(
            bboxes=torch.tensor(np.array([box for box, _, _ in found]).reshape(-1, 4)),
            labels=torch.tensor([label for _, label, _ in found], dtype=torch.long),
            scores=torch.tensor([score for _, _, score in found], dtype=torch.float64),
        )
        made.append(dict(img_id=f'image_{i:03}', ori_shape=(100, 100), **fields))
    return made


def evaluate(metric, images):
    metric.dataset_meta = dict(classes=CLASSES, dataset_type='VOC2007')
    for sample in samples(images):
        metric.process({}, [sample])
    return metric.evaluate(len(images))


@pytest.mark.parametrize('seed', range(8))
@pytest.mark.parametrize('mode', ['11points', 'area'])
def test_voc_map_is_the_devkits(seed, mode):
    images = random_images(seed)
    expected = {}
    for label, name in enumerate(CLASSES):
        objects = {i: [(box, hard) for box, k, hard in truth if k == label] for i, (truth, _) in enumerate(images)}
        detections = [(i, score, box) for i, (_, found) in enumerate(images) for box, k, score in found if k == label]
        ap = devkit_ap(detections, objects, mode)
        if ap is not None:
            expected[name] = ap
    assert set(expected) == {'cat', 'dog', 'no detections'}
    assert expected['no detections'] == 0 and 0.05 < expected['cat'] < 0.95

    figures = evaluate(PascalVOCMetric(eval_mode=mode), images)
    for name, ap in expected.items():
        assert figures[f'pascal_voc/AP_{name}'] == pytest.approx(ap, abs=1e-6)
    mean = np.mean(list(expected.values()))
    for key in ('mAP', 'AP50', f'mAP_{mode}'):
        assert figures[f'pascal_voc/{key}'] == pytest.approx(mean, abs=1e-6)
    assert not {f'pascal_voc/AP_{name}' for name in ('no objects', 'neither', 'only difficult')} & set(figures)


def test_recalls_of_exactly_a_tenth_count():
    """Ten objects, found one after the other with one false alarm in front: the precision at k hits is k / (k + 1)."""
    tp, fp = np.arange(11), np.ones(11)
    recall, precision = tp / 10, tp / (tp + fp)
    assert average_precision(recall, precision, '11points') == pytest.approx(10 / 11, abs=1e-12)
    tp = np.arange(1, 11)  # no false alarm until 7 are found, then all others are
    recall = np.append(tp[:7] / 10, np.full(20, 0.7))
    precision = np.append(np.ones(7), 7 / (7 + np.arange(1, 21)))
    assert average_precision(recall, precision, '11points') == pytest.approx(8 / 11, abs=1e-12)


def test_table_has_the_data_sets_own_names(capfd):
    from conftest import forget_earlier_runs

    forget_earlier_runs()
    evaluate(PascalVOCMetric(), random_images(0))
    printed = ''.join(capfd.readouterr())
    assert 'only difficult' in printed and 'aeroplane' not in printed
    assert 'left out of the mean' in printed


def test_several_thresholds():
    images = random_images(1)
    both = evaluate(PascalVOCMetric(iou_thrs=[0.5, 0.75]), images)
    alone = [evaluate(PascalVOCMetric(iou_thrs=thr), images)['pascal_voc/mAP'] for thr in (0.5, 0.75)]
    assert [both['pascal_voc/AP50'], both['pascal_voc/AP75']] == alone
    assert both['pascal_voc/mAP'] == pytest.approx(sum(alone) / 2)
    assert alone[0] > alone[1]


def test_mode_that_does_not_exist():
    with pytest.raises(UserError, match=r"eval_mode='11point'.*did you mean '11points'"):
        PascalVOCMetric(eval_mode='11point')


def test_coco_map_of_a_voc_data_set(tmp_path):
    images = random_images(3)
    truth = dict(
        images=[dict(id=i + 1, width=100, height=100) for i in range(len(images))],
        categories=[dict(id=k + 1, name=name) for k, name in enumerate(CLASSES)],
        annotations=[],
    )
    results = []
    for i, (objects, found) in enumerate(images):
        for (x1, y1, x2, y2), label, difficult in objects:
            truth['annotations'].append(
                dict(id=len(truth['annotations']) + 1, image_id=i + 1, category_id=label + 1, bbox=[x1, y1, x2 - x1, y2 - y1],
                     area=(x2 - x1) * (y2 - y1), iscrowd=int(difficult))
            )  # fmt: skip
        for (x1, y1, x2, y2), label, score in found:
            results.append(dict(image_id=i + 1, category_id=label + 1, bbox=[x1, y1, x2 - x1, y2 - y1], score=score))
    (tmp_path / 'truth.json').write_text(json.dumps(truth))
    coco = COCO(tmp_path / 'truth.json')
    reference = COCOeval(coco, coco.loadRes(results), 'bbox')
    reference.evaluate()
    reference.accumulate()
    reference.summarize()
    figures = evaluate(VOCCocoMetric(), images)
    for i, key in enumerate(('mAP', 'mAP_50', 'mAP_75')):
        assert figures[f'coco/bbox_{key}'] == pytest.approx(reference.stats[i], abs=5.1e-4)  # printed to three digits
    assert 0.05 < reference.stats[0] < 0.95
