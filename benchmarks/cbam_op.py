"""CBAM alone, side by side in one run: time, memory, and bytes kept for the backward pass.

    python benchmarks/cbam_op.py [--shapes C2 C3 C4 C5] [--batch 2] [--dtypes float32 bfloat16]
                                 [--out benchmarks/results/NAME]

It compares the equations in plain PyTorch (`textbook`, plain_cbam.py), torch.compile of these, timm's CbamModule where
timm is installed, and our CBAM, eager and fused. `fused` is the C library on a CPU and the Triton kernels on a GPU;
TRITON_INTERPRET=1 tries these on a CPU.

Times are medians of rounds that alternate between the contenders, so that a slow moment of the machine affects all of
them. On a GPU they are measured by events. Compare the ratios: milliseconds belong to one machine. `bandwidth` is that
of the forward pass, counted as 3 reads and 1 write of x, as a share of the bandwidth of copying x.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from plain_cbam import PlainCBAM, saved_share
from record import keep_freed_memory, machine, rotated, write
from tqdm import tqdm

from cbam_mmdet import CBAM
from cbam_mmdet.errors import UserError

# The stages of a ResNet-50 and a ResNet-18 for images of 800x1333, R-50's first at half that size too, those of VGG-16
# for SSD300, and SSD300's last maps.
SHAPES = {
    'C2': (256, 200, 334), 'C3': (512, 100, 167), 'C4': (1024, 50, 84), 'C5': (2048, 25, 42), 'C2half': (256, 100, 168),
    'R18C2': (64, 200, 334), 'R18C3': (128, 100, 167), 'R18C4': (256, 50, 84), 'R18C5': (512, 25, 42),
    'VGG1': (64, 300, 300), 'VGG2': (128, 150, 150), 'VGG3': (256, 75, 75), 'VGG5': (512, 19, 19),
    'SSD38': (512, 38, 38), 'SSD19': (1024, 19, 19), 'SSD10': (512, 10, 10), 'SSD5': (256, 5, 5),
}  # fmt: skip
LAYOUTS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}


def contenders(channels: int, x: torch.Tensor, names: list[str]) -> dict[str, torch.nn.Module]:
    """The modules with these names that can be built here."""

    def textbook():
        return PlainCBAM(channels).to(x.device, x.dtype)

    def timm():
        from timm.layers.cbam import CbamModule

        return CbamModule(channels).to(x.device, x.dtype)

    makers = {
        'textbook': textbook,
        'timm': timm,
        'compiled': lambda: torch.compile(textbook(), fullgraph=True),
        'eager': lambda: CBAM(channels, impl='eager').to(x.device),
        'fused': lambda: CBAM(channels, impl='fused').to(x.device),
    }
    modules = {}
    for name in names:
        try:
            module = makers[name]()
            if name == 'fused':
                module.implementation(x)
        except (ImportError, UserError) as error:
            tqdm.write(f'{name} is left out: {error}')
        else:
            modules[name] = module
    return modules


def milliseconds(run: Callable[[], None], device: torch.device) -> float:
    if device.type == 'cuda':
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def medians(runs: dict[str, Callable[[], None]], device: torch.device, args: argparse.Namespace) -> dict[str, float]:
    """The median of the milliseconds of each run, measured in turns."""
    times = {name: [] for name in runs}
    for i in range(args.rounds + args.warm_up):
        for name in rotated([*runs], i):
            taken = milliseconds(runs[name], device)
            if i >= args.warm_up:
                times[name].append(taken)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(case: dict, names: list[str], device: torch.device, args: argparse.Namespace) -> list[dict]:
    """A row for each contender."""
    torch.set_num_threads(case['threads'])
    channels, *size = SHAPES[case['shape']]
    dtype = getattr(torch, case['dtype'])
    x, grad = torch.randn(2, case['batch'], channels, *size, device=device).to(dtype).unbind(0)
    x, grad = (t.contiguous(memory_format=LAYOUTS[case['layout']]) for t in (x, grad))
    x.requires_grad_()
    copy = torch.empty_like(x)
    modules = contenders(channels, x, names)

    def forward(module):
        def run():
            with torch.no_grad():
                module(x)

        return run

    def both(module):
        def run():
            x.grad = None
            module(x).backward(grad)

        return run

    copying = medians({'copy': lambda: copy.copy_(x.detach())}, device, args)['copy']
    times = {name: medians({k: make(m) for k, m in modules.items()}, device, args)
             for name, make in (('forward', forward), ('both', both))}  # fmt: skip
    rows = []
    for name, module in modules.items():
        row = dict(case, what=name, forward_ms=times['forward'][name], forward_backward_ms=times['both'][name])
        if 'textbook' in times['both']:
            row['forward_speedup'] = times['forward']['textbook'] / times['forward'][name]
            row['speedup'] = times['both']['textbook'] / times['both'][name]
        row['bandwidth'] = 2 * copying / times['forward'][name]
        row['copy_gb_per_s'] = 2e-6 * x.numel() * x.element_size() / copying
        row['kept_percent'] = 100 * saved_share(module, x)
        if device.type == 'cuda':
            row['extra_mb'] = _peak(both(module)) / 2**20
        rows.append({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})
    return rows


def _peak(run: Callable[[], None]) -> int:
    """The peak number of bytes of the run, beyond those that existed before."""
    run()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--shapes', nargs='+', default=['C2', 'C3', 'C4', 'C5'], choices=SHAPES)
    parser.add_argument('--batch', nargs='+', type=int, default=[2])
    parser.add_argument('--dtypes', nargs='+', default=['float32'], choices=['float32', 'bfloat16', 'float16'])
    parser.add_argument('--layouts', nargs='+', default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--what', nargs='+', choices=['textbook', 'timm', 'compiled', 'eager', 'fused'],
                        help='default: all that run on the device')  # fmt: skip
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--warm-up', type=int, default=2, help='rounds before those that count')
    parser.add_argument('--threads', nargs='+', type=int, default=[torch.get_num_threads()], help='of PyTorch on a CPU')
    parser.add_argument('--keep-memory', action='store_true', help='on a CPU: keep freed memory, see record.py')
    parser.add_argument('--out', type=Path, help='write NAME.json, NAME.md and NAME.png')
    args = parser.parse_args()

    device = torch.device(args.device)
    kept = device.type == 'cpu' and args.keep_memory and keep_freed_memory()
    names = args.what or ['textbook', 'timm', 'compiled', 'eager', 'fused']
    facts = machine('benchmarks/cbam_op.py', 'timm', 'triton')
    cases = [
        dict(shape=shape, batch=batch, dtype=dtype, layout=layout, threads=threads)
        for threads, shape, batch, dtype, layout in itertools.product(
            args.threads, args.shapes, args.batch, args.dtypes, args.layouts
        )
    ]
    rows = []
    for case in tqdm(cases, disable=None):
        torch._dynamo.reset()
        rows += measure(case, names, device, args)

    means = {
        f'geometric_mean_{key}': {
            name: round(statistics.geometric_mean(row[key] for row in rows if row['what'] == name), 2)
            for name in dict.fromkeys(row['what'] for row in rows)
        }
        for key in ('forward_speedup', 'speedup')
        if all(key in row for row in rows)
    }
    record = dict(facts, rounds=args.rounds, warm_up=args.warm_up, freed_memory_is_kept=kept, **means, rows=rows)
    labels = ['\n'.join(map(str, case.values())) for case in cases]
    bars = {}
    for row in rows:
        bars.setdefault(row['what'], []).append(row['forward_backward_ms'])
    write(record, args.out, labels, bars, 'ms, forward + backward')


if __name__ == '__main__':
    main()
