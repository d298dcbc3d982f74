"""Ablations: what is read from the disk, what is counted, and that a killed one resumes where it stopped."""

import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import DEMO, ROOT, SMALL, WritesAFile, forget_earlier_runs, tiny
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope
from torch import nn

from cbam_mmdet.apis.ablate import (
    AblationRun,
    Cost,
    _locked,
    ablate,
    as_csv,
    interleaved_speeds,
    load_runs,
    markdown,
    multiply_adds,
    next_command,
    record_settings,
)
from cbam_mmdet.errors import UserError

ABLATION = ROOT / 'configs/ablation'
TOOLS = ROOT / 'tools'
STAND_IN = """
import json, os, shutil, sys, time
config, work_dir = sys.argv[1], sys.argv[sys.argv.index('--work-dir') + 1]
name, resume = os.path.basename(work_dir), '--resume' in sys.argv
def log(directory, row):
    os.makedirs(f'{work_dir}/{directory}/vis_data', exist_ok=True)
    with open(f'{work_dir}/{directory}/vis_data/scalars.json', 'a') as file:
        file.write(json.dumps(row) + '\\n')
if name == os.environ.get('FAILS'):
    sys.exit('error: something is amiss')
for epoch in (2,) if resume else (1, 2):
    if epoch == 2 and name == os.environ.get('HANGS'):
        open(f'{work_dir}/hangs', 'w').write(str(os.getpid()))
        time.sleep(600)
    shutil.copy(os.environ['WEIGHTS'], f'{work_dir}/epoch_{epoch}.pth')
    log('resumed' if resume else 'first', {'coco/bbox_mAP': epoch / 10, 'time': 1.0, 'step': epoch})
"""


@pytest.fixture
def run(tmp_path):
    cfg = Config(dict(train_cfg=dict(max_epochs=2), val_dataloader=dict(batch_size=1), val_evaluator=dict(type='X')))
    return AblationRun('some', cfg, tmp_path)


def write_log(run, *rows, cut=''):
    path = run.work_dir / '20260101_000000/vis_data/scalars.json'
    path.parent.mkdir(parents=True)
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows) + cut)


def write_checkpoint(run, epoch, intact=True):
    run.work_dir.mkdir(exist_ok=True)
    path = run.work_dir / f'epoch_{epoch}.pth'
    torch.save(dict(weight=torch.zeros(1000)), path)
    if not intact:
        path.write_bytes(path.read_bytes()[:-100])
    return path


def test_metrics_are_those_of_the_last_epoch(run):
    assert run.metrics() is None
    train = dict(loss=1.0, step=2, epoch=1, iter=2)  # the second iteration, not the second epoch
    write_log(run, train, {'coco/bbox_mAP': 0.1, 'time': 0.2, 'step': 1}, cut='{"coco/bbox_mAP": 0.')
    assert run.metrics() is None, 'an earlier validation is not the last'
    shutil.rmtree(run.work_dir)
    write_log(run, train, {'coco/bbox_mAP': 0.1, 'step': 1}, {'coco/bbox_mAP': 0.3, 'data_time': 0.1, 'step': 2})
    assert run.metrics() == {'coco/bbox_mAP': 0.3}
    assert next_command(run, TOOLS) is None


def test_a_finished_run_that_detects_nothing_is_finished(run):
    write_log(run, dict(time=0.2, data_time=0.1, step=2))
    assert run.metrics() == {}


def test_iterations_are_counted_in_a_loop_of_iterations(tmp_path):
    cfg = Config(dict(train_cfg=dict(type='IterBasedTrainLoop', max_iters=90)))
    run = AblationRun('some', cfg, tmp_path)
    write_log(run, {'loss': 1.0, 'step': 90, 'iter': 90}, {'coco/bbox_mAP': 0.3, 'step': 90})
    assert run.metrics() == {'coco/bbox_mAP': 0.3}


