"""Say which settings of the model a checkpoint was trained with, where the config has others.

Here are those that change no shape of a weight, as the sizes of anchors or the normalization of images: the checkpoint
fits, and computes something else. MMEngine's checkpoints hold the text of their config, which is parsed and never run.
"""

from __future__ import annotations

import ast
import inspect
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

from mmdet.registry import MODELS, TASK_UTILS
from mmengine.config import Config

from cbam_mmdet.engine.checkpoint.content import meta_of
from cbam_mmdet.engine.checkpoint.variants import NAMES, parsed
from cbam_mmdet.utils.config import class_of, type_name
from cbam_mmdet.utils.logging import log
from cbam_mmdet.utils.text import brief

# What a trained model computes does not depend on these, or they are there to be changed.
FREE = {
    'test_cfg', 'train_cfg', 'init_cfg', 'pretrained', 'num_classes', 'score_thr', 'frozen_stages', 'norm_eval',
    'requires_grad', 'with_cp', 'batch_augments', 'dn_cfg', '_scope_',
}  # fmt: skip
NORMALIZATION = ('data_preprocessor.mean', 'data_preprocessor.std', 'data_preprocessor.bgr_to_rgb')
UNKNOWN = object()  # a value that the text does not say, or a default that no signature says
MOST = 8


def warn_of_other_settings(checkpoint: object, cfg: Config, strict: bool, name: str) -> None:
    """Log a warning that names the settings of `model` in which a config differs from the one in a checkpoint.

    Args:
        checkpoint: the loaded checkpoint. Without the text of a config nothing is compared.
        cfg: the config that is used.
        strict: whether every weight is used, as for a test. Of weights to fine-tune from (`load_from`) only the
            normalization of the images is compared, and only for the same kind of backbone.
        name: the checkpoint's name.
    """
    before, now = _model_in(meta_of(checkpoint).get('cfg')), _model_of(cfg)
    if not before:
        return
    found = dict(_differences(before, now, ''))
    if not strict:
        same = not any(key.startswith('backbone') for key in found)
        found = {key: found[key] for key in NORMALIZATION if key in found and same}
    if found:
        shown = [f'model.{key}: {brief(old, 80)}, now {brief(new, 80)}' for key, (old, new) in found.items()]
        more = f'; and {len(shown) - MOST} more' if len(shown) > MOST else ''
        log(
            f'checkpoint {name} was trained with other settings of the model. Those of the config are used, with which '
            f'its weights compute something else: {"; ".join(shown[:MOST])}{more}',
            logging.WARNING,
        )


def _model_of(cfg: Config) -> dict[str, Any]:
    model = cfg.model.get('module', cfg.model)  # inside DetTTAModel
    return {'data_preprocessor': cfg.get('data_preprocessor'), **model}


def _model_in(config: object) -> dict[str, Any]:
    """The model of a config's text. Empty if the text is none that can be parsed."""
    found = {
        statement.targets[0].id: _value(statement.value)
        for statement in ast.iter_child_nodes(parsed(config))
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
    }
    model = found.get('model')
    return {'data_preprocessor': found.get('data_preprocessor'), **model} if isinstance(model, dict) else {}


def _value(node: ast.AST) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict' and not node.args:
        return {keyword.arg: _value(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Dict):
        return {getattr(key, 'value', None): _value(value) for key, value in zip(node.keys, node.values, strict=True)}
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Name) and node.id == 'inf':  # so MMEngine writes it
        return math.inf
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        return UNKNOWN


def _differences(before: Any, now: Any, place: str) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """The dotted keys in which two configs differ, with both values."""
    if before is UNKNOWN or now is UNKNOWN:
        return
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        kinds = _kind(before.get('type')), _kind(now.get('type'))
        if kinds[0] != kinds[1]:
            yield _inside(place, 'type'), kinds
            return
        if kinds[0] == 'CBAM':
            return  # its variant is compared where its weights are loaded
        plugin = before.get('cfg')
        ours = {'position'} if isinstance(plugin, Mapping) and plugin.get('type') in NAMES else set()
        for key in dict.fromkeys([*before, *now]):
            if key != 'type' and key not in FREE | ours and not str(key).startswith('loss'):
                old, new = (side[key] if key in side else _default(now.get('type'), key) for side in (before, now))
                yield from _differences(old, new, _inside(place, key))
    elif isinstance(before, (list, tuple)) and isinstance(now, (list, tuple)) and len(before) == len(now):
        if any(isinstance(item, Mapping) for item in before):
            for number, (old, new) in enumerate(zip(before, now, strict=True)):
                yield from _differences(old, new, _inside(place, number))
        elif UNKNOWN not in (*_flat(before), *_flat(now)) and _plain(before) != _plain(now):
            yield place, (list(before), list(now))
    elif _plain(before) != _plain(now):
        yield place, (before, now)


def _inside(place: str, key: object) -> str:
    return f'{place}.{key}' if place else str(key)


def _kind(name: Any) -> Any:
    """The name of a class without its package. The kinds of BatchNorm compute the same once they are trained."""
    text = type_name(name)
    return 'BN' if text in ('SyncBN', 'MMSyncBN', 'BN2d', 'NaiveSyncBN') else text


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _default(name: Any, key: Any) -> Any:
    """What a class takes for an argument that a config does not give."""
    cls = next(filter(None, (class_of(registry, name) for registry in (MODELS, TASK_UTILS))), None) if name else None
    for base in cls.__mro__ if isinstance(cls, type) else ():
        init = vars(base).get('__init__')
        parameter = inspect.signature(init).parameters.get(key) if inspect.isfunction(init) else None
        if parameter is not None:
            return UNKNOWN if parameter.default is parameter.empty else parameter.default
    return UNKNOWN
