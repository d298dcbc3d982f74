"""The metrics against Pascal VOC's and COCO's own definitions."""

import contextlib
import importlib.util
import io
import json
import pickle
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import DATA, ROOT, forget_earlier_runs
from mmdet.evaluation import VOCMetric
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cbam_mmdet.errors import UserError
from cbam_mmdet.evaluation.metrics import SampleCocoMetric, VOCDetectionMetric
from cbam_mmdet.utils.config import check_evaluators, load_config

BCCD = DATA / 'bccd'
CLASSES = ('often', 'rare', 'only detected', 'only there', 'neither', 'only difficult')


# Pascal VOC's development kit, as VOCevaldet.m and VOCap.m describe it, in plain loops and exact fractions.


def devkit_matches(detections, objects, threshold=0.5):
    """From (image, score, box) and (image, box, difficult): 1, 0 or None for each detection, by falling score."""
    found, outcome = set(), []
    for image, _, (bx1, by1, bx2, by2) in sorted(detections, key=lambda d: -d[1]):
        best, match = -np.inf, None
        for j, (other, (x1, y1, x2, y2), _) in enumerate(objects):
            width, height = min(bx2, x2) - max(bx1, x1) + 1, min(by2, y2) - max(by1, y1) + 1
            if other != image or width <= 0 or height <= 0:
                continue
            union = (bx2 - bx1 + 1) * (by2 - by1 + 1) + (x2 - x1 + 1) * (y2 - y1 + 1) - width * height
            if width * height / union > best:
                best, match = width * height / union, j
        if best < threshold:
            outcome.append(0)
        elif objects[match][2]:
            outcome.append(None)
        else:
            outcome.append(0 if match in found else 1)
            found.add(match)
    return outcome


def devkit_ap(outcome, count, mode):
    true, false, points = 0, 0, []
    for result in outcome:
        true, false = true + (result == 1), false + (result == 0)
        points.append((Fraction(true, count), Fraction(true, true + false) if true + false else Fraction(0)))
    if mode == '11points':
        thresholds = [Fraction(t, 10) for t in range(11)]
        return float(sum(max((p for r, p in points if r >= t), default=Fraction(0)) for t in thresholds) / 11)
    recalls = [Fraction(0), *(r for r, _ in points), Fraction(1)]
    precisions = [Fraction(0), *(p for _, p in points), Fraction(0)]
    for i in range(len(precisions) - 2, -1, -1):
        precisions[i] = max(precisions[i], precisions[i + 1])
    return float(sum((recalls[i] - recalls[i - 1]) * precisions[i] for i in range(1, len(recalls))))


def devkit(samples, num_classes, mode):
    """The AP of each class; None for one without an object that is not difficult."""
    aps = []
    for label in range(num_classes):
        detections, objects = [], []
        for image, sample in enumerate(samples):
            found = sample['pred_instances']
            for box, score, name in zip(*(found[k].tolist() for k in ('bboxes', 'scores', 'labels')), strict=True):
                if name == label:
                    detections.append((image, score, box))
            for key in ('gt_instances', 'ignored_instances'):
                for box, name in zip(*(sample[key][k].tolist() for k in ('bboxes', 'labels')), strict=True):
                    if name == label:
                        objects.append((image, box, key == 'ignored_instances'))
        count = sum(not difficult for _, _, difficult in objects)
        aps.append(devkit_ap(devkit_matches(detections, objects), count, mode) if count else None)
    return aps


def instances(boxes, labels, scores=None):
    result = dict(bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), labels=torch.tensor(labels).long())
    return result if scores is None else {**result, 'scores': torch.tensor(scores, dtype=torch.float32)}


