"""Does CBAM help, and how should it be put in? The study behind docs/does_cbam_help.md.

    python benchmarks/accuracy/study.py run --data shapes --data-root data/shapes --seeds 0 1 2
    python benchmarks/accuracy/study.py table

`run` takes hours, and continues where it stopped. `table` shows what is there so far.

For each seed, the detector is trained from scratch plain, with SE, with CBAM as in the paper, and with CBAM's unit
gate. Then each of these is put into the plain detector of the same seed, which is fine-tuned with it. The plain
detector is also fine-tuned equally long without anything. Only trainings of one seed are compared: they have the
same initial weights of the plain part and the same order of images.
"""

import argparse
import copy
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mmengine.config import Config
from record import head, machine

from cbam_mmdet.engine.scalars import final_metrics
from cbam_mmdet.utils.tables import Column, Table

ROOT = Path(__file__).resolve().parents[2]

# The arguments of CBAM. SE is its channel branch with one pool.
ATTENTIONS = {
    'plain': None,
    'SE': dict(pools=('avg',), spatial=None),
    'CBAM': dict(),
    'CBAM, unit gate': dict(gate='unit'),
}


@dataclass(frozen=True)
class Data:
    """The detector for a data set, and the length of its trainings."""

    config: str
    epochs: int
    finetune_epochs: int
    variations: bool = True  # whether to vary the fine-tuning


DATA = {
    'shapes': Data('configs/demo/faster_rcnn_cbam.py', 16, 6),
    'bccd': Data('configs/demo/bccd_r18_cbam.py', 10, 4, variations=False),
}


@dataclass(frozen=True)
class Finetune:
    """A way to fine-tune the trained plain detector with an attention."""

    attention: str
    lr_mult: float = 1.0  # for the attention's parameters, as decay_mult
    decay_mult: float = 1.0
    last_stages: int = 4  # the number of stages with an attention
    norm_eval: bool = False  # every BatchNorm of the backbone, CBAM's too, keeps its running statistics
    warmup: bool = True  # a warm-up of the learning rate over the first 50 iterations
    lr: float = 0.1  # as a share of the learning rate from scratch
    control: str = 'plain'  # the fine-tuning without an attention that it is compared with


# FINETUNES are compared with each other. VARIATIONS change one setting of the fine-tuning at a time.
FINETUNES = {name: Finetune(name) for name in ATTENTIONS}
VARIATIONS = {
    'unit gate, lr x 10': Finetune('CBAM, unit gate', lr_mult=10),
    'unit gate, no weight decay': Finetune('CBAM, unit gate', decay_mult=0),
    'unit gate, last two stages': Finetune('CBAM, unit gate', last_stages=2),
    'unit gate, no warm-up': Finetune('CBAM, unit gate', warmup=False),
    'plain, norm_eval': Finetune('plain', norm_eval=True, control='plain, norm_eval'),
    'unit gate, norm_eval': Finetune('CBAM, unit gate', norm_eval=True, control='plain, norm_eval'),
    'plain, full rate': Finetune('plain', lr=1, control='plain, full rate'),
    'CBAM, full rate': Finetune('CBAM', lr=1, control='plain, full rate'),
    'unit gate, full rate': Finetune('CBAM, unit gate', lr=1, control='plain, full rate'),
}


@dataclass(frozen=True)
class StudyRun:
    """One training: its folder below the study's, and its config."""

    folder: Path
    cfg: Config
    epochs: int

    def metrics(self) -> dict[str, float] | None:
        """The mAPs of the validation of the last epoch, or None before it."""
        metrics = final_metrics(self.folder, self.epochs)
        return metrics and {key.split('/')[-1]: value for key, value in metrics.items() if 'mAP' in key}


def base_config(data: str, attention: str, seed: int, epochs: int, last_stages: int = 4) -> Config:
    cfg = copy.deepcopy(_read(DATA[data].config))
    arguments = ATTENTIONS[attention]
    plugin = cfg.model.backbone.plugins[0]
    if arguments is None:
        cfg.model.backbone.plugins = None
    else:
        # The reduction is that of the demo's CBAM, which has few channels.
        plugin.cfg = dict(type='CBAM', reduction=plugin.cfg.reduction, **arguments)
        if 'stages' in plugin or 'position' in plugin:
            plugin.stages = tuple(stage >= 4 - last_stages for stage in range(4))
        elif last_stages < 4:  # PluginBackbone, whose usual place is in all stages
            plugin.after = f'layer[{5 - last_stages}-4].*.bn2'
    cfg.randomness = dict(seed=seed)
    cfg.train_cfg.update(max_epochs=epochs, val_interval=epochs)
    cfg.default_hooks.checkpoint.update(interval=epochs, max_keep_ckpts=1)
    cosine = cfg.param_scheduler[1]
    cosine.update(end=epochs, T_max=epochs)
    return cfg


@functools.cache
def _read(config: str) -> Config:
    return Config.fromfile(ROOT / config)


