"""The record of a run: its config, and its command, versions and machine, for whoever reads the work dir later.

A copy of a config has no bases any more. So which base a config inherits from, and what it changes, is only known
while the original is loaded.
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

from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.config import CONFIG_DIR, PREFIX, config_path, config_text, shipped_configs
from cbam_mmdet.utils.files import AtomicLocalBackend

RECORD = 'vis_data/run.json'
PACKAGES = ('cbam_mmdet', 'torch', 'torchvision', 'mmcv', 'mmengine', 'mmdet')
# What a record holds. One of before 0.2 has no copy, no results and no checkpoint.
RECORDED: dict[str, type | tuple[type, ...]] = dict(
    command=str, config=(str, type(None)), copy=(str, type(None)), results=(str, type(None)),
    checkpoint=(str, type(None)), bases=list, differences=list, processes=int, versions=dict, machine=str,
)  # fmt: skip
# The arguments of the Runner, without those for folders and names. Other names in a config are its own variables.
SETTINGS = tuple(
    name
    for name in inspect.signature(Runner.__init__).parameters
    if name not in ('self', 'cfg', 'work_dir', 'launcher', 'resume', 'log_level', 'experiment_name')
)


class Setting(NamedTuple):
    """A setting of a config by its dotted name, and the repr of its values before and after. None means not set."""

    name: str
    before: str | None
    after: str | None


def write_record(
    cfg: Config,
    folder: str | Path,
    copy_in: str | Path,
    results: str | None = None,
    checkpoint: str | None = None,
) -> None:
    """Write `vis_data/run.json` into the log folder of a run, and a copy of its config.

    Args:
        cfg: the config of the run. Its `filename` is the file that the user gave.
        folder: the folder into which the run writes its log.
        copy_in: the folder for the copy: a training's work dir, or the log folder of a test.
        results: the file of a test's detections.
        checkpoint: the file that a test was made of.
    """
    bases, changes = base_differences(cfg, cfg.filename) if cfg.filename and osp.isfile(cfg.filename) else ([], [])
    copy = Path(copy_in, osp.basename(cfg.filename or 'config.py'))
    record = dict(
        command=shlex.join([osp.relpath(sys.argv[0]), *sys.argv[1:]]),
        config=cfg.filename,
        copy=copy.name,
        results=results and osp.abspath(results),
        checkpoint=checkpoint and osp.abspath(checkpoint),
        bases=bases,
        differences=changes,
        processes=get_world_size(),
        versions=dict(Python=platform.python_version(), **{name: import_module(name).__version__ for name in PACKAGES}),
        machine=_machine(),
    )
    AtomicLocalBackend().put(config_text(cfg).encode(), copy)
    AtomicLocalBackend().put(json.dumps(record, indent=1).encode(), Path(folder) / RECORD)


def read_record(folder: str | Path) -> dict:
    """What write_record wrote into a log folder; empty where another program ran.

    Raises:
        UserError: for a file that holds something else.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding='utf-8'))
        wrong = [key for key, kind in RECORDED.items() if not isinstance(record.get(key), kind)]
        wrong += [] if wrong or all(len(change) == 3 for change in record['differences']) else ['differences']
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        wrong = [f'{type(error).__name__}: {error}']
    if wrong:
        raise UserError(f'{path} is not a record that tools/train.py wrote ({wrong[0]}): move it away to go on without')
    return record


def base_differences(cfg: Config, path: str) -> tuple[list[str], list[Setting]]:
    """The settings in which a config differs from the base that its file names.

    Args:
        cfg: the config, with all options that were merged into it.
        path: the file that it was read from.

    Returns:
        The files of the bases, none if the config has no base or is written as pure Python, and the settings that
        differ.
    """
    bases = [_resolve(base, path) for base in Config._get_base_files(path)]
    if not bases:
        return [], []
    base = Config.fromstring(f'_base_ = {bases!r}', '.py')
    return bases, differences(base, cfg)


def differences(before: Config, after: Config) -> list[Setting]:
    """The settings that differ between two configs. Equal ones for validation and test are listed as one."""
    old, new = ({key: v for name in SETTINGS for key, v in _flat(cfg.get(name), name)} for cfg in (before, after))
    names = sorted(old.keys() | new.keys(), key=lambda name: (SETTINGS.index(name.split('.')[0]), name))
    # Nearly everything that is built from a config treats a missing setting like None.
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
    """The path of the shipped config with this file name, if there is exactly one."""
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
    """(dotted name, value) of each leaf. A list of plain values is one leaf."""
    if isinstance(value, dict) and value:
        return [leaf for key, item in value.items() if key != '_scope_' for leaf in _flat(item, f'{name}.{key}')]
    if isinstance(value, (list, tuple)) and any(isinstance(item, dict) for item in value):
        return [leaf for i, item in enumerate(value) for leaf in _flat(item, f'{name}.{i}')]
    # Where one config file has a list, another one may have a tuple.
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