def random_samples(seed, images=40):
    """Whole-pixel boxes; detections near them, far from them and twice; many equal scores."""
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(images):
        boxes, labels, ignored, ignored_labels, found, found_labels = [], [], [], [], [], []
        for _ in range(rng.integers(0, 8)):
            label = rng.choice([0, 0, 0, 0, 1, 3, 5])
            x, y, w, h = rng.integers(0, 150), rng.integers(0, 100), *rng.integers(4, 60, 2)
            box = [x, y, x + w, y + h]
            hard = label == 5 or rng.random() < 0.25
            (ignored if hard else boxes).append(box)
            (ignored_labels if hard else labels).append(label)
            if label != 3:
                for _ in range(rng.integers(0, 3)):
                    found.append(np.array(box) + rng.normal(0, 0.08, 4) * [w, h, w, h])
                    found_labels.append(label if rng.random() < 0.9 else rng.choice([0, 1]))
        for _ in range(rng.integers(0, 4)):
            x, y, w, h = rng.random(4) * [150, 100, 60, 60]
            found.append([x, y, x + w, y + h])
            found_labels.append(rng.choice([0, 1, 2]))
        found = np.array(found).reshape(-1, 4)
        samples.append(
            dict(
                img_id=f'{i:03d}',
                ori_shape=(160, 210),
                gt_instances=instances(boxes, labels),
                ignored_instances=instances(ignored, ignored_labels),
                pred_instances=instances(found, found_labels, rng.integers(0, 30, len(found)) / 30),
            )
        )
    return samples


def evaluate(metric, samples, classes=CLASSES, dataset_type=None):
    metric.dataset_meta = dict(classes=classes, dataset_type=dataset_type)
    for sample in samples:
        metric.process(None, [sample])
    return metric.evaluate(len(samples))


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('mode', ['11points', 'area'])
def test_equals_the_devkit(mode, seed):
    samples = random_samples(seed)
    result = evaluate(VOCDetectionMetric(eval_mode=mode), samples)
    for other in ('11points', 'area'):
        aps = [ap for ap in devkit(samples, len(CLASSES), other) if ap is not None]
        assert len(aps) == 3
        assert 0 < np.mean(aps) < 1
        assert result[f'pascal_voc/mAP_{other}'] == pytest.approx(np.mean(aps), abs=1e-12)
    assert result['pascal_voc/mAP'] == result[f'pascal_voc/mAP_{mode}']
    for name, ap in zip(CLASSES, devkit(samples, len(CLASSES), mode), strict=True):
        if ap is None:
            assert f'pascal_voc/AP_{name}' not in result
        else:
            assert result[f'pascal_voc/AP_{name}'] == pytest.approx(ap, abs=1e-12)


def one_class(images, found):
    """An object in each image, and a perfect detection of the first `found`."""
    box = [10, 10, 50, 50]
    return [
        dict(
            img_id=str(i),
            ori_shape=(100, 100),
            gt_instances=instances([box], [0]),
            ignored_instances=instances([], []),
            pred_instances=instances([box] if i < found else [], [0] if i < found else [], [0.9] if i < found else []),
        )
        for i in range(images)
    ]


@pytest.mark.parametrize('found', range(11))
def test_recall_at_a_threshold_reaches_it(found):
    """MMDetection's thresholds 0.3, 0.6 and 0.7 lie a hair above."""
    samples = one_class(10, found)
    result = evaluate(VOCDetectionMetric(), samples, ('thing',))
    assert result['pascal_voc/mAP'] == pytest.approx((found + 1) / 11 if found else 0, abs=1e-12)
    theirs = evaluate(VOCMetric(), samples, ('thing',))['pascal_voc/mAP']
    lower = 1 / 11 if found in (3, 6, 7) else 0
    assert theirs == pytest.approx(result['pascal_voc/mAP'] - lower, abs=1e-6)


def test_equal_scores_keep_the_order_of_the_images():
    """Of 2 * 40 detections with the same score the false ones come first, in the first 40 images."""
    samples = one_class(80, 80)
    for sample in samples[:40]:
        sample['pred_instances']['bboxes'] += 200
    area = evaluate(VOCDetectionMetric(eval_mode='area'), samples, ('thing',))['pascal_voc/mAP']
    assert area == pytest.approx(devkit(samples, 1, 'area')[0], abs=1e-12)
    assert area == pytest.approx(0.5 * 0.5, abs=1e-12)


