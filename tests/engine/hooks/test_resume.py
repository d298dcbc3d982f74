"""A run that was stopped anywhere and taken up again gives the losses of one that was not, iteration by iteration."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import DEMO, FORKS, ROOT, in_a_fork, run_in_this_process, tiny
from mmengine.runner import EpochBasedTrainLoop
from torch.utils.data import DataLoader

from cbam_mmdet.engine.checkpoint.loading import load_checkpoint
from cbam_mmdet.engine.hooks import resume_exactly as resume
from cbam_mmdet.engine.hooks import stop_signal
from cbam_mmdet.engine.hooks.resume_exactly import PlacedBatches, PlacedImages
from cbam_mmdet.engine.hooks.stop_signal import StopSignalHook
from cbam_mmdet.engine.scalars import is_validation, metrics_of, scalar_logs
from cbam_mmdet.errors import Stopped

EPOCHS, ITERATIONS = 3, 4  # of an epoch: 8 images in batches of 2

# A hook that sends this process a signal in the middle of a training, where a real one would come from outside.
HOOK = """
import os
import signal
import subprocess
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module(force=True)
class SignalHook(Hook):
    priority = 'LOWEST'  # after the checkpoint

    def __init__(self, at, number, rank=None):
        self.at, self.number, self.rank = at, number, rank

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter + 1 == self.at and self.rank is not None:
            if int(os.environ['RANK']) == self.rank:
                os.kill(os.getpid(), self.number)
        elif runner.iter + 1 == self.at and self.number != signal.SIGKILL:
            # As Slurm and torchrun do: from outside, to all processes of the group, workers among them, and again.
            kill = f'kill -{int(self.number)} -{os.getpgid(0)}'
            subprocess.run(['sh', '-c', f'{kill}; {kill}'], start_new_session=True)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.at and self.number == signal.SIGKILL:
            os.kill(os.getpid(), self.number)
"""


# A signal in the middle of the validation of an epoch, in which the model has the weights of the EMA.
IN_VALIDATION = """
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
import os, signal

