"""CBAM in a detector with a pretrained backbone: the study of PROTOCOL.md.

    python benchmarks/accuracy/pretrained_study.py run --data bccd --data-root BCCD --seeds 0 1 2 --weights FILE
    python benchmarks/accuracy/pretrained_study.py table

`run` takes hours, one training at a time. It continues where it stopped: each training that ends is written into the
record, and one that is there is not repeated. `table` shows what is there so far.

Only trainings of one seed are compared. They start from the same weights, but for the attention's, and see the same
images in the same order.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from arms import ARMS
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import set_random_seed
from record import machine

import cbam_mmdet  # noqa: F401  (registers the backbone)
from cbam_mmdet.engine.scalars import is_training, is_validation, scalar_logs
from cbam_mmdet.utils.files import write_text
from cbam_mmdet.utils.tables import Column, Table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CONFIG = ROOT / 'configs/faster_rcnn_effnet_lite0.py'
RECORD = ROOT / 'benchmarks/results/pretrained_study.json'

# The number of classes, and of epochs.
DATA = {'bccd': (3, 4), 'raccoon': (1, 8)}
CHOICE, CONFIRMATION = range(0, 3), range(3, 8)
FACTS = ('processor', 'device', 'cores', 'python', 'versions')


def config_of(data: str, arm: str, seed: int, start: Path) -> Config:
    """The config of one training, which starts from the weights in `start`."""
    _, epochs = DATA[data]
    cfg = ARMS[arm].apply(_plain(data))
    cfg.load_from = str(start)
    cfg.randomness = dict(seed=seed)
    cfg.train_cfg.update(max_epochs=epochs, val_interval=1)
    cfg.param_scheduler[1].update(end=epochs, T_max=epochs)
    cfg.default_hooks.checkpoint.update(interval=epochs, max_keep_ckpts=1)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.num_workers = 1
    return cfg


def _plain(data: str) -> Config:
    cfg = Config.fromfile(CONFIG)
    cfg.model.roi_head.bbox_head.num_classes = DATA[data][0]
    cfg.model.backbone.init_cfg = None
    return cfg


def initial_weights(data: str, seed: int, weights: Path | None, folder: Path) -> Path:
    """A checkpoint of the plain detector before its training, written once."""
    path = folder / f'start_{data}_seed{seed}{"" if weights else "_random"}.pth'
    if not path.exists():
        model = _plain(data).model
        model.backbone.init_cfg = weights and dict(type='Pretrained', checkpoint=str(weights))
        init_default_scope('mmdet')
        set_random_seed(seed)
        detector = MODELS.build(model)
        detector.init_weights()
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(dict(state_dict=detector.state_dict()), path)
    return path


def train(cfg: Config, folder: Path, data_root: str) -> dict:
    """Train in a process of its own.

    Returns:
        The mAPs after each epoch, the images per second, and the minutes. Of a training that failed, its exit code.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cfg.dump(folder / 'config.py')
    command = [sys.executable, ROOT / 'tools/train.py', folder / 'config.py', '--work-dir', folder / 'run']
    command += ['--data-root', data_root, '--classes', 'auto', '--resume', 'auto']
    paths = os.pathsep.join(filter(None, [str(HERE), os.environ.get('PYTHONPATH')]))
    start = time.monotonic()
    with (folder / 'log').open('ab') as log:
        done = subprocess.run([*map(str, command)], stdout=log, stderr=log, env={**os.environ, 'PYTHONPATH': paths})
    minutes = round((time.monotonic() - start) / 60, 2)
    if done.returncode:
        return dict(exit_code=done.returncode, minutes=minutes)
    return dict(**_measured(folder / 'run', cfg.train_dataloader.batch_size), minutes=minutes)


def _measured(run: Path, batch_size: int) -> dict:
    rows = [row for _, log in scalar_logs(run) for row in log]
    scores = {
        int(row['step']): {key: row[f'coco/bbox_{key}'] for key in ('mAP', 'mAP_50')}
        for row in rows
        if is_validation(row) and 'coco/bbox_mAP' in row
    }
    times = [row['time'] for row in rows if is_training(row)]
    return dict(scores=scores, images_per_second=round(batch_size / statistics.median(times), 2))


def run(args: argparse.Namespace) -> None:
    record = _read(args.record)
    done = {(row['data'], row['arm'], row['seed']) for row in record['trainings'] if 'scores' in row}
    lost = []
    for seed in args.seeds:
        for arm in args.arms:
            if (args.data, arm, seed) in done:
                continue
            weights = args.weights if ARMS[arm].pretrained else None
            start = initial_weights(args.data, seed, weights, args.work_dir)
            slug = arm.lower().replace(',', '').replace(' ', '_')
            folder = args.work_dir / args.data / f'{slug}_seed{seed}'
            made = train(config_of(args.data, arm, seed, start), folder, args.data_root)
            facts = {key: value for key, value in machine(__file__, 'onedl-mmdetection').items() if key in FACTS}
            row = dict(data=args.data, arm=arm, seed=seed, commit=_commit(), **made, **facts)
            record = _read(args.record)
            record['trainings'].append(row)
            write_text(args.record, json.dumps(record, indent=1) + '\n')
            print({key: row.get(key) for key in ('data', 'arm', 'seed', 'scores', 'exit_code', 'minutes')}, flush=True)
            if 'exit_code' in row:
                lost.append(f'{folder}/log: exit code {row["exit_code"]}')
    if lost:
        sys.exit('\n'.join(lost))


