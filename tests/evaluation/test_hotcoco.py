"""HotCocoMetric against MMDetection's CocoMetric, which pycocotools evaluates, and against pycocotools itself."""

import contextlib
import copy
import importlib.util
import io
import json
import os
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, forget_earlier_runs, run_forks
from mmdet.evaluation import CocoMetric
from mmdet.registry import METRICS
from mmengine.config import Config
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cbam_mmdet.errors import UserError
from cbam_mmdet.evaluation.metrics import HotCocoMetric, SampleCocoMetric, VOCDetectionMetric
from cbam_mmdet.evaluation.scores import Scores

CLASSES = ('often', 'rare', 'never there', 'never found')
CATEGORIES = (3, 4, 8, 20)
SIZE = 300
needs_hotcoco = pytest.mark.skipif(
    not importlib.util.find_spec('hotcoco'), reason="make setup installs it, or: pip install '.[fast-eval]'"
)


def draw(seed=0, images=24):
    """COCO's annotations with crowds and all sizes, and detections with few different scores, some images without any.

    The images' ids are not in order, and the area of an object is that of its mask, not that of its box.
    """
    random = np.random.default_rng(seed)
    annotations, samples = [], []
    ids = [int(i) for i in random.permutation(images) * 7 + 1]
    for image in ids:
        boxes, labels, scores, masks = [], [], [], []
        for _ in range(random.integers(0, 6)):
            (x, y), (w, h) = random.uniform(0, 150, 2), np.exp(random.uniform(np.log(8), np.log(150), 2))
            label = int(random.choice([0, 0, 0, 1, 3]))
            # An octagon, which is smaller than its box.
            at = np.array([[0.3, 0], [0.7, 0], [1, 0.3], [1, 0.7], [0.7, 1], [0.3, 1], [0, 0.7], [0, 0.3]])
            polygon = (at * [w, h] + [x, y]).ravel().tolist()
            mask = mask_utils.frPyObjects([polygon], SIZE, SIZE)[0]
            crowd = int(random.random() < 0.15)
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=image,
                    category_id=CATEGORIES[label],
                    bbox=[x, y, w, h],
                    area=float(mask_utils.area(mask)),
                    iscrowd=crowd,
                    segmentation=dict(size=mask['size'], counts=mask['counts'].decode()) if crowd else [polygon],
                )
            )
            for _ in range(random.integers(0, 5)):
                boxes.append(np.array([x, y, x + w, y + h]) + random.normal(0, 0.1, 4) * [w, h, w, h])
                labels.append(random.choice([label, label, label, 2]) if label != 3 else 0)
                scores.append(random.integers(1, 20) / 20)
                shifted = np.roll(mask_utils.decode(mask), random.integers(-4, 5, 2), (0, 1))
                masks.append(mask_utils.encode(np.asfortranarray(shifted)))
        found = dict(
            bboxes=torch.tensor(np.array(boxes).reshape(-1, 4)).float(),
            labels=torch.tensor(labels).long(),
            scores=torch.tensor(scores).float(),
            masks=masks,
        )
        samples.append(dict(img_id=image, ori_shape=(SIZE, SIZE), pred_instances=found))
    truth = dict(
        images=[dict(id=i, width=SIZE, height=SIZE, file_name='') for i in ids],
        annotations=annotations,
        categories=[dict(id=i, name=name) for i, name in zip(CATEGORIES, CLASSES, strict=True)],
    )
    return truth, samples


def without_detections(samples):
    return [
        {**sample, 'pred_instances': {key: values[:0] for key, values in sample['pred_instances'].items()}}
        for sample in samples
    ]


@pytest.fixture
def data(tmp_path):
    """The file of the annotations, and the samples."""
    truth, samples = draw()
    (tmp_path / 'truth.json').write_text(json.dumps(truth))
    return tmp_path / 'truth.json', samples


@pytest.fixture
def no_hotcoco(monkeypatch):
    monkeypatch.setitem(sys.modules, 'hotcoco', None)  # its import fails


