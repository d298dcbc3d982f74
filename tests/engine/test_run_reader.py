"""What is read back from a work dir: losses, metrics and the config, of logs written by hand and by a training."""

import json
import os

import pytest

from cbam_mmdet.engine.run_reader import find_config, read_scalars
from cbam_mmdet.engine.scalars import final_metrics
from cbam_mmdet.errors import UserError


def write_log(work_dir, timestamp, *rows, cut=''):
    path = work_dir / timestamp / 'vis_data/scalars.json'
    path.parent.mkdir(parents=True)
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows) + cut)


def gates(step):
    return {'gates/backbone.layer1.0.cbam/channel_mean': 0.5, 'step': step}


def loss(step, epoch):
    return dict(loss=1 / step, step=step, epoch=epoch, iter=step)


def test_the_gates_are_no_validation(tmp_path):
    write_log(
        tmp_path, '20260101_000000', loss(5, 1), gates(5), loss(10, 1), gates(10), {'coco/bbox_mAP': 0.3, 'step': 1}
    )
    train, validations = read_scalars(tmp_path)
    assert [row['step'] for row in train] == [5, 10]
    assert validations == [{'coco/bbox_mAP': 0.3, 'step': 10}]


def test_the_gates_of_a_training_are_no_validation(trained):
    train, validations = read_scalars(trained)
    log = next(trained.glob('*/vis_data/scalars.json')).read_text()
    assert 'gates/' in log and train
    assert len(validations) == log.count('"coco/bbox_mAP"') == 1


def test_a_resumed_training_is_read_from_its_start(tmp_path):
    early, late = {'coco/bbox_mAP': 0.1, 'step': 1}, {'coco/bbox_mAP': 0.2, 'step': 2}
    write_log(tmp_path, '20260101_000000', loss(5, 1), loss(10, 1), early, loss(15, 2), cut='{"loss": 0.')
    write_log(tmp_path, '20260101_000100', loss(12, 2), loss(20, 2), gates(20), late)
    train, validations = read_scalars(tmp_path)
    assert [row['step'] for row in train] == [5, 10, 12, 20], 'what was trained twice counts as trained the last time'
    assert [(row['coco/bbox_mAP'], row['step']) for row in validations] == [(0.1, 10), (0.2, 20)]


def test_the_metrics_at_the_end_of_a_training(tmp_path):
    assert final_metrics(tmp_path, 2) is None
    write_log(tmp_path, '20260101_000000', loss(2, 1), gates(2), {'coco/bbox_mAP': 0.1, 'time': 0.2, 'step': 1})
    assert final_metrics(tmp_path, 2) is None, 'the second iteration is not the second epoch'
    write_log(tmp_path, '20260101_000100', {'coco/bbox_mAP': 0.3, 'data_time': 0.2, 'step': 2}, gates(2))
    assert final_metrics(tmp_path, 2) == {'coco/bbox_mAP': 0.3}


def test_the_newest_config_counts(tmp_path):
    with pytest.raises(UserError, match='holds no config'):
        find_config(tmp_path)
    for name, seconds in (('a.py', 1), ('b.py', 3), ('c.py', 2)):
        (tmp_path / name).write_text('')
        os.utime(tmp_path / name, (seconds, seconds))
    assert find_config(tmp_path) == tmp_path / 'b.py'
