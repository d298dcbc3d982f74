"""A config made small enough for a first look: does it run from data to scores?"""

from __future__ import annotations

from typing import Any

from mmengine.config import Config, ConfigDict

from cbam_mmdet.utils.config import SPLITS, split_datasets, type_name
from cbam_mmdet.utils.logging import log

IMAGES = {'train': 4, 'val': 10, 'test': 10}
SIDE = 320  # pixels


def make_small(cfg: Config) -> None:
    """Let a config train one epoch on a few small images and test on a few more, without pretrained weights, in place.

    No score reaches a usual threshold after so few iterations: it is set to 0, so that there are figures to see.
    """
    for split in SPLITS:
        if not cfg.get(f'{split}_dataloader'):
            continue
        _repeat_once(cfg[f'{split}_dataloader'].dataset)
        cfg[f'{split}_dataloader'].batch_size = min(cfg[f'{split}_dataloader'].batch_size, 2)
        for dataset in split_datasets(cfg, split):
            dataset.indices = IMAGES[split]
            _shrink(dataset.get('pipeline'))
    cfg.train_cfg.val_interval = 1
    if cfg.train_cfg.get('max_iters'):
        cfg.train_cfg.max_iters = IMAGES['train'] // 2
        cfg.train_cfg.val_interval = cfg.train_cfg.max_iters
    else:
        cfg.train_cfg.max_epochs = 1
    for node in _dicts(cfg.model):
        if 'score_thr' in node:
            node.score_thr = 0.0
        if any(type_name(init.get('type')).startswith('Pretrained') for init in _dicts(node.get('init_cfg'))):
            node.init_cfg = None
        if node.get('pretrained'):
            node.pretrained = False if node.pretrained is True else None
    log(
        f'--smoke: a first look only: {IMAGES["train"]} images of at most {SIDE} pixels, one epoch, no pretrained '
        'backbone, every score. The figures mean nothing.'
    )


def _repeat_once(dataset: ConfigDict) -> None:
    for node in _dicts(dataset):
        if 'times' in node:
            node.times = 1


def _shrink(pipeline: Any) -> None:
    for step in _dicts(pipeline):
        for key in {'scale', 'scales', 'crop_size'} & step.keys():
            step[key] = _smaller(step[key])


def _smaller(scale: Any) -> Any:
    if not isinstance(scale, (list, tuple)):
        return scale
    if all(isinstance(side, int) for side in scale):
        factor = min(1, SIDE / max(scale))
        return tuple(max(round(side * factor), 32) for side in scale)
    return [_smaller(item) for item in scale]


def _dicts(node: Any) -> list[ConfigDict]:
    """All dicts in a part of a config."""
    if isinstance(node, dict):
        return [node, *(inner for value in node.values() for inner in _dicts(value))]
    return [inner for item in node for inner in _dicts(item)] if isinstance(node, (list, tuple)) else []
