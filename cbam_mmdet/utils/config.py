"""Load and check MMEngine configs, and point them at other data: for the tools and for notebooks."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import inspect
import json
import os.path as osp
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.registry import OPTIMIZERS, Registry, init_default_scope
from mmengine.runner import Runner
from mmengine.utils import import_modules_from_strings

from cbam_mmdet.compat.mmengine import yaml_without_code
from cbam_mmdet.errors import UserError, did_you_mean
from cbam_mmdet.utils.config_types import refuse_code, with_tuples
from cbam_mmdet.utils.config_variables import settings_made_of

SPLITS = ('train', 'val', 'test')
CONFIG_DIR = Path(__file__).parents[1] / '.mim' / 'configs'
# Top-level names that a training or a test reads: those of MMEngine's Runner, and those of this package.
RUNNER_SETTINGS = {*inspect.signature(Runner.__init__).parameters} - {'self', 'cfg'} | {
    'runner_type', 'strategy', 'model_wrapper_cfg', 'find_unused_parameters', 'sync_bn', 'compile', 'auto_scale_lr',
    'tta_model', 'tta_pipeline', 'custom_imports', 'gate_statistics', 'broken_images', 'data_preprocessor',
    'activation_checkpointing', 'efficient_conv_bn_eval',
}  # fmt: skip
PREFIX = 'cbam_mmdet::'


def shipped_configs() -> list[str]:
    """The names of the configs that the package ships, except `_base_/`, whose files only define names for others."""
    names = (path.relative_to(CONFIG_DIR).as_posix() for path in CONFIG_DIR.rglob('*.py'))
    return sorted(name for name in names if not name.startswith('_base_/'))


def config_path(name: str) -> str:
    """The path of a config that the package ships, e.g. 'faster_rcnn_r50_cbam.py'.

    Raises:
        UserError: for an unknown name. The message suggests similar names.
    """
    path = CONFIG_DIR / name
    if not path.is_file():
        shipped = shipped_configs()
        raise UserError(
            f'cbam_mmdet ships no config {name!r}{did_you_mean(name, shipped) or "."} It has: {", ".join(shipped)}'
        )
    return str(path)


def load_config(path: str, cfg_options: dict | None = None, check: Callable[[Config], None] | None = None) -> Config:
    """Read a config file, or one that the package ships ('cbam_mmdet::NAME.py'), and merge options into it.

    Args:
        path: the config's file.
        cfg_options: dotted keys and values to set.
        check: is called with the config before its `custom_imports` are imported, which may take seconds.

    Raises:
        UserError: if the file is missing or is not a config, if an option does not fit, or if a JSON or YAML file names
            code that is not registered.
    """
    path = find_config_file(path)
    with _readable(path), yaml_without_code():
        cfg = Config.fromfile(path, import_custom_modules=False)
    if path.endswith('.json'):
        cfg = Config(with_tuples(cfg.to_dict()), cfg.text, cfg.filename, cfg.env_variables)
    _check_kind(cfg, path)
    _merge(cfg, cfg_options or {}, path)
    if check:
        check(cfg)
    if cfg.get('custom_imports'):
        with _readable(path):
            import_modules_from_strings(**cfg.custom_imports)
    if not path.endswith('.py'):
        refuse_code(cfg.to_dict(), path)
    return cfg


def config_text(cfg: Config) -> str:
    """The text of a config's file, in the format that its `filename` has.

    MMEngine takes `{{ ... }}` in a file for a variable, also where it is a part of a class name: there the text has an
    escape. A YAML file gets JSON, which is YAML too and has such escapes.
    """
    if cfg.filename is None or cfg.filename.endswith('.py'):
        return cfg.pretty_text.replace('{{', '{\\x7b')
    return json.dumps(cfg.to_dict(), indent=2).replace('{{', '{\\u007b')


def find_config_file(path: str) -> str:
    """The path of a config file, or of one that the package ships ('cbam_mmdet::NAME.py').

    Raises:
        UserError: if it does not exist, with similar names.
    """
    if path.startswith(PREFIX):
        return config_path(path[len(PREFIX) :])
    if not osp.isfile(path):
        folder = Path(path).parent
        siblings = [str(p) for p in folder.glob('*.py')] if folder.is_dir() else []
        raise UserError(f'config {path!r} does not exist{did_you_mean(path, siblings)}')
    return path


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a config is code, which may raise anything
        raise UserError(f'config {path!r} cannot be read: {type(error).__name__}: {error}') from error


def _check_kind(cfg: Config, path: str) -> None:
    if 'data' in cfg and 'train_dataloader' not in cfg:
        raise UserError(
            f'config {path!r} is written for MMDetection 2.x (data=..., runner=...): its migration guide says how to '
            'rewrite it for 3.x (train_dataloader=..., train_cfg=...)'
        )
    if 'model' not in cfg:
        raise UserError(f'config {path!r} has no `model`: it is not the config of a detector')


def _merge(cfg: Config, cfg_options: dict, path: str) -> None:
    for key in cfg_options:
        first = key.split('.')[0]
        if first not in cfg and first not in RUNNER_SETTINGS:
            hint = did_you_mean(first, RUNNER_SETTINGS)
            if hint:
                raise UserError(f'--cfg-options {key}: the config has no {first!r}{hint}')
            warnings.warn(
                f'--cfg-options {key}: the config has no {first!r}, and no setting has this name', stacklevel=3
            )
        elif first not in RUNNER_SETTINGS:
            _refuse_variable(cfg, key, cfg_options[key])
        _refuse_misspelt(cfg, key)
    try:
        cfg.merge_from_dict(cfg_options)
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f'--cfg-options {cfg_options} does not fit config {path!r}: {error}') from error


def _refuse_variable(cfg: Config, key: str, value: object) -> None:
    """Refuse a name that the config file uses for settings, which have their values by now.

    Raises:
        UserError: which names these settings, as options to copy.
    """
    first, _, inner = key.partition('.')
    settings = {name: cfg[name] for name in cfg if name in RUNNER_SETTINGS}
    places = list(_places_of(settings))
    made = {
        f'{place}.{inner}' if inner else place: same for place, same in settings_made_of(first, cfg.filename).items()
    }
    same, computed = ([place for place in places if made.get(place) is wanted] for wanted in (True, False))
    last = key.split('.')[-1]
    meant = same or [place for place in places if place.split('.')[-1] == last][:3]
    if meant or computed:
        options = ' '.join(f'{place}={value}' for place in meant)
        more = f' (computed of it: {", ".join(computed)})' if computed else ''
        raise UserError(
            f'--cfg-options {key}: no setting is called {first!r}. The config file uses the name for others, which '
            f'have their values by now. Set those: {options or ", ".join(computed)}{more if options else ""}'
        )
    warnings.warn(
        f'--cfg-options {key}: no setting is called {first!r}. What the config file makes of it stays as it is',
        stacklevel=4,
    )


def _places_of(node: object, place: str = '') -> Iterator[str]:
    """The dotted keys of everything in a config."""
    if isinstance(node, Mapping):
        pairs = [(str(key), value) for key, value in node.items()]
    else:
        pairs = [(str(i), value) for i, value in enumerate(node)] if isinstance(node, (list, tuple)) else []
    for key, value in pairs:
        inner = f'{place}.{key}' if place else key
        yield inner
        yield from _places_of(value, inner)


def _refuse_misspelt(cfg: Config, key: str) -> None:
    """Refuse a new key beside one of nearly the same name, in a group of settings that nobody else would miss it in.

    So is one that only a group inside has: a two-stage detector reads test_cfg.rcnn.score_thr, not test_cfg.score_thr.

    A dict with a `type` is built, and what builds it refuses keys that it does not take. The names of modules in
    `custom_keys` are the user's.

    Raises:
        UserError: which names the other key.
    """
    parts, node = key.split('.'), cfg
    for depth, part in enumerate(parts):
        if isinstance(node, (list, tuple)):
            if not part.isdigit() or int(part) >= len(node):
                return
            node = node[int(part)]
            continue
        if not isinstance(node, Mapping) and not isinstance(node, Config):
            return
        if part not in node:
            inner = [place for place in _places_of(node) if place.split('.')[-1] == part]
            alike = inner[-1:] or difflib.get_close_matches(part, map(str, node), n=1, cutoff=0.85)
            numbered = alike and re.sub(r'\d', '', part) == re.sub(r'\d', '', alike[0])  # stage3 beside stage2
            if depth and alike and not numbered and 'type' not in node and parts[depth - 1] != 'custom_keys':
                where = '.'.join(parts[:depth])
                raise UserError(
                    f'--cfg-options {key}: {where} has no {part!r}; did you mean {alike[0]!r}? A new setting that is '
                    'called so can stand in the config file'
                )
            return
        node = node[part]


def set_default_scope(cfg: Config) -> None:
    """Let MMEngine look up names in a config's default scope. A config without one gets MMDetection's."""
    init_default_scope(cfg.setdefault('default_scope', 'mmdet'))


def class_of(registry: Registry, type_: str | type | None) -> type | None:
    """The class that a config's `type` means: a name in a registry, or the class itself. None for an unknown name."""
    return registry.get(type_) if isinstance(type_, str) else type_


