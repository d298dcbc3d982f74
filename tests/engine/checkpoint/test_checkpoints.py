"""Checkpoints that survive a kill and run no code."""

import collections
import contextlib
import errno
import itertools
import os
import pickle
import shutil
import subprocess
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DEMO, FORKS, ROOT, SMALL, WritesAFile, cfg_options, forget_earlier_runs, tiny
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.logging import HistoryBuffer, MessageHub, MMLogger
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import save_checkpoint

import cbam_mmdet.compat.torch as torch_parts
from cbam_mmdet.compat.mmengine import local_files_written_by
from cbam_mmdet.engine.checkpoint.files import find_checkpoint, newest_checkpoint
from cbam_mmdet.engine.checkpoint.loading import load_checkpoint, safe_loading
from cbam_mmdet.engine.hooks.safe_checkpoint import SafeCheckpointHook
from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.files import AtomicLocalBackend


class Asks:
    """Unpickled, it calls getattr for what is not a statistic."""

    def __init__(self, *args):
        self.args = args

    def __reduce__(self):
        return getattr, self.args


class Calls:
    """Unpickled, it calls this function."""

    def __init__(self, function):
        self.function = function

    def __reduce__(self):
        return self.function, ('x',)


@pytest.fixture
def evil(trained, tmp_path):
    """A checkpoint that fits the demo's detector, and writes a file when it is unpickled."""
    checkpoint = torch.load(trained / 'epoch_1.pth', weights_only=False)
    checkpoint['meta']['extra'] = WritesAFile(tmp_path / 'written')
    torch.save(checkpoint, tmp_path / 'evil.pth')
    return tmp_path / 'evil.pth'


@pytest.fixture(params=[torch_parts.HAS_SAFE_GLOBALS, False], ids=['by torch', 'without torch'])
def either_way(request, monkeypatch):
    """As this torch loads tensors and plain data, and as one before 2.6 must."""
    monkeypatch.setattr(torch_parts, 'HAS_SAFE_GLOBALS', request.param)


# Safe


def assert_refused(result, evil):
    assert result.code == 2 and 'Traceback' not in result.err, result.err[-2000:]
    assert 'holds more than tensors and plain data' in result.err and '--trust-checkpoint' in result.err
    assert not (evil.parent / 'written').exists()


def test_plain_unpickling_runs_the_code(evil):
    """That the file is what it should be."""
    torch.load(evil, weights_only=False)
    assert (evil.parent / 'written').read_text() == 'code ran'


def test_train_load_from_refuses_code(run_tool, evil, shapes, tmp_path):
    options = tiny(tmp_path / 'work', shapes, f'load_from={evil}')
    assert_refused(run_tool('train.py', DEMO, *options), evil)


def test_train_pretrained_backbone_refuses_code(run_tool, evil, shapes, tmp_path):
    config = tmp_path / 'own.py'
    init_cfg = dict(_delete_=True, type='Pretrained', checkpoint=str(evil), prefix='backbone.')
    config.write_text(f"_base_ = '{DEMO}'\nmodel = dict(backbone=dict(init_cfg={init_cfg}))\n")
    assert_refused(run_tool('train.py', config, *tiny(tmp_path / 'work', shapes)), evil)


@pytest.mark.parametrize(
    ('source', 'words'),
    [
        (dict(prefix='backbon.'), ["begins with prefix='backbon.'; did you mean 'backbone.'?", 'rpn_head.']),
        ({}, ['none of its weights is of the', "prefix='backbone.')"]),
        (dict(checkpoint='weights/no.pth'), ['weights/no.pth', 'docs/own_data.md#without-a-gpu-a-pretrained-detector']),
    ],
)
def test_a_part_of_a_checkpoint_that_is_not_there(run_tool, trained, shapes, tmp_path, source, words):
    init_cfg = {'_delete_': True, 'type': 'Pretrained', 'checkpoint': str(trained / 'epoch_1.pth'), **source}
    config = tmp_path / 'own.py'
    config.write_text(f"_base_ = '{DEMO}'\nmodel = dict(backbone=dict(init_cfg={init_cfg}))\n")
    result = run_tool('train.py', config, *tiny(tmp_path / 'work', shapes))
    assert result.code == 2 and 'Traceback' not in result.err, result.err[-2000:]
    assert all(word in result.err for word in words), result.err


