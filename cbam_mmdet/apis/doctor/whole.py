"""Self-tests of what comes together: a checkpoint that is saved and loaded, and a detector with CBAM that learns."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterator

import torch

from cbam_mmdet.apis.doctor.case import Case
from cbam_mmdet.engine.checkpoint.files import write_checkpoint
from cbam_mmdet.engine.checkpoint.loading import load_checkpoint
from cbam_mmdet.errors import UserError
from cbam_mmdet.models.cbam import CBAM

REMEDY = 'the message says what is wrong; if it helps you no further, please report it with this page'


def cases(devices: list[str]) -> Iterator[Case]:
    """Of the checkpoints one, of the detector one for each device."""
    yield Case('a checkpoint, saved and loaded without running code', _checkpoint, REMEDY)
    for device in devices:
        yield Case(
            f'a detector with CBAM, a training step and a detection, {device}',
            functools.partial(_detector, device),
            REMEDY,
        )


class _MakesAFolder:
    """Unpickled by force, it makes a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def _checkpoint() -> str | None:
    weights = CBAM(16).state_dict()
    with tempfile.TemporaryDirectory() as folder:
        path, trap = os.path.join(folder, 'a.pth'), os.path.join(folder, 'trap')
        write_checkpoint(dict(state_dict=weights, meta=dict(epoch=1)), path)
        loaded = load_checkpoint(path)['state_dict']
        if weights.keys() != loaded.keys() or not all(torch.equal(weights[key], loaded[key]) for key in weights):
            return 'the weights are not those that were saved'
        torch.save(dict(state_dict=weights, more=_MakesAFolder(trap)), path)
        try:
            load_checkpoint(path)
        except UserError:
            return 'code of the file ran' if os.path.exists(trap) else None
        return 'a file that would run code was not refused'


def _detector(device: str) -> str | None:
    import mmdet.models  # noqa: F401 (registers)
    from mmdet.structures import DetDataSample
    from mmengine.registry import MODELS, DefaultScope
    from mmengine.structures import InstanceData

    from cbam_mmdet.utils.config import config_path, load_config

    cfg = load_config(config_path('demo/faster_rcnn_cbam.py'))
    cfg.model.backbone.base_channels, cfg.model.neck.in_channels = 4, [16, 32, 64, 128]
    with torch.random.fork_rng(), DefaultScope.overwrite_default_scope('mmdet'):
        torch.manual_seed(0)
        model = MODELS.build(cfg.model).to(device).train()
        size = dict.fromkeys(('img_shape', 'pad_shape', 'batch_input_shape', 'ori_shape'), (64, 64))
        sample = DetDataSample(metainfo=dict(size, scale_factor=(1.0, 1.0)))
        boxes, labels = torch.tensor([[8.0, 8, 40, 40], [20, 4, 60, 50]]), torch.tensor([0, 1])
        sample.gt_instances = InstanceData(bboxes=boxes, labels=labels)
        sample.ignored_instances = InstanceData(bboxes=boxes[:0], labels=labels[:0])
        images, samples = torch.randn(1, 3, 64, 64, device=device), [sample.to(device)]
        loss = model.parse_losses(model(images, samples, mode='loss'))[0]
        loss.backward()
        if not loss.isfinite():
            return f'the loss is {float(loss)}'
        gates = [module for module in model.modules() if isinstance(module, CBAM)]
        if not gates or not all(
            p.grad is not None and p.grad.isfinite().all() for gate in gates for p in gate.parameters()
        ):
            return 'a CBAM in it gets no finite gradient'
        with torch.no_grad():
            found = model.eval()(images, samples, mode='predict')[0].pred_instances
    return None if found.bboxes.isfinite().all() else 'a detected box is not finite'
