"""What a training was: its command, config, versions and machine, written beside its log for tools/report.py to read.

A work dir's copy of the config is complete. Which base the config stands on, and what it changes, is known only while
it is loaded.
"""

from __future__ import annotations

import inspect
import json
import os
import os.path as osp
import platform
import shlex
import sys
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
from mmengine.config import Config
from mmengine.dist import get_world_size
from mmengine.runner import Runner

from cbam_mmdet.utils.config import CONFIG_DIR, PREFIX, config_path, shipped_configs
from cbam_mmdet.utils.files import AtomicLocalBackend

RECORD = 'vis_data/run.json'
PACKAGES = ('cbam_mmdet', 'torch', 'torchvision', 'mmcv', 'mmengine', 'mmdet')
# What the Runner is built from, but for what says where and under which name. The config's other names are variables.
SETTINGS = tuple(
    name
    for name in inspect.signature(Runner.__init__).parameters
    if name not in ('self', 'cfg', 'work_dir', 'launcher', 'resume', 'log_level', 'experiment_name')
)


class Setting(NamedTuple):
    """A setting of a config by its dotted name, its values before and after as Python writes them (None: not set)."""

    name: str
    before: str | None
    after: str | None


def write_record(cfg: Config, folder: str | Path) -> None:
    """Write `run.json` into the log folder of a training that begins.

    Args:
        cfg: the config as it is trained with; its `filename` is the one that was given.
        folder: where the training writes its log.
    """
    bases, changes = base_differences(cfg, cfg.filename) if cfg.filename and osp.isfile(cfg.filename) else ([], [])
    record = dict(
        command=shlex.join([osp.relpath(sys.argv[0]), *sys.argv[1:]]),
        config=cfg.filename,
        bases=bases,
        differences=changes,
        processes=get_world_size(),
        versions=dict(Python=platform.python_version(), **{name: import_module(name).__version__ for name in PACKAGES}),
        machine=_machine(),
    )
    AtomicLocalBackend().put(json.dumps(record, indent=1).encode(), Path(folder) / RECORD)


def base_differences(cfg: Config, path: str) -> tuple[list[str], list[Setting]]:
    """What a config changes against the base that its file names.

    Args:
        cfg: the config, with whatever options were merged into it.
        path: the file that it was read from.

    Returns:
        The base's file (several for a list of bases, none if the config stands alone or is written as plain Python),
        and the settings that differ.
    """
    bases = [_resolve(base, path) for base in Config._get_base_files(path)]
    if not bases:
        return [], []
    base = Config.fromstring(f'_base_ = {bases!r}', '.py')
    return bases, differences(base, cfg)


def differences(before: Config, after: Config) -> list[Setting]:
    """The settings that differ between two configs; those alike for validation and test are one."""
    old, new = ({key: v for name in SETTINGS for key, v in _flat(cfg.get(name), name)} for cfg in (before, after))
    names = sorted(old.keys() | new.keys(), key=lambda name: (SETTINGS.index(name.split('.')[0]), name))
    # To be unset and to be None is the same to nearly all that is built from a config.
    changed = {name: (old.get(name), new.get(name)) for name in names if old.get(name, 'None') != new.get(name, 'None')}
    settings = []
    for name, values in changed.items():
        split, _, rest = name.partition('_')
        if split == 'test' and changed.get(f'val_{rest}') == values:
            continue
        if split == 'val' and changed.get(f'test_{rest}') == values:
            name = f'{{val,test}}_{rest}'
        settings.append(Setting(name, *values))
    return settings


def shipped_config(name: str) -> str | None:
    """The path of the config of this file name that the package ships, if there is just one."""
    found = [path for path in shipped_configs() if Path(path).name == name]
    return config_path(found[0]) if len(found) == 1 else None


def _resolve(base: str, path: str) -> str:
    if '::' in base:
        return base
    base = osp.normpath(osp.join(osp.dirname(osp.abspath(path)), base))
    shipped = CONFIG_DIR.resolve()
    inside = Path(base).resolve().is_relative_to(shipped)
    return f'{PREFIX}{Path(base).resolve().relative_to(shipped).as_posix()}' if inside else base


def _flat(value: object, name: str) -> list[tuple[str, str]]:
    """(dotted name, value) of each leaf; a list of plain values is one."""
    if isinstance(value, dict) and value:
        return [leaf for key, item in value.items() if key != '_scope_' for leaf in _flat(item, f'{name}.{key}')]
    if isinstance(value, (list, tuple)) and any(isinstance(item, dict) for item in value):
        return [leaf for i, item in enumerate(value) for leaf in _flat(item, f'{name}.{i}')]
    # A list in one config file is a tuple in another.
    return [(name, repr(list(value) if isinstance(value, tuple) else value))]


def _machine() -> str:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    counted = [f'{gpus.count(name)} x {name}' for name in dict.fromkeys(gpus)]
    return ', '.join([*counted, f'{os.cpu_count()} x {_cpu()}', f'{platform.system()} {platform.machine()}'])


def _cpu() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or 'CPU'
