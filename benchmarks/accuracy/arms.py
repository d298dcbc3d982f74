"""The arms of pretrained_study.py: what is put into the pretrained detector, where, and how it is trained.

Trainings import this module, too (custom_imports), for its plugin and its hooks.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import Runner
from torch import Tensor, nn

from cbam_mmdet.models.cbam import CBAM
from cbam_mmdet.models.gates import find_cbams

ALL_STAGES = 'timm_model.blocks.[2-6].*.bn3'  # those that train, strides 8 to 32
LAST_STAGES = 'timm_model.blocks.[56].*.bn3'  # stride 32
PAPER = dict(type='CBAM', reduction=4)
UNIT = dict(**PAPER, gate='unit')


@dataclass(frozen=True)
class Arm:
    """A way to train the detector.

    Attributes:
        plugin: the attention; None for none.
        after: its places in the backbone; None for the outputs of the neck.
        lr_mult: the attention's learning rate, as a multiple of the detector's.
        decay_mult: its weight decay, in the same way.
        hooks: custom hooks of the training.
        pretrained: whether the backbone starts from its ImageNet weights.
    """

    plugin: dict | None = None
    after: str | None = ALL_STAGES
    lr_mult: float = 1.0
    decay_mult: float = 1.0
    hooks: tuple[dict, ...] = field(default=())
    pretrained: bool = True

    def apply(self, plain: Config) -> Config:
        """The config of this arm, from the plain detector's."""
        cfg = copy.deepcopy(plain)
        model = cfg.model
        if self.plugin and self.after:
            plugins = [dict(cfg=self.plugin, after=self.after)]
            model.backbone = dict(type='PluginBackbone', backbone=model.backbone, plugins=plugins)
        elif self.plugin:
            model.neck = dict(type='PluginNeck', neck=model.neck, plugins=[dict(cfg=self.plugin)])
        if (self.lr_mult, self.decay_mult) != (1, 1):
            cbam = dict(lr_mult=self.lr_mult, decay_mult=self.decay_mult)
            cfg.optim_wrapper.paramwise_cfg = dict(custom_keys=dict(cbam=cbam))
        cfg.custom_hooks = [*cfg.get('custom_hooks', []), *map(dict, self.hooks)]
        cfg.custom_imports.imports = [*cfg.custom_imports.imports, 'arms']
        return cfg


ARMS = {
    'plain': Arm(),
    'SE': Arm(dict(**PAPER, pools=('avg',), spatial=None)),
    'CBAM, paper': Arm(PAPER),
    'CBAM, unit gate': Arm(UNIT),
    'unit gate, last stages': Arm(UNIT, after=LAST_STAGES),
    'unit gate, neck outputs': Arm(UNIT, after=None),
    'unit gate, lr x 10': Arm(UNIT, lr_mult=10),
    'unit gate, no weight decay': Arm(UNIT, decay_mult=0),
    'unit gate, its norm trains': Arm(UNIT, hooks=(dict(type='TrainGateNorms'),)),
    'unit gate, backbone frozen first': Arm(UNIT, hooks=(dict(type='FreezeBackboneFirst'),)),
    'paper gate, residual': Arm(dict(type='ResidualCBAM', reduction=4)),
    'plain, random weights': Arm(pretrained=False),
}


@MODELS.register_module()
class ResidualCBAM(CBAM):
    """x + a * (CBAM(x) - x), where a is learned and starts at 0: the identity, whatever the gates are."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.a = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.lerp(x, super().forward(x), self.a)


@HOOKS.register_module()
class TrainGateNorms(Hook):
    """The norms of CBAM use the statistics of the batch, while norm_eval holds all others of the backbone."""

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        for cbam in find_cbams(runner.model).values():
            cbam.spatial.bn.train()


@HOOKS.register_module()
class FreezeBackboneFirst(Hook):
    """In the first epoch only the gates train in the backbone."""

    def before_train_epoch(self, runner: Runner) -> None:
        for name, parameter in self._pretrained(runner.model):
            parameter.requires_grad_(runner.epoch > 0 and name in self.trained)

    def before_train(self, runner: Runner) -> None:
        self.trained = {name for name, parameter in self._pretrained(runner.model) if parameter.requires_grad}

    @staticmethod
    def _pretrained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        return [item for item in model.backbone.named_parameters() if '.cbam.' not in item[0]]