def evaluate(metric_class, ann_file, samples, **options):
    """The figures of a metric, and what it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        metric = metric_class(ann_file=str(ann_file), **options)
        metric.dataset_meta = dict(classes=CLASSES)
        for sample in copy.deepcopy(samples):
            metric.process({}, [sample])
        figures = metric.evaluate(len(samples))
    return figures, [line for line in out.getvalue().splitlines() if line.startswith(' Average')]


def log_of(logged, words):
    return [record.getMessage() for record in logged.records if words in record.getMessage()]


def same(a, b):
    assert a.keys() == b.keys() and list(a) == list(b)
    np.testing.assert_array_equal(list(a.values()), list(b.values()))


OPTIONS = {
    'default': {},
    'classwise': dict(classwise=True),
    'proposal_nums': dict(proposal_nums=(1, 10, 100)),
    'few, not in order': dict(proposal_nums=(5, 1, 2), metric_items=['mAP', 'mAP_50', 'AR@100', 'AR@1000']),
    'metric_items': dict(proposal_nums=(1, 10, 100), metric_items=['mAP_s', 'AR@300', 'AR_l@1000']),
    'iou_thrs': dict(iou_thrs=np.array([0.3, 0.5, 0.75])),
    'without classes': dict(metric='proposal', proposal_nums=(1, 10, 100)),
    'masks': dict(metric=['bbox', 'segm'], classwise=True),
    'prefix': dict(prefix='mine'),
}


def test_each_class_has_its_own_figures_whatever_the_order_of_the_ids(data, tmp_path):
    """MMDetection's own metric gives the classes the figures of each other here."""
    path, samples = data
    expected, _ = evaluate(HotCocoMetric, path, samples, classwise=True)
    truth = json.loads(path.read_text())
    truth['categories'].reverse()  # MMDetection numbers the classes in the file's order
    (tmp_path / 'reversed.json').write_text(json.dumps(truth))
    for sample in samples:
        sample['pred_instances']['labels'] = len(CLASSES) - 1 - sample['pred_instances']['labels']
    figures, _ = evaluate(HotCocoMetric, tmp_path / 'reversed.json', samples, classwise=True)
    assert {key: value for key, value in figures.items() if value == value} == {
        key: value for key, value in expected.items() if value == value
    }
    assert len({figures[f'coco/{name}_precision'] for name in ('often', 'rare')}) == 2, 'else nothing is seen'


@needs_hotcoco
@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
def test_has_the_figures_and_the_table_of_mmdetections_metric(data, options, logged, monkeypatch):
    expected, table = evaluate(CocoMetric, *data, **options)
    by_class = log_of(logged, 'category')
    copypaste = log_of(logged, 'copypaste')
    logged.clear()
    monkeypatch.setattr(HotCocoMetric, 'results2json', None)  # no file is written
    figures, printed = evaluate(HotCocoMetric, *data, **options)
    same(figures, expected)
    assert printed == table
    assert log_of(logged, 'copypaste') == copypaste
    assert [line.split() for line in log_of(logged, 'category')] == [line.split() for line in by_class]
    assert log_of(logged, 'COCO evaluation by hotcoco') and not log_of(logged, 'pycocotools')
    assert any(0.05 < value < 0.95 for value in figures.values()), 'there is something to compare'


@needs_hotcoco
def test_recalls_are_rounded_as_mmdetections(tmp_path):
    """MMDetection formats the figures of proposals, and rounds the others by NumPy: 0.6125 becomes 0.613 and 0.612."""
    truth, samples = draw(seed=3, images=120)
    (tmp_path / 'truth.json').write_text(json.dumps(truth))
    expected, _ = evaluate(CocoMetric, tmp_path / 'truth.json', samples, metric='proposal')
    assert expected['coco/AR_l@1000'] == 0.613
    same(evaluate(HotCocoMetric, tmp_path / 'truth.json', samples, metric='proposal')[0], expected)


@needs_hotcoco
def test_figures_of_classes_are_rounded_as_mmdetections(tmp_path):
    """A precision of 49 / 80 at each recall: 49 objects, found after 31 false detections."""
    box = [10.0, 10.0, 40.0, 40.0]
    objects = [[4.0 * i, 0.0, 4.0 * i + 4, 50.0] for i in range(49)]
    annotation = dict(image_id=1, category_id=CATEGORIES[0], area=200.0, iscrowd=0)
    truth = dict(
        images=[dict(id=1, width=SIZE, height=SIZE, file_name='')],
        annotations=[dict(annotation, id=i + 1, bbox=[x, y, 4.0, 50.0]) for i, (x, y, _, _) in enumerate(objects)],
        categories=[dict(id=i, name=name) for i, name in zip(CATEGORIES, CLASSES, strict=True)],
    )
    (tmp_path / 'truth.json').write_text(json.dumps(truth))
    found = dict(
        bboxes=torch.tensor([box] * 31 + objects),
        labels=torch.zeros(80, dtype=torch.long),
        scores=torch.tensor([0.9] * 31 + [0.5] * 49),
    )
    samples = [dict(img_id=1, ori_shape=(SIZE, SIZE), pred_instances=found)]
    expected, _ = evaluate(CocoMetric, tmp_path / 'truth.json', samples, classwise=True)
    assert expected['coco/often_precision'] == 0.612
    same(evaluate(HotCocoMetric, tmp_path / 'truth.json', samples, classwise=True)[0], expected)


