"""What CBAM adds to whole networks, side by side in one run: the inference and the training step.

    python benchmarks/network.py [--networks r50 r18 vgg16 ssd300] [--modes inference training]
                                 [--out benchmarks/results/NAME]

A network is a config's backbone, or its whole detector, with drawn images and boxes and without the loading of data.
Inference is the forward pass; a training step is forward, loss, backward and SGD, where a backbone's loss is the sum of
its outputs. The contenders are the same network with another module in CBAM's places: nothing (`plain`), the equations
in plain PyTorch (`textbook`, plain_cbam.py), torch.compile of these, timm's CbamModule where timm is installed, and our
CBAM: `ours` as it chooses, `eager` without kernels, and on a GPU `fused tail` where blocks have one.

Times are medians of rounds that alternate between the contenders. `added` is what a contender takes beyond plain in the
same round, as a share of plain, with its quartiles over the rounds; `of textbook` is that as a share of what textbook
takes beyond plain. Milliseconds belong to one machine, the shares less so. On a CPU an image of a training step has
half the size by default.
"""

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cbam_mmdet  # isort: skip  (before mmdet)

import torch
from mmdet.structures import DetDataSample
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData
from plain_cbam import PlainCBAM
from record import keep_freed_memory, machine, rotated, write
from torch import nn
from tqdm import tqdm

from cbam_mmdet.errors import UserError
from cbam_mmdet.models.cbam import CBAM
from cbam_mmdet.models.fused_tail import fuse_tails
from cbam_mmdet.models.gates import find_cbams
from cbam_mmdet.utils.config import load_config


@dataclass(frozen=True)
class Network:
    """A part of the model of a config that the package ships: its backbone, or all of it."""

    config: str
    part: str
    batch: int
    width: int
    height: int


NETWORKS = {
    'r50': Network('faster_rcnn_r50_cbam.py', 'backbone', 1, 1333, 800),
    'r18': Network('faster_rcnn_r18_cbam.py', 'backbone', 1, 1333, 800),
    'vgg16': Network('ssd300_vgg16_cbam_coco.py', 'backbone', 1, 300, 300),
    'ssd300': Network('ssd300_vgg16_cbam_coco.py', 'detector', 4, 300, 300),
    'faster_rcnn_r50': Network('faster_rcnn_r50_cbam.py', 'detector', 1, 1333, 800),
}
LAYOUTS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16}


def timm_cbam(channels: int) -> nn.Module:
    from timm.layers.cbam import CbamModule

    return CbamModule(channels)


def ours(impl: str) -> Callable[[int], nn.Module]:
    return lambda channels: CBAM(channels, impl=impl)


MODULES: dict[str, Callable[[int], nn.Module]] = {
    'plain': lambda channels: nn.Identity(),
    'textbook': PlainCBAM,
    'timm': timm_cbam,
    'compiled': lambda channels: torch.compile(PlainCBAM(channels)),
    'ours': ours('auto'),
    'eager': ours('eager'),
    'fused tail': ours('auto'),
}


def build(network: Network, contender: str) -> nn.Module:
    """The network with the contender's module in each of CBAM's places.

    Raises:
        ImportError, UserError: if there is no such contender here, or not in this network.
    """
    cfg = load_config(cbam_mmdet.config_path(network.config))
    cfg.model.backbone.init_cfg = None
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    for name, cbam in find_cbams(model).items():
        parent, _, child = name.rpartition('.')
        setattr(model.get_submodule(parent), child, MODULES[contender](cbam.channel.fc1.in_features))
    if contender == 'fused tail':
        fuse_tails(model.backbone)
    return model.backbone if network.part == 'backbone' else model


def draw(batch: int, width: int, height: int, device: str, boxes: int = 7) -> tuple[torch.Tensor, list[DetDataSample]]:
    """Images of noise, each with some boxes. The mean of COCO is 7."""
    samples = []
    for _ in range(batch):
        corner = torch.rand(boxes, 2) * torch.tensor([width, height]) / 2
        extent = (0.1 + 0.4 * torch.rand(boxes, 2)) * torch.tensor([width, height])
        size = dict(img_shape=(height, width), pad_shape=(height, width), batch_input_shape=(height, width))
        truth = DetDataSample(metainfo=dict(size, ori_shape=(height, width), scale_factor=(1.0, 1.0)))
        labels = torch.randint(80, (boxes,))
        truth.gt_instances = InstanceData(bboxes=torch.cat([corner, corner + extent], 1), labels=labels)
        truth.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
        samples.append(truth.to(device))
    return torch.randn(batch, 3, height, width, device=device), samples


