"""Kill a training with SIGKILL again and again, resume it each time, and report what was lost.

    python benchmarks/faults.py [--kills 50] [--out benchmarks/results/faults.json]

The demo's detector, made small, saves every INTERVAL iterations. Each of its lives ends at a random moment: while it
starts, while it trains, or while it writes a checkpoint. The same command starts the next life. After each death the
newest checkpoint must load, be at most one interval behind the last iteration that was logged, and be the one that the
next life resumes from. At the end the losses and the weights must be those of a run that nobody killed, bit for bit.
Linux only.
"""

import argparse
import collections
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from record import machine

from cbam_mmdet.datasets import ensure_shapes
from cbam_mmdet.engine.checkpoint.files import newest_checkpoint
from cbam_mmdet.engine.checkpoint.loading import load_checkpoint
from cbam_mmdet.engine.scalars import is_training, scalar_logs

ROOT = Path(__file__).resolve().parent.parent
INTERVAL = 5
EPOCH = 4  # iterations: 8 images in batches of 2
# The probabilities of the moments at which a life ends. In all other cases it is a random moment of the training.
WHILE_WRITING, WHILE_STARTING = 0.4, 0.1


def start(folder: Path, epochs: int) -> subprocess.Popen:
    """Start the training, or resume it, with the same command."""
    options = dict(
        train_cfg=dict(max_epochs=epochs, val_interval=10),
        train_dataloader=dict(batch_size=2),
        model=dict(backbone=dict(base_channels=4), neck=dict(in_channels=[16, 32, 64, 128])),
        default_hooks=dict(
            logger=dict(interval=1),
            checkpoint=dict(by_epoch=False, interval=INTERVAL, max_keep_ckpts=2),
            ema=dict(type='EMAHook', momentum=0.01),
        ),
        log_processor=dict(window_size=1),
    )
    config = folder / 'faults.py'
    if not config.exists():
        settings = '\n'.join(f'{key} = {value}' for key, value in options.items())
        config.write_text(f"_base_ = '{ROOT}/configs/demo/faster_rcnn_cbam.py'\n{settings}\n")
    command = [sys.executable, ROOT / 'tools/train.py', config, '--resume', 'auto', '--work-dir', folder / 'work']
    command += ['--data-root', folder.parent / 'shapes']
    with (folder / 'log').open('ab') as log:
        environment = dict(os.environ, OMP_NUM_THREADS=os.environ.get('OMP_NUM_THREADS', '1'))
        return subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=environment)


def curve(work_dir: Path) -> dict[int, dict[str, float]]:
    """Iteration -> losses and learning rate, of all lives. The last complete line of an iteration counts."""
    found = {}
    for _, rows in scalar_logs(work_dir):
        for row in filter(is_training, rows):
            found[row['step']] = {key: value for key, value in row.items() if 'loss' in key or key == 'lr'}
    return found


def end(process: subprocess.Popen, where: str, work_dir: Path, rng: random.Random) -> None:
    """Send SIGKILL at a random moment of this kind, or return as soon as the run ends by itself."""
    if where == 'starting':
        time.sleep(rng.uniform(0, 8))
    else:
        before = max(curve(work_dir), default=0)
        while process.poll() is None and max(curve(work_dir), default=0) <= before:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 3))
        if where == 'writing':
            while process.poll() is None and not any(name.endswith('.unfinished') for name in os.listdir(work_dir)):
                time.sleep(0.0005)
            time.sleep(rng.uniform(0, 0.03))
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    process.wait()


def resumed_at(log: str) -> int | None:
    """The iteration from which the last life in a log resumed. 0 if it started anew, None if it ended before that."""
    life = log.rpartition('=== life')[2]
    found = re.search(r'--resume: .* from \S*/iter_(\d+)\.pth', life)
    if found:
        return int(found.group(1))
    return 0 if 'Checkpoints will be saved' in life else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--kills', type=int, default=50)
    parser.add_argument('--seed', type=int, default=0, help='of the moments')
    parser.add_argument('--epochs', type=int, default=200, help=f'of {EPOCH} iterations; enough for all kills')
    parser.add_argument('--out', type=Path, help='write the figures as JSON')
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ensure_shapes(folder / 'shapes', num_train=8, num_val=4, image_size=64, progress=False)
        for run in ('killed', 'unharmed'):
            (folder / run).mkdir()
        work_dir, log = folder / 'killed/work', folder / 'killed/log'
        kinds, lost, half_written, expected, checked, problems = collections.Counter(), [], 0, 0, 0, []
        for life in range(args.kills + 1):
            with log.open('a') as file:
                file.write(f'=== life {life}\n')
            process = start(folder / 'killed', args.epochs)
            where = rng.choices(
                ['writing', 'starting', 'training'], [WHILE_WRITING, WHILE_STARTING, 1 - WHILE_WRITING - WHILE_STARTING]
            )[0]
            if life == args.kills:
                process.wait()
            else:
                end(process, where, work_dir, rng)
            if process.returncode != (0 if life == args.kills else -signal.SIGKILL):
                sys.exit(f'life {life} ended with {process.returncode}:\n{log.read_text()[-3000:]}')
            resumed = resumed_at(log.read_text())
            if resumed is not None:
                checked += 1
                if resumed != expected:
                    problems.append(f'life {life} resumed from {resumed}, the newest intact checkpoint was {expected}')
            if life == args.kills:
                break
            kinds[where] += 1
            half_written += bool(work_dir.is_dir() and list(work_dir.glob('.*.pth.*.unfinished')))
            newest, skipped = newest_checkpoint(str(work_dir))
            expected = int(re.search(r'iter_(\d+)', newest).group(1)) if newest else 0
            lost.append(max(curve(work_dir), default=0) - expected)
            problems += [f'life {life}: {reason}' for reason in skipped]
            reached = f'iteration {expected + lost[-1]}, lost {lost[-1]}'
            print(f'{life + 1}/{args.kills} killed while {where}: {reached}', flush=True)
        if start(folder / 'unharmed', args.epochs).wait():
            sys.exit((folder / 'unharmed/log').read_text()[-3000:])
        curves = [curve(folder / run / 'work') for run in ('killed', 'unharmed')]
        weights = [load_checkpoint(newest_checkpoint(str(folder / run / 'work'))[0]) for run in ('killed', 'unharmed')]
    same = all(
        torch.equal(value, weights[1][part][key])
        for part in ('state_dict', 'ema_state_dict')
        for key, value in weights[0][part].items()
    )
    record = dict(
        **machine('benchmarks/faults.py', 'onedl-mmdetection'),
        kills=sum(kinds.values()),
        killed_while=dict(kinds),
        left_a_checkpoint_half_written=half_written,
        checkpoint_interval=INTERVAL,
        most_iterations_lost=max(lost),
        mean_iterations_lost=round(sum(lost) / len(lost), 2),
        resumptions_that_were_checked=checked,
        iterations=len(curves[1]),
        losses_equal_the_uninterrupted_run=curves[0] == curves[1] and len(curves[1]) == args.epochs * EPOCH,
        weights_equal_the_uninterrupted_run=same,
        problems=problems,
    )
    print(json.dumps(record, indent=2))
    if args.out:
        args.out.write_text(json.dumps(record, indent=2) + '\n')
    good = max(lost) <= INTERVAL and not problems
    sys.exit(0 if good and record['losses_equal_the_uninterrupted_run'] and same else 1)


if __name__ == '__main__':
    main()