def type_name(type_: object) -> str:
    """The name that a config's `type` means, without its package: of a name, or of the class itself."""
    return type_.__name__ if isinstance(type_, type) else str(type_).rpartition('.')[2]


def datasets_of(dataset: ConfigDict | list | None) -> Iterator[ConfigDict]:
    """The data sets that hold data, inside all wrappers (RepeatDataset, ConcatDataset, MultiImageMixDataset)."""
    for candidate in dataset if isinstance(dataset, (list, tuple)) else [dataset]:
        if not candidate:
            continue
        inner = candidate.get('dataset') or candidate.get('datasets')
        if inner:
            yield from datasets_of(inner)
        else:
            yield candidate


def split_datasets(cfg: Config, split: str) -> list[ConfigDict]:
    """The data sets of one split, 'train', 'val' or 'test'."""
    loader = cfg.get(f'{split}_dataloader')
    return list(datasets_of(loader.get('dataset'))) if loader else []


def evaluators_of(cfg: Config, split: str) -> list[ConfigDict]:
    """The metrics of one split, 'val' or 'test'."""
    return [metric for _, metric in named_evaluators(cfg, split)]


def named_evaluators(cfg: Config, split: str) -> list[tuple[str, ConfigDict]]:
    """The metrics of one split, each with its dotted key: one, those of a list, or an evaluator's `metrics`."""
    return list(_evaluators(cfg.get(f'{split}_evaluator'), f'{split}_evaluator'))