def test_training_starts_resumes_and_skips_what_is_cut_off(run):
    train = [sys.executable, f'{TOOLS}/train.py', str(run.config), '--work-dir', str(run.work_dir)]
    assert next_command(run, TOOLS) == train
    # train.py itself takes the newest intact one, which may be one that a stop has saved, and starts anew without any.
    write_checkpoint(run, 1).rename(run.work_dir / 'iter_7.pth')
    assert next_command(run, TOOLS) == [*train, '--resume', 'auto']
    write_checkpoint(run, 2, intact=False)
    assert next_command(run, TOOLS) == [*train, '--resume', 'auto'], 'cut off: not the end of the training'


def test_checkpoints_are_ordered_by_number(tmp_path):
    run = AblationRun('some', Config(dict(train_cfg=dict(max_epochs=24))), tmp_path)
    for epoch in (10, 8, 9):
        write_checkpoint(run, epoch)
    assert run.checkpoint().name == 'epoch_10.pth'


def test_checkpoints_may_count_iterations_in_a_training_of_epochs(run):
    write_checkpoint(run, 1)
    for name in ('iter_90', 'iter_100'):
        shutil.copy(run.work_dir / 'epoch_1.pth', run.work_dir / f'{name}.pth')
    assert run.checkpoint().name == 'epoch_1.pth'
    (run.work_dir / 'epoch_1.pth').unlink()
    assert run.checkpoint().name == 'iter_100.pth'


def test_killed_in_the_last_validation_only_validates(run):
    final = write_checkpoint(run, 2)
    command = next_command(run, TOOLS)
    assert command[1].endswith('test.py') and command[3] == str(final)
    cfg = Config.fromfile(command[2])
    assert (cfg.test_dataloader, cfg.test_evaluator) == (cfg.val_dataloader, cfg.val_evaluator)
    result = run.validation_dir / '20260101_000000/20260101_000000.json'
    result.parent.mkdir(parents=True)
    result.write_text(json.dumps({'coco/bbox_mAP': 0.3, 'time': 0.1}))
    assert run.metrics() == {'coco/bbox_mAP': 0.3}


def test_changed_settings_are_refused(run):
    record_settings(run)
    run.cfg.train_cfg.max_epochs = 3
    record_settings(run)  # nothing was trained: free to change
    run.work_dir.mkdir()
    record_settings(run)
    run.cfg.train_cfg.max_epochs = 4
    with pytest.raises(UserError, match=r'(?s)other settings.*-.*3.*\+.*4.*another --work-dir; or delete'):
        record_settings(run)
    run.config.unlink()
    with pytest.raises(UserError, match='unknown settings'):
        record_settings(run)


def test_one_ablation_a_folder(tmp_path):
    with _locked(tmp_path), pytest.raises(UserError, match='wait for it, or stop it'), _locked(tmp_path):
        pass
    with _locked(tmp_path):
        pass


def test_bases(tmp_path):
    base = str(ROOT / 'configs/faster_rcnn_r50_cbam.py')
    (run,) = load_runs(
        [str(ABLATION / 'channel_max.py')], tmp_path, base, '/elsewhere', cfg_options={'train_cfg.max_epochs': 3}
    )
    expected = dict(type='CBAM', reduction=16, gate='unit', pools=('max',), spatial=None)
    assert run.cfg.model.backbone.plugins[0].cfg == expected
    assert run.cfg.train_dataloader.dataset.data_root == '/elsewhere/'
    assert run.last_step == ('epoch', 3)
    (run,) = load_runs([str(ABLATION / 'channel_max.py')], tmp_path)
    assert run.cfg.model.backbone.plugins[0].cfg.reduction == 4, 'the base is forgotten'
    with pytest.raises(UserError, match='a base of its own'):
        load_runs([DEMO], tmp_path, base)
    with pytest.raises(UserError, match='must be a CBAM'):
        load_runs([str(ABLATION / 'plain.py')], tmp_path, base.replace('_cbam', ''))


def test_two_configs_of_one_name_are_refused(tmp_path):
    with pytest.raises(UserError, match='two configs are called plain'):
        load_runs([str(ABLATION / 'plain.py')] * 2, tmp_path)


