"""What is read back from a work dir: losses, metrics and the config, of logs written by hand and by a training."""

import io
import json
import math
import os
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import WritesAFile, pretend_tested

from cbam_mmdet.engine.record import RECORDED
from cbam_mmdet.engine.run_reader import (
    find_config,
    find_tested_config,
    read_results,
    read_runs,
    read_scalars,
    was_made_of,
)
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


@pytest.mark.parametrize('killed_again', [False, True])
def test_a_validation_that_a_resumed_training_makes_up_for(tmp_path, killed_again):
    """It is of the step at which the checkpoint was saved, also where that start of the training came no further."""
    first, second = {'coco/bbox_mAP': 0.1, 'step': 1}, {'coco/bbox_mAP': 0.2, 'step': 2}
    write_log(tmp_path, '20260101_000000', loss(5, 1), loss(10, 1))
    write_log(tmp_path, '20260101_000100', first, *([] if killed_again else [loss(15, 2)]))
    write_log(tmp_path, '20260101_000200', loss(15, 2), loss(20, 2), second)
    train, validations = read_scalars(tmp_path)
    assert [row['step'] for row in train] == [5, 10, 15, 20]
    assert [(row['coco/bbox_mAP'], row['step']) for row in validations] == [(0.1, 10), (0.2, 20)]


def test_a_training_that_resumed_none_is_not_joined_with_an_older_one(tmp_path):
    """MMEngine writes beside each log with which config it was made."""
    write_log(tmp_path, '20260101_000000', loss(40, 1), {'coco/bbox_mAP': 0.9, 'step': 1}, loss(80, 2))
    write_log(tmp_path, '20260101_000100', loss(50, 1), {'coco/bbox_mAP': 0.1, 'step': 1}, loss(100, 2))
    write_log(tmp_path, '20260101_000200', loss(60, 1), {'coco/bbox_mAP': 0.2, 'step': 1})
    for timestamp, resumed in (('000000', False), ('000100', False), ('000200', True)):
        (tmp_path / f'20260101_{timestamp}/vis_data/config.py').write_text(f'a = 1\nresume = {resumed}\n')
    train, validations = read_scalars(tmp_path)
    assert [row['step'] for row in train] == [50, 60]
    assert [(row['coco/bbox_mAP'], row['step']) for row in validations] == [(0.1, 50), (0.2, 60)]


def test_a_new_training_has_no_scores_of_an_older_one(tmp_path):
    """Also where nothing but its record was written yet."""
    score = {'coco/bbox_mAP': 0.9, 'step': 1}
    write_log(tmp_path, '20260101_000000', loss(40, 1), score)
    assert final_metrics(tmp_path, 1) == {'coco/bbox_mAP': 0.9}
    for name in ('test', 'training'):
        folder = tmp_path / f'20260101_000100_{name}/vis_data'
        folder.mkdir(parents=True)
        (folder / 'config.py').write_text('resume = False\n')
        empty = {key: kind[0]() if isinstance(kind, tuple) else kind() for key, kind in RECORDED.items()}
        (folder / 'run.json').write_text(json.dumps(empty | (dict(checkpoint='a.pth') if name == 'test' else {})))
        assert (final_metrics(tmp_path, 1) is None) == (name == 'training')
    with pytest.raises(UserError, match='holds a training that has logged no losses yet'):
        read_scalars(tmp_path)


def test_the_time_of_a_resumed_training_is_that_of_all_its_parts(trained, tmp_path):
    work = shutil.copytree(trained, tmp_path / 'work')
    (log,) = work.glob('*/*.log')
    times = re.findall(r'^(\d{4}/\d\d/\d\d) \d\d:\d\d:\d\d - ', log.read_text(), re.M)
    later = shutil.copytree(log.parent, work / '29990101_000000')
    for path, (first, last) in {log: ('01:00:00', '03:10:00'), later / log.name: ('23:00:00', '23:05:00')}.items():
        path.write_text(f'{times[0]} {first} - a\n{times[0]} {last} - b\n')
    config = later / 'vis_data/config.py'
    config.write_text(config.read_text().replace('resume = False', 'resume = True'))
    (run,) = read_runs([work])
    greatest = max(row['lr'] for row in run.train)
    given = run.trained.optim_wrapper.optimizer.lr
    told = '' if math.isclose(greatest, given, rel_tol=1e-3) else f' (in the log at most {greatest:.4g})'
    assert run.facts['Optimizer'].endswith(f', lr {given}{told}')
    for scalars in work.glob('*/vis_data/scalars.json'):
        rows = [json.loads(line) for line in scalars.read_text().splitlines()]
        scalars.write_text(''.join(json.dumps(row | (dict(lr=0.25) if 'lr' in row else {})) + '\n' for row in rows))
    assert read_runs([work])[0].facts['Optimizer'].endswith(f', lr {given} (in the log at most 0.25)')
    assert run.facts['Trained'] == f'{times[0].replace("/", "-")} 01:00, for 2 h 15 min, in 2 parts'


