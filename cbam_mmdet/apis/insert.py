"""CBAM put into a detector that is trained already: a config and a checkpoint to fine-tune from.

With gate='unit' every CBAM starts as the exact identity, since its gates are 2 * sigmoid(0) = 1. So the new
detector's outputs are those of the plain one, bit for bit.

There is no exact fold back to the paper's sigmoid: 2 * sigmoid reaches above 1, sigmoid does not, and no bias of the
last layer makes 2 * sigmoid(z) = sigmoid(z + b) for all z. The factors 2 * 2 of the two gates cannot go into the norm
before the CBAM either: the gates are computed from that norm's output and would change with it.

Everything else of the plain config stays: learning rate and its schedule, weight decay, norm_eval. CBAM follows them
as any layer does. Each of these defaults has its row in benchmarks/results/accuracy_study.md;
docs/does_cbam_help.md says which.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import MODELS
from mmengine.config import Config, ConfigDict
from torch import nn

from cbam_mmdet.engine.checkpoint.compare import compare_state_dicts
from cbam_mmdet.engine.checkpoint.content import meta_of, weights_of
from cbam_mmdet.engine.checkpoint.files import find_checkpoint, write_checkpoint
from cbam_mmdet.engine.checkpoint.loading import load_checkpoint
from cbam_mmdet.errors import UserError
from cbam_mmdet.models.gates import find_cbams
from cbam_mmdet.models.plugins.backbone import PluginBackbone
from cbam_mmdet.models.plugins.places import OUTPUTS, matches, names_of, usual_place
from cbam_mmdet.utils.config import class_of, config_text, set_default_scope
from cbam_mmdet.utils.files import AtomicLocalBackend


@dataclass(frozen=True)
class Inserted:
    """What insert_cbam wrote: two files, the names of the new modules, and how many parameters they have."""

    config: Path
    checkpoint: Path
    modules: list[str]
    parameters: int


def insert_cbam(
    cfg: Config,
    checkpoint: str,
    out_dir: str,
    *,
    cbam: Mapping[str, Any] | None = None,
    after: str | list[str] | None = None,
    seed: int = 0,
    trust_checkpoint: bool = False,
) -> Inserted:
    """Write the config and the checkpoint of the same detector with CBAM in its backbone.

    Args:
        cfg: the plain detector's config; it is changed in place.
        checkpoint: its weights, a file or a work dir; every key must fit.
        out_dir: where NAME_cbam.py (or .yaml, .json) and NAME_cbam.pth go, NAME being the config's. The new config's
            load_from is the new checkpoint.
        cbam: CBAM's arguments; gate='unit' unless it says otherwise.
        after: where, as PluginBackbone's `after`; by default the backbone's usual place, without the stages that are
            frozen.
        seed: of the weights of CBAM that start at random.
        trust_checkpoint: load the checkpoint by full unpickling, which runs code from the file.

    Raises:
        UserError: if another file has the new config's name, the detector has CBAM already or no backbone that takes
            it, or the checkpoint does not fit the plain config.
    """
    name = f'{Path(cfg.filename).stem}_cbam'
    new_config, new_checkpoint = Path(out_dir, name + Path(cfg.filename).suffix), Path(out_dir, f'{name}.pth')
    set_default_scope(cfg)
    if not cfg.get('model', {}).get('backbone'):
        raise UserError(f'{cfg.filename} has no model.backbone to put CBAM into')
    given = load_checkpoint(find_checkpoint(checkpoint), 'cpu', trust_checkpoint)
    plain = _build_plain(cfg, given, checkpoint)
    plugin = dict(
        cfg=dict(type='CBAM', **{'gate': 'unit', **(cbam or {})}), after=after or _trained_places(plain.backbone)
    )
    _add_plugin(cfg.model, plugin)
    _load_from(cfg, new_checkpoint)
    text = config_text(cfg).encode()
    if new_config.exists() and new_config.read_bytes() != text:
        raise UserError(
            f'{new_config} exists already, and is not what would be written now: name another --out-dir, or remove it'
        )
    torch.manual_seed(seed)
    model = MODELS.build(copy.deepcopy(cfg.model))
    modules = _load_plain_weights(model, given)
    meta = {key: value for key, value in meta_of(given).items() if key == 'dataset_meta'}
    write_checkpoint(dict(meta=meta, state_dict=model.state_dict()), new_checkpoint)
    AtomicLocalBackend().put(text, new_config)
    parameters = sum(p.numel() for key in modules for p in model.get_submodule(key).parameters())
    return Inserted(new_config, new_checkpoint, modules, parameters)


def _build_plain(cfg: Config, checkpoint: Mapping, name: str) -> nn.Module:
    """The plain detector, of which the checkpoint must have every key."""
    _forget_pretrained(cfg.model)
    # A copy, because DETR and its kin write into what they are built of, and refuse to be built of it again.
    plain = MODELS.build(copy.deepcopy(cfg.model))
    if find_cbams(plain):
        raise UserError(f'{cfg.filename} has CBAM in its model already: give the config of the plain detector')
    compare_state_dicts(checkpoint, plain, strict=True, name=name)
    return plain


def _add_plugin(model: ConfigDict, plugin: Mapping) -> None:
    """Put a PluginBackbone around the backbone, or the plugin into the one that is there."""
    backbone = model.backbone
    wrapped = class_of(MODELS, backbone.type) is PluginBackbone
    model.backbone = ConfigDict(
        type='PluginBackbone',
        backbone=backbone.backbone if wrapped else backbone,
        plugins=[*((backbone.get('plugins') or []) if wrapped else []), plugin],
    )


def _load_plain_weights(model: nn.Module, checkpoint: Mapping) -> list[str]:
    """Load the plain detector's weights, of which none may be missing or left over; the names of the CBAMs."""
    left = model.load_state_dict(weights_of(checkpoint), strict=False)
    modules = list(find_cbams(model))
    others = [key for key in left.missing_keys if not key.startswith(tuple(f'{module}.' for module in modules))]
    if others or left.unexpected_keys:
        raise RuntimeError(f'CBAM changed other keys of the model: {others + left.unexpected_keys}')
    return modules