def _read(record: Path) -> dict:
    return json.loads(record.read_text()) if record.exists() else dict(trainings=[])


@cache
def _commit() -> str:
    git = ['git', '-C', str(ROOT)]
    dirty = subprocess.run([*git, 'status', '--porcelain', '-uno', 'cbam_mmdet', 'configs', 'benchmarks/accuracy'],
                           capture_output=True, text=True).stdout  # fmt: skip
    head = subprocess.run([*git, 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True).stdout.strip()
    return head + (' with changes' if dirty else '')


def table(trainings: Sequence[dict], data: str, seeds: Sequence[int]) -> Table:
    """The arms on one data set over these seeds, with the differences to plain of the same seed."""
    found = {(row['arm'], row['seed']): row for row in trainings if row['data'] == data and row['seed'] in seeds}
    found = {key: row for key, row in found.items() if 'scores' in row}
    header = [
        data,
        'seeds',
        Column('mAP_50', '.3f'),
        Column('mAP', '.3f'),
        Column('mAP less plain', '+.3f'),
        Column('standard deviation', '.3f'),
        '95 % interval',
        Column('mAP after epoch 1', '.3f'),
        Column('less plain', '+.3f'),
        Column('images/s', '.1f'),
    ]
    lines = []
    for arm in ARMS:
        rows = {seed: found[arm, seed] for seed in seeds if (arm, seed) in found}
        if not rows:
            continue
        last = max(map(int, next(iter(rows.values()))['scores']))
        paired = [s for s in rows if ('plain', s) in found and arm != 'plain']

        def mean(key: str, epoch: int, rows: dict = rows) -> float:
            return statistics.mean(row['scores'][str(epoch)][key] for row in rows.values())

        def differences(epoch: int, rows: dict = rows, paired: list = paired) -> list[float]:
            plain = {seed: found['plain', seed]['scores'][str(epoch)]['mAP'] for seed in paired}
            return [rows[seed]['scores'][str(epoch)]['mAP'] - plain[seed] for seed in paired]

        gains, shocks = differences(last), differences(1)
        lines.append([
            arm,
            ', '.join(map(str, rows)),
            mean('mAP_50', last),
            mean('mAP', last),
            statistics.mean(gains) if gains else None,
            statistics.stdev(gains) if len(gains) > 1 else None,
            '{:+.3f} to {:+.3f}'.format(*interval(gains)) if len(gains) > 1 else None,
            mean('mAP', 1),
            statistics.mean(shocks) if shocks else None,
            statistics.median(row['images_per_second'] for row in rows.values()),
        ])  # fmt: skip
    return Table(header, lines, nothing='')


def interval(differences: Sequence[float], resamples: int = 10_000) -> tuple[float, float]:
    """The 95 % interval of the mean of paired differences: the percentile bootstrap over seeds."""
    values = np.asarray(differences)
    drawn = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.percentile(values[drawn].mean(1), [2.5, 97.5])
    return float(low), float(high)


def report(trainings: Sequence[dict]) -> str:
    """All tables, as Markdown, and the trainings that were lost."""
    parts = []
    for title, seeds in (('The choice', CHOICE), ('The confirmation', CONFIRMATION)):
        for data in DATA:
            made = table(trainings, data, seeds)
            if made.rows:
                parts.append(f'## {title}: {data}, {DATA[data][1]} epochs\n\n{made.markdown()}')
    lost = [row for row in trainings if 'scores' not in row]
    minutes = sum(row['minutes'] for row in trainings)
    facts = [f'{len(trainings) - len(lost)} trainings, {minutes / 60:.1f} hours, on:']
    facts += [f'- {name}' for name in dict.fromkeys(f'{r["processor"]}, {r["device"]}' for r in trainings)]
    facts += [f'- lost: {row["data"]}, {row["arm"]}, seed {row["seed"]}: exit code {row["exit_code"]}' for row in lost]
    return '\n'.join(['# CBAM in a detector with a pretrained backbone', '', *facts, '', *parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('what', choices=['run', 'table'])
    parser.add_argument('--data', choices=list(DATA))
    parser.add_argument('--data-root')
    parser.add_argument('--weights', type=Path, help='ImageNet weights of the backbone, see the config')
    parser.add_argument('--seeds', nargs='+', type=int, default=[*CHOICE])
    parser.add_argument('--arms', nargs='+', choices=list(ARMS), default=list(ARMS))
    parser.add_argument('--work-dir', type=Path, default=ROOT / 'work_dirs/pretrained_study')
    parser.add_argument('--record', type=Path, default=RECORD)
    parser.add_argument('--out', type=Path, help='where `table` writes its Markdown')
    args = parser.parse_args()
    if args.what == 'run':
        if not (args.data and args.data_root and args.weights):
            parser.error('run takes --data, --data-root and --weights')
        run(args)
        return
    made = report(_read(args.record)['trainings'])
    print(made)
    if args.out:
        write_text(args.out, made)


if __name__ == '__main__':
    main()
