"""Kill trainings and other tools with SIGKILL again and again, and report what was lost.

    python benchmarks/faults.py [--kills 200] [--out benchmarks/results/faults.json]

65 % of the kills hit a training in one process, 15 % one in two processes, 20 % a report, a test, the insertion of CBAM
or detection on images. The demo's detector, made small, saves every INTERVAL iterations. Each life of a training ends
at a random moment: while it starts, trains, validates, or writes a checkpoint. The same command starts the next life.
After each death the newest checkpoint must load, be at most one interval behind the last iteration that was logged, and
be the one that the next life resumes from. At the end the losses, the scores of all validations, the best checkpoint
and the weights must be those of a run that nobody killed, bit for bit. What another tool writes must be whole or
absent after each kill, and equal to what an undisturbed call wrote in the end. Linux only.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from record import machine

from cbam_mmdet.datasets import ensure_shapes
from cbam_mmdet.engine.checkpoint.files import newest_checkpoint
from cbam_mmdet.engine.checkpoint.loading import load_checkpoint
from cbam_mmdet.engine.run_reader import read_results
from cbam_mmdet.engine.scalars import is_training, is_validation, metrics_of, scalar_logs
from cbam_mmdet.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
INTERVAL = 5
EPOCH = 4  # iterations: 8 images in batches of 2
ENVIRONMENT = dict(os.environ, OMP_NUM_THREADS='1', PYTHON=sys.executable)
VICTIMS = ['one_process', 'two_processes', 'tools']
MARK = 'FAULTS_TRAINING'  # a variable in the environment of every process of a training
# Moments at which a life of a training ends -> how often.
MOMENTS = {'starting': 0.15, 'training': 0.3, 'validating': 0.2, 'writing a checkpoint': 0.35}


@dataclass
class Training:
    """A training that is started again and again by the same command.

    Args:
        folder: where its config, its log and its work dir are.
        epochs: of EPOCH iterations.
        processes: one, or several that torchrun starts.
        base: the name of one of the demo's configs.
    """

    folder: Path
    epochs: int
    processes: int = 1
    base: str = 'faster_rcnn_cbam'
    process: subprocess.Popen | None = None

    @property
    def work_dir(self) -> Path:
        return self.folder / 'work'

    @property
    def log(self) -> str:
        """What this life has printed."""
        return (self.folder / 'log').read_text(errors='replace').rpartition('=== life\n')[2]

    def start(self) -> None:
        self.folder.mkdir(exist_ok=True)
        config = self.folder / 'faults.py'
        if not config.exists():
            settings = '\n'.join(f'{key} = {value}' for key, value in self._settings().items())
            config.write_text(f"_base_ = '{ROOT}/configs/demo/{self.base}.py'\n{settings}\n")
        tool = [sys.executable, ROOT / 'tools/train.py', config]
        if self.processes > 1:
            tool = ['bash', ROOT / 'tools/dist_train.sh', config, self.processes]
        where = ['--work-dir', self.work_dir, '--data-root', self.folder.parent / 'shapes']
        with (self.folder / 'log').open('a') as log:
            log.write('=== life\n')
            log.flush()
            command = [str(part) for part in [*tool, *where, '--resume', 'auto']]
            marked = ENVIRONMENT | {MARK: str(self.folder)}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=marked, start_new_session=True)

    def _settings(self) -> dict:
        checkpoint = dict(by_epoch=False, interval=INTERVAL, max_keep_ckpts=2, save_best='coco/bbox_mAP')
        return dict(
            train_cfg=dict(max_epochs=self.epochs, val_interval=2),
            train_dataloader=dict(batch_size=2 // self.processes),
            model=dict(backbone=dict(base_channels=4), neck=dict(in_channels=[16, 32, 64, 128])),
            default_hooks=dict(logger=dict(interval=1), checkpoint=checkpoint, ema=dict(type='EMAHook', momentum=0.01)),
            log_processor=dict(window_size=1),
        )

    def running(self) -> bool:
        return self.process.poll() is None

    def curve(self) -> dict[int, dict[str, float]]:
        """Iteration -> losses and learning rate, of all lives. The last complete line of an iteration counts."""
        return {
            row['step']: _losses(row) for _, rows in scalar_logs(self.work_dir) for row in filter(is_training, rows)
        }

    def validations(self) -> dict[int, dict[str, float]]:
        """Epoch -> scores."""
        rows = [row for _, rows in scalar_logs(self.work_dir) for row in filter(is_validation, rows)]
        return {row['step']: metrics_of(row) for row in rows}

    def reached(self) -> int:
        return max(self.curve(), default=0)

    def best(self) -> list[str]:
        return sorted(path.name for path in self.work_dir.glob('best_*'))

    def resumed_at(self) -> int | None:
        """The iteration from which this life resumed. 0 if it started anew, None if it ended before that."""
        found = re.search(r'--resume: .* from \S*/iter_(\d+)\.pth', self.log)
        if found:
            return int(found.group(1))
        return 0 if 'Checkpoints will be saved' in self.log else None

    def end(self, moment: str, rng: random.Random) -> None:
        """Send SIGKILL at a random moment of this kind, or return as soon as the run ends by itself."""
        if moment == 'starting':
            time.sleep(rng.uniform(0, 8))
        else:
            before = self.reached()
            self._wait(lambda: self.reached() > before, 0.05)
            time.sleep(rng.uniform(0, 1.5))
        if moment == 'validating':
            seen = self.log.count('Epoch(val)')
            self._wait(lambda: self.log.count('Epoch(val)') > seen, 0.01)
            time.sleep(rng.uniform(0, 0.6))
        elif moment == 'writing a checkpoint':
            self._wait(self.writes, 0.0005)
            time.sleep(rng.uniform(0, 0.03))
        victims = self.members()
        if self.processes > 1 and rng.random() < 0.5:  # one of the processes, whom torchrun's end of the others follows
            victims = [rng.choice([pid for pid in victims if 'RANK' in _environment(pid)] or victims)]
        if self.running():
            for pid in victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait()
        # What is left of the life's processes has noticed that others are dead, and ends by itself.
        deadline = time.monotonic() + 60
        while self.members() and time.monotonic() < deadline:
            time.sleep(0.1)
        if self.members():
            raise RuntimeError(f'these processes outlived a kill: {self.members()}')

    def _wait(self, for_: Callable[[], bool], pause: float) -> None:
        while self.running() and not for_():
            time.sleep(pause)

    def writes(self) -> bool:
        return any(name.endswith('.unfinished') for name in os.listdir(self.work_dir))

    def members(self) -> list[int]:
        """The processes of this training that are alive, by a variable of their environment: torchrun's have sessions
        of their own."""
        everyone = [int(path.name) for path in Path('/proc').glob('[0-9]*')]
        return [pid for pid in everyone if _environment(pid).get(MARK) == str(self.folder)]


def _losses(row: dict) -> dict[str, float]:
    return {key: value for key, value in row.items() if 'loss' in key or key == 'lr'}


def _environment(pid: int) -> dict[str, str]:
    """The variables of a process. Empty if it is dead."""
    with contextlib.suppress(OSError):
        words = Path(f'/proc/{pid}/environ').read_bytes().decode(errors='replace').split('\0')
        return dict(word.split('=', 1) for word in words if '=' in word)
    return {}


@dataclass
class Figures:
    """What was seen of one kind of victims."""

    name: str
    kills: collections.Counter = field(default_factory=collections.Counter)
    lost: list[int] = field(default_factory=list)
    facts: dict = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def say(self, what: str) -> None:
        print(f'{self.name} {self.kills.total()}: {what}', flush=True)

    def record(self) -> dict:
        losses = {}
        if self.lost:
            mean = round(sum(self.lost) / len(self.lost), 2)
            losses = dict(most_iterations_lost=max(self.lost), mean_iterations_lost=mean)
        kills = dict(kills=self.kills.total(), killed_while=dict(self.kills))
        return dict(**kills, **losses, **self.facts, problems=self.problems)


def kill_trainings(folder: Path, name: str, kills: int, processes: int, epochs: int, rng: random.Random) -> Figures:
    """Kill a training again and again, let it end, and compare it with one that nobody killed."""
    figures = Figures(name)
    run = Training(folder / f'{name}_killed', epochs, processes)
    expected = resumed = half_written = 0
    moments = {key: share for key, share in MOMENTS.items() if processes == 1 or key != 'writing a checkpoint'}
    for life in range(kills + 1):
        run.start()
        moment = rng.choices(list(moments), list(moments.values()))[0]
        if life == kills:
            run.process.wait()
        else:
            run.end(moment, rng)
        if (run.process.returncode == 0) != (life == kills):
            raise RuntimeError(f'{name}: life {life} ended with {run.process.returncode}:\n{run.log[-3000:]}')
        at = run.resumed_at()
        resumed += at is not None
        if at not in (None, expected):
            figures.problems.append(f'life {life} resumed from {at}, the newest intact checkpoint was {expected}')
        if life == kills:
            break
        figures.kills[moment] += 1
        half_written += bool(run.work_dir.is_dir() and list(run.work_dir.glob('.*.pth.*.unfinished')))
        newest, skipped = newest_checkpoint(str(run.work_dir))
        expected = int(re.search(r'iter_(\d+)', newest).group(1)) if newest else 0
        figures.lost.append(max(run.reached() - expected, 0))
        figures.problems += [f'life {life}: {reason}' for reason in skipped]
        figures.say(f'killed while {moment}: iteration {run.reached()}, lost {figures.lost[-1]}')
    whole = Training(folder / f'{name}_unharmed', epochs, processes)
    whole.start()
    if whole.process.wait():
        raise RuntimeError(whole.log[-3000:])
    figures.facts = dict(left_a_checkpoint_half_written=half_written, resumptions_that_were_checked=resumed)
    compare(run, whole, figures)
    return figures


def compare(run: Training, whole: Training, figures: Figures) -> None:
    """Compare a training that was killed with one that was not."""
    weights = [load_checkpoint(newest_checkpoint(str(it.work_dir))[0]) for it in (run, whole)]
    epochs = whole.epochs
    figures.facts |= dict(
        processes=whole.processes,
        checkpoint_interval=INTERVAL,
        iterations=len(whole.curve()),
        losses_equal=run.curve() == whole.curve() and len(whole.curve()) == epochs * EPOCH,
        validations_equal=run.validations() == whole.validations() and len(whole.validations()) == -(-epochs // 2),
        best_checkpoint_equal=run.best() == whole.best() and len(whole.best()) == 1,
        weights_equal=all(
            torch.equal(value, weights[1][part][key])
            for part in ('state_dict', 'ema_state_dict')
            for key, value in weights[0][part].items()
        ),
    )
    figures.problems += [f'not {key}' for key, value in figures.facts.items() if value is False]
    if max(figures.lost, default=0) > INTERVAL:
        figures.problems.append('more than one interval was lost')


@dataclass
class Call:
    """A call of a tool that reads a trained detector.

    Args:
        command: what follows Python.
        out: the folder that it writes to.
        files: the patterns of what it writes there.
    """

    command: list[str | Path]
    out: Path
    files: tuple[str, ...]
    seconds: float = 0.0
    expected: dict[str, str] = field(default_factory=dict)

    def run(self) -> None:
        """Let it end, and take the time."""
        started = time.monotonic()
        done = subprocess.run(self._words(), capture_output=True, text=True, env=ENVIRONMENT)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        self.seconds = time.monotonic() - started

    def kill(self, rng: random.Random) -> None:
        """Kill it somewhere in the time that it takes, the later half more often."""
        quiet = subprocess.DEVNULL
        process = subprocess.Popen(self._words(), stdout=quiet, stderr=quiet, env=ENVIRONMENT, start_new_session=True)
        time.sleep(self.seconds * max(rng.random(), rng.random()))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def written(self) -> dict[str, str]:
        """File -> the hash of its content."""
        return {str(path): content_hash(path) for pattern in self.files for path in sorted(self.out.glob(pattern))}

    def _words(self) -> list[str]:
        return [sys.executable, *map(str, self.command)]


def content_hash(path: Path) -> str:
    """The hash of what a file says, without the time of its writing."""
    content = path.read_bytes()
    if path.suffix == '.html':
        content = re.sub(rb'Written [0-9 :-]+ by', b'', content)
    elif path.suffix == '.pkl':  # its tensors are stored with their addresses
        with contextlib.suppress(UserError):
            found = [(sample['img_id'], sample['pred_instances']) for sample in read_results(path)]
            content = repr([(i, {key: it[key].tolist() for key in sorted(it)}) for i, it in found]).encode()
    return hashlib.sha256(content).hexdigest()


def kill_tools(folder: Path, kills: int, rng: random.Random) -> Figures:
    """Kill tools that read a trained detector, look at what they left, and let them end at last."""
    figures = Figures('tools')
    cbam, plain = Training(folder / 'cbam', 2), Training(folder / 'plain', 2, base='faster_rcnn')
    for training in (cbam, plain):
        training.start()
        if training.process.wait():
            raise RuntimeError(training.log[-3000:])
    inputs = {path: path.stat().st_mtime_ns for it in (cbam, plain) for path in it.work_dir.rglob('*.p*')}
    tools, work, out = ROOT / 'tools', cbam.work_dir, folder / 'out'
    detector, image_folder = [work / 'faults.py', work], folder / 'shapes/val2017'
    tested, found = ['--out', out / 'test.pkl', '--work-dir', folder / 'tested'], ['--score-thr', '0']
    calls = {
        'report': ([tools / 'report.py', work, '--out-dir', out], ('report.html', 'tables/*', 'figures/*.png')),
        'test': ([tools / 'test.py', *detector, *tested], ('test.pkl',)),
        'infer': ([tools / 'infer.py', *detector, image_folder, '--out-dir', out, *found], ('*.json', 'vis/*')),
        'insert_cbam': (
            [tools / 'insert_cbam.py', plain.work_dir / 'faults.py', plain.work_dir, '--out-dir', out],
            ('faults_cbam.*',),
        ),
    }
    calls = {name: Call(command, out, files) for name, (command, files) in calls.items()}
    for call in calls.values():
        call.run()
        call.expected = call.written()
        shutil.rmtree(out)
    for number in range(kills):
        name = list(calls)[number % len(calls)]
        if rng.random() < 0.5:
            shutil.rmtree(out, ignore_errors=True)  # or else it writes over what is there
        calls[name].kill(rng)
        figures.kills[name] += 1
        left = calls[name].written()
        damaged = [path for path, content in left.items() if calls[name].expected.get(path) != content]
        figures.problems += [f'{name} left a file that is not whole: {path}' for path in damaged]
        figures.say(f'{name} killed, {len(left)} of {len(calls[name].expected)} files written, {len(damaged)} damaged')
    for name, call in calls.items():
        call.run()
        if call.written() != call.expected:
            figures.problems.append(f'{name} wrote something else after it had been killed')
    if inputs != {path: path.stat().st_mtime_ns for path in inputs}:
        figures.problems.append('what the tools read has been changed')
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--kills', type=int, default=200, help='of all victims together')
    parser.add_argument('--only', nargs='+', choices=VICTIMS, default=VICTIMS, help='kill these only')
    parser.add_argument('--seed', type=int, default=0, help='of the moments')
    parser.add_argument('--epochs', type=int, default=400, help=f'of {EPOCH} iterations; enough for 130 kills')
    parser.add_argument('--out', type=Path, help='write the figures as JSON; those of other victims there are kept')
    args = parser.parse_args()
    kills = {'two_processes': round(0.15 * args.kills), 'tools': round(0.2 * args.kills)}
    kills['one_process'] = args.kills - sum(kills.values())
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        folder = Path(name)
        ensure_shapes(folder / 'shapes', num_train=8, num_val=4, image_size=64, progress=False)

        def kill(victim: str) -> Figures:
            rng = random.Random(f'{args.seed} {victim}')
            if victim == 'tools':
                return kill_tools(folder, kills[victim], rng)
            processes, share = (2, 6) if victim == 'two_processes' else (1, 1)
            return kill_trainings(folder, victim, kills[victim], processes, args.epochs // share, rng)

        figures = list(pool.map(kill, args.only))
    write(figures, args.out)
    sys.exit(1 if any(it.problems for it in figures) else 0)


def write(figures: list[Figures], out: Path | None) -> None:
    """Print the record of these victims, and write it beside those of others."""
    how = machine('benchmarks/faults.py', 'onedl-mmdetection')
    record = json.loads(out.read_text()) if out and out.exists() else {}
    record |= {it.name: it.record() | dict(measured=how) for it in figures}
    parts = [record[name] for name in VICTIMS if name in record]
    record |= dict(kills=sum(it['kills'] for it in parts), problems=sum(len(it['problems']) for it in parts))
    text = json.dumps(record, indent=2)
    print(text)
    if out:
        out.write_text(text + '\n')


if __name__ == '__main__':
    main()