def test_equals_mmdetections_where_nothing_is_on_the_edge():
    rng = np.random.default_rng(0)
    samples = random_samples(5)
    for sample in samples:  # no two equal scores
        sample['pred_instances']['scores'] = torch.tensor(rng.random(len(sample['pred_instances']['scores'])))
    for mode in ('11points', 'area'):
        theirs = evaluate(VOCMetric(eval_mode=mode), samples)['pascal_voc/mAP']
        if mode == 'area':
            assert evaluate(VOCDetectionMetric(eval_mode=mode), samples)['pascal_voc/mAP'] == pytest.approx(
                theirs, abs=1e-6
            )
        else:
            assert evaluate(VOCDetectionMetric(eval_mode=mode), samples)['pascal_voc/mAP'] >= theirs - 1e-6


def test_table_names_the_classes_of_the_data_set(capfd):
    """MMDetection's names those of VOC where the folder is called VOC2007."""
    forget_earlier_runs()
    evaluate(VOCDetectionMetric(), random_samples(0), dataset_type='VOC2007')
    out, err = capfd.readouterr()
    rows = dict(re.findall(r'\| (\w[\w ]*?) +\|(.*)\|', out + err))
    assert set(CLASSES) <= set(rows)
    assert 'aeroplane' not in rows
    assert 'not part of the mAP: only detected, neither, only difficult' in out + err
    assert rows['neither'].split('|')[0].strip() == '0'


def test_nothing_to_find_is_no_score():
    samples = one_class(3, 2)
    for sample in samples:
        sample['ignored_instances'], sample['gt_instances'] = sample['gt_instances'], sample['ignored_instances']
    assert np.isnan(evaluate(VOCDetectionMetric(), samples, ('thing',))['pascal_voc/mAP'])


def test_unknown_mode():
    with pytest.raises(UserError, match=r"eval_mode='11point'.*11points"):
        VOCDetectionMetric(eval_mode='11point')


def coco_score(samples, path, num_classes):
    """COCO's twelve figures by pycocotools, from a file of our own with other ids."""
    annotations, records = [], []
    for image, sample in enumerate(samples):
        for crowd, key in enumerate(('gt_instances', 'ignored_instances')):
            for (x1, y1, x2, y2), label in zip(*(sample[key][k].tolist() for k in ('bboxes', 'labels')), strict=True):
                annotations.append(
                    dict(
                        id=len(annotations) + 1,
                        image_id=image + 7,
                        category_id=label + 11,
                        iscrowd=crowd,
                        bbox=[x1, y1, x2 - x1, y2 - y1],
                        area=(x2 - x1) * (y2 - y1),
                    )
                )
        found = sample['pred_instances']
        for (x1, y1, x2, y2), score, label in zip(
            *(found[k].tolist() for k in ('bboxes', 'scores', 'labels')), strict=True
        ):
            box = [x1, y1, x2 - x1, y2 - y1]
            records.append(dict(image_id=image + 7, category_id=label + 11, bbox=box, score=score))
    images = [dict(id=i + 7, width=210, height=160, file_name='') for i in range(len(samples))]
    categories = [dict(id=i + 11, name=f'class{i}') for i in range(num_classes)]
    path.write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        evaluation = COCOeval(truth, truth.loadRes(records), 'bbox')
        evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    return evaluation.stats


@pytest.mark.parametrize('seed', range(2))
def test_coco_metric_equals_pycocotools(tmp_path, seed):
    samples = random_samples(seed)
    result = evaluate(SampleCocoMetric(proposal_nums=(1, 10, 100)), samples)
    expected = coco_score(samples, tmp_path / 'truth.json', len(CLASSES))
    for key, value in zip(('', '_50', '_75', '_s', '_m', '_l'), expected[:6], strict=True):
        assert result[f'coco/bbox_mAP{key}'] == pytest.approx(value, abs=5.1e-4)
    for sample in samples:  # were difficult objects counted, the score would differ
        gt, hard = sample['gt_instances'], sample['ignored_instances']
        sample['gt_instances'] = {key: torch.cat([gt[key], hard[key]]) for key in gt}
        sample['ignored_instances'] = instances([], [])
    assert abs(coco_score(samples, tmp_path / 'truth.json', len(CLASSES))[0] - expected[0]) > 1e-3


