"""What GateStatisticsHook costs: training steps that it logs, beside the same steps without it, in one run.

    python benchmarks/gate_hook.py [--config demo/faster_rcnn_cbam.py] [--batch 8] [--size 128 128] [--rounds 25]
                                   [--out benchmarks/results/gate_hook]

A step is that of network.py. A logged step also runs the hook around it and writes through MMEngine's
visualizer. Both alternate on one detector, so that a slow moment of the machine affects both. `cost_ms` is the median
of the pairs' differences. A training logs one step in `interval`, so the hook's share of a training is cost_ms /
(interval * step_ms). `hook_ms` is the time inside the hook's own methods, without the recording within the forward
pass.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import cbam_mmdet  # noqa: F401  # isort: skip  (before mmdet)

import torch
from mmengine.hooks import LoggerHook
from mmengine.registry import init_default_scope
from mmengine.visualization import Visualizer
from network import Network, Run, build, draw
from record import machine, write
from tqdm import tqdm

from cbam_mmdet.engine.hooks.gate_statistics import GateStatisticsHook
from cbam_mmdet.models.gates import find_cbams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--config', default='demo/faster_rcnn_cbam.py', help='one that the package ships')
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--size', nargs=2, type=int, default=[128, 128], metavar=('W', 'H'))
    parser.add_argument('--interval', type=int, default=10, help='of logging; 50 in the configs for COCO')
    parser.add_argument('--amp', action='store_true', help='autocast to bf16')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--rounds', type=int, default=25)
    parser.add_argument('--out', type=Path, help='write NAME.json, NAME.md and NAME.png')
    args = parser.parse_args()

    init_default_scope('mmdet')
    facts = machine('benchmarks/gate_hook.py', 'onedl-mmdetection', 'onedl-mmengine')
    network = Network(args.config, 'detector', args.batch, *args.size)
    dtype = torch.bfloat16 if args.amp else torch.float32
    step = Run(build(network, 'ours'), 'training', args.device, dtype, torch.contiguous_format)
    images, samples = draw(args.batch, *args.size, args.device)
    for sample in samples:
        sample.gt_instances.labels %= 6  # the demo has six classes
    plain, logged, inside = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        visualizer = Visualizer('gate_hook', vis_backends=[dict(type='LocalVisBackend')], save_dir=folder)
        runner = SimpleNamespace(
            model=step.model, hooks=[LoggerHook(interval=1)], visualizer=visualizer, iter=0, train_dataloader=range(1)
        )
        hook = GateStatisticsHook()
        hook.before_train(runner)
        for i in tqdm(range(args.rounds + 2), disable=None):
            times = {}
            for with_hook in (i % 2 == 0, i % 2 == 1):  # so that neither is always first
                start = time.perf_counter()
                if with_hook:
                    hook.before_train_iter(runner, 0)
                begun = time.perf_counter()
                step(images, samples)
                ended = time.perf_counter()
                if with_hook:
                    hook.after_train_iter(runner, 0)
                    own = begun - start + time.perf_counter() - ended
                times[with_hook] = time.perf_counter() - start
            if i >= 2:  # the first two rounds are a warm-up
                plain.append(times[False])
                logged.append(times[True])
                inside.append(own)
    step_ms = 1e3 * statistics.median(plain)
    cost_ms = 1e3 * statistics.median(b - a for a, b in zip(plain, logged, strict=True))
    hook_ms = 1e3 * statistics.median(inside)
    row = dict(
        cbams=len(find_cbams(step.model)),
        step_ms=round(step_ms, 1),
        logged_step_ms=round(1e3 * statistics.median(logged), 1),
        cost_ms=round(cost_ms, 2),
        hook_ms=round(hook_ms, 2),
        hook_percent_of_a_logged_step=round(100 * hook_ms / step_ms, 3),
        hook_percent_of_a_training=round(100 * hook_ms / step_ms / args.interval, 4),
    )
    record = dict(facts, config=args.config, batch=args.batch, size=args.size, amp=args.amp, interval=args.interval,
                  rounds=args.rounds, rows=[row])  # fmt: skip
    bars = dict(plain=[row['step_ms']], logged=[row['logged_step_ms']])
    write(record, args.out, ['training step'], bars, 'ms')


if __name__ == '__main__':
    main()