@needs_hotcoco
@pytest.mark.parametrize('metric', ['bbox', 'segm'])
def test_an_image_without_detections_need_not_be_in_the_annotations(data, metric):
    ann_file, samples = data
    samples.append({**without_detections(samples[:1])[0], 'img_id': 99999})
    expected, _ = evaluate(CocoMetric, ann_file, samples, metric=metric)
    same(evaluate(HotCocoMetric, ann_file, samples, metric=metric)[0], expected)


def test_fast_recall_is_mmdetections(tmp_path):
    """Of one image: with a recent numpy MMDetection's own function fails for several."""
    truth, samples = draw(seed=4, images=1)
    (tmp_path / 'truth.json').write_text(json.dumps(truth))
    options = dict(metric='proposal_fast', proposal_nums=(1, 10, 100))
    expected, _ = evaluate(CocoMetric, tmp_path / 'truth.json', samples, **options)
    assert len(expected) == 3 and 0 < max(expected.values()) < 1
    same(evaluate(HotCocoMetric, tmp_path / 'truth.json', samples, **options)[0], expected)


@needs_hotcoco
@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('kind', ['bbox', 'segm', 'proposal'])
def test_arrays_are_those_of_pycocotools(tmp_path, seed, kind):
    """Precision, recall and scores to 1e-12, and what matches what."""
    truth, samples = draw(seed)
    (tmp_path / 'truth.json').write_text(json.dumps(truth))
    with contextlib.redirect_stdout(io.StringIO()):
        metric = HotCocoMetric(ann_file=str(tmp_path / 'truth.json'), proposal_nums=(1, 10, 100))
        metric.dataset_meta = dict(classes=CLASSES)
        metric.process({}, samples)
        ours = metric.evaluation(metric.results, kind)

        objects = COCO(str(tmp_path / 'truth.json'))
        records = []
        for sample in samples:
            found = sample['pred_instances']
            for i, (x1, y1, x2, y2) in enumerate(found['bboxes'].tolist()):
                record = dict(image_id=sample['img_id'], category_id=CATEGORIES[found['labels'][i]])
                shape = dict(bbox=[x1, y1, x2 - x1, y2 - y1])
                if kind == 'segm':
                    shape = dict(segmentation=found['masks'][i])
                records.append(dict(record, score=float(found['scores'][i]), **shape))
        theirs = COCOeval(objects, objects.loadRes(records), 'segm' if kind == 'segm' else 'bbox')
        theirs.params.useCats = int(kind != 'proposal')
        theirs.evaluate(), theirs.accumulate(), theirs.summarize()
    assert 0.05 < theirs.stats[0] < 0.9
    np.testing.assert_allclose(ours.stats, theirs.stats, rtol=0, atol=1e-12)
    for name in ('precision', 'recall', 'scores'):
        np.testing.assert_allclose(ours.eval[name], theirs.eval[name], rtol=0, atol=1e-12)
    a, b = parts_of(ours), parts_of(theirs)
    assert a.keys() == b.keys() and len(b) >= 80
    for at, part in b.items():
        for key in ('gtIds', 'dtScores', 'gtMatches', 'dtMatches', 'dtIgnore', 'gtIgnore'):
            np.testing.assert_array_equal(a[at][key], part[key], err_msg=f'{key} of {at}')


def parts_of(evaluation):
    parts = filter(None, evaluation.evalImgs)
    return {(int(part['image_id']), int(part['category_id']), *part['aRng']): part for part in parts}