def _evaluators(node: ConfigDict | list | None, key: str) -> Iterator[tuple[str, ConfigDict]]:
    if isinstance(node, (list, tuple)):
        for i, item in enumerate(node):
            yield from _evaluators(item, f'{key}.{i}')
    elif node and _holds_metrics(node):
        yield from _evaluators(node.metrics, f'{key}.metrics')
    elif node:
        yield key, node


def _holds_metrics(evaluator: ConfigDict) -> bool:
    """Whether `metrics` are metrics. Those of MMEngine's Evaluator are, and a metric may have names under this key."""
    inner = evaluator.get('metrics')
    items = inner if isinstance(inner, (list, tuple)) else [inner]
    return bool(inner) and all(isinstance(item, dict) for item in items)


def set_data_root(cfg: Config, data_root: str) -> None:
    """Point every dataloader and every evaluator of a config at another folder with the same layout.

    Raises:
        UserError: if an evaluator's annotation file is not below the config's data root, or data sets of several roots
            would become the same.
    """
    new = data_root.rstrip('/') + '/'
    old_roots = set()
    for split in SPLITS:
        roots: dict[str, str | None] = {}  # of the data sets, by what they read below the new one
        for dataset, old in [(it, it.get('data_root')) for it in split_datasets(cfg, split)]:  # it may be there twice
            if old:
                old_roots.add(old.rstrip('/') + '/')
            dataset.data_root = new
            if dataset.get('ann_file'):
                dataset.ann_file = _below_new_root(dataset.ann_file, old_roots, new)
            for key, folder in (dataset.get('data_prefix') or {}).items():
                dataset.data_prefix[key] = _below_new_root(folder, old_roots, new)
            read = repr((dataset.get('ann_file'), dataset.get('data_prefix')))
            if dataset.get('ann_file') and roots.setdefault(read, old) != old:
                raise UserError(
                    f'--data-root: the {split} data sets of the config are in {roots[read]} and {old}, and below '
                    f'{data_root} both would be {dataset.ann_file}: take a config that has one'
                )
    for split in SPLITS:
        for key, metric in named_evaluators(cfg, split):
            ann_file = metric.get('ann_file')
            if not ann_file:
                continue
            metric.ann_file = _below_new_root(ann_file, old_roots, new)
            if metric.ann_file == ann_file and not ann_file.startswith(new):
                raise UserError(
                    f"--data-root: {key}'s ann_file {ann_file!r} is not below the config's data_root "
                    f'{sorted(old_roots)}; give it by --cfg-options {key}.ann_file=FILE'
                )
    if 'data_root' in cfg:
        cfg.data_root = new


def _below_new_root(path: str, old_roots: set[str], new: str) -> str:
    """The path below the new data root, if it lies below one of the old ones. Other paths stay as they are."""
    for root in sorted(old_roots, key=len, reverse=True):
        if path.startswith(root):
            return new + path[len(root) :]
    return path


def check_optimizer(cfg: Config) -> None:
    """Check `optim_wrapper.optimizer.type`. For an unknown one MMEngine only says that None is not callable.

    Raises:
        UserError: for an unknown type. The message suggests similar names.
    """
    name = (cfg.get('optim_wrapper') or {}).get('optimizer', {}).get('type')
    if isinstance(name, str) and OPTIMIZERS.get(name) is None:
        known = list(OPTIMIZERS.module_dict)
        raise UserError(
            f'optim_wrapper.optimizer.type={name!r} is not a registered optimizer{did_you_mean(name, known)}'
        )


def check_evaluators(cfg: Config) -> None:
    """Check that the packages of the evaluators are installed. FasterCocoMetric would fail after the last image only.

    Raises:
        UserError: if one is not. The message says what to install.
    """
    for split in ('val', 'test'):
        for key, metric in named_evaluators(cfg, split):
            if metric.get('type') == 'FasterCocoMetric' and importlib.util.find_spec('faster_coco_eval') is None:
                raise UserError(
                    f'{key}.type=FasterCocoMetric needs the package faster-coco-eval, '
                    'which is not installed here (pip install faster-coco-eval); '
                    "type='cbam_mmdet.HotCocoMetric' gives the same figures, with or without another package"
                )
