"""The variants of the CBAMs in a checkpoint that does not say them itself: one of before 0.2, or of another program.

Newer ones do (see models.variant). MMEngine's checkpoints hold the text of the config, too. It is Python code, which
is parsed here and never run.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from typing import Any

from cbam_mmdet.models.variant import KEY

PAPER = dict(gate='sigmoid', pools='avg, max', order='channel-spatial')  # the defaults of CBAM
NAMES = ('CBAM', 'mmengine.CBAM')  # the type in a config
FC1, FC2 = 'channel.fc1.weight', 'channel.fc2.weight'


def cbams_in(state_dict: Mapping) -> list[str]:
    """The names of the CBAMs in a state dict."""
    found = [key.removesuffix(FC1) for key in state_dict if isinstance(key, str) and f'.{key}'.endswith(f'.{FC1}')]
    return [name.rstrip('.') for name in found if f'{name}{FC2}' in state_dict]


def set_variant(state_dict: Any, names: Iterable[str], variant: Mapping[str, str]) -> None:
    """Write a variant into the metadata of a state dict (an OrderedDict), for these CBAMs."""
    metadata = state_dict.__dict__.setdefault('_metadata', {})
    for name in names:
        metadata.setdefault(name, {})[KEY] = dict(variant)


def add_variants(state_dict: Any, meta: Mapping) -> list[str]:
    """Add the variants that the config in a checkpoint's meta says, where the state dict does not.

    Returns:
        The names of the CBAMs of which the variant is not known: there is no config, or it has several variants.
    """
    metadata = getattr(state_dict, '_metadata', {})
    unknown = [name for name in cbams_in(state_dict) if KEY not in metadata.get(name, {})]
    variants = variants_in(meta.get('cfg')) if unknown else []
    if len(variants) != 1 or not hasattr(state_dict, '__dict__'):
        return unknown
    set_variant(state_dict, unknown, variants[0])
    return []


def variants_in(config: object) -> list[dict[str, str]]:
    """The different variants of CBAM in the text of a config. Empty if it is none that can be parsed."""
    variants: list[dict[str, str]] = []
    for node in ast.walk(parsed(config)):
        given = _arguments(node)
        if given.get('type') not in NAMES:
            continue
        pools = given.get('pools') or ('avg', 'max')
        pools = [pools] if not isinstance(pools, (list, tuple)) else pools
        pools = ', '.join(sorted(map(str, pools)))
        order = given.get('order') or PAPER['order']
        variant = dict(PAPER, gate=given.get('gate') or PAPER['gate'], pools=pools, order=order)
        if variant not in variants:
            variants.append(variant)
    return variants


def positions_in(config: object) -> set[str]:
    """Where the plugins in the text of a config put CBAM into residual blocks: 'after_conv1', ... Maybe empty."""
    positions = set()
    for node in ast.walk(parsed(config)):
        position = _arguments(node).get('position')
        if isinstance(position, str) and any(_arguments(part).get('type') in NAMES for part in ast.walk(node)):
            positions.add(position)
    return positions


def parsed(config: object) -> ast.AST:
    try:
        return ast.parse(config) if isinstance(config, str) else ast.Module([], [])
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.Module([], [])


def _arguments(node: ast.AST) -> dict[Any, Any]:
    """The constant arguments of dict(...), or items of {...}."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict':
        pairs: list[tuple[Any, ast.expr]] = [(keyword.arg, keyword.value) for keyword in node.keywords]
    elif isinstance(node, ast.Dict):
        keys = [key.value if isinstance(key, ast.Constant) else None for key in node.keys]
        pairs = list(zip(keys, node.values, strict=True))
    else:
        return {}
    given = {}
    for key, value in pairs:
        try:
            given[key] = ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError):  # no constant
            continue
    return given
