"""The whole pipeline learns: the demo to its promised mAP, and real photographs by heart. Minutes each."""

import json

import pytest
from conftest import DATA, ROOT

COCO = DATA / 'coco'


def last(work_dir, key):
    rows = next(work_dir.glob('*/vis_data/scalars.json')).read_text().splitlines()
    return [row[key] for row in map(json.loads, rows) if key in row][-1]


@pytest.mark.slow
def test_demo_reaches_half_the_map(demo):
    assert last(demo / 'work', 'coco/bbox_mAP') >= 0.50


@pytest.mark.slow
@pytest.mark.skipif(not COCO.is_dir(), reason='the COCO images are not there')
def test_learns_eight_photographs_by_heart(run_tool, tmp_path):
    config = ROOT / 'configs/demo/overfit_coco8.py'
    assert run_tool('train.py', config, '--data-root', COCO, '--work-dir', tmp_path).code == 0
    assert last(tmp_path, 'coco/bbox_mAP_50') >= 0.90
