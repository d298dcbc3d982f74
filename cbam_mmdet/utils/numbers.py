"""The numbers of a config that a training or a test reads, checked before anything is built."""

from __future__ import annotations

from typing import Any

from mmengine.config import Config

from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.config import SPLITS

MOST, FINITE = 2**63, 1e300
# Dotted name -> the least value, and whether it must be a whole number. What a config does not have is not checked.
LEAST: dict[str, tuple[float, bool]] = {
    'train_cfg.max_epochs': (1, True),
    'train_cfg.max_iters': (1, True),
    'train_cfg.val_interval': (1, True),
    'train_cfg.val_begin': (0, True),
    'optim_wrapper.optimizer.lr': (0, False),
    'optim_wrapper.accumulative_counts': (1, True),
    'auto_scale_lr.base_batch_size': (1, True),
    'default_hooks.logger.interval': (1, True),
    'randomness.seed': (0, True),
    **{f'{split}_dataloader.batch_size': (1, True) for split in SPLITS},
    **{f'{split}_dataloader.num_workers': (0, True) for split in SPLITS},
}


def check_numbers(cfg: Config) -> None:
    """Refuse numbers that are out of their range.

    MMEngine takes some of them without a word: with max_epochs=-1 it trains nothing. Others end in a traceback, or in a
    loss that is not finite.

    Raises:
        UserError: for the first such number, with its name, what was given and what is expected.
    """
    for name, (least, whole) in LEAST.items():
        value = _value(cfg._cfg_dict, name)
        if value is None:
            continue
        fits = isinstance(value, int) if whole else isinstance(value, (int, float))
        if isinstance(value, bool) or not fits or not least <= value < (MOST if whole else FINITE):
            kind = 'a whole number' if whole else 'a finite number'
            raise UserError(f'the config says {name}={value!r}; it must be {kind} of at least {least}')


def _value(cfg: Any, name: str) -> Any:
    for key in name.split('.'):
        if not isinstance(cfg, dict) or key not in cfg:
            return None
        cfg = cfg[key]
    return cfg