@pytest.mark.parametrize('newest', [True, False])
def test_resume_refuses_code(run_tool, evil, shapes, tmp_path, newest):
    shutil.copytree(tmp_path, tmp_path / 'work')
    (tmp_path / 'work/evil.pth').rename(tmp_path / 'work/epoch_1.pth')
    options = tiny(tmp_path / 'work', shapes)
    result = run_tool('train.py', DEMO, '--resume', *([] if newest else [evil]), *options)
    if newest:
        assert result.code == 2 and 'none of the 1 checkpoints in' in result.err
        assert 'skipped' in result.out + result.err and 'holds more than tensors' in result.out + result.err
        assert not (tmp_path / 'written').exists()
    else:
        assert_refused(result, evil)


def test_test_refuses_code(run_tool, evil, shapes, tmp_path):
    options = tiny(tmp_path / 'work', shapes)
    assert_refused(run_tool('test.py', DEMO, evil, *options), evil)


def test_infer_refuses_code(run_tool, evil, shapes, tmp_path):
    image = next((shapes / 'val2017').iterdir())
    result = run_tool('infer.py', DEMO, evil, image, '--out-dir', tmp_path / 'out', *cfg_options(SMALL))
    assert_refused(result, evil)


def test_convert_checkpoint_refuses_code(run_tool, evil, tmp_path):
    assert_refused(run_tool('convert_checkpoint.py', evil, tmp_path / 'out.pth'), evil)


def test_insert_cbam_refuses_code(run_tool, evil, tmp_path):
    plain = ROOT / 'configs/demo/faster_rcnn.py'
    assert_refused(run_tool('insert_cbam.py', plain, evil, '--out-dir', tmp_path / 'new'), evil)


@pytest.mark.parametrize('tool', ['gradcam.py', 'attention_maps.py'])
def test_pictures_refuse_code(run_tool, evil, shapes, tmp_path, tool):
    image = next((shapes / 'val2017').iterdir())
    chosen = ['--out-dir', tmp_path / 'out', *cfg_options(SMALL)]
    assert_refused(run_tool(tool, DEMO, evil, image, *chosen), evil)


def test_report_refuses_code(run_tool, evil, trained, tmp_path):
    shutil.copytree(trained, tmp_path / 'work')
    shutil.copy(evil, tmp_path / 'work/epoch_1.pth')
    assert_refused(run_tool('report.py', tmp_path / 'work', '--out-dir', tmp_path / 'out'), evil)


@pytest.mark.parametrize(
    'content', [[1, 2], torch.ones(3), dict(meta=[1], state_dict={}, message_hub={}, optimizer={})]
)
@pytest.mark.parametrize('named', [True, False])
def test_resume_from_what_is_no_checkpoint(run_tool, shapes, tmp_path, content, named):
    path = tmp_path / 'work/epoch_1.pth'
    path.parent.mkdir()
    torch.save(content, path)
    result = run_tool('train.py', DEMO, '--resume', *([path] if named else []), *tiny(tmp_path / 'work', shapes))
    assert result.code == 2 and 'Traceback' not in result.err, result.err[-2000:]
    assert 'error: ' in result.err and str(path) in result.err


def test_trust_checkpoint_loads_it_all_the_same(run_tool, evil, shapes, tmp_path):
    options = tiny(tmp_path / 'work', shapes)
    result = run_tool('test.py', DEMO, evil, '--trust-checkpoint', *options)
    assert result.code == 0, result.err[-2000:]
    assert (tmp_path / 'written').read_text() == 'code ran'


@pytest.mark.parametrize('function', [os.system, eval, print, np.load, torch.load, torch.jit.load, exec, setattr])
@pytest.mark.parametrize('zipped', [True, False])
def test_functions_are_refused(function, zipped, tmp_path, either_way):
    torch.save(dict(x=Calls(function)), tmp_path / 'a.pth', _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=f'it names .*{function.__name__}'):
        load_checkpoint(tmp_path / 'a.pth')


def test_a_class_is_not_changed(tmp_path, either_way):
    """A pickle may set attributes of what it names, also of a class that it may name."""
    state = b'N}X\x04\x00\x00\x00evilK\x01s\x86'  # (None, {'evil': 1}): plain unpickling sets it by setattr
    content = b'\x80\x02ccollections\nCounter\n' + state + b'b.'
    with zipfile.ZipFile(tmp_path / 'a.pth', 'w') as archive:
        archive.writestr('a/data.pkl', content)
        archive.writestr('a/version', '3\n')
    with pytest.raises(UserError):
        load_checkpoint(tmp_path / 'a.pth')
    assert not hasattr(collections.Counter, 'evil')


