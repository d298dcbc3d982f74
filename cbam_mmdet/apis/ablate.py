"""Train configs one after another and put them side by side in one table: what tools/ablate.py calls.

What is done and what is left is read from the disk alone, so it may be killed at any moment and started again:

    DIR/configs/NAME.py        the complete config that NAME is trained with; a later start compares its own with it
    DIR/NAME/                  the work dir of tools/train.py: checkpoints, logs, metrics
    DIR/NAME/ablation.log      all that the training printed
    DIR/ablation.{md,csv}      the table
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import os
import re
import shlex
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config, ConfigDict
from mmengine.dataset import pseudo_collate
from torch import Tensor, nn

from cbam_mmdet.analysis.complexity import interleaved_speeds, multiply_adds
from cbam_mmdet.apis.infer import load_detector
from cbam_mmdet.datasets.pointing import point_at_data
from cbam_mmdet.engine.scalars import final_metrics, json_lines, metrics_of
from cbam_mmdet.errors import UserError
from cbam_mmdet.models.cbam import CBAM
from cbam_mmdet.models.plugins.checks import check_plugins
from cbam_mmdet.utils.config import class_of, config_text, load_config, set_default_scope
from cbam_mmdet.utils.files import AtomicLocalBackend
from cbam_mmdet.utils.lock import open_lock
from cbam_mmdet.utils.tables import Cell, Column, Table

BASE = 'ABLATION_BASE'  # the environment variable that configs/ablation/cbam.py reads
HEADLINES = ('coco/bbox_mAP', 'coco/bbox_mAP_50', 'pascal_voc/mAP')


@dataclass(frozen=True)
class AblationRun:
    """One config of an ablation, and what is on the disk of its training.

    Args:
        name: the config's file name without '.py'.
        cfg: the complete config, with options and data root merged in.
        root: the ablation's folder.
    """

    name: str
    cfg: Config
    root: Path

    @property
    def config(self) -> Path:
        return self.root / 'configs' / f'{self.name}.py'

    @property
    def work_dir(self) -> Path:
        return self.root / self.name

    @property
    def log(self) -> Path:
        return self.work_dir / 'ablation.log'

    @property
    def validation_dir(self) -> Path:
        return self.work_dir / 'validation'

    @property
    def last_step(self) -> tuple[str, int]:
        """('epoch', 12) or ('iter', 90000): the unit that the training counts in, and where it ends."""
        train_cfg = self.cfg.train_cfg
        return ('epoch', train_cfg.max_epochs) if train_cfg.get('max_epochs') else ('iter', train_cfg.max_iters)

    def checkpoint(self) -> Path | None:
        """The newest intact checkpoint; one that another program wrote may be cut off.

        One of the unit that the training counts in comes first. A CheckpointHook may count in the other one.
        """
        for unit in sorted(('epoch', 'iter'), key=lambda unit: unit != self.last_step[0]):
            numbered = [(int(re.search(r'\d+', p.stem)[0]), p) for p in self.work_dir.glob(f'{unit}_*.pth')]
            for _, path in sorted(numbered, reverse=True):
                if zipfile.is_zipfile(path):
                    return path
        return None

    def metrics(self) -> dict[str, float] | None:
        """The metrics of the validation that ended the training (none of them where nothing was detected).

        Returns:
            None if the training is not finished.
        """
        metrics = final_metrics(self.work_dir, self.last_step[1])
        if metrics is not None:
            return metrics
        for log in sorted(self.validation_dir.glob('*/*.json'), reverse=True):
            for row in json_lines(log):
                return metrics_of(row)
        return None


@dataclass(frozen=True)
class Cost:
    """What a detector costs: parameters, multiply-adds of one image of `size` (H, W), and images a second.

    `flops` is None where the detector cannot be traced.
    """

    parameters: int
    flops: int | None
    size: tuple[int, int]
    speed: float


def ablate(
    configs: Sequence[str],
    work_dir: str,
    tools: Path,
    *,
    base: str | None = None,
    data_root: str | None = None,
    classes: str | Sequence[str] | None = None,
    train_ann: str | None = None,
    val_ann: str | None = None,
    cfg_options: dict | None = None,
    rounds: int = 20,
    print_commands: bool = False,
) -> int:
    """Train what is not trained yet, each config in a process of its own, then write and print the table.

    Args:
        configs: the config files.
        work_dir: the folder for everything.
        tools: the folder of train.py and test.py.
        base: the detector that configs/ablation/ builds on, in place of the demo's.
        data_root: re-points every dataloader and evaluator (see datasets.pointing.point_at_data).
        classes: class names, or 'auto' to read them from the training annotations (see datasets.classes.set_classes).
        train_ann: the COCO annotation file to train on, in a data root that holds several.
        val_ann: that to validate on.
        cfg_options: settings to override in every config.
        rounds: how often each detector's speed is measured.
        print_commands: print the commands that are left to run, and end.

    Returns:
        The exit code: 0, or 1 if a config failed.

    Raises:
        UserError: for a config that cannot be used, or a folder that holds runs of other settings.
    """
    runs = load_runs(configs, Path(work_dir), base, data_root, classes, cfg_options, train_ann, val_ann)
    with _locked(Path(work_dir)) as lock:
        for run in runs:
            record_settings(run)
        if print_commands:
            for run in runs:
                command = next_command(run, tools)
                if command:
                    print(shlex.join(command))
            return 0
        failures = {}
        for i, run in enumerate(runs, start=1):
            failures[run.name] = _finish(run, tools, lock, f'[{i}/{len(runs)}] {run.name}')
        finished = [run for run in runs if not failures[run.name]]
        if finished:
            print(f'measuring {rounds} rounds of {len(finished)} detectors side by side', flush=True)
        costs = measure(finished, rounds) if finished else {}
    metrics = {run.name: run.metrics() for run in finished}
    names = [run.name for run in runs]
    table = f'{markdown(names, metrics, costs)}\n{_notes(finished, costs, rounds)}' if finished else ''
    if finished:
        _write(Path(work_dir) / 'ablation.md', table)
        _write(Path(work_dir) / 'ablation.csv', as_csv(names, metrics, costs))
        print(f'\n{table}\nwritten to {work_dir}/ablation.md and ablation.csv', flush=True)
    failed = [message for message in failures.values() if message]
    if failed:
        lines = '\n'.join(failed)
        print(f'\n{len(failed)} of {len(runs)} configs failed:\n{lines}', file=sys.stderr, flush=True)
    return 1 if failed else 0


def load_runs(
    configs: Sequence[str],
    work_dir: Path,
    base: str | None = None,
    data_root: str | None = None,
    classes: str | Sequence[str] | None = None,
    cfg_options: dict | None = None,
    train_ann: str | None = None,
    val_ann: str | None = None,
) -> list[AblationRun]:
    """Read every config with its bases, and merge options and data root into it.

    Raises:
        UserError: for one that cannot be read or has no validation, for two of one name, or a base that does not fit.
    """
    if base:
        base = base if '::' in base else os.path.abspath(base)
        _check_base(base)
    runs: list[AblationRun] = []
    for path in configs:
        with _base_variable(base):
            cfg = load_config(path, cfg_options)
        name = Path(path.split('::')[-1]).stem
        if name in [run.name for run in runs]:
            raise UserError(f'two configs are called {name}: their work dirs would be the same; rename one')
        if base and BASE not in cfg.env_variables:
            raise UserError(f'--base is for the configs of configs/ablation/; {path} builds on a base of its own')
        if not cfg.get('val_dataloader') or not cfg.get('train_cfg'):
            raise UserError(f'{path} has no training with a validation (train_cfg, val_dataloader): nothing to compare')
        set_default_scope(cfg)
        with contextlib.redirect_stdout(sys.stderr):
            point_at_data(cfg, data_root, classes, train_ann, val_ann, folder=str(work_dir))
        check_plugins(cfg)
        run = AblationRun(name, cfg, work_dir)
        # So that a row of metrics names its validation; MMEngine counts no epochs in a loop of iterations.
        hooks = cfg.setdefault('default_hooks', ConfigDict())
        hooks.setdefault('logger', ConfigDict(type='LoggerHook')).log_metric_by_epoch = run.last_step[0] == 'epoch'
        runs.append(run)
    return runs


def record_settings(run: AblationRun) -> None:
    """Write the config that a run is trained with.

    Raises:
        UserError: if the run on the disk was made with another.
    """
    text = config_text(run.cfg)
    recorded = run.config.read_text(encoding='utf-8') if run.config.is_file() else None
    if run.work_dir.exists() and recorded != text:
        if recorded is None:
            what = f'{run.work_dir} holds a run of unknown settings ({run.config} is not there). '
        else:
            lines = difflib.unified_diff(recorded.splitlines(), text.splitlines(), n=0, lineterm='')
            changes = [line for line in lines if not line.startswith(('---', '+++', '@@'))]
            shown = '\n'.join(changes[:8] + ['...'] * (len(changes) > 8))
            what = f'{run.work_dir} was made with other settings (-) than are asked for now (+):\n{shown}\n'
        raise UserError(f'{what}Give the settings of then, or another --work-dir; or delete {run.work_dir}.')
    if recorded != text:
        _write(run.config, text)


def next_command(run: AblationRun, tools: Path) -> list[str] | None:
    """The command that brings a run to its end from what lies on the disk; None if it is there."""
    if run.metrics() is not None:
        return None
    checkpoint = run.checkpoint()
    if checkpoint and checkpoint.stem == '{}_{}'.format(*run.last_step):
        # Killed in its last validation, which a resumed training would not repeat.
        config = run.config.with_name(f'{run.name}.validation.py')
        _write(config, config_text(_validation_as_test(run.cfg)))
        return [sys.executable, f'{tools}/test.py', str(config), str(checkpoint), '--work-dir', str(run.validation_dir)]
    # Not from `checkpoint`: a training that was stopped by a signal has saved a newer one, whatever unit it counts in.
    resume = ['--resume', 'auto'] if any(run.work_dir.glob('*.pth')) else []
    return [sys.executable, f'{tools}/train.py', str(run.config), '--work-dir', str(run.work_dir), *resume]


def measure(runs: Sequence[AblationRun], rounds: int) -> dict[str, Cost]:
    """Cost of every trained detector, on the first image of its validation set.

    Raises:
        UserError: if a run's checkpoint is gone.
    """
    sizes, counts, forwards = {}, {}, {}
    for run in runs:
        checkpoint = run.checkpoint()
        if not checkpoint:
            raise UserError(
                f'{run.work_dir} holds the metrics of a finished run, but no intact checkpoint to measure its speed '
                'with: put it back, or delete the folder to train anew'
            )
        detector = load_detector(run.cfg, str(checkpoint))
        dataset = DATASETS.build(run.cfg.val_dataloader.dataset)
        with torch.no_grad():
            data = detector.data_preprocessor(pseudo_collate([dataset[0]]), False)
        image, samples = data['inputs'], data['data_samples']
        sizes[run.name] = tuple(image.shape[2:])
        try:
            flops = multiply_adds(detector, image, samples)
        except Exception as error:  # tracing fails in many ways, and must not cost the table
            print(f'{run.name}: FLOPs cannot be counted ({type(error).__name__}: {error})', file=sys.stderr)
            flops = None
        counts[run.name] = sum(p.numel() for p in detector.parameters()), flops
        forwards[run.name] = _forward(detector, image, samples)
    speeds = interleaved_speeds(forwards, rounds)
    return {run.name: Cost(*counts[run.name], sizes[run.name], speeds[run.name]) for run in runs}


def markdown(names: Sequence[str], metrics: dict[str, dict[str, float]], costs: dict[str, Cost]) -> str:
    """The table, one row a name; 'failed' for those without metrics.

    The columns of accuracy are the usual headlines of the data sets at hand, else all metrics.
    """
    keys = _metric_keys(metrics)
    keys = [key for key in HEADLINES if key in keys] or keys or ['mAP']
    columns = {key.split('/')[-1]: '.3f' for key in keys}
    columns |= {'parameters (M)': '.3f', 'FLOPs (G)': '.3f', 'images/s': '.1f', 'input': ''}
    header = ['config', *(Column(name, style, number=True) for name, style in columns.items())]
    rows: list[list[Cell]] = []
    for name in names:
        if name not in metrics:
            rows.append([name, 'failed', *[None] * (len(columns) - 1)])
            continue
        cost = costs[name]
        flops = None if cost.flops is None else cost.flops / 1e9
        scores = [metrics[name].get(key) for key in keys]
        rows.append([name, *scores, cost.parameters / 1e6, flops, cost.speed, '{}x{}'.format(*cost.size)])
    return Table(header, rows, nothing='-').markdown()


def as_csv(names: Sequence[str], metrics: dict[str, dict[str, float]], costs: dict[str, Cost]) -> str:
    """The table with every metric and plain numbers; empty cells for what failed."""
    keys = _metric_keys(metrics)
    rows: list[list[Cell]] = []
    for name in names:
        cost = costs.get(name)
        numbers = [cost.parameters, cost.flops, f'{cost.speed:.4g}', *cost.size] if cost else [None] * 5
        rows.append([name, *(metrics.get(name, {}).get(key) for key in keys), *numbers])
    return Table(['config', *keys, 'parameters', 'flops', 'images_per_second', 'height', 'width'], rows).csv()


def _forward(detector: nn.Module, image: Tensor, samples: list) -> Callable[[], object]:
    @torch.no_grad()
    def forward() -> object:
        return detector(image, samples, mode='predict')

    return forward


def _finish(run: AblationRun, tools: Path, lock: int, title: str) -> str | None:
    """Bring a run to its end; the message if it fails."""
    command = next_command(run, tools)
    if not command:
        print(f'{title}: finished before', flush=True)
        return None
    how = 'resumes from its checkpoint' if '--resume' in command else 'starts'
    if command[1].endswith('test.py'):
        how = 'validates its last checkpoint'
    print(f'{title}: {how}; follow it with: tail -f {run.log}', flush=True)
    start = time.time()
    code = _call(command, run.log, lock)
    if code == 0 and run.metrics() is not None:
        print(f'{title}: finished in {time.time() - start:.0f} s', flush=True)
        return None
    if code == 0:
        why = f'it ended without the validation of its last {run.last_step[0]}, {run.last_step[1]} (stopped early?)'
    else:
        lines = run.log.read_text(encoding='utf-8', errors='replace').split('\n')
        # The message of a mistake may have several lines. The first one names the mistake.
        message = next((line for line in reversed(lines) if line.startswith('error: ')), None)
        last = message or next((line.strip() for line in reversed(lines) if line.strip()), '')
        why = f'exit code {code}: {last}' if code > 0 else f'killed by signal {-code}'
    print(f'{title}: failed', flush=True)
    return f'{run.name}: {why}\n    log: {run.log}'


def _call(command: list[str], log: Path, lock: int) -> int:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open('ab') as file:
        streams = dict(stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        process = subprocess.Popen(command, pass_fds=(lock,), **streams)
        try:
            return process.wait()
        except BaseException:  # Ctrl-C, or SystemExit on SIGTERM
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Keep a folder to one ablation; a training inherits the lock, and holds it when its parent is killed alone."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(open_lock(folder / '.lock'), 'w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f'another tools/ablate.py works in {folder}, or a training that it left behind: wait for it, or stop it'
            ) from None
        yield file.fileno()


@contextlib.contextmanager
def _base_variable(base: str | None) -> Iterator[None]:
    before = os.environ.get(BASE)
    if base:
        os.environ[BASE] = base
    try:
        with contextlib.redirect_stdout(sys.stderr):  # MMEngine speaks of it; stdout may be a list of commands
            yield
    finally:
        if before is not None:
            os.environ[BASE] = before
        elif base:
            del os.environ[BASE]


def _check_base(base: str) -> None:
    plugins = load_config(base).model.get('backbone', {}).get('plugins') or [{}]
    if class_of(MODELS, plugins[0].get('cfg', {}).get('type')) is not CBAM:
        raise UserError(f'--base {base}: its model.backbone.plugins[0] must be a CBAM, whose arguments are then varied')


def _validation_as_test(cfg: Config) -> Config:
    cfg = Config(cfg.to_dict())
    cfg.test_dataloader, cfg.test_evaluator = cfg.val_dataloader, cfg.val_evaluator
    cfg.test_cfg = dict(type='TestLoop')
    return cfg


def _metric_keys(metrics: dict[str, dict[str, float]]) -> list[str]:
    return list(dict.fromkeys(key for row in metrics.values() for key in row))


def _notes(runs: Sequence[AblationRun], costs: dict[str, Cost], rounds: int) -> str:
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f'the CPU, {torch.get_num_threads()} threads'
    tests = [run.cfg.model.get('test_cfg') or {} for run in runs]
    limits = {str(test.rpn.max_per_img) for test in tests if 'rpn' in test}
    proposals = f'; two-stage detectors with {"/".join(sorted(limits))} proposals' if limits else ''
    return (
        'mAP: of the last validation. FLOPs: multiply-adds of one image of the given size (height x width), in '
        f'convolutions, linear layers, matrix products, norms and interpolation{proposals}.\n'
        f'images/s: forward and post-processing of one such image, torch {torch.__version__} on {device}, median of '
        f'{rounds} rounds that take turns.\n'
    )


def _write(path: Path, text: str) -> None:
    """Write a file that is complete or absent, whatever kills the process."""
    AtomicLocalBackend().put(text.encode('utf-8'), path)
