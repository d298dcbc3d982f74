"""Which settings a config file makes of a variable. The file is parsed here, and not run."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

from mmengine.config import Config
from mmengine.config.utils import ConfigParsingError


def settings_made_of(variable: str, path: str) -> dict[str, bool]:
    """The dotted keys of the settings in which a config file, or one of its bases, uses a variable.

    Returns:
        Key -> whether the setting is the variable itself, and not something computed of it. Empty for a file that only
        MMEngine can find or read, as a base of '{{fileDirname}}'.
    """
    if not path.endswith('.py'):
        return {}
    try:
        statements = ast.parse(Path(path).read_text(encoding='utf-8')).body
        bases = [Config._get_cfg_path(base, path)[0] for base in Config._get_base_files(path)]
    except (OSError, SyntaxError, ConfigParsingError):
        return {}
    assigned = {
        statement.targets[0].id: statement.value
        for statement in statements
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
    }
    found: dict[str, bool] = {}
    for base in bases:
        found |= settings_made_of(variable, base)
    for name, value in assigned.items():
        if name != variable:
            found |= dict(_uses(value, variable, assigned, name, ()))
    return found


def _uses(
    node: ast.AST, variable: str, assigned: Mapping[str, ast.AST], place: str, within: tuple[str, ...]
) -> Iterator[tuple[str, bool]]:
    if isinstance(node, ast.Name):
        if node.id == variable:
            yield place, True
        elif node.id in assigned and node.id not in within:  # another variable, which may be made of this one
            yield from _uses(assigned[node.id], variable, assigned, place, (*within, node.id))
        return
    items: list[tuple[object, ast.AST]]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict':
        items = [(keyword.arg, keyword.value) for keyword in node.keywords]
    elif isinstance(node, ast.Dict):
        items = [(getattr(key, 'value', None), value) for key, value in zip(node.keys, node.values, strict=True)]
    elif isinstance(node, (ast.List, ast.Tuple)):
        items = list(enumerate(node.elts))
    elif any(isinstance(inner, ast.Name) and inner.id == variable for inner in ast.walk(node)):
        yield place, False
        return
    else:
        return
    for key, value in items:  # **other has no key: its items stand beside these
        yield from _uses(value, variable, assigned, place if key is None else f'{place}.{key}', within)
