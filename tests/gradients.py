"""One training step of a small FCOS with CBAM, in float64, in one process or in several: gradients and statistics.

It is FCOS because its losses are divided by the number of objects in all processes. AllReduceBN synchronizes the norms,
as torch's SyncBatchNorm does not support CPUs. A single process has torch's own BatchNorm.
"""

import cbam_mmdet  # noqa: F401  # isort: skip  (before mmdet)

import torch
from mmdet.structures import DetDataSample
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData
from torch import distributed, nn
from torch.distributed.nn.functional import all_reduce

from cbam_mmdet.engine.distributed import end_process

BATCH, SIZE, CLASSES = 4, 64, 3
PLACES = ('plugins', 'PluginBackbone')


@MODELS.register_module()
class AllReduceBN(nn.BatchNorm2d):
    """Batch statistics over all processes of equally many pixels: means and mean squares are averaged."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        moments = torch.stack([x.mean((0, 2, 3)), (x**2).mean((0, 2, 3))])
        mean, square = all_reduce(moments) / distributed.get_world_size()
        var = square - mean**2
        count = x.numel() // x.shape[1] * distributed.get_world_size()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        weight = self.weight / (var + self.eps).sqrt()
        return x * weight[:, None, None] + (self.bias - mean * weight)[:, None, None]


def build(place, norm):
    norm_cfg, cbam = dict(type=norm), dict(type='CBAM', reduction=4, norm_cfg=dict(type=norm, momentum=0.01))
    backbone = dict(type='ResNet', base_channels=4, norm_cfg=norm_cfg, norm_eval=False, frozen_stages=-1)
    if place == 'plugins':
        backbone.update(depth=50, plugins=[dict(cfg=cbam, position='after_conv3')])
    else:
        backbone = dict(type=place, backbone=dict(backbone, depth=18), plugins=[dict(cfg=cbam, after='layer*.*.bn2')])
    channels = [16, 32, 64, 128] if place == 'plugins' else [4, 8, 16, 32]
    head = dict(type='mmdet.FCOSHead', num_classes=CLASSES, in_channels=8, stacked_convs=1, feat_channels=8)
    head.update(strides=[8, 16, 32], norm_cfg=dict(type='GN', num_groups=2))
    head.update(regress_ranges=((-1, 16), (16, 32), (32, 1e8)), loss_bbox=dict(type='IoULoss'))
    neck = dict(type='mmdet.FPN', in_channels=channels, out_channels=8, start_level=1, num_outs=3)
    init_default_scope('mmdet')
    return MODELS.build(dict(type='mmdet.FCOS', backbone=backbone, neck=neck, bbox_head=head))


def batch():
    """Images with 1, 2, 3, 4 boxes: the two halves have different numbers of objects."""
    random = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=random, dtype=torch.float64)
    samples = []
    for i in range(BATCH):
        corner = torch.rand(i + 1, 2, generator=random, dtype=torch.float64) * SIZE / 2
        extent = 10 + torch.rand(i + 1, 2, generator=random, dtype=torch.float64) * SIZE / 3
        labels = torch.randint(CLASSES, (i + 1,), generator=random)
        shape = dict(img_shape=(SIZE, SIZE), pad_shape=(SIZE, SIZE), batch_input_shape=(SIZE, SIZE))
        sample = DetDataSample(metainfo=shape)
        sample.gt_instances = InstanceData(bboxes=torch.cat([corner, corner + extent], 1), labels=labels)
        samples.append(sample)
    return images, samples


def step(place, rank=0, processes=1):
    """Gradients of all parameters and the statistics of all norms, after a step on this process's share of a batch."""
    torch.manual_seed(0)
    model = build(place, 'AllReduceBN' if processes > 1 else 'BN').double().train()
    run = model
    if processes > 1:
        run = MMDistributedDataParallel(model, device_ids=None, broadcast_buffers=False)
    images, samples = batch()
    share = slice(rank * BATCH // processes, (rank + 1) * BATCH // processes)
    losses = run(images[share], samples[share], mode='loss')
    model.parse_losses(losses)[0].backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return gradients, {name: buffer for name, buffer in model.named_buffers() if 'running' in name}


def step_in_a_group(rank, processes, folder):
    """What each of several processes does; the first writes the result to folder/gradients.pt."""
    distributed.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=processes)
    result = {place: step(place, rank, processes) for place in PLACES}
    if rank == 0:
        torch.save(result, f'{folder}/gradients.pt')
    end_process(0)