class Run:
    """A network in one mode. A call is one inference, or one training step."""

    def __init__(self, model: nn.Module, mode: str, device: str, dtype: torch.dtype, layout: torch.memory_format):
        model.train(mode == 'training')  # MMDetection's backbones return None
        self.model = model.to(device, memory_format=layout)
        self.mode, self.device, self.dtype, self.layout = mode, device, dtype, layout
        self.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-9, momentum=0.9)

    def __call__(self, images: torch.Tensor, samples: list[DetDataSample]) -> None:
        images = images.contiguous(memory_format=self.layout)
        is_detector = hasattr(self.model, 'bbox_head') or hasattr(self.model, 'rpn_head')
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            if self.mode == 'inference':
                with torch.no_grad():
                    _ = (
                        self.model(images, copy.deepcopy(samples), mode='predict')
                        if is_detector
                        else self.model(images)
                    )
            elif is_detector:
                losses = self.model(images, copy.deepcopy(samples), mode='loss')
                loss = self.model.parse_losses(losses)[0]
            else:
                loss = sum(out.float().mean() for out in self.model(images))
        if self.mode == 'training':
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        if self.device == 'cuda':
            torch.cuda.synchronize()


def measure(case: dict, names: list[str], args: argparse.Namespace) -> list[dict]:
    """A row for each contender."""
    network, mode = NETWORKS[case['network']], case['mode']
    half = 2 if args.device == 'cpu' and mode == 'training' and network.width > 300 else 1
    batch = draw(args.batch or network.batch, network.width // half, network.height // half, args.device)
    runs = {}
    for name in names:
        try:
            model = build(network, name)
        except (ImportError, UserError) as error:
            tqdm.write(f'{name} is left out of {case["network"]}: {error}')
            continue
        runs[name] = Run(model, mode, args.device, DTYPES[case['dtype']], LAYOUTS[case['layout']])
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(args.rounds + 2):
        for name in rotated([*runs], i):
            start = time.perf_counter()
            runs[name](*batch)
            if i >= 2:  # the first two rounds are a warm-up
                times[name].append(1e3 * (time.perf_counter() - start))
    plain = statistics.median(times['plain'])
    shares = {
        name: [100 * (b - a) / plain for a, b in zip(times['plain'], values, strict=True)]
        for name, values in times.items()
    }
    added = {name: statistics.median(values) for name, values in shares.items()}
    rows = []
    for name, run in runs.items():
        row = dict(case, size=f'{tuple(batch[0].shape)}', what=name, ms=round(statistics.median(times[name]), 1))
        low, _, high = statistics.quantiles(shares[name]) if len(shares[name]) > 1 else 3 * shares[name]
        row |= dict(added_percent=round(added[name], 1), quartiles=f'{low:.1f} to {high:.1f}')
        row['of_textbook'] = round(added[name] / added['textbook'], 2) if added.get('textbook') else None
        if args.device == 'cuda':
            torch.cuda.reset_peak_memory_stats()
            run(*batch)
            row['peak_mb'] = round(torch.cuda.max_memory_allocated() / 2**20)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--networks', nargs='+', default=['r50', 'r18', 'ssd300'], choices=NETWORKS)
    parser.add_argument('--modes', nargs='+', default=['inference', 'training'], choices=['inference', 'training'])
    parser.add_argument('--dtypes', nargs='+', default=['float32'], choices=DTYPES, help='bfloat16: by autocast')
    parser.add_argument('--layouts', nargs='+', default=['contiguous'], choices=LAYOUTS)
    parser.add_argument('--batch', type=int, help='images, 1 by default, SSD 4')
    parser.add_argument('--threads', type=int, help="of PyTorch on a CPU; all of the machine's by default")
    parser.add_argument('--keep-memory', action='store_true', help='on a CPU: keep freed memory, see record.py')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--what', nargs='+', choices=MODULES, help='default: all that run on the device')
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--out', type=Path, help='write NAME.json, NAME.md and NAME.png')
    args = parser.parse_args()

    init_default_scope('mmdet')
    if args.threads:
        torch.set_num_threads(args.threads)
    kept = args.device == 'cpu' and args.keep_memory and keep_freed_memory()
    names = args.what or [name for name in MODULES if args.device == 'cuda' or name != 'fused tail']
    facts = machine('benchmarks/network.py', 'onedl-mmdetection', 'timm', 'triton')
    cases = [
        dict(network=network, mode=mode, dtype=dtype, layout=layout)
        for network, mode, dtype, layout in itertools.product(args.networks, args.modes, args.dtypes, args.layouts)
    ]
    rows = []
    for case in tqdm(cases, disable=None):
        torch._dynamo.reset()
        rows += measure(case, ['plain', *(name for name in names if name != 'plain')], args)
    record = dict(facts, threads=torch.get_num_threads(), freed_memory_is_kept=kept, rounds=args.rounds, rows=rows)
    labels = [f'{case["network"]}\n{case["mode"]}\n{case["dtype"]}\n{case["layout"]}' for case in cases]
    bars: dict[str, list[float | None]] = {}
    for i, case in enumerate(cases):
        for row in rows:
            if row['what'] != 'plain' and case.items() <= row.items():
                bars.setdefault(row['what'], [None] * len(cases))[i] = row['added_percent']
    write(record, args.out, labels, bars, '% added to plain')


if __name__ == '__main__':
    main()