def test_table():
    metrics = {
        'a': {'coco/bbox_mAP': 0.25, 'coco/bbox_mAP_50': 0.5, 'coco/bbox_mAP_s': 0.125},
        'b': {},  # detected nothing
    }
    costs = {
        'a': Cost(1_234_567, 2_500_000_000, (800, 1344), 12.345),
        'b': Cost(1_000_000, None, (64, 64), 100.0),
    }
    assert markdown(['a', 'b', 'c'], metrics, costs).splitlines() == [
        '| config | bbox_mAP | bbox_mAP_50 | parameters (M) | FLOPs (G) | images/s | input |',
        '| --- | ---: | ---: | ---: | ---: | ---: | ---: |',
        '| a | 0.250 | 0.500 | 1.235 | 2.500 | 12.3 | 800x1344 |',
        '| b | - | - | 1.000 | - | 100.0 | 64x64 |',
        '| c | failed | - | - | - | - | - |',
    ]
    rows = list(csv.DictReader(as_csv(['a', 'b', 'c'], metrics, costs).splitlines()))
    assert [row['config'] for row in rows] == ['a', 'b', 'c']
    assert float(rows[0]['coco/bbox_mAP_s']) == 0.125
    assert (rows[0]['parameters'], rows[0]['flops'], rows[1]['flops']) == ('1234567', '2500000000', '')
    assert set(rows[2].values()) == {'c', ''}
    voc = {'a': {'pascal_voc/mAP': 0.7, 'pascal_voc/AP50': 0.7}}
    assert '| config | mAP | parameters' in markdown(['a'], voc, costs)
    other = {'a': {'lvis/bbox_AP': 0.7, 'lvis/bbox_APr': 0.6}}
    assert '| config | bbox_AP | bbox_APr | parameters' in markdown(['a'], other, costs)


