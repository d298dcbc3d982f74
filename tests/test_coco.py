"""Real COCO images through the shipped config, as README's example has it."""

import contextlib
import io
import pickle
import re

import pytest
from conftest import ROOT
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

DATA = ROOT.parent / 'shared/data/coco'
CONFIG = ROOT / 'configs/faster_rcnn_r50_cbam.py'


@pytest.mark.skipif(not DATA.is_dir(), reason='the COCO images are not there')
def test_train_and_test_on_coco_print_what_pycocotools_computes(run_tool, tmp_path):
    options = [
        '--data-root', DATA, '--work-dir', tmp_path / 'work', '--cfg-options', 'model.backbone.init_cfg=None',
        'train_dataloader.batch_size=1', 'train_dataloader.dataset.indices=2', 'train_cfg.max_epochs=1',
        'train_dataloader.num_workers=0', 'train_dataloader.persistent_workers=False',
        'train_dataloader.dataset.pipeline.2.scale=(320,192)',
        'val_dataloader.dataset.pipeline.1.scale=(320,192)', 'test_dataloader.dataset.pipeline.1.scale=(320,192)',
        # After two iterations no score passes the usual 0.05, and nothing would be compared.
        'model.test_cfg.rcnn.score_thr=0.0', 'model.test_cfg.rpn.max_per_img=50',
    ]  # fmt: skip
    trained = run_tool('train.py', CONFIG, *options)
    assert trained.code == 0, trained.err[-2000:]
    out = tmp_path / 'results.pkl'
    tested = run_tool('test.py', CONFIG, tmp_path / 'work', '--out', out, *options)
    assert tested.code == 0, tested.err[-2000:]

    expected = score(out, max_dets=[100, 300, 1000])
    assert max(expected) > 0, 'nothing was detected'
    for result in (trained, tested):
        printed = [float(v) for v in re.findall(r'Average (?:Precision|Recall) .*= (-?\d\.\d{3})', result.out)]
        assert len(printed) == 12
        assert printed == pytest.approx(expected, abs=5.1e-4)


def score(results, max_dets):
    """The twelve figures in the order that MMDetection prints them: its recalls are at 100, 300 and 1000 detections."""
    truth = COCO(str(DATA / 'annotations/instances_val2017.json'))
    categories = truth.getCatIds()
    records = []
    for sample in pickle.loads(results.read_bytes()):
        found = sample['pred_instances']
        for (x1, y1, x2, y2), value, label in zip(found['bboxes'], found['scores'], found['labels'], strict=True):
            box = [float(v) for v in (x1, y1, x2 - x1, y2 - y1)]
            record = dict(image_id=sample['img_id'], category_id=categories[int(label)], bbox=box, score=float(value))
            records.append(record)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(records), 'bbox')
        evaluation.params.maxDets = max_dets
        evaluation.evaluate()
        evaluation.accumulate()
    return [*(mean(evaluation, 'precision', *at) for at in AP), *(mean(evaluation, 'recall', *at) for at in AR)]


# (IoU threshold or None for all, area range's index, index into max_dets)
AP = [(None, 0, 0), (0.5, 0, 2), (0.75, 0, 2), (None, 1, 2), (None, 2, 2), (None, 3, 2)]
AR = [(None, 0, 0), (None, 0, 1), (None, 0, 2), (None, 1, 2), (None, 2, 2), (None, 3, 2)]


def mean(evaluation, what, threshold, area, limit):
    """The mean of COCOeval's table where it is defined; its last axes are area range and number of detections."""
    table = evaluation.eval[what][..., area, limit]
    if threshold is not None:
        table = table[[abs(t - threshold) < 1e-9 for t in evaluation.params.iouThrs]]
    table = table[table > -1]
    return table.mean() if table.size else -1.0
