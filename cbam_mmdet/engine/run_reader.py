"""Read the content of a work dir of tools/train.py and tools/test.py: scalars, config, record, detections."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from mmengine.config import Config

from cbam_mmdet.engine.checkpoint.loading import load_plain_pickle
from cbam_mmdet.engine.record import Setting, base_differences, read_record, shipped_config
from cbam_mmdet.engine.scalars import SCALARS, is_training, is_validation, scalar_logs, training_logs
from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.config import load_config, split_datasets

RESULTS = 'results.pkl'  # in the work dir


@dataclass
class TrainingRecord:
    """A training, as its work dir records it.

    Args:
        name: a short name that differs from those of the other trainings.
        work_dir: its folder.
        trained: the config of the training.
        tested: the config of the test that wrote the detections, which names the test data; that of the training if
            no such test is recorded.
        train: the rows of losses, in the order of their `step` (iterations).
        validations: the rows of metrics. Their `step` is the iteration after which they were measured.
        facts: a description of the run: the config, the data, the seed, the versions, the machine.
        bases: the configs that its config inherits from.
        changes: the settings that differ from those of the bases, or None if they are unknown.
    """

    name: str
    work_dir: Path
    trained: Config
    tested: Config
    train: list[dict]
    validations: list[dict]
    facts: dict[str, str]
    bases: list[str] = field(default_factory=list)
    changes: list[Setting] | None = None


def read_runs(work_dirs: Sequence[str | Path]) -> list[TrainingRecord]:
    """Read work dirs. Each training gets a name of its own.

    Raises:
        UserError: for a path that is not a folder, a folder without a training's log or without a config, and a folder
            that is given twice.
    """
    paths = [Path(os.path.abspath(path)) for path in work_dirs]
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f'{path} is given twice: give each work dir once')
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    names = [list(path.parts[-depth:]) for path in paths]
    while depth > 1 and len({parts[-1] for parts in names}) == 1:  # plain/seed0, cbam/seed0
        names, depth = [parts[:-1] for parts in names], depth - 1
    return [_read_run(Path(path), '/'.join(parts)) for path, parts in zip(work_dirs, names, strict=True)]


def read_scalars(work_dir: str | Path) -> tuple[list[dict], list[dict]]:
    """The scalars that MMEngine logged for the newest training in a work dir, from its start even if it was resumed.

    Returns:
        The rows of losses, and the rows of metrics. The `step` of both counts iterations.

    Raises:
        UserError: if the work dir holds no log of a training.
    """
    return _join(_training_logs(work_dir))


def find_config(work_dir: str | Path) -> Path:
    """The config of the newest training in a work dir.

    A config is code, which reading it runs: no other file is taken for one, whatever else lies in the folder.

    Returns:
        The copy that the training's record names. Another program's training has no such record: then it is the copy
        in its log folder, or the only config in the work dir.

    Raises:
        UserError: if there is none.
    """
    configs = list(Path(work_dir).glob('*.py'))
    for folder in [folder for folder, rows in reversed(scalar_logs(work_dir)) if any(map(is_training, rows))][:1]:
        named = Path(work_dir, os.path.basename(read_record(folder).get('copy') or ''))
        if named.is_file():
            return named
        logged = folder / 'vis_data/config.py'
        if logged.is_file():
            return next((path for path in configs if path.read_bytes() == logged.read_bytes()), logged)
    if not configs:
        raise UserError(f'{work_dir} holds no config: give the --work-dir of tools/train.py')
    if len(configs) > 1:
        names = ', '.join(sorted(path.name for path in configs))
        raise UserError(f"{work_dir} holds {len(configs)} configs ({names}) and no record of which is the training's")
    return configs[0]


def find_tested_config(work_dir: str | Path, results: str | Path) -> Path | None:
    """The config of the test in a work dir that wrote this file of detections; None if there is no record of it."""
    found = _find_test(work_dir, results)
    return found and found[0]


def was_made_of(results: str | Path, work_dir: str | Path, checkpoint: str | Path) -> bool:
    """Whether a file of detections is known to be those of this checkpoint, unchanged since."""
    found = _find_test(work_dir, results)
    tested = found[1].get('checkpoint') if found else None
    if not tested or os.path.basename(tested) != Path(checkpoint).name:
        return False
    if os.path.isfile(tested) and not os.path.samefile(tested, checkpoint):  # else the work dir may have been moved
        return False
    return Path(results).stat().st_mtime >= Path(checkpoint).stat().st_mtime


def _find_test(work_dir: str | Path, results: str | Path) -> tuple[Path, dict] | None:
    """The config and the record of the newest test in a work dir that wrote this file of detections."""
    tests = []
    for folder in sorted(Path(work_dir).glob('*/vis_data'), reverse=True):
        record = read_record(folder.parent)
        copy = folder.parent / os.path.basename(record.get('copy') or '')
        if record.get('results') and copy.is_file():
            tests.append((copy, record))
    here = [test for test in tests if os.path.abspath(results) == test[1]['results']]
    # A work dir may have been moved: the file's name must do, then.
    moved = [
        test
        for test in tests
        if os.path.basename(test[1]['results']) == Path(results).name and not os.path.exists(test[1]['results'])
    ]
    return next(iter([*here, *moved]), None)


def read_results(path: str | Path) -> list[dict]:
    """The detections of each image, as `tools/test.py --out FILE.pkl` wrote them.

    Raises:
        UserError: if the file is missing, cut off, or something else.
    """
    require_results(path)
    try:
        samples = load_plain_pickle(path)
        images = [sample['img_id'] for sample in samples]
        labels = [label for sample in samples for label in sample['pred_instances']['labels'].tolist()]
        samples[0]['pred_instances']['bboxes']
        if len(set(images)) < len(images):
            raise ValueError('an image id is in it twice, as where a test has several data sets: a report takes one')
        if any(type(label) is not int or label < 0 for label in labels):
            raise ValueError('a label is not the index of a class')
    except UserError:
        raise
    except Exception as error:  # a pickle may raise anything
        raise UserError(
            f'{path} does not hold the detections of images ({type(error).__name__}: {error}): write it again with '
            f'tools/test.py CONFIG CHECKPOINT --out {path}'
        ) from error
    return samples


def require_results(path: str | Path) -> None:
    """Look for a file of detections, of which nothing is read.

    Raises:
        UserError: if it does not exist.
    """
    if not Path(path).is_file():
        raise UserError(f'{path} does not exist: write it with tools/test.py CONFIG CHECKPOINT --out {path}')


def require_work_dir(path: str | Path) -> None:
    """Look for the folder of a training, of which nothing is read.

    Raises:
        UserError: if it does not exist.
    """
    if not Path(path).is_dir():
        raise UserError(f'{path} is not a folder: give the --work-dir of tools/train.py')


def _read_run(work_dir: Path, name: str) -> TrainingRecord:
    require_work_dir(work_dir)
    logs = _training_logs(work_dir)
    train, validations = _join(logs)
    config = find_config(work_dir)
    folder = logs[-1][0]
    trained = load_config(str(config))
    test = find_tested_config(work_dir, work_dir / RESULTS)
    tested = load_config(str(test)) if test else trained
    texts = [
        next((path.read_text(encoding='utf-8', errors='replace') for path in start.glob('*.log')), '')
        for start, _ in logs
    ]
    record = read_record(folder)

    run = TrainingRecord(
        name, work_dir, trained, tested, train, validations, _facts(trained, record, texts, config, train)
    )
    if record:
        run.bases, run.changes = record['bases'], [Setting(*change) for change in record['differences']]
    elif shipped := shipped_config(config.name):  # trained by another program
        run.bases, run.changes = base_differences(trained, shipped)
    return run


def _training_logs(work_dir: str | Path) -> list[tuple[Path, list[dict]]]:
    logs = training_logs(work_dir)
    if not any(is_training(row) for _, rows in logs for row in rows):
        what = f'a training that has logged no losses yet ({logs[-1][0].name})' if logs else 'no log of a training run'
        raise UserError(f'{work_dir} holds {what} (*/{SCALARS}): give the --work-dir of tools/train.py')
    return logs


def _join(logs: list[tuple[Path, list[dict]]]) -> tuple[list[dict], list[dict]]:
    """The rows of the newest training. Those before its first step come from the trainings that it resumed.

    A validation is that of the last step before it, in its own log or in those before: a resumed training first makes
    up for one that its checkpoint lacks.
    """
    train: list[dict] = []
    validations: list[dict] = []
    for _, rows in logs:
        first = next((row['step'] for row in rows if is_training(row)), float('inf'))
        train = [row for row in train if row['step'] < first]
        validations = [row for row in validations if row['step'] < first]
        for row in rows:
            if is_training(row):
                train.append(row)
            elif is_validation(row):
                validations.append({**row, 'step': train[-1]['step'] if train else 0})
    return train, validations


def _facts(cfg: Config, record: dict, logs: list[str], config: Path, train: list[dict]) -> dict[str, str]:
    log = logs[-1]
    loader, loop = cfg.train_dataloader, cfg.train_cfg
    environment = dict(re.findall(r'^    ([A-Z][\w ,]*?): (.+)$', log.partition('Runtime environment:')[0], re.M))
    versions = record.get('versions') or {
        key: environment[key].split(' ')[0]
        for key in ('Python', 'PyTorch', 'TorchVision', 'MMEngine')
        if key in environment
    }
    gpus = ', '.join(value for key, value in environment.items() if key.startswith('GPU '))
    machine = record.get('machine') or gpus or ('a CPU' if environment.get('CUDA available') == 'False' else '')
    seed = re.search(r'^    seed: (\d+)$', log, re.M)
    batch, processes = loader.get('batch_size'), record.get('processes', 1)
    optimizer = cfg.optim_wrapper.get('optimizer', {})
    facts = {
        'Config': record.get('config') or config.name,
        'Command': record.get('command', ''),
        'Trained': _duration(logs),
        'Length': f'{train[-1]["step"]} iterations'
        + (
            f', the last one in epoch {train[-1]["epoch"]} of {loop.max_epochs}'
            if loop.get('max_epochs') and 'epoch' in train[-1]
            else ''
        ),
        'Batch': f'{processes} x {batch}' if processes > 1 else str(batch),
        'Optimizer': f'{optimizer.get("type", "")}, lr {optimizer.get("lr", "")}{_greatest_rate(optimizer, train)}',
        'Seed': seed[1] if seed else str((cfg.get('randomness') or {}).get('seed') or ''),
        'Training data': '; '.join(data_of(cfg, 'train')),
        'Test data': '; '.join(data_of(cfg, 'test')),
        'Versions': ', '.join(f'{name} {version}' for name, version in versions.items()),
        'Machine': machine,
    }
    return {key: value for key, value in facts.items() if value}


def _greatest_rate(optimizer: dict, train: list[dict]) -> str:
    """The greatest learning rate that was logged, where it is not the config's.

    `auto_scale_lr` multiplies that, and a resumed training keeps the one with which it began.
    """
    rates = [row.get('base_lr', row.get('lr')) for row in train]
    greatest = max([rate for rate in rates if rate is not None], default=None)
    if greatest is None or math.isclose(greatest, optimizer.get('lr') or 0, rel_tol=1e-3):
        return ''
    return f' (in the log at most {greatest:.4g})'


def data_of(cfg: Config, split: str) -> list[str]:
    """The annotation files of a split's data sets, as a report names them."""
    return [os.path.join(d.get('data_root') or '', d.get('ann_file') or '') for d in split_datasets(cfg, split)]


def _duration(logs: list[str]) -> str:
    """When a training began, and how long it took, the time between its starts left out."""
    spans = [span for span in map(_span, logs) if span]
    if not spans:
        return ''
    seconds = round(sum((end - start).total_seconds() for start, end in spans))
    minutes = round(seconds / 60)
    hours = f'{minutes // 60} h ' if minutes >= 60 else ''
    duration = f'{hours}{minutes % 60} min' if minutes else f'{seconds} s'
    parts = f', in {len(spans)} parts' if len(spans) > 1 else ''
    return f'{spans[0][0]:%Y-%m-%d %H:%M}, for {duration}{parts}'


def _span(log: str) -> tuple[datetime, datetime] | None:
    """The times of the first and of the last line of MMEngine's log."""
    times = re.findall(r'^(\d{4}/\d\d/\d\d \d\d:\d\d:\d\d) - ', log, re.M)
    try:
        start, end = (datetime.strptime(times[i], '%Y/%m/%d %H:%M:%S') for i in (0, -1))
    except (IndexError, ValueError):  # not a log of MMEngine's
        return None
    return start, end
