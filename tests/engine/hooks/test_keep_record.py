"""The config in a work dir is that of what was trained there."""

import json
import os
import shutil

import pytest
import torch
from conftest import DEMO, FORKS, cfg_options, in_a_fork, tiny
from mmengine.config import Config

from cbam_mmdet.utils.config import config_text
from cbam_mmdet.utils.lock import locked


@pytest.fixture
def work(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / 'work')


def contents(work):
    return (work / 'faster_rcnn_cbam.py').read_bytes()


@pytest.mark.parametrize('changes', [['--tta'], cfg_options({'model.test_cfg.rcnn.score_thr': 0.9})])
def test_a_test_leaves_it_as_it_is(run_tool, work, shapes, changes):
    before = contents(work)
    result = run_tool('test.py', work / 'faster_rcnn_cbam.py', work, *changes, '--work-dir', work)
    assert result.code == 0, result.err[-2000:]
    assert contents(work) == before
    (copy,) = work.glob('*/faster_rcnn_cbam.py')
    assert ('DetTTAModel' if '--tta' in changes else 'score_thr=0.9') in copy.read_text()
    assert json.loads((copy.parent / 'vis_data/run.json').read_text())['copy'] == copy.name


def test_a_report_after_tta(run_tool, work):
    results = work / 'results.pkl'
    config = work / 'faster_rcnn_cbam.py'
    assert run_tool('test.py', config, work, '--tta', '--out', results, '--work-dir', work).code == 0
    result = run_tool('report.py', work, '--out-dir', work / 'report')
    assert result.code == 0, result.err[-2000:]


def test_a_training_that_does_not_begin_leaves_it_as_it_is(run_tool, work, shapes):
    before = contents(work)
    torch.save(dict(a=torch.ones(1)), work / 'other.pth')
    result = run_tool('train.py', DEMO, *tiny(work, shapes, f'load_from={work / "other.pth"}', 'randomness.seed=7'))
    assert result.code == 2 and 'of another architecture' in result.err
    assert contents(work) == before


@pytest.mark.parametrize(('flags', 'options'), [(['--resume'], []), ([], ['resume=True'])])
def test_a_training_by_the_config_of_a_resumed_one_starts_anew(run_tool, work, shapes, tmp_path, flags, options):
    """Else a second seed would go on from the first one's weights."""
    resumed = run_tool('train.py', DEMO, *flags, *tiny(work, shapes, 'train_cfg.max_epochs=2', *options))
    assert resumed.code == 0, resumed.err[-2000:]
    said = resumed.out + resumed.err
    assert f'resuming from {work}/epoch_1.pth' in said and 'resumed epoch: 1' in said
    assert ('resume=True in the config: as --resume auto' in said) == (not flags)
    saved = Config.fromfile(work / 'faster_rcnn_cbam.py')
    assert not saved.resume and saved.load_from is None
    changes = json.loads(next(path for path in work.glob('*/vis_data/run.json')).read_text())['differences']
    assert 'load_from' not in [name for name, *_ in changes]
    anew = run_tool('train.py', work / 'faster_rcnn_cbam.py', '--work-dir', tmp_path / 'anew')
    assert anew.code == 0, anew.err[-2000:]
    assert 'resumed' not in anew.out + anew.err and 'Epoch(train) [1]' in (anew.out + anew.err).replace('  ', ' ')


def test_what_the_config_resumes_is_resumed_where_there_is_nothing_else(run_tool, work, shapes, tmp_path):
    options = ('train_cfg.max_epochs=2', 'resume=True', f'load_from={work / "epoch_1.pth"}')
    result = run_tool('train.py', DEMO, '--resume', 'auto', *tiny(tmp_path / 'anew', shapes, *options))
    assert result.code == 0, result.err[-2000:]
    said = result.out + result.err
    assert '--resume auto: resuming from' in said and 'resumed epoch: 1' in said


@pytest.mark.parametrize('suffix', ['py', 'json', 'yaml'])
def test_braces_in_a_name_are_no_variable(suffix, tmp_path):
    classes = ['{{ fileDirname }}', '{{$HOME:x}}', '{{{{', '}}', '{{_base_.a}}', "'\\"]
    path = tmp_path / f'a.{suffix}'
    path.touch()
    cfg = Config(dict(classes=classes, nested=dict(a=1)), filename=path)
    path.write_text(config_text(cfg))
    assert Config.fromfile(path).to_dict() == cfg.to_dict()


def hold(folder, ready, done):
    with locked(folder, ''):
        ready.set()
        done.wait(120)


def test_two_trainings_in_one_work_dir(run_tool, shapes, tmp_path):
    ready, done = FORKS.Event(), FORKS.Event()
    process = FORKS.Process(target=in_a_fork, args=(hold, tmp_path, ready, done))
    process.start()
    assert ready.wait(60)
    result = run_tool('train.py', DEMO, *tiny(tmp_path, shapes))
    assert result.code == 2 and f'{tmp_path} is in use by process {process.pid}' in result.err
    assert 'give another --work-dir' in result.err
    assert os.listdir(tmp_path) == ['.lock']
    done.set()
    process.join()
    with locked(tmp_path, ''):
        pass