def test_a_program_of_torchscript_is_refused(tmp_path, either_way):
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / 'a.pth')
    with pytest.raises(UserError):
        load_checkpoint(tmp_path / 'a.pth')


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('value', [
    torch.nn.Parameter(torch.arange(3.0)), torch.arange(6).view(2, 3).T, torch.tensor([1, 2], dtype=torch.bfloat16),
    np.float64(0.1), np.arange(3), np.array([True]), {1, 2}, b'bytes', 2j, torch.Size([1, 2]), torch.float16,
    torch.device('cpu'), collections.OrderedDict(a=1), collections.Counter('aab'), None, 2**70,
], ids=repr)  # fmt: skip
def test_plain_data_comes_back(value, zipped, tmp_path, either_way):
    torch.save(dict(x=value), tmp_path / 'a.pth', _use_new_zipfile_serialization=zipped)
    loaded = load_checkpoint(tmp_path / 'a.pth')['x']
    assert type(loaded) is type(value) and repr(loaded) == repr(value)


@pytest.mark.parametrize(
    'args', [(HistoryBuffer, '__init__'), (HistoryBuffer, '__globals__'), (HistoryBuffer, 'register_statistics')]
)
def test_getattr_reaches_only_the_statistics(tmp_path, args, either_way):
    torch.save(dict(x=Asks(*args)), tmp_path / 'a.pth')
    with pytest.raises(UserError, match='holds more than'):
        load_checkpoint(tmp_path / 'a.pth')


def test_loading_leaves_torch_as_strict_as_it_was(trained, tmp_path):
    load_checkpoint(trained / 'epoch_1.pth')
    torch.save(dict(x=np.float64(1)), tmp_path / 'a.pth')
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / 'a.pth', weights_only=True)


def test_a_runs_own_checkpoint_loads_whole(trained, either_way):
    """With the state of the optimizer and the histories of the logs, equal to what full unpickling gives."""
    path = trained / 'epoch_1.pth'
    safe, full = load_checkpoint(path), torch.load(path, weights_only=False)
    assert set(safe) == set(full) >= {'state_dict', 'optimizer', 'message_hub', 'param_schedulers', 'meta'}
    assert all(torch.equal(safe['state_dict'][key], value) for key, value in full['state_dict'].items())
    buffers = [c['message_hub']['log_scalars']['train/loss'] for c in (safe, full)]
    assert buffers[0].mean(2) == buffers[1].mean(2)
    assert np.array_equal(buffers[0].data[0], buffers[1].data[0])