def _load_from(cfg: Config, checkpoint: Path) -> None:
    cfg.load_from, cfg.resume = str(checkpoint.absolute()), False  # from whatever folder it is trained
    imports = cfg.setdefault('custom_imports', ConfigDict(imports=[]))
    imports.imports = list(dict.fromkeys([*imports.imports, 'cbam_mmdet']))
    cfg.pop('work_dir', None)


def _forget_pretrained(model: ConfigDict) -> None:
    """The checkpoint holds every weight: nothing is to be fetched."""
    model.backbone.init_cfg = None
    if isinstance(model.backbone.get('backbone'), Mapping):
        model.backbone.backbone.init_cfg = None


def _trained_places(backbone: nn.Module) -> list[str]:
    """The usual place, but only in the stages that train: a CBAM in a frozen one never would."""
    patterns = usual_place(backbone)
    if not patterns:
        raise UserError(
            f'where CBAM usually goes in a {type(backbone).__name__} is not known: name the modules by --after (see '
            'tools/list_backbones.py)'
        )
    frozen = getattr(backbone, 'frozen_stages', -1)
    if 1 <= frozen < 4 and all(pattern.startswith('layer*.') for pattern in patterns):
        return [pattern.replace('layer*', f'layer[{frozen + 1}-4]', 1) for pattern in patterns]
    names = [name for name in names_of(backbone) if any(matches(pattern, name) for pattern in patterns)]
    trained = [name for name in names if name == OUTPUTS or _trains(backbone, name)]
    if not trained:
        raise UserError(
            f'every stage is frozen (frozen_stages={frozen}): CBAM would never train. Set model.backbone.frozen_stages '
            'lower'
        )
    return patterns if trained == names else trained


def _trains(backbone: nn.Module, name: str) -> bool:
    """Whether a place is in a block that trains. The norm itself may be frozen, as in networks of Caffe's."""
    parameters = [*backbone.get_submodule(name.rpartition('.')[0]).parameters()]
    return not parameters or any(parameter.requires_grad for parameter in parameters)
