"""What the `type=` of a JSON or YAML config may name: such a file is data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from importlib import import_module

import mmengine.registry
from mmengine.registry import Registry
from mmengine.utils import get_object_from_string

from cbam_mmdet.errors import UserError

NAMED = ('type', 'constructor', 'runner_type')  # the keys whose values MMEngine looks up, and calls what they name


def refuse_unregistered_paths(cfg: Mapping, path: str) -> None:
    """Refuse dotted names of what no registry holds: MMEngine imports it, whatever it is, and calls it.

    Raises:
        UserError: for the first such name.
    """
    for where, name in _dotted_names(cfg):
        if not _is_registered(name):
            raise UserError(
                f'config {path!r}: {where}={name!r} is code that no registry of MMEngine holds, and this file is data: '
                'name a registered class, or write the config in Python'
            )


def _dotted_names(node: object, where: str = '') -> Iterator[tuple[str, str]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            place = f'{where}.{key}' if where else str(key)
            if key in NAMED and isinstance(value, str) and '.' in value:
                yield place, value
            yield from _dotted_names(value, place)
    elif isinstance(node, (list, tuple)):
        for i, value in enumerate(node):
            yield from _dotted_names(value, f'{where}[{i}]')


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
