"""tools/draw_run.py: the curve and the sheet of a run."""

import os
import shutil

import cv2
import pytest
from conftest import DEMO, tiny

from cbam_mmdet.errors import UserError
from cbam_mmdet.visualization.run_pictures import draw_curve


@pytest.fixture
def work_dir(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / 'work')


def test_draw_run_reads_the_newest_config(run_tool, work_dir, shapes, tmp_path):
    done = run_tool('test.py', DEMO, work_dir, '--out', work_dir / 'results.pkl', *tiny(tmp_path / 'test', shapes))
    assert done.code == 0, done.err
    older = work_dir / 'another.py'
    older.write_text('model = dict()\n')  # of a training in the same folder: it names no data
    os.utime(older, (1, 1))
    result = run_tool('draw_run.py', work_dir, '--num-images', 4)
    assert result.code == 0, result.err
    for name in ('curve.png', 'detections.png'):
        assert cv2.imread(str(work_dir / name)).std() > 10, 'something is drawn'


def test_a_curve_without_a_finite_loss_is_one_message(tmp_path):
    log = tmp_path / '20260101_000000/vis_data/scalars.json'
    log.parent.mkdir(parents=True)
    log.write_text('{"loss": NaN, "step": 1, "epoch": 1}\n')
    with pytest.raises(UserError, match='infinite or NaN'):
        draw_curve(tmp_path, tmp_path / 'curve.png')
