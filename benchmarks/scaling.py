"""PROJECTION of a training step of a detector on 1, 8, 64 and 256 GPUs, from pieces measured in one process.

    python benchmarks/scaling.py [CONFIG] --data-root /path/to/coco [--step-time SECONDS] [--out FILE.json]

Measured here: the parameters and the bytes that a step all-reduces, the bytes kept for the backward pass of one
image, and the images/s that one core loads. Published: the speeds of the links (docs/scaling.md names the sources).
The time of a step on one GPU is measured where torch sees one. Elsewhere it is --step-time; without it, what
depends on it is open.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import cbam_mmdet  # isort: skip  (before mmdet)

import cv2
import torch
from mmdet.structures import DetDataSample
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.structures import InstanceData

from cbam_mmdet.utils.config import load_config, set_data_root
from cbam_mmdet.utils.tables import Column, Table

GPUS, GPUS_PER_NODE = (1, 8, 64, 256), 8
COCO_IMAGES = 117_266  # the images of train2017 with a box
# Bytes per second in one direction. For a GPU this is half of NVLink 4's 900 GB/s, for a node the sum of all its ports.
NVLINK = 450e9
NETWORKS = {
    '8 x 400 Gb/s a node': 400e9,
    '8 x 200 Gb/s a node': 200e9,
    '100 Gb/s a node': 12.5e9,
    '10 Gb/s a node': 1.25e9,
}
HEIGHT, WIDTH = 800, 1344


def all_reduce_seconds(count: int, size: float, network: float) -> float:
    """The time of rings through all GPUs, one for each port, without latency.

    2 (N - 1) / N of the bytes cross every link, and the slowest link decides.

    Args:
        count: N, the GPUs.
        size: bytes of the gradients.
        network: bytes a second in and out of a node, over all its ports; every ring passes each node once.
    """
    bandwidth = NVLINK if count <= GPUS_PER_NODE else min(NVLINK, network)
    return 2 * (count - 1) / count * size / bandwidth


def step_seconds(count: int, size: float, network: float, alone: float) -> tuple[float, float]:
    """(All of the all-reduce hidden behind the backward pass, as DDP tries to; none hidden).

    The backward pass is taken as two thirds of a step: two products where the forward pass has one.
    """
    transfer = all_reduce_seconds(count, size, network)
    return alone + max(0.0, transfer - alone * 2 / 3), alone + transfer


def sample(boxes: int = 10) -> DetDataSample:
    random = torch.Generator().manual_seed(0)
    corner = torch.rand(boxes, 2, generator=random) * torch.tensor([WIDTH, HEIGHT]) / 2
    extent = 50 + torch.rand(boxes, 2, generator=random) * 300
    size = dict(img_shape=(HEIGHT, WIDTH), pad_shape=(HEIGHT, WIDTH), batch_input_shape=(HEIGHT, WIDTH))
    truth = DetDataSample(metainfo=dict(size, scale_factor=(1.0, 1.0)))
    labels = torch.randint(80, (boxes,), generator=random)
    truth.gt_instances = InstanceData(bboxes=torch.cat([corner, corner + extent], 1), labels=labels)
    truth.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    return truth


def loss_of(model: torch.nn.Module, batch: int, device: str) -> torch.Tensor:
    images = torch.randn(batch, 3, HEIGHT, WIDTH, device=device)
    return model.parse_losses(model(images, [sample().to(device) for _ in range(batch)], mode='loss'))[0]


def kept_bytes(model: torch.nn.Module) -> int:
    """The bytes that are kept for the backward pass of one image, without the weights."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(model, 1, 'cpu')
    total = sum(kept.values())
    del loss  # the storages exist until here, so no address is used twice
    return total


def loading_rate(dataset: dict, seconds: float) -> float:
    """Images per second that one process loads, through the training pipeline and into a batch."""
    images = DATASETS.build(dataset)
    start, count = time.perf_counter(), 0
    while time.perf_counter() < start + seconds:
        pseudo_collate([images[count % len(images)]])
        count += 1
    return count / (time.perf_counter() - start)