def test_the_metrics_at_the_end_of_a_training(tmp_path):
    assert final_metrics(tmp_path, 2) is None
    write_log(tmp_path, '20260101_000000', loss(2, 1), gates(2), {'coco/bbox_mAP': 0.1, 'time': 0.2, 'step': 1})
    assert final_metrics(tmp_path, 2) is None, 'the second iteration is not the second epoch'
    write_log(tmp_path, '20260101_000100', {'coco/bbox_mAP': 0.3, 'data_time': 0.2, 'step': 2}, gates(2))
    assert final_metrics(tmp_path, 2) == {'coco/bbox_mAP': 0.3}


def test_the_config_of_another_program(tmp_path):
    with pytest.raises(UserError, match='holds no config'):
        find_config(tmp_path)
    for name in ('a', 'b', 'c'):
        (tmp_path / f'{name}.py').write_text(f'name = {name!r}')
    with pytest.raises(UserError, match=r'holds 3 configs \(a.py, b.py, c.py\) and no record'):
        find_config(tmp_path)
    write_log(tmp_path, '20260101_000000', loss(5, 1))
    logged = tmp_path / '20260101_000000/vis_data/config.py'
    logged.write_text("name = 'b'")
    assert find_config(tmp_path) == tmp_path / 'b.py'
    (tmp_path / 'b.py').write_text('')
    assert find_config(tmp_path) == logged


def test_a_stray_file_is_no_config(trained, tmp_path):
    shutil.copytree(trained, tmp_path / 'work')
    (tmp_path / 'work/zzz.py').write_text('raise SystemExit')
    assert find_config(tmp_path / 'work').name == 'faster_rcnn_cbam.py'


def write_results(path, **more):
    with open(path, 'wb') as file:
        pickle.dump([dict(img_id=1, pred_instances=dict(bboxes=torch.ones(2, 4), labels=np.arange(2)), **more)], file)


@pytest.mark.parametrize('protocol', [2, pickle.HIGHEST_PROTOCOL])
def test_detections_are_plain_data(tmp_path, protocol):
    mask = dict(size=[3, 4], counts=b'\x00\xff')
    kinds = dict(f=np.float64(0.5), i=np.int64(3), half=torch.ones(1, dtype=torch.bfloat16), shape=(3, 4), masks=[mask])
    samples = [dict(img_id=1, pred_instances=dict(bboxes=torch.rand(2, 4), labels=torch.arange(2)), **kinds)]
    (tmp_path / 'a.pkl').write_bytes(pickle.dumps(samples, protocol))
    (read,) = read_results(tmp_path / 'a.pkl')
    assert read.keys() == samples[0].keys() and torch.equal(read['half'], kinds['half'])
    assert torch.equal(read['pred_instances']['bboxes'], samples[0]['pred_instances']['bboxes'])
    assert all(read[key] == kinds[key] and type(read[key]) is type(kinds[key]) for key in ('f', 'i', 'shape', 'masks'))


def test_detections_of_another_checkpoint_are_not_taken_for_those_of_this_one(trained, tmp_path):
    work = shutil.copytree(trained, tmp_path / 'work')
    results, checkpoint = work / 'results.pkl', work / 'epoch_1.pth'
    write_results(results)
    assert not was_made_of(results, work, checkpoint)  # no test left a record
    pretend_tested(work)
    assert was_made_of(results, work, checkpoint)
    os.utime(checkpoint, (2e9, 2e9))
    assert not was_made_of(results, work, checkpoint)  # trained further since
    os.utime(checkpoint, (1e9, 1e9))
    shutil.copy(checkpoint, work / 'epoch_2.pth')
    os.utime(work / 'epoch_2.pth', (1e9, 1e9))
    assert not was_made_of(results, work, work / 'epoch_2.pth')
    moved = work.rename(tmp_path / 'moved')
    assert was_made_of(moved / 'results.pkl', moved, moved / 'epoch_1.pth')