@pytest.mark.parametrize('how', ['cut', 'text', 'empty'])
def test_damaged_file(trained, tmp_path, how):
    whole = (trained / 'epoch_1.pth').read_bytes()
    path = tmp_path / 'epoch_1.pth'
    path.write_bytes(dict(cut=whole[: len(whole) // 2], text=b'no checkpoint', empty=b'')[how])
    with pytest.raises(UserError, match=r'checkpoint .*epoch_1\.pth (cannot be read|holds more)'):
        load_checkpoint(path)


def test_a_url_is_loaded_the_safe_way(evil, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, 'download_url_to_file', lambda url, path, **_: shutil.copy(evil, path))
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    with safe_loading(), pytest.raises(UserError, match='holds more than'):
        CheckpointLoader.load_checkpoint('https://example.org/resnet50-12345678.pth', map_location='cpu')
    assert not (tmp_path / 'written').exists()


# Surviving


@pytest.mark.parametrize('failure', [OSError(errno.ENOSPC, 'No space left on device'), KeyboardInterrupt()])
def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch, failure):
    path = str(tmp_path / 'epoch_1.pth')

    def fail(_):
        raise failure

    with local_files_written_by(AtomicLocalBackend):
        save_checkpoint(dict(state_dict=dict(a=torch.ones(3))), path)
        before = Path(path).read_bytes()
        monkeypatch.setattr(os, 'fsync', fail)
        with pytest.raises(type(failure)):
            save_checkpoint(dict(state_dict=dict(a=torch.zeros(3))), path)
    assert Path(path).read_bytes() == before
    assert os.listdir(tmp_path) == ['epoch_1.pth'], 'nothing half written is left'


def test_mmengine_writes_through_it(tmp_path):
    get_file_backend('plain/relative/path')  # MMEngine remembers the one that it made
    with local_files_written_by(AtomicLocalBackend):
        assert type(get_file_backend(str(tmp_path / 'a.pth'))) is AtomicLocalBackend
        assert type(get_file_backend('plain/relative/path')) is AtomicLocalBackend
    assert type(get_file_backend('plain/relative/path')) is LocalBackend


def write_forever(path, written):
    """The same checkpoint again and again, with its number in it."""
    with local_files_written_by(AtomicLocalBackend):
        for i in itertools.count(1):
            save_checkpoint(dict(meta=i, state_dict=dict(a=torch.full((2000000,), float(i)))), path)
            written.send(i)


def test_killed_while_writing_leaves_the_old_file(tmp_path):
    """SIGKILL at random moments."""
    rng = np.random.default_rng(0)
    for _ in range(3):
        ours, theirs = FORKS.Pipe(duplex=False)
        process = FORKS.Process(target=write_forever, args=(str(tmp_path / 'iter_1.pth'), theirs))
        process.start()
        theirs.close()
        numbers = [ours.recv()]
        time.sleep(rng.random() * 0.3)
        process.kill()
        with contextlib.suppress(EOFError):
            while True:
                numbers.append(ours.recv())
        process.join()
        checkpoint = load_checkpoint(tmp_path / 'iter_1.pth')
        assert (checkpoint['state_dict']['a'] == checkpoint['meta']).all()
        assert checkpoint['meta'] >= numbers[-1]


def test_newest_checkpoint_passes_over_what_is_not_whole(trained, tmp_path):
    whole = (trained / 'epoch_1.pth').read_bytes()
    for i, content in enumerate([whole, whole, whole[:2000], b''], start=1):
        (tmp_path / f'epoch_{i}.pth').write_bytes(content)
        os.utime(tmp_path / f'epoch_{i}.pth', (i, i))
    torch.save(torch.load(trained / 'epoch_1.pth', weights_only=False)['state_dict'], tmp_path / 'epoch_5.pth')
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_9'))
    (tmp_path / 'best_coco_epoch_7.pth').write_bytes(whole)
    path, passed_over = newest_checkpoint(str(tmp_path))
    assert Path(path).name == 'epoch_2.pth'
    assert [('epoch_5' in passed_over[0]), ('epoch_4' in passed_over[1]), ('epoch_3' in passed_over[2])] == [True] * 3
    assert 'lacks the state of the run' in passed_over[0]


def write_run_checkpoint(path, iterations, time):
    torch.save(dict(meta=dict(iter=iterations), message_hub={}, optimizer={}, state_dict={}), path)
    os.utime(path, (time, time))


def test_newest_checkpoint_is_that_of_last_checkpoint_or_a_later_further_one(tmp_path):
    def newest():
        return Path(newest_checkpoint(str(tmp_path))[0]).name

    for iterations, written in ((5, 3), (10, 2), (15, 1)):  # a folder that was copied without its times
        write_run_checkpoint(tmp_path / f'iter_{iterations}.pth', iterations, written)
    assert newest() == 'iter_5.pth', 'nothing but the times to go by'
    (tmp_path / 'last_checkpoint').write_text('/elsewhere/work/iter_15.pth')
    assert newest() == 'iter_15.pth'
    write_run_checkpoint(tmp_path / 'iter_20.pth', 20, 9)
    assert newest() == 'iter_20.pth', 'killed before last_checkpoint was written'
    # Gone back to iteration 5 by hand, and on from there: what was written before is of another branch.
    write_run_checkpoint(tmp_path / 'iter_7.pth', 7, 20)
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_7.pth'))
    assert newest() == 'iter_7.pth'
    (tmp_path / 'iter_7.pth').write_bytes(b'')
    assert newest() == 'iter_20.pth'
    assert 'iter_7.pth' in newest_checkpoint(str(tmp_path))[1][0]


def test_a_copied_work_dir_stands_for_itself(tmp_path):
    for name in ('original', 'copy'):
        (tmp_path / name).mkdir()
        write_run_checkpoint(tmp_path / name / 'iter_5.pth', 5, 1)
        (tmp_path / name / 'last_checkpoint').write_text(str(tmp_path / 'original/iter_5.pth'))
    assert find_checkpoint(str(tmp_path / 'copy')) == str(tmp_path / 'copy/iter_5.pth')


def test_resume_auto_does_not_start_anew_over_checkpoints_that_do_not_load(run_tool, evil, shapes, tmp_path):
    work = tmp_path / 'work'
    work.mkdir()
    shutil.move(evil, work / 'epoch_1.pth')
    options = tiny(work, shapes, 'train_cfg.max_epochs=2')
    result = run_tool('train.py', DEMO, '--resume', 'auto', *options)
    assert result.code == 2 and 'move them away' in result.err and not (tmp_path / 'written').exists()
    result = run_tool('train.py', DEMO, '--resume', 'auto', '--trust-checkpoint', *options)
    assert result.code == 0, result.err[-2000:]
    assert 'resuming from' in result.out + result.err and (tmp_path / 'written').exists()


def test_resume_finds_checkpoints_of_another_folder_and_name(run_tool, shapes, tmp_path):
    hook = ['default_hooks.checkpoint.interval=1', f'default_hooks.checkpoint.out_dir={tmp_path}/elsewhere']
    hook += ['default_hooks.checkpoint.filename_tmpl=after_{}.pth']
    assert run_tool('train.py', DEMO, *tiny(tmp_path / 'work', shapes, *hook)).code == 0
    assert (tmp_path / 'elsewhere/work/after_1.pth').is_file()
    result = run_tool('train.py', DEMO, '--resume', *tiny(tmp_path / 'work', shapes, 'train_cfg.max_epochs=2', *hook))
    assert result.code == 0, result.err[-2000:]
    assert 'elsewhere/work/after_1.pth' in result.out + result.err


def test_any_damage_is_a_message(trained, tmp_path):
    """Bytes of the pickle inside the file are changed at random."""
    with zipfile.ZipFile(trained / 'epoch_1.pth') as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in members if name.endswith('data.pkl'))
    rng, path, messages = np.random.default_rng(0), tmp_path / 'epoch_1.pth', []
    for _ in range(40):
        content = bytearray(members[pickled])
        for place in rng.integers(0, len(content), 3):
            content[place] = rng.integers(256)
        with zipfile.ZipFile(path, 'w') as archive:
            for name, data in members.items():
                if name == pickled or not name.split('/')[-1].isdigit():
                    archive.writestr(name, bytes(content) if name == pickled else data)
                else:
                    archive.writestr(name, data)
        try:
            load_checkpoint(path)
        except UserError as error:
            messages.append(str(error))
    assert len(messages) > 10
    told = [m for m in messages if 'would run code' in m]
    assert all('it names' in m for m in told) and len(told) < len(messages)


def test_resume_goes_on_from_the_newest_that_is_whole(run_tool, trained, shapes, tmp_path):
    work = Path(shutil.copytree(trained, tmp_path / 'work'))
    (work / 'epoch_2.pth').write_bytes((work / 'epoch_1.pth').read_bytes()[:5000])
    (work / 'last_checkpoint').write_text(str(work / 'epoch_2.pth'))
    (work / '.epoch_2.pth.123.unfinished').write_bytes(b'half')
    options = tiny(work, shapes, 'train_cfg.max_epochs=2')
    result = run_tool('train.py', DEMO, '--resume', *options)
    printed = result.out + result.err
    assert result.code == 0, result.err[-2000:]
    assert 'skipped' in printed and 'epoch_2.pth' in printed and f'resuming from {work}/epoch_1.pth' in printed
    assert load_checkpoint(work / 'epoch_2.pth')['meta']['epoch'] == 2
    assert not list(work.glob('.*.unfinished'))


def test_old_checkpoint_stays_until_the_new_one_is_there(run_tool, shapes, tmp_path, monkeypatch):
    """With max_keep_ckpts=1, and a disk that is full at the second checkpoint."""
    fsync = os.fsync

    def full_at_the_second_checkpoint(descriptor):
        if 'epoch_2.pth' in os.readlink(f'/proc/self/fd/{descriptor}'):
            raise OSError(errno.ENOSPC, 'No space left on device', 'epoch_2.pth')
        fsync(descriptor)

    monkeypatch.setattr(os, 'fsync', full_at_the_second_checkpoint)
    options = tiny(
        tmp_path,
        shapes,
        'train_cfg.max_epochs=3',
        'default_hooks.checkpoint.interval=1',
        'default_hooks.checkpoint.max_keep_ckpts=1',
    )
    result = run_tool('train.py', DEMO, *options)
    assert result.code == 2 and 'Traceback' not in result.err
    assert 'No space left on device' in result.err
    assert [p.name for p in tmp_path.glob('*.pth')] == ['epoch_1.pth']
    assert load_checkpoint(tmp_path / 'epoch_1.pth')['meta']['epoch'] == 1
    monkeypatch.undo()


def test_old_best_stays_until_the_new_one_is_there(tmp_path):
    saves = []

    def save_checkpoint(folder, filename, *args, **kwargs):
        saves.append(sorted(path.name for path in tmp_path.iterdir()))
        if runner.epoch == 3:
            raise OSError(errno.ENOSPC, 'No space left on device', filename)
        Path(folder, filename).touch()

    hook = SafeCheckpointHook(interval=1, save_best='acc', rule='greater', out_dir=str(tmp_path))
    hub = MessageHub('best')
    runner = SimpleNamespace(message_hub=hub, save_checkpoint=save_checkpoint, logger=MMLogger('best'))
    hook.file_backend = LocalBackend()
    for runner.epoch in (1, 2):
        runner.iter = runner.epoch * 10
        hook.after_val_epoch(runner, dict(acc=runner.epoch))
    runner.epoch = 3
    with pytest.raises(OSError):
        hook.after_val_epoch(runner, dict(acc=3))
    first, second = [], ['best_acc_epoch_1.pth']
    assert saves == [first, second, ['best_acc_epoch_2.pth']]
    assert [path.name for path in tmp_path.iterdir()] == ['best_acc_epoch_2.pth']
    runner.epoch = 2  # and one that is written over itself stays
    hook.best_ckpt_path = str(tmp_path / 'best_acc_epoch_2.pth')
    hook.after_val_epoch(runner, dict(acc=4))
    assert [path.name for path in tmp_path.iterdir()] == ['best_acc_epoch_2.pth']


@pytest.fixture
def disk(tmp_path):
    """A file system of its own: disk(option) mounts it, or mounts it anew with another option."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    mounted = False

    def mount(option):
        nonlocal mounted
        options = f'remount,{option}' if mounted else option
        done = subprocess.run(['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f'no file system can be mounted here: {done.stderr.strip()}')
        mounted = True
        return folder

    yield mount
    if mounted:
        forget_earlier_runs()  # a log file of theirs is still open
        subprocess.run(['umount', '--lazy', folder], check=True)


def test_full_disk(run_tool, trained, shapes, disk):
    size = (trained / 'epoch_1.pth').stat().st_size
    work_dir = disk(f'size={int(1.5 * size)}')
    every = ['default_hooks.checkpoint.interval=1', 'default_hooks.checkpoint.max_keep_ckpts=-1']
    options = tiny(work_dir, shapes, 'train_cfg.max_epochs=2', *every)
    result = run_tool('train.py', DEMO, *options)
    assert result.code == 2 and 'Traceback' not in result.err, result.err[-2000:]
    assert 'epoch_2.pth' in result.err and 'No space left on device' in result.err and '--resume' in result.err
    assert not list(work_dir.glob('.*.unfinished')), 'what was not finished does not take the room'
    assert [p.name for p in work_dir.glob('*.pth')] == ['epoch_1.pth']
    assert load_checkpoint(work_dir / 'epoch_1.pth')['meta']['epoch'] == 1
    disk(f'size={4 * size}')
    result = run_tool('train.py', DEMO, '--resume', *options)
    assert result.code == 0, result.err[-2000:]
    assert load_checkpoint(work_dir / 'epoch_2.pth')['meta']['epoch'] == 2


def test_folder_that_is_read_only(run_tool, trained, shapes, disk):
    work_dir = disk('size=100m')
    shutil.copytree(trained, work_dir, dirs_exist_ok=True)
    disk('ro')
    before = {path.name for path in work_dir.iterdir()}
    for arguments in ([], ['--resume']):
        result = run_tool('train.py', DEMO, *arguments, *tiny(work_dir, shapes, 'train_cfg.max_epochs=2'))
        assert result.code == 2 and 'Traceback' not in result.err, result.err[-2000:]
        assert str(work_dir) in result.err and 'Read-only file system' in result.err
    assert {path.name for path in work_dir.iterdir()} == before
    assert load_checkpoint(work_dir / 'epoch_1.pth')['meta']['epoch'] == 1


def test_only_so_many_are_kept(run_tool, shapes, tmp_path):
    options = tiny(
        tmp_path,
        shapes,
        'train_cfg.max_epochs=3',
        'default_hooks.checkpoint.interval=1',
        'default_hooks.checkpoint.max_keep_ckpts=2',
    )
    assert run_tool('train.py', DEMO, *options).code == 0
    assert sorted(p.name for p in tmp_path.glob('*.pth')) == ['epoch_2.pth', 'epoch_3.pth']
