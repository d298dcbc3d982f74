"""CBAM alone, side by side in one run: time of forward and backward, and bytes kept for the backward pass.

    python benchmarks/cbam_op.py [--dtype bfloat16] [--device cuda] [--out benchmarks/results/NAME.json]

Compared are ours and the same equations in plain PyTorch (tests/textbook.py), in both memory layouts, at the four stages of a
ResNet-50 for 800x1333 images. Times are the medians of rounds that alternate between the two, so that a slow moment of the
machine meets both. The ratios are what counts; milliseconds belong to one machine.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent / 'tests'))

from test_functional import saved_share
from textbook import PlainCBAM

from cbam_mmdet import CBAM

STAGES = {'C2': (256, 200, 334), 'C3': (512, 100, 167), 'C4': (1024, 50, 84), 'C5': (2048, 25, 42)}


def measure(modules: dict[str, torch.nn.Module], x: torch.Tensor, rounds: int) -> dict[str, float]:
    """Median milliseconds of forward + backward for each module."""
    times = {name: [] for name in modules}
    grad = torch.randn_like(x)
    for i in range(rounds + 2):
        for name, module in modules.items():
            x.grad = None
            synchronize(x)
            start = time.perf_counter()
            module(x).backward(grad)
            synchronize(x)
            if i >= 2:  # the first two warm up
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def synchronize(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16', 'float16'])
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--out', type=Path, help='write the rows and the machine as JSON')
    args = parser.parse_args()

    rows = []
    cases = [(stage, layout) for stage in STAGES for layout in ('contiguous', 'channels_last')]
    for stage, layout in tqdm(cases, disable=None):
        channels, *size = STAGES[stage]
        x = torch.randn(args.batch, channels, *size, device=args.device, dtype=getattr(torch, args.dtype))
        if layout == 'channels_last':
            x = x.to(memory_format=torch.channels_last)
        x.requires_grad_()
        modules = {'ours': CBAM(channels).to(args.device), 'plain': PlainCBAM(channels).to(args.device, x.dtype)}
        ms = measure(modules, x, args.rounds)
        kept = {name: saved_share(module, x) for name, module in modules.items()}
        rows.append(dict(stage=stage, layout=layout, **{f'{k}_ms': round(v, 2) for k, v in ms.items()},
                         speedup=round(ms['plain'] / ms['ours'], 2),
                         **{f'{k}_kept_percent': round(100 * v, 2) for k, v in kept.items()}))  # fmt: skip

    print(f'| {" | ".join(rows[0])} |\n|{"---|" * len(rows[0])}')
    for row in rows:
        print(f'| {" | ".join(map(str, row.values()))} |')
    mean = statistics.geometric_mean(row['speedup'] for row in rows)
    print(f'\ngeometric mean of the speedups: {mean:.2f}')
    if args.out:
        device = (
            torch.cuda.get_device_name()
            if args.device.startswith('cuda')
            else f'CPU, {torch.get_num_threads()} threads'
        )
        record = dict(command=' '.join(['python', 'benchmarks/cbam_op.py', *sys.argv[1:]]), device=device, processor=processor(),
                      python=platform.python_version(), torch=torch.__version__, batch=args.batch, dtype=args.dtype,
                      geometric_mean_speedup=round(mean, 2), rows=rows)  # fmt: skip
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + '\n')


def processor() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(': ', 1)[1] for line in lines if line.startswith('model name')), platform.machine())


if __name__ == '__main__':
    main()