def runs(data: str, seed: int, work_dir: Path) -> dict[tuple[str, str], StudyRun]:
    """('scratch' or 'finetune', name) -> run, in an order in which they can be trained."""
    folder, settings, made = work_dir / data, DATA[data], {}
    for name in ATTENTIONS:
        cfg = base_config(data, name, seed, settings.epochs)
        made['scratch', name] = StudyRun(folder / 'scratch' / _slug(name) / f'seed{seed}', cfg, settings.epochs)
    plain = made['scratch', 'plain'].folder / f'epoch_{settings.epochs}.pth'
    ways = {**FINETUNES, **VARIATIONS} if settings.variations else FINETUNES
    for name, way in ways.items():
        cfg = base_config(data, way.attention, seed, settings.finetune_epochs, way.last_stages)
        cfg.load_from = str(plain)
        cfg.optim_wrapper.optimizer.lr *= way.lr
        cfg.param_scheduler[1].eta_min *= way.lr
        if way.norm_eval:
            backbone = cfg.model.backbone
            backbone.get('backbone', backbone).norm_eval = True
        if not way.warmup:
            del cfg.param_scheduler[0]
        if (way.lr_mult, way.decay_mult) != (1, 1):
            keys = dict(cbam=dict(lr_mult=way.lr_mult, decay_mult=way.decay_mult))
            cfg.optim_wrapper.paramwise_cfg = dict(custom_keys=keys)
        made['finetune', name] = StudyRun(
            folder / 'finetune' / _slug(name) / f'seed{seed}', cfg, settings.finetune_epochs
        )
    return made


def _slug(name: str) -> str:
    return name.lower().replace(',', '').replace(' ', '_')


def train(run: StudyRun, data_root: str) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    config = run.folder / 'config.py'
    config.write_text(run.cfg.pretty_text)
    command = [sys.executable, ROOT / 'tools/train.py', config, '--work-dir', run.folder, '--data-root', data_root]
    start = time.monotonic()
    with (run.folder / 'log').open('ab') as log:
        done = subprocess.run([*map(str, command), '--resume', 'auto'], stdout=log, stderr=log, env=os.environ)
    if done.returncode:
        sys.exit(f'{run.folder}: exit code {done.returncode}\n{(run.folder / "log").read_text()[-2000:]}')
    with (run.folder / 'seconds').open('a') as file:
        file.write(f'{time.monotonic() - start:.0f}\n')


def table(data: str, work_dir: Path, seeds: list[int], metric: str) -> tuple[Table, list[dict]]:
    """The table of all finished runs, and its rows as data."""
    by_seed = {seed: runs(data, seed, work_dir) for seed in seeds}
    header = [
        data,
        'seeds',
        Column(metric, '.3f'),
        Column('standard deviation', '.3f'),
        Column('less the same without attention, per seed', '+.3f'),
        Column('its standard deviation', '.3f'),
    ]
    lines, rows = [], []
    for key in by_seed[seeds[0]]:
        stage, name = key
        found = {seed: runs_[key].metrics() for seed, runs_ in by_seed.items()}
        way = {**FINETUNES, **VARIATIONS}.get(name) if stage == 'finetune' else None
        control = way.control if way else 'plain'
        plain = {seed: runs_[stage, control].metrics() for seed, runs_ in by_seed.items()}
        values = {seed: metrics[metric] for seed, metrics in found.items() if metrics}
        if not values:
            continue
        paired = [value - plain[seed][metric] for seed, value in values.items() if plain[seed]]
        row = dict(data=data, stage=stage, name=name, values=values, paired=[round(d, 4) for d in paired])
        rows.append(row)
        what = 'from scratch' if stage == 'scratch' else 'fine-tuned from plain'
        difference = [None, None] if name == control else [_mean(paired), _spread(paired)]
        every = list(values.values())
        lines.append([f'{what}: {name}', ', '.join(map(str, values)), _mean(every), _spread(every), *difference])
    return Table(header, lines, nothing=''), rows


def _mean(values: list[float]) -> float | None:
    return statistics.mean(values) if values else None


def _spread(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('what', choices=['run', 'table'])
    parser.add_argument('--data', nargs='+', choices=list(DATA), default=list(DATA))
    parser.add_argument('--data-root', help='of the data set that is run')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--work-dir', type=Path, default=ROOT / 'work_dirs/study')
    parser.add_argument('--metric', default='bbox_mAP')
    parser.add_argument('--out', type=Path, help='write the table, and the same as .json beside it')
    args = parser.parse_args()
    if args.what == 'run':
        if len(args.data) != 1 or not args.data_root:
            parser.error('run takes one --data and its --data-root')
        for seed in args.seeds:
            for key, run in runs(args.data[0], seed, args.work_dir).items():
                if run.metrics() is None:
                    train(run, args.data_root)
                print(args.data[0], seed, *key, run.metrics(), flush=True)
        return
    lines, rows, trained = [], [], {}
    for data in args.data:
        shown, found = table(data, args.work_dir, args.seeds, args.metric)
        lines.append(shown.markdown())
        rows += found
        trained[data] = _trained(data, args.work_dir)
    print('\n'.join(lines))
    if args.out:
        record = dict(**machine('benchmarks/accuracy/study.py', 'onedl-mmdetection'), trained=trained, rows=rows)
        args.out.write_text('\n'.join([*head(record), '', *lines]))
        args.out.with_suffix('.json').write_text(json.dumps(record, indent=1) + '\n')


def _trained(data: str, work_dir: Path) -> dict:
    """A description of the study. The hours are those of finished trainings, without the time that kills cost."""
    files = [*(work_dir / data).glob('*/*/seed*/seconds')]
    hours = sum(float(x) for file in files for x in file.read_text().split()) / 3600
    settings = DATA[data]
    return dict(
        config=settings.config,
        epochs=settings.epochs,
        finetune_epochs=settings.finetune_epochs,
        trainings=len(files),
        hours=round(hours, 2),
    )


if __name__ == '__main__':
    main()