@pytest.mark.parametrize(
    ('images', 'label', 'words'), [([1, 1], 0, 'an image id is in it twice'), ([1, 2], -1, 'not the index of a class')]
)
def test_detections_that_cannot_be_are_refused(tmp_path, images, label, words):
    samples = [
        dict(img_id=i, pred_instances=dict(bboxes=torch.ones(1, 4), labels=torch.tensor([label]))) for i in images
    ]
    (tmp_path / 'a.pkl').write_bytes(pickle.dumps(samples))
    with pytest.raises(UserError, match=words):
        read_results(tmp_path / 'a.pkl')


@pytest.mark.parametrize('tool', ['report.py', 'draw_run.py'])
def test_detections_that_hold_code_are_refused(run_tool, trained, tmp_path, tool):
    work = shutil.copytree(trained, tmp_path / 'work')
    write_results(work / 'results.pkl', more=WritesAFile(tmp_path / 'written'))
    pretend_tested(work)
    result = run_tool(tool, work)
    assert result.code == 2 and 'holds more than tensors and plain data (it names pathlib.Path' in result.err
    assert not (tmp_path / 'written').exists()


def test_code_in_the_bytes_of_a_tensor_is_refused(tmp_path):
    class Storage:
        def __reduce__(self):
            stream = io.BytesIO()
            torch.save(WritesAFile(tmp_path / 'written'), stream)
            return torch.storage._load_from_bytes, (stream.getvalue(),)

    write_results(tmp_path / 'a.pkl', more=Storage())
    with pytest.raises(UserError, match='holds more than tensors and plain data'):
        read_results(tmp_path / 'a.pkl')
    assert not (tmp_path / 'written').exists()


@pytest.mark.parametrize('text', ['', '{', '[]', '{}', '3', '[' * 10000])
def test_a_record_of_something_else(trained, tmp_path, text):
    shutil.copytree(trained, tmp_path / 'work')
    next((tmp_path / 'work').glob('*/vis_data/run.json')).write_text(text)
    with pytest.raises(UserError, match='is not a record'):
        find_config(tmp_path / 'work')


def test_the_test_that_wrote_a_file_is_found_by_its_whole_path(trained, tmp_path):
    """A later test may have written a file of the same name elsewhere."""
    work = shutil.copytree(trained, tmp_path / 'work')
    write_results(work / 'results.pkl')
    pretend_tested(work)
    first = find_tested_config(work, work / 'results.pkl')
    later = shutil.copytree(work / '29990101_000000', work / '29990102_000000')
    record = json.loads((later / 'vis_data/run.json').read_text())
    (tmp_path / 'results.pkl').write_bytes(b'')
    (later / 'vis_data/run.json').write_text(json.dumps({**record, 'results': str(tmp_path / 'results.pkl')}))
    assert find_tested_config(work, work / 'results.pkl') == first


ODD_LINES = [
    '{"loss": "a", "step": 1}', '{"loss": 1, "step": null}', '{"loss": 1}', '[' * 200_000,
    f'{{"loss": 1, "step": {"1" * 5000}}}', f'{{"loss": 1{"0" * 400}, "step": 1}}',
]  # fmt: skip


@pytest.mark.parametrize('line', ODD_LINES)
def test_odd_lines_of_a_log_are_left_out(trained, tmp_path, line):
    work = shutil.copytree(trained, tmp_path / 'work')
    whole = read_scalars(work)
    with next(work.glob('*/vis_data/scalars.json')).open('a') as file:
        file.write(f'{line}\n')
    train, validations = read_scalars(work)
    assert [row['loss'] for row in train] == [row['loss'] for row in whole[0]]
    assert [row['step'] for row in train + validations] == [row['step'] for row in whole[0] + whole[1]]