@pytest.mark.skipif(not BCCD.is_dir(), reason='the BCCD images are not there')
def test_shipped_config_on_real_data(run_tool, tmp_path):
    """Train and test a little, and compare both metrics' figures with the definitions, from --out's detections."""
    options = [
        '--cfg-options', 'model.backbone.init_cfg=None', 'model.backbone.base_channels=16',
        'model.neck.in_channels=[64,128,256,512]', 'train_cfg.max_epochs=1', 'train_dataloader.dataset.times=1',
        'train_dataloader.dataset.dataset.datasets.0.indices=2', 'train_dataloader.num_workers=0',
        'train_dataloader.persistent_workers=False',
        'train_dataloader.dataset.dataset.datasets.0.pipeline.2.scale=(160,128)',
        *(f'{split}_dataloader.{option}' for split in ('val', 'test') for option in (
            'num_workers=0', 'persistent_workers=False', 'dataset.indices=6', 'dataset.pipeline.1.scale=(160,128)')),
        'model.test_cfg.rcnn.score_thr=0.0', 'model.test_cfg.rpn.max_per_img=100',
        'model.roi_head.bbox_head.fc_out_channels=64', 'randomness.seed=0',
    ]  # fmt: skip
    work, config = tmp_path / 'work', ROOT / 'configs/faster_rcnn_r50_cbam_voc0712.py'
    result = run_tool('train.py', config, '--data-root', BCCD, '--classes', 'auto', '--work-dir', work, *options)
    assert result.code == 0, result.err[-2000:]
    for flags in ([], ['--tta']):
        out = tmp_path / f'results{len(flags)}.pkl'
        test_dir = tmp_path / f'test{len(flags)}'
        result = run_tool('test.py', work / config.name, work, '--work-dir', test_dir, '--out', out, *flags)
        assert result.code == 0, result.err[-2000:]
        scored = json.loads(next(test_dir.glob('*/*.json')).read_text())

        samples = [{**sample, **truth_of_bccd(sample['img_id'])} for sample in pickle.loads(out.read_bytes())]
        assert sum(len(s['pred_instances']['scores']) for s in samples) > 100
        for mode in ('11points', 'area'):
            aps = [ap for ap in devkit(samples, 3, mode) if ap is not None]
            assert np.mean(aps) > 0
            assert scored[f'pascal_voc/mAP_{mode}'] == pytest.approx(np.mean(aps), abs=1e-9)
        expected = coco_score(samples, tmp_path / 'truth.json', 3)
        assert scored['coco/bbox_mAP'] == pytest.approx(expected[0], abs=5.1e-4)
        assert scored['coco/bbox_mAP_50'] == pytest.approx(expected[1], abs=5.1e-4)


def truth_of_bccd(name):
    """By regular expressions instead of an XML parser."""
    text = (BCCD / f'VOC2007/Annotations/{name}.xml').read_text()
    labels = [('Platelets', 'RBC', 'WBC').index(label) for label in re.findall('<name>(.*?)</name>', text)]
    corners = [[int(v) - 1 for v in re.findall(rf'<{key}>(\d+)<', text)] for key in ('xmin', 'ymin', 'xmax', 'ymax')]
    return dict(gt_instances=instances(list(zip(*corners, strict=True)), labels), ignored_instances=instances([], []))


def test_the_fast_evaluator_is_missed_before_the_training(monkeypatch):
    cfg = load_config(str(ROOT / 'configs/demo/faster_rcnn_cbam.py'), {'val_evaluator.type': 'FasterCocoMetric'})
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match='needs the package faster-coco-eval'):
        check_evaluators(cfg)
