"""Peak memory of each epoch of a training, in the main process and in those that load its images: does it grow?

    python benchmarks/memory_over_epochs.py [--epochs 20] [--out benchmarks/results/memory_over_epochs.json]

The demo's detector, made small, trains on 64 generated images. Every epoch has a validation and a checkpoint, and the
workers stay from epoch to epoch. Each peak is the kernel's own (VmHWM), which is set back at every epoch's end, so that
none is missed. Linux only.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from record import machine

from cbam_mmdet.cli import run_tool
from cbam_mmdet.datasets import ensure_shapes

ROOT = Path(__file__).resolve().parent.parent


def peak(process: str = 'self') -> float:
    """The peak memory of a process in MiB since the last call, or since its start."""
    lines = Path(f'/proc/{process}/status').read_text().splitlines()
    kilobytes = next(int(line.split()[1]) for line in lines if line.startswith('VmHWM'))
    Path(f'/proc/{process}/clear_refs').write_text('5')
    return kilobytes / 1024


class PeakHook(Hook):
    """Record the peaks after each epoch with its validation."""

    priority = 'HIGHEST'  # at the end of the training, before another hook ends the workers

    def __init__(self) -> None:
        self.main: list[float] = []
        self.workers: list[float] = []

    def before_train_epoch(self, runner: Runner) -> None:
        if runner.epoch:
            self._look(runner)

    def after_train(self, runner: Runner) -> None:
        self._look(runner)

    def _look(self, runner: Runner) -> None:
        self.main.append(peak())
        workers = runner.train_dataloader._iterator._workers + runner.val_dataloader._iterator._workers
        self.workers.append(sum(peak(str(worker.pid)) for worker in workers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--epochs', type=int, default=20)
    parser.add_argument('--out', type=Path, help='write the figures as JSON')
    args = parser.parse_args()
    from cbam_mmdet.apis import train

    hook, build = PeakHook(), train.build_runner
    train.build_runner = lambda cfg, hooks: build(cfg, [*hooks, hook])
    with tempfile.TemporaryDirectory() as folder:
        ensure_shapes(Path(folder, 'shapes'), num_train=64, num_val=16, image_size=64, progress=False)
        cfg = Config.fromfile(ROOT / 'configs/demo/faster_rcnn_cbam.py')
        cfg.merge_from_dict({
            'train_cfg.max_epochs': args.epochs,
            'train_cfg.val_interval': 1,
            'default_hooks.checkpoint.interval': 1,
            'model.backbone.base_channels': 4,
            'model.neck.in_channels': [16, 32, 64, 128],
        })  # fmt: skip
        train.train(cfg, data_root=str(Path(folder, 'shapes')), work_dir=str(Path(folder, 'work')))
    growth = {
        name: round(max(peaks[3:]) - peaks[2], 1) for name, peaks in (('main', hook.main), ('workers', hook.workers))
    }
    record = dict(
        **machine('benchmarks/memory_over_epochs.py', 'onedl-mmdetection'),
        unit='MiB',
        main_process=[round(value, 1) for value in hook.main],
        loading_processes=[round(value, 1) for value in hook.workers],
        highest_later_peak_less_that_of_the_third_epoch=growth,
    )
    print(json.dumps(record))
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + '\n')


if __name__ == '__main__':
    sys.exit(run_tool(main))
