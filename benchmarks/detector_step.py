"""A training step of a detector with CBAM against its plain twin, side by side in one run.

    python benchmarks/detector_step.py [--config faster_rcnn_r50_cbam.py] [--batch 2] [--size 1333 800] [--amp]
                                       [--out benchmarks/results/NAME]

A step is forward, loss, backward and SGD on drawn images with drawn boxes, without the loading of data. The contenders
are the same detector: plain, with CBAM eager and, where there is a GPU, with CBAM fused and with the tail of its blocks
fused as well. Times are medians of rounds that alternate between them. `cost` is what a step takes beyond the plain
one's. --profile adds each contender's most expensive operators.
"""

import argparse
import copy
import statistics
import time
from pathlib import Path

import cbam_mmdet  # isort: skip  (before mmdet)

import torch
from mmdet.structures import DetDataSample
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData
from record import machine, write
from tqdm import tqdm

from cbam_mmdet.models.fused_tail import fuse_tails
from cbam_mmdet.models.gates import find_cbams
from cbam_mmdet.ops.functional import INTERPRETED
from cbam_mmdet.utils.config import load_config


def draw(batch: int, width: int, height: int, device: str, boxes: int = 7) -> tuple[torch.Tensor, list[DetDataSample]]:
    """Images of noise, each with some boxes. The mean of COCO is 7."""
    samples = []
    for _ in range(batch):
        corner = torch.rand(boxes, 2) * torch.tensor([width, height]) / 2
        extent = (0.1 + 0.4 * torch.rand(boxes, 2)) * torch.tensor([width, height])
        size = dict(img_shape=(height, width), pad_shape=(height, width), batch_input_shape=(height, width))
        truth = DetDataSample(metainfo=dict(size, scale_factor=(1.0, 1.0)))
        labels = torch.randint(80, (boxes,))
        truth.gt_instances = InstanceData(bboxes=torch.cat([corner, corner + extent], 1), labels=labels)
        truth.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
        samples.append(truth.to(device))
    return torch.randn(batch, 3, height, width, device=device), samples


class Step:
    """A detector and its optimizer. A call trains one step."""

    def __init__(self, model: torch.nn.Module, device: str, amp: bool, channels_last: bool) -> None:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.model = model.train().to(device, memory_format=layout)
        self.device, self.amp, self.layout = device, amp, layout
        self.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-5, momentum=0.9)

    def __call__(self, images: torch.Tensor, samples: list[DetDataSample]) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.amp):
            losses = self.model(images.contiguous(memory_format=self.layout), copy.deepcopy(samples), mode='loss')
            loss = self.model.parse_losses(losses)[0]
        loss.backward()
        self.optimizer.step()
        if self.device == 'cuda':
            torch.cuda.synchronize()


def build(config: str, impl: str | None, fuse_tail: bool = False) -> torch.nn.Module:
    """The detector with this `impl` in every CBAM, or its plain twin for None."""
    cfg = load_config(cbam_mmdet.config_path(config))
    cfg.model.backbone.init_cfg = None
    if impl is None:
        cfg.model.backbone.pop('plugins')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    for cbam in find_cbams(model).values():
        cbam.impl = impl
    if fuse_tail:
        fuse_tails(model.backbone)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--config', default='faster_rcnn_r50_cbam.py', help='one that the package ships, with CBAM as `plugins`'
    )
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument('--size', nargs=2, type=int, default=[1333, 800], metavar=('W', 'H'))
    parser.add_argument('--amp', action='store_true', help='autocast to bf16')
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--profile', action='store_true', help='print the most expensive operators of a step')
    parser.add_argument('--out', type=Path, help='write NAME.json, NAME.md and NAME.png')
    args = parser.parse_args()

    init_default_scope('mmdet')
    facts = machine('benchmarks/detector_step.py', 'onedl-mmdetection', 'triton')
    contenders = {'plain': (None,), 'eager': ('eager',)}
    if args.device == 'cuda' or INTERPRETED:
        contenders |= {'fused': ('fused',), 'fused tail': ('fused', True)}
    batch = draw(args.batch, *args.size, args.device)
    steps = {
        name: Step(build(args.config, *how), args.device, args.amp, args.channels_last)
        for name, how in contenders.items()
    }
    times = {name: [] for name in steps}
    for i in tqdm(range(args.rounds + 2), disable=None):
        for name, step in steps.items():
            start = time.perf_counter()
            step(*batch)
            if i >= 2:  # the first two rounds are a warm-up
                times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in times.items()}
    rows = []
    for name, step in steps.items():
        cost = statistics.median(b / a - 1 for a, b in zip(times['plain'], times[name], strict=True))
        row = dict(what=name, step_ms=round(1e3 * median[name], 1), cost_percent=round(100 * cost, 1))
        if args.device == 'cuda':
            torch.cuda.reset_peak_memory_stats()
            step(*batch)
            row['peak_mb'] = round(torch.cuda.max_memory_allocated() / 2**20)
        rows.append(row)
        if args.profile:
            with torch.profiler.profile() as profile:
                step(*batch)
            key = 'self_cuda_time_total' if args.device == 'cuda' else 'self_cpu_time_total'
            print(f'{name}\n{profile.key_averages().table(sort_by=key, row_limit=20)}')
    record = dict(facts, config=args.config, batch=args.batch, size=args.size, amp=args.amp,
                  channels_last=args.channels_last, rounds=args.rounds, rows=rows)  # fmt: skip
    write(record, args.out, ['training step'], {row['what']: [row['step_ms']] for row in rows}, 'ms')


if __name__ == '__main__':
    main()