def test_pycocotools_serves_without_hotcoco(data, logged, no_hotcoco):
    expected, table = evaluate(CocoMetric, *data, metric=['bbox', 'segm', 'proposal'], classwise=True)
    figures, printed = evaluate(HotCocoMetric, *data, metric=['bbox', 'segm', 'proposal'], classwise=True)
    same(figures, expected)
    assert printed == table
    assert 'pip install' in log_of(logged, 'COCO evaluation by pycocotools')[0]


def annotation_of_id_0(truth, samples):
    truth['annotations'][0]['id'] = 0


def annotations_of_one_id(truth, samples):
    truth['annotations'][1]['id'] = truth['annotations'][0]['id']


def box_of_nan(truth, samples):
    truth['annotations'][0]['bbox'][0] = float('nan')


def area_of_nan(truth, samples):
    truth['annotations'][0]['area'] = float('nan')


@needs_hotcoco
@pytest.mark.parametrize(
    ('spoil', 'reason'),
    [
        (annotation_of_id_0, 'ids of the annotations'),
        (annotations_of_one_id, 'ids of the annotations'),
        (box_of_nan, 'not finite'),
        (area_of_nan, 'not finite'),
    ],
)
def test_what_hotcoco_treats_differently_goes_to_pycocotools(tmp_path, spoil, reason, logged):
    truth, samples = draw()
    spoil(truth, samples)
    (tmp_path / 'truth.json').write_text(json.dumps(truth))
    figures, _ = evaluate(HotCocoMetric, tmp_path / 'truth.json', samples)
    same(figures, evaluate(CocoMetric, tmp_path / 'truth.json', samples)[0])
    assert reason in log_of(logged, 'COCO evaluation by pycocotools')[0]


@pytest.mark.parametrize('installed', [pytest.param(True, marks=needs_hotcoco), False])
def test_nothing_detected_is_a_table_of_zeros(data, installed, logged, request):
    if not installed:
        request.getfixturevalue('no_hotcoco')
    ann_file, samples = data
    truth = json.loads(ann_file.read_text())
    truth['annotations'] = [it for it in truth['annotations'] if it['area'] < 96**2]
    ann_file.write_text(json.dumps(truth))
    assert not evaluate(CocoMetric, ann_file, without_detections(samples))[0], 'what is mended'
    options = dict(metric=['bbox', 'segm'], classwise=True)
    figures, printed = evaluate(HotCocoMetric, ann_file, without_detections(samples), **options)
    assert figures.keys() == evaluate(CocoMetric, ann_file, samples, **options)[0].keys()
    for kind in ('bbox', 'segm'):
        assert [figures[f'coco/{kind}_mAP{part}'] for part in ('', '_50', '_75', '_s', '_m')] == [0] * 5
        assert figures[f'coco/{kind}_mAP_l'] == -1, 'there is no large object'
    assert figures['coco/often_precision'] == 0 and np.isnan(figures['coco/never there_precision'])
    assert len(printed) == 24
    assert log_of(logged, 'nothing was detected in 24 images')


@pytest.mark.parametrize('only', [True, False])
def test_files_are_those_of_mmdetection(data, tmp_path, only):
    options = dict(format_only=only, metric=['bbox', 'segm'])
    expected, _ = evaluate(CocoMetric, *data, outfile_prefix=str(tmp_path / 'theirs/x'), **options)
    figures, _ = evaluate(HotCocoMetric, *data, outfile_prefix=str(tmp_path / 'ours/x'), **options)
    same(figures, expected)
    assert bool(figures) != only
    names = sorted(path.name for path in (tmp_path / 'theirs').iterdir())
    assert names == sorted(path.name for path in (tmp_path / 'ours').iterdir()) == ['x.bbox.json', 'x.segm.json']
    for name in names:
        assert (tmp_path / 'ours' / name).read_text() == (tmp_path / 'theirs' / name).read_text()


def evaluate_half(rank, ann_file, folder):
    """As in a test by two processes: each has every second image, and the last of an odd number twice."""
    os.environ.update(MASTER_ADDR='127.0.0.1', RANK=str(rank), WORLD_SIZE='2')
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/group', rank=rank, world_size=2)
    _, samples = draw(images=23)
    metric = HotCocoMetric(ann_file=str(ann_file), classwise=True)
    metric.dataset_meta = dict(classes=CLASSES)
    for sample in [*samples, samples[0]][rank::2]:
        metric.process({}, [sample])
    figures = metric.evaluate(len(samples))
    (folder / f'figures{rank}.json').write_text(json.dumps(figures))
    torch.distributed.destroy_process_group()