def measure_step(model: torch.nn.Module, batch: int, rounds: int = 20) -> tuple[float, int]:
    """The median seconds of forward, backward and SGD on this GPU in fp32, and its peak memory in bytes."""
    model = model.cuda()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-5, momentum=0.9)
    times = []
    for _ in range(rounds + 5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        optimizer.zero_grad()
        loss_of(model, batch, 'cuda').backward()
        optimizer.step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[5:])[rounds // 2], torch.cuda.max_memory_allocated()


def table(figures: dict) -> str:
    """The projection as Markdown, with '?' if the time of a step is not known."""
    size, alone, batch = figures['all_reduce_bytes'], figures['step_seconds'], figures['batch']
    cases = [
        (count, name, network)
        for count in GPUS
        for name, network in (
            NETWORKS.items() if count > GPUS_PER_NODE else [('NVLink' if count > 1 else 'none', NVLINK)]
        )
    ]

    def efficiency(count: int, _: str, network: float) -> str | None:
        return alone and ' to '.join(f'{alone / t:.0%}' for t in step_seconds(count, size, network, alone))

    columns = {
        'GPUs': lambda case: case[0],
        'network': lambda case: case[1],
        'images a step': lambda case: case[0] * batch,
        'iterations an epoch of COCO': lambda case: -(-COCO_IMAGES // (case[0] * batch)),
        Column('sent a GPU, MB', '.0f'): lambda case: 2 * (case[0] - 1) / case[0] * size / 1e6,
        Column('all-reduce, ms', '.1f'): lambda case: 1e3 * all_reduce_seconds(case[0], size, case[2]),
        Column('efficiency, hidden to not', number=True): lambda case: efficiency(*case),
    }
    return Table.of(cases, columns, nothing='?').markdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', nargs='?', default=cbam_mmdet.config_path('faster_rcnn_r50_cbam.py'))
    parser.add_argument('--data-root', required=True, help="images to load, in the config's layout")
    parser.add_argument('--step-time', type=float, metavar='S', help='seconds of a step on one GPU, if known')
    parser.add_argument('--seconds', type=float, default=20, help='how long to load images')
    parser.add_argument('--out', type=Path, help='write the figures as JSON')
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)

    cfg = load_config(args.config)
    set_data_root(cfg, args.data_root)
    init_default_scope('mmdet')
    cfg.model.backbone.init_cfg = None
    model = MODELS.build(cfg.model).train()
    batch = cfg.train_dataloader.batch_size
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    figures = dict(
        config=Path(args.config).stem,
        machine=f'{platform.machine()}, {os.cpu_count()} cores',
        torch=torch.__version__,
        batch=batch,
        trained_parameters=trained,
        all_reduce_bytes=4 * trained,
        # The weights, and for each trained parameter a gradient, its copy in DDP's bucket, and SGD's momentum.
        fixed_bytes=weights + 3 * 4 * trained,
        kept_bytes_per_image=kept_bytes(model),
        images_per_second_and_core=loading_rate(cfg.train_dataloader.dataset, args.seconds),
        step_seconds=args.step_time,
        step_source='given by --step-time' if args.step_time else 'not known: no GPU here',
    )
    if torch.cuda.is_available() and not args.step_time:
        figures['step_seconds'], figures['peak_bytes'] = measure_step(model, batch)
        figures['step_source'] = f'measured on {torch.cuda.get_device_name()}'
    print('PROJECTION, not a measurement. Its pieces:\n')
    for key, value in figures.items():
        print(f'    {key}: {value:,.1f}' if isinstance(value, float) else f'    {key}: {value}')
    if figures['step_seconds']:
        needed = batch / figures['step_seconds'] / figures['images_per_second_and_core']
        print(f'    cores that load for one GPU: {needed:.2f}')
    print(f'\n{table(figures)}', end='')
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + '\n')


if __name__ == '__main__':
    main()