class TinyNet(nn.Module):
    """What stands in for a detector, with a count that is done by hand."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 5, padding=2, groups=8)
        self.fc = nn.Linear(8, 10)

    def forward(self, image, samples, mode):
        return self.fc(self.depthwise(self.conv(image)).relu().mean((2, 3)))


def test_multiply_adds_of_a_net_counted_by_hand():
    count = multiply_adds(TinyNet().eval(), torch.zeros(1, 3, 32, 48), [])
    assert count == 16 * 24 * (8 * 3 * 9) + 16 * 24 * (8 * 25) + 8 * 10


@pytest.mark.parametrize('height, width', [(64, 64), (96, 128)])
def test_cbams_share_of_the_multiply_adds(height, width):
    """Per block: K pools through C -> C/r -> C, a k x k convolution of 2 planes, and a BatchNorm of 2 a pixel."""
    cfg = Config.fromfile(DEMO)
    init_default_scope('mmdet')
    counts = []
    for plugins in (cfg.model.backbone.plugins, None):
        model = ConfigDict(cfg.model, backbone=ConfigDict(cfg.model.backbone, plugins=plugins))
        detector = MODELS.build(model).eval()
        sample = DetDataSample(metainfo=dict(img_shape=(height, width), batch_input_shape=(height, width)))
        counts.append(multiply_adds(detector, torch.randn(1, 3, height, width), [sample]))
    share, stride = 0, 4
    for blocks, channels in ((3, 64), (4, 128), (6, 256), (3, 512)):
        pixels = (height // stride) * (width // stride)
        share += blocks * (2 * 2 * channels * channels // 4 + pixels * 2 * 49 + pixels * 2)
        stride *= 2
    assert counts[0] - counts[1] == share


def test_multiply_adds_do_not_depend_on_the_proposals_found():
    cfg = Config.fromfile(DEMO)
    init_default_scope('mmdet')
    detector = MODELS.build(cfg.model).eval()
    usual = detector.rpn_head.test_cfg
    sample = DetDataSample(metainfo=dict(img_shape=(64, 64), batch_input_shape=(64, 64)))
    counts = {multiply_adds(detector, torch.randn(1, 3, 64, 64) * scale, [sample]) for scale in (0, 1, 100)}
    assert len(counts) == 1
    assert detector.rpn_head.test_cfg is usual


def test_speed_is_the_median_of_rounds_that_take_turns(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr('cbam_mmdet.apis.ablate.time.perf_counter', lambda: clock[0])

    def detector(name, *seconds):
        durations = iter((100, 100, *seconds))  # the first two warm up

        def forward():
            calls.append(name)
            clock[0] += next(durations)

        return forward

    speeds = interleaved_speeds({'a': detector('a', 2, 9, 1), 'b': detector('b', 4, 4, 8)}, rounds=3)
    assert speeds == {'a': 1 / 2, 'b': 1 / 4}
    assert calls == ['a', 'b'] * 5


class Ablation:
    """tools/ablate.py as a process of its own, beside a stand-in for train.py that takes no time."""

    def __init__(self, folder, trained, shapes):
        self.work_dir, self.tools, self.shapes = folder / 'work', folder / 'tools', shapes
        self.tools.mkdir()
        for name in ('ablate.py', 'arguments.py'):
            shutil.copy(TOOLS / name, self.tools)
        (self.tools / 'train.py').write_text(STAND_IN)
        self.environment = dict(os.environ, WEIGHTS=str(trained / 'epoch_1.pth'))
        self.configs = [folder / f'{name}.py' for name in ('first', 'second', 'third')]
        for config in self.configs:
            config.write_text(f'_base_ = {DEMO!r}\n')
        self.command = [sys.executable, self.tools / 'ablate.py', *self.configs, '--rounds', '1']
        self.options = tiny(self.work_dir, shapes, 'train_cfg.max_epochs=2')

    def start(self, *flags, **environment):
        return subprocess.Popen(
            list(map(str, [*self.command, *flags, *self.options])), env=self.environment | environment,
            start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            # A script's background job ignores Ctrl-C, and so would all its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def start_until_it_hangs(self, name):
        process = self.start(HANGS=name)
        mark = self.work_dir / name / 'hangs'
        deadline = time.monotonic() + 120
        while not (mark.is_file() and mark.read_text()):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.05)
        return process, int(mark.read_text())

    def rows(self):
        with open(self.work_dir / 'ablation.csv') as file:
            return list(csv.DictReader(file))


@pytest.fixture
def ablation(tmp_path, trained, shapes):
    return Ablation(tmp_path, trained, shapes)


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob('*')}


@pytest.mark.slow
def test_killed_in_the_second_run_it_resumes_there(ablation):
    process, _ = ablation.start_until_it_hangs('second')
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = files_of(ablation.work_dir / 'first')
    assert not (ablation.work_dir / 'third').exists()

    out, err = ablation.start('--print-commands').communicate(timeout=120)
    train, work_dir = [sys.executable, f'{ablation.tools}/train.py'], ablation.work_dir
    assert list(map(shlex.split, out.splitlines())) == [  # nothing but commands, and only those that are left
        [*train, f'{work_dir}/configs/second.py', '--work-dir', f'{work_dir}/second', '--resume', 'auto'],
        [*train, f'{work_dir}/configs/third.py', '--work-dir', f'{work_dir}/third'],
    ], err
    assert not (work_dir / 'third').exists()

    process = ablation.start()
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert files_of(ablation.work_dir / 'first') == before, 'the first is not touched again'
    assert {p.name for p in (ablation.work_dir / 'second').iterdir() if p.is_dir()} == {'first', 'resumed'}
    assert {p.name for p in (ablation.work_dir / 'third').iterdir() if p.is_dir()} == {'first'}
    rows = ablation.rows()
    assert [row['config'] for row in rows] == ['first', 'second', 'third']
    weights = torch.load(ablation.environment['WEIGHTS'], weights_only=False)['state_dict']
    buffers = ('running_mean', 'running_var', 'num_batches_tracked')
    parameters = sum(value.numel() for key, value in weights.items() if not key.endswith(buffers))
    for row in rows:
        assert float(row['coco/bbox_mAP']) == 0.2
        assert int(row['parameters']) == parameters
        assert int(row['flops']) > 0 and float(row['images_per_second']) > 0
    assert all(f'| {name} | 0.200 |' in out for name in ('first', 'second', 'third'))
    assert (ablation.work_dir / 'ablation.md').read_text() in out


def test_ctrl_c_stops_the_training_too(ablation):
    process, child = ablation.start_until_it_hangs('first')
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 130
    assert err.strip().endswith('interrupted')
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_a_failure_is_named_and_the_others_are_trained(ablation, monkeypatch, capfd):
    monkeypatch.setenv('FAILS', 'second')
    monkeypatch.setenv('WEIGHTS', ablation.environment['WEIGHTS'])
    forget_earlier_runs()
    options = {**SMALL, 'train_cfg.max_epochs': 2}
    arguments = dict(data_root=str(ablation.shapes), cfg_options=options, rounds=1)
    assert ablate(list(map(str, ablation.configs)), str(ablation.work_dir), ablation.tools, **arguments) == 1
    out, err = capfd.readouterr()
    log = ablation.work_dir / 'second/ablation.log'
    assert f'1 of 3 configs failed:\nsecond: exit code 1: error: something is amiss\n    log: {log}' in err
    assert '| second | failed | -' in out
    assert [row['coco/bbox_mAP'] for row in ablation.rows()] == ['0.2', '', '0.2']

    # A work dir holds a checkpoint of which the ablation knows nothing: it is loaded to measure the speed.
    checkpoint, mark = max((ablation.work_dir / 'first').glob('*.pth')), ablation.work_dir / 'code_ran'
    torch.save(dict(torch.load(checkpoint, weights_only=False), extra=WritesAFile(mark)), checkpoint)
    with pytest.raises(UserError, match='holds more than tensors and plain data'):
        ablate(list(map(str, ablation.configs)), str(ablation.work_dir), ablation.tools, **arguments)
    assert not mark.exists()


@pytest.mark.slow
def test_real_training_killed_and_finished(shapes, tmp_path):
    """As above, with tools/train.py itself and configs of configs/ablation/."""
    names = ('plain', 'channel_avg', 'cbam')
    options = tiny(tmp_path, shapes, 'train_cfg.max_epochs=4', 'default_hooks.checkpoint.interval=1')
    command = [sys.executable, TOOLS / 'ablate.py', *(ABLATION / f'{n}.py' for n in names), '--rounds', '2', *options]
    command = list(map(str, command))
    process = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 300
    while not (tmp_path / 'channel_avg/epoch_2.pth').is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = files_of(tmp_path / 'plain')
    assert (tmp_path / 'plain/epoch_4.pth') in before

    assert subprocess.run(command, timeout=500).returncode == 0
    assert files_of(tmp_path / 'plain') == before
    logs = sorted((tmp_path / 'channel_avg').glob('*/*.log'))
    assert len(logs) == 2
    assert 'resumed epoch: ' in logs[1].read_text()
    with open(tmp_path / 'ablation.csv') as file:
        rows = list(csv.DictReader(file))
    assert [row['config'] for row in rows] == list(names)
    for row in rows:
        scalars = [
            p.read_text().splitlines() for p in sorted((tmp_path / row['config']).glob('*/vis_data/scalars.json'))
        ]
        assert float(row['coco/bbox_mAP']) == json.loads(scalars[-1][-1])['coco/bbox_mAP']
    parameters = {row['config']: int(row['parameters']) for row in rows}
    # SE's two linear layers with biases, and the spatial convolution of 98 weights with its BatchNorm of 2, a block.
    se = sum(n * (2 * c * (c // 4) + c // 4 + c) for n, c in ((3, 16), (4, 32), (6, 64), (3, 128)))
    assert parameters['channel_avg'] - parameters['plain'] == se
    assert parameters['cbam'] - parameters['channel_avg'] == 16 * (98 + 2)