@needs_hotcoco
def test_two_processes(tmp_path):
    truth, samples = draw(images=23)
    ann_file = tmp_path / 'truth.json'
    ann_file.write_text(json.dumps(truth))
    run_forks(evaluate_half, (0, ann_file, tmp_path), (1, ann_file, tmp_path))
    expected, _ = evaluate(CocoMetric, ann_file, samples, classwise=True)
    for rank in range(2):
        same(json.loads((tmp_path / f'figures{rank}.json').read_text()), expected)


def test_detections_of_other_images_are_named(data):
    ann_file, samples = data
    samples[0]['img_id'] = 'photo'
    samples[0]['pred_instances'] = next(s['pred_instances'] for s in samples if len(s['pred_instances']['scores']))
    with pytest.raises(UserError, match="1 images with detections are not in the annotations, such as 'photo'"):
        evaluate(HotCocoMetric, ann_file, samples)


def test_unknown_metric_item(data):
    with pytest.raises(KeyError, match='metric item "mAP_90" is not supported'):
        evaluate(HotCocoMetric, *data, metric_items=['mAP_90'])


def test_a_config_that_replaces_our_imports_finds_the_metric(tmp_path, data):
    """`custom_imports` is a list that a derived config replaces, so the type names the package."""
    path = tmp_path / 'config.py'
    path.write_text(
        f'_base_ = {str(ROOT / "configs/faster_rcnn_r50_cbam.py")!r}\n'
        "custom_imports = dict(imports=['cbam_mmdet'])\n"
        f'val_evaluator = dict(ann_file={str(data[0])!r}, classwise=True)\n'
    )
    forget_earlier_runs()
    metric = METRICS.build(Config.fromfile(path).val_evaluator)
    assert type(metric) is HotCocoMetric
    assert metric.proposal_nums == [1, 10, 100] and metric.classwise


def test_objects_are_counted_in_the_images_that_were_tested(tmp_path):
    """A test of some images (`indices`) is scored by the file of all."""
    boxes = [dict(id=i, image_id=image, category_id=1, bbox=[1, i, 9, 9]) for i, image in enumerate((1, 2, 2), start=1)]
    images = [dict(id=i, file_name=f'{i}.jpg', width=40, height=30) for i in (1, 2)]
    annotations = [dict(box, area=81, iscrowd=0) for box in boxes]
    content = dict(images=images, annotations=annotations, categories=[dict(id=1, name='cat')])
    (tmp_path / 'all.json').write_text(json.dumps(content))
    found = dict(bboxes=torch.tensor([[1.0, 1, 10, 10]]), scores=torch.tensor([0.9]), labels=torch.tensor([0]))
    metric = HotCocoMetric(ann_file=str(tmp_path / 'all.json'))
    metric.dataset_meta = dict(classes=('cat',))
    metric.process({}, [dict(img_id=1, ori_shape=(30, 40), pred_instances=found)])
    scores = Scores(metric.evaluation(metric.results), {}, 'area', ('cat',), {})
    assert scores.num_objects == {'cat': 1}
    assert scores.figures['mAP'] == pytest.approx(1)


@pytest.mark.parametrize('key', ['bboxes', 'scores'])
@pytest.mark.parametrize('kind', [HotCocoMetric, SampleCocoMetric, VOCDetectionMetric])
def test_detections_that_are_not_numbers_are_refused(kind, key):
    """pycocotools takes an IoU that is not a number for a match: the score would be perfect."""
    found = dict(bboxes=torch.tensor([[1.0, 1, 10, 10]]), scores=torch.tensor([0.9]), labels=torch.tensor([0]))
    truth = dict(bboxes=found['bboxes'].clone(), labels=found['labels'])
    none = dict(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    sample = dict(img_id=1, ori_shape=(30, 40), gt_instances=truth, ignored_instances=none, pred_instances=found)
    metric = kind()
    metric.dataset_meta = dict(classes=('cat',), dataset_type='VOC2007')
    if kind is not HotCocoMetric:  # which would want a file
        metric.process({}, [sample])
    found[key] = found[key] * float('nan')
    with pytest.raises(UserError, match=f'gives {key} that are not numbers, in image 1'):
        metric.process({}, [sample])
