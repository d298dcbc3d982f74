"""JSON and YAML configs, which are data: what their `type=` may name, and the tuples that JSON does not have."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import mmengine.registry
from mmengine.registry import Registry
from mmengine.utils import get_object_from_string

from cbam_mmdet.errors import UserError

NAMED = ('type', 'constructor', 'runner_type')  # the keys whose values MMEngine looks up, and calls what they name
SIZES = ('basesize_ratio_range', 'crop_size', 'img', 'img_scale', 'scale', 'scales', 'size')  # img: of pad_val


def refuse_code(cfg: Mapping, path: str) -> None:
    """Refuse what MMEngine would import and call, whatever it is: a path of what no registry holds; or no name at all.

    MMCV evaluates the `type` of an NMS.

    Raises:
        UserError: for the first such name.
    """
    for where, name in _names(cfg):
        if not re.fullmatch(r'\w+(\.\w+)*', name):
            raise UserError(f'config {path!r}: {where}={name!r} is not the name of a class')
        if '.' in name and not _is_registered(name):
            raise UserError(
                f'config {path!r}: {where}={name!r} is code that no registry of MMEngine holds, and this file is data: '
                'name a registered class, or write the config in Python'
            )


def with_tuples(node: Any, key: str = '') -> Any:
    """The same settings, with tuples for lists of numbers that are sizes or colours: MMCV's transforms ask for them."""
    if isinstance(node, dict):
        return {name: with_tuples(value, name) for name, value in node.items()}
    if not isinstance(node, list):
        return node
    if key in SIZES:
        if all(isinstance(item, (int, float)) for item in node):
            return tuple(node)
        return [with_tuples(item, key) for item in node]  # a list of sizes
    return [with_tuples(item) for item in node]


def _names(node: object, where: str = '') -> Iterator[tuple[str, str]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            place = f'{where}.{key}' if where else str(key)
            if key in NAMED and isinstance(value, str):
                yield place, value
            yield from _names(value, place)
    elif isinstance(node, (list, tuple)):
        for i, value in enumerate(node):
            yield from _names(value, f'{where}[{i}]')


def _is_registered(name: str) -> bool:
    """Whether a name is 'SCOPE.NAME' of some registry, such as 'mmdet.ResNet', or the path of what one holds."""
    scope, _, inner = name.partition('.')
    found = None
    with contextlib.suppress(Exception):  # MMEngine tries both, too
        import_module(f'{scope}.registry')
    with contextlib.suppress(Exception):
        found = get_object_from_string(name)
    for registry in _registries():
        registry.import_from_location()
    return any(
        (scope == registry.scope and inner in registry.module_dict)
        or any(found is held for held in registry.module_dict.values())
        for registry in _registries()  # some of which have come with the imports
    )


def _registries() -> list[Registry]:
    """Those of MMEngine and of all packages that are imported."""
    left = [it for it in vars(mmengine.registry).values() if isinstance(it, Registry)]
    all_: list[Registry] = []
    while left:
        registry = left.pop()
        all_.append(registry)
        left += registry.children.values()
    return all_