@HOOKS.register_module(force=True)
class StopInValidationHook(Hook):
    def __init__(self, number=signal.SIGTERM):
        self.number = number

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        os.kill(os.getpid(), self.number)
"""

# A loop of iterations, as MMEngine recommends it: it is taken up again by telling the sampler to skip.
BY_ITERATION = f"""
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters={EPOCHS * ITERATIONS}, val_interval=8)
train_dataloader = dict(sampler=dict(type='InfiniteSampler'), batch_sampler=None, dataset=dict(pipeline=train_pipeline))
log_processor = dict(by_epoch=False)
"""


def config(folder, custom_hooks='[]', more=''):
    """The demo with photometric and geometric randomness and an EMA, logging every loss and saving by iteration."""
    (folder / 'signal_hook.py').write_text(HOOK + IN_VALIDATION)
    path = folder / 'resumable.py'
    path.write_text(
        f"_base_ = '{DEMO}'\n"
        "custom_imports = dict(imports=['cbam_mmdet', 'signal_hook'])\n"
        f"custom_hooks = [dict(type='EMAHook', momentum=0.1)] + {custom_hooks}\n"
        'before, after = _base_.train_pipeline[:2], _base_.train_pipeline[2:]\n'
        'train_pipeline = [*before, dict(type="PhotoMetricDistortion"), *after]\n'
        'train_dataloader = dict(dataset=dict(pipeline=train_pipeline))\n'
        'default_hooks = dict(logger=dict(interval=1), checkpoint=dict(by_epoch=False, interval=1, max_keep_ckpts=2))\n'
        'log_processor = dict(window_size=1)\n'
        'randomness = dict(_delete_=True)\n' + more
    )
    return path


def losses(work_dir):
    """Iteration -> every loss, from what the run wrote; a later line of an iteration counts."""
    found = {}
    for path in sorted(Path(work_dir).glob('*/vis_data/scalars.json'), key=lambda p: p.stat().st_mtime):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if 'loss' in row:
                found[row['step']] = {
                    key: value for key, value in row.items() if 'loss' in key or key in ('lr', 'acc', 'grad_norm')
                }
    return found


def train_with(run_tool, work_dir, shapes, epochs, batch_size, *resume):
    """Train the demo; what was printed, and epoch -> how many of its batches were trained."""
    options = tiny(
        work_dir, shapes, f'train_cfg.max_epochs={epochs}', f'train_dataloader.batch_size={batch_size}',
        'train_cfg.val_interval=100', 'default_hooks.logger.interval=1', 'default_hooks.checkpoint.by_epoch=False',
        'default_hooks.checkpoint.interval=1', 'default_hooks.checkpoint.max_keep_ckpts=-1',
    )  # fmt: skip
    result = run_tool('train.py', DEMO, *resume, *options)
    assert result.code == 0, result.err[-2000:]
    printed = result.out + result.err
    return printed, Counter(int(epoch) for epoch in re.findall(r'Epoch\(train\) +\[(\d+)\]', printed))


@pytest.mark.parametrize(
    'iteration, batch_size, expected',
    [(8, 8, {3: 1}), pytest.param(6, 1, {2: 4, 3: 8}, marks=pytest.mark.slow)],
    ids=['epoch done', 'half an epoch done'],
)
def test_resumed_with_another_batch_size(run_tool, shapes, tmp_path, iteration, batch_size, expected):
    """No epoch is lost and none begins anew, neither by the first resume nor by the one after it."""
    _, first = train_with(run_tool, tmp_path, shapes, 2, 2)
    assert first == {1: 4, 2: 4}
    checkpoint = tmp_path / f'iter_{iteration}.pth'
    printed, second = train_with(run_tool, tmp_path, shapes, 3, batch_size, '--resume', checkpoint)
    assert f'an epoch had 4 batches, and now has {8 // batch_size}' in printed
    assert second == expected
    printed, third = train_with(run_tool, tmp_path, shapes, 4, batch_size, '--resume')
    assert 'an epoch had' not in printed
    assert third == {4: 8 // batch_size}


def test_resumed_from_a_checkpoint_that_does_not_say_where_in_its_epoch(logged_by_print):
    def skipped(iterations, epoch, length):
        runner = SimpleNamespace(
            train_dataloader=DataLoader(range(length)), train_loop=Mock(spec=EpochBasedTrainLoop), seed=0,
            iter=iterations, epoch=epoch,
        )  # fmt: skip
        hook = resume.ResumeExactlyHook()
        hook.before_train(runner)
        return hook.batches.skip

    assert skipped(10, 4, 2) == 2  # MMEngine's own, by iteration
    assert skipped(8, 4, 2) == 0
    assert not any('trained from its start' in message for message in logged_by_print)
    for length in (1, 3):
        assert skipped(10, 4, length) == 0
        assert 'trained from its start' in logged_by_print[-1]


class Infos(list):
    """A data set of these images."""

    def get_data_info(self, index):
        return self[index]


def test_resumed_with_other_images(logged_by_print):
    def say(before, now):
        logged_by_print.clear()
        loop = Mock(spec=EpochBasedTrainLoop)
        runner = SimpleNamespace(train_dataloader=DataLoader(before), train_loop=loop, seed=0, iter=0, epoch=0)
        first, second = resume.ResumeExactlyHook(), resume.ResumeExactlyHook()
        first.before_train(runner)
        checkpoint = dict(meta=dict(iter=len(before), epoch=1))
        runner.optim_wrapper = None
        first.before_save_checkpoint(runner, checkpoint)
        second.after_load_checkpoint(runner, checkpoint)
        runner.train_dataloader, runner.iter, runner.epoch = DataLoader(now), len(before), 1
        second.before_train(runner)
        return any('images are not those of the checkpoint' in message for message in logged_by_print)

    def images(*names, folder='a', boxes=1):
        instances = [dict(bbox_label=0, bbox=[0, 0, 9, 8 + i]) for i in range(boxes)]
        return Infos(dict(img_path=f'{folder}/{name}', instances=instances) for name in names)

    before = images('1.jpg', '2.jpg')
    assert not say(before, images('1.jpg', '2.jpg', folder='moved'))
    for other in (images('1.jpg', '3.jpg'), images('2.jpg', '1.jpg'), images('1.jpg', '2.jpg', boxes=2)):
        assert say(before, other)
    corrected = copy.deepcopy(before)
    corrected[1]['instances'][0]['bbox'][0] = 1
    assert say(before, corrected)


@pytest.mark.parametrize('checkpoint', [{}, dict(meta=None), dict(meta=['of', 'others'])])
def test_weights_of_no_run_say_nothing_of_an_epoch(checkpoint):
    hook = resume.ResumeExactlyHook()
    hook.after_load_checkpoint(None, checkpoint)
    assert hook.resumed is None


@pytest.fixture
def logged_by_print(monkeypatch):
    messages = []
    monkeypatch.setattr(resume, 'print_log', lambda message, **_: messages.append(message))
    return messages


@pytest.fixture(scope='module')
def finished(shapes, tmp_path_factory):
    """The folder of a training that was not stopped, whose workers stay."""
    folder = tmp_path_factory.mktemp('uninterrupted')
    assert start(folder, shapes, workers=2, persistent=True).wait(timeout=300) == 0, (folder / 'log').read_text()[
        -2000:
    ]
    return folder


@pytest.fixture
def uninterrupted(finished):
    curve = losses(finished / 'work')
    assert sorted(curve) == list(range(1, EPOCHS * ITERATIONS + 1))
    return curve, load_checkpoint(finished / f'work/iter_{EPOCHS * ITERATIONS}.pth')


def test_training_with_workers_that_stay_ends(finished):
    """The workers of persistent_workers=True are ended by SIGTERM when the program ends, and must heed it."""
    assert 'Traceback' not in (finished / 'log').read_text()


def start(
    folder, shapes, custom_hooks='[]', seed=7, workers=0, resume=(), persistent=False, processes=1, more='',
    epochs=True, fresh=True,
):  # fmt: skip
    """Start a training, whose exit code `wait` gives.

    Args:
        more: text for the config; `epochs` tells whether its loop counts them.
        fresh: a new Python; else one that begins with the package imported.
    """
    chosen = [f'train_dataloader.num_workers={workers}', f'train_dataloader.persistent_workers={persistent}']
    chosen += [f'train_dataloader.batch_size={2 // processes}']
    chosen += [f'randomness.seed={seed}'] if seed is not None else []
    schedule = {'train_cfg.max_epochs': EPOCHS, 'train_cfg.val_interval': 2} if epochs else {}
    arguments = [*resume, *tiny(folder / 'work', shapes, *chosen, schedule=schedule)]
    path = config(folder, custom_hooks, more)
    if not fresh:
        return Fork(folder, [path, *arguments])
    tool = ['bash', ROOT / 'tools/dist_train.sh', path, processes]
    if processes == 1:
        tool = [sys.executable, ROOT / 'tools/train.py', path]
    environment = dict(os.environ, PYTHONPATH=f'{ROOT}{os.pathsep}{folder}', OMP_NUM_THREADS='1', PYTHON=sys.executable)
    with (folder / 'log').open('ab') as log:
        return subprocess.Popen(
            [*map(str, tool), *map(str, arguments)], stdout=log, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip


class Fork:
    """tools/train.py in a process that begins with the package imported."""

    def __init__(self, folder, arguments):
        self.process = FORKS.Process(target=in_a_fork, args=(train_in_a_fork, folder, arguments))
        self.process.start()

    def wait(self, timeout):
        self.process.join(timeout)
        return self.process.exitcode


def train_in_a_fork(folder, arguments):
    os.setsid()
    with (folder / 'log').open('ab') as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    sys.path.insert(0, str(folder))
    torch.set_num_threads(1)
    sys.exit(run_in_this_process('train.py', *arguments))


def assert_same(work_dir, uninterrupted):
    curve, checkpoint = uninterrupted
    actual = losses(work_dir)
    assert sorted(actual) == sorted(curve)
    for iteration, values in curve.items():
        assert actual[iteration] == values, f'iteration {iteration}'
    last = load_checkpoint(Path(work_dir) / f'iter_{EPOCHS * ITERATIONS}.pth')
    for part in ('state_dict', 'ema_state_dict'):
        assert checkpoint[part]
        assert all(torch.equal(last[part][key], value) for key, value in checkpoint[part].items())


@pytest.mark.parametrize(
    ('at', 'number', 'workers'),
    [
        pytest.param(ITERATIONS + 1, signal.SIGKILL, 0, marks=pytest.mark.slow),  # an epoch's first iteration
        (ITERATIONS + 2, signal.SIGKILL, 1),  # its middle, with another number of workers than the run without a stop
        pytest.param(2 * ITERATIONS, signal.SIGKILL, 0, marks=pytest.mark.slow),  # its end, before the validation
        pytest.param(ITERATIONS + 3, signal.SIGTERM, 2, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGINT, 2, marks=pytest.mark.slow),
    ],
)
def test_stopped_and_resumed_equals_uninterrupted(uninterrupted, shapes, tmp_path, at, number, workers):
    hook = f"[dict(type='SignalHook', at={at}, number={int(number)})]"
    code = start(tmp_path, shapes, hook, workers=workers, fresh=number != signal.SIGKILL).wait(timeout=300)
    log = (tmp_path / 'log').read_text()
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL, log[-2000:]
    else:
        assert code == 128 + number, log[-2000:]
        assert f'stopped by {number.name}' in log and 'Traceback' not in log
    assert max(losses(tmp_path / 'work')) <= at + 1
    # The second time the hook is not there; the seed is that of the checkpoint, whether another is given or none.
    again = start(tmp_path, shapes, resume=['--resume'], seed=9 if workers else None, fresh=False)
    assert again.wait(timeout=300) == 0, (tmp_path / 'log').read_text()[-2000:]
    assert_same(tmp_path / 'work', uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('number', 'how'),
    [
        (signal.SIGKILL, dict(more=BY_ITERATION, epochs=False, workers=2)),
        (signal.SIGTERM, dict(more=BY_ITERATION, epochs=False)),
        (signal.SIGKILL, dict(processes=2)),
        (signal.SIGTERM, dict(processes=2, workers=2)),
        # Finite samplers too, whose batches are drawn once more to pass over them.
        (
            signal.SIGKILL,
            dict(
                more=BY_ITERATION.replace("type='InfiniteSampler'), batch_sampler=None", "type='DefaultSampler')"),
                epochs=False,
            ),
        ),
        # Gradients of three iterations are one step: it stops after the one that is begun.
        (signal.SIGTERM, dict(more='optim_wrapper = dict(accumulative_counts=3)\n')),
    ],
)
def test_loops_of_iterations_and_several_processes(shapes, tmp_path, number, how):
    for name in ('whole', 'stopped'):
        (tmp_path / name).mkdir()
    assert start(tmp_path / 'whole', shapes, **how).wait(timeout=300) == 0, (tmp_path / 'whole/log').read_text()[-2000:]
    last = load_checkpoint(tmp_path / f'whole/work/iter_{EPOCHS * ITERATIONS}.pth')
    hook = f"[dict(type='SignalHook', at=5, number={int(number)})]"
    code = start(tmp_path / 'stopped', shapes, hook, **how).wait(timeout=300)
    log = (tmp_path / 'stopped/log').read_text()
    assert code not in (0, 1, 2), log[-2000:]
    if number == signal.SIGTERM:
        assert code == 143 and 'stopped by SIGTERM' in log and 'Traceback' not in log, log[-2000:]
    assert max(losses(tmp_path / 'stopped/work')) < EPOCHS * ITERATIONS
    assert start(tmp_path / 'stopped', shapes, resume=['--resume'], seed=None, **how).wait(timeout=300) == 0, (
        tmp_path / 'stopped/log'
    ).read_text()[-2000:]
    assert_same(tmp_path / 'stopped/work', (losses(tmp_path / 'whole/work'), last))


@pytest.mark.slow
def test_stopped_in_a_validation(uninterrupted, shapes, tmp_path):
    code = start(tmp_path, shapes, "[dict(type='StopInValidationHook')]").wait(timeout=300)
    assert code == 143, (tmp_path / 'log').read_text()[-2000:]
    assert max(losses(tmp_path / 'work')) == 2 * ITERATIONS
    assert start(tmp_path, shapes, resume=['--resume']).wait(timeout=300) == 0
    assert_same(tmp_path / 'work', uninterrupted)


SAVE_BEST = """
checkpoint = dict(by_epoch={by_epoch}, interval={interval}, save_best='coco/bbox_mAP', max_keep_ckpts=-1)
default_hooks = dict(checkpoint=checkpoint, logger=dict(log_metric_by_epoch={by_epoch}))
"""


@pytest.mark.parametrize(
    ('number', 'loop'),
    [
        (signal.SIGKILL, {}),
        pytest.param(signal.SIGTERM, {}, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, dict(more=BY_ITERATION, epochs=False), marks=pytest.mark.slow),
    ],
)
def test_a_validation_that_was_not_finished_is_made_up_for(shapes, tmp_path, number, loop):
    """MMEngine goes on with the next epoch: without scores of this one, and without its claim to be the best."""
    loop = loop | dict(
        more=loop.get('more', '') + SAVE_BEST.format(by_epoch=not loop, interval=4 if loop else 1), fresh=False
    )
    for name in ('whole', 'stopped'):
        (tmp_path / name).mkdir()
    assert start(tmp_path / 'whole', shapes, **loop).wait(timeout=300) == 0, (tmp_path / 'whole/log').read_text()[
        -2000:
    ]
    hook = f"[dict(type='StopInValidationHook', number={int(number)})]"
    code = start(tmp_path / 'stopped', shapes, hook, **loop).wait(timeout=300)
    assert code in (-number, 128 + number), (tmp_path / 'stopped/log').read_text()[-2000:]
    assert not validations(tmp_path / 'stopped/work')
    assert start(tmp_path / 'stopped', shapes, resume=['--resume'], **loop).wait(timeout=300) == 0
    assert 'are in the logs: it is validated first' in (tmp_path / 'stopped/log').read_text()
    scores, best = (
        [read(tmp_path / name / 'work') for name in ('stopped', 'whole')] for read in (validations, best_checkpoints)
    )
    assert scores[0] == scores[1] and len(scores[1]) == 2
    assert best[0] == best[1] and len(best[1]) == 1
    # Nothing is missing now, so nothing is repeated.
    assert start(tmp_path / 'stopped', shapes, resume=['--resume'], **loop).wait(timeout=300) == 0
    assert (tmp_path / 'stopped/log').read_text().count('it is validated first') == 1


def validations(work_dir):
    """Step -> the scores of its validation."""
    return {
        row['step']: metrics_of(row) for _, rows in scalar_logs(work_dir) for row in rows if is_validation(row)
    }  # fmt: skip


def best_checkpoints(work_dir):
    return sorted(path.name for path in Path(work_dir).glob('best_*'))


@pytest.mark.slow
def test_one_of_two_processes_is_told_to_stop(shapes, tmp_path):
    """And the first one writes the checkpoint slowly: the other must wait."""
    slow = (
        'import mmengine.runner.runner as r, time\n'
        'save = r.Runner.save_checkpoint\n'
        'def slowly(*args, **kwargs):\n'
        '    time.sleep(4)\n'
        '    return save(*args, **kwargs)\n'
        'r.Runner.save_checkpoint = slowly\n'
    )
    (tmp_path / 'slow_saving.py').write_text(slow)
    hook = f"[dict(type='SignalHook', at=5, number={int(signal.SIGTERM)}, rank=1)]"
    more = (
        "custom_imports = dict(imports=['cbam_mmdet', 'signal_hook', 'slow_saving'])\n"
        'default_hooks = dict(checkpoint=dict(by_epoch=False, interval=100), logger=dict(interval=1))\n'
    )
    code = start(tmp_path, shapes, hook, processes=2, more=more).wait(timeout=300)
    log = (tmp_path / 'log').read_text()
    assert code == 143 and 'iter_10.pth is saved' in log, log[-2000:]
    assert load_checkpoint(tmp_path / 'work/iter_10.pth')['meta']['iter'] == 10
    assert not list((tmp_path / 'work').glob('.*.unfinished'))


def test_a_signal_is_not_lost_while_the_processes_agree(monkeypatch, tmp_path):
    """It comes after this process has said that it has none, before it knows what the others say."""
    hook, saved = StopSignalHook(interval=1), []
    runner = SimpleNamespace(
        model=torch.nn.Linear(1, 1), optim_wrapper=None, train_loop=None, val_loop=None, hooks=[],
        work_dir=str(tmp_path), epoch=0, iter=0, save_checkpoint=lambda *args, **_: saved.append(args),
    )  # fmt: skip
    monkeypatch.setattr(stop_signal, 'get_world_size', lambda: 2)
    monkeypatch.setattr(stop_signal, 'all_reduce', lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    hook.before_train(runner)
    try:
        assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, None), 'it would end the tests'
        hook.after_train_iter(runner, 0)
        assert not saved
        monkeypatch.setattr(stop_signal, 'all_reduce', lambda *_: None)
        with pytest.raises(Stopped) as stop:
            hook.after_train_iter(runner, 1)
    finally:
        hook.restore()
    assert saved and stop.value.code == 128 + signal.SIGTERM


class Numbers:
    """A data set of what its transforms would draw."""

    metainfo = dict(classes=('a',))

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return index, float(torch.rand(())), float(np.random.rand())


def draw(workers, epochs, skip=0, seed=3):
    loader = DataLoader(Numbers(), batch_size=2, num_workers=workers)
    batches = PlacedBatches(loader.batch_sampler, seed, 0)
    batches.epoch, batches.skip = epochs.start, skip
    vars(loader).update(batch_sampler=batches, dataset=PlacedImages(loader.dataset))
    return [tuple(map(float, numbers)) for _ in epochs for batch in loader for numbers in zip(*batch, strict=True)]


def test_random_numbers_belong_to_the_place_of_an_image():
    whole = draw(0, range(3))
    assert len(set(whole)) == len(whole) == 18, 'no two images, and no image twice, draw the same'
    assert draw(2, range(3)) == whole
    assert draw(0, range(1, 3)) == whole[6:]
    assert draw(2, range(1, 3), skip=2) == whole[10:]
    assert draw(0, range(3), seed=4) != whole


def test_the_wrapped_data_set_is_used_as_if_it_were_not():
    wrapped = PlacedImages(Numbers())
    assert wrapped.metainfo == Numbers.metainfo and len(wrapped) == 6
    wrapped.pipeline = 'another'
    assert wrapped.placed.pipeline == 'another'
    with pytest.raises(AttributeError):
        wrapped.nothing  # noqa: B018
