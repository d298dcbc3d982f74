"""Real COCO images through the shipped config, as README's example has it."""

import contextlib
import io
import pickle
import re

import pytest
from conftest import DATA, ROOT
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

IMAGES = DATA / 'coco'
CONFIG = ROOT / 'configs/faster_rcnn_r50_cbam.py'


@pytest.mark.skipif(not IMAGES.is_dir(), reason='the COCO images are not there')
def test_train_and_test_on_coco_print_what_pycocotools_computes(run_tool, tmp_path):
    options = [
        '--data-root', IMAGES, '--work-dir', tmp_path / 'work', '--cfg-options', 'model.backbone.init_cfg=None',
        'train_dataloader.batch_size=1', 'train_dataloader.dataset.indices=2', 'train_cfg.max_epochs=1',
        'train_dataloader.num_workers=0', 'train_dataloader.persistent_workers=False',
        'train_dataloader.dataset.pipeline.2.scale=(320,192)',
        'val_dataloader.dataset.pipeline.1.scale=(320,192)', 'test_dataloader.dataset.pipeline.1.scale=(320,192)',
        'randomness.seed=0', 'val_dataloader.dataset.indices=12', 'test_dataloader.dataset.indices=12',
        # After two iterations no score passes the usual 0.05, and nothing would be compared.
        'model.test_cfg.rcnn.score_thr=0.0', 'model.test_cfg.rpn.max_per_img=200',
    ]  # fmt: skip
    trained = run_tool('train.py', CONFIG, *options)
    assert trained.code == 0, trained.err[-2000:]
    out = tmp_path / 'results.pkl'
    tested = run_tool('test.py', CONFIG, tmp_path / 'work', '--out', out, *options)
    assert tested.code == 0, tested.err[-2000:]

    expected = score(out)
    for result in (trained, tested):
        printed = [float(v) for v in re.findall(r'Average (?:Precision|Recall) .*= (-?\d\.\d{3})', result.out)]
        assert len(printed) == 12
        assert printed == pytest.approx(expected, abs=5.1e-4)


def score(results):
    """COCO's twelve figures, by pycocotools alone."""
    truth = COCO(str(IMAGES / 'annotations/instances_val2017.json'))
    categories = truth.getCatIds()
    records = []
    for sample in pickle.loads(results.read_bytes()):
        found = sample['pred_instances']
        for (x1, y1, x2, y2), value, label in zip(found['bboxes'], found['scores'], found['labels'], strict=True):
            box = [float(v) for v in (x1, y1, x2 - x1, y2 - y1)]
            record = dict(image_id=sample['img_id'], category_id=categories[int(label)], bbox=box, score=float(value))
            records.append(record)
    assert len(records) > 1000, 'detections are compared, if poor ones'
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(records), 'bbox')
        evaluation.params.imgIds = sorted({record['image_id'] for record in records})  # those that were tested
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return list(evaluation.stats)
