"""The rooms of the package: each uses only those that stand before it, and no files import each other in a ring."""

import ast
import graphlib
from pathlib import Path

from conftest import ROOT

PACKAGE = ROOT / 'cbam_mmdet'
ROOMS = (
    'errors', 'version', 'compat', 'utils', 'ops', 'models', 'datasets', 'evaluation', 'engine', 'analysis', 'deploy',
    'apis', 'visualization', 'cli',
)  # fmt: skip
# The package itself, which registers everything, and what work dirs of 0.1.0 import: each imports the new name.
DOORS = {'__init__', 'ssd_head', 'classification'}


def modules() -> dict[str, Path]:
    """Dotted names below the package, without its own, and their files."""
    found = {}
    for path in PACKAGE.rglob('*.py'):
        parts = path.relative_to(PACKAGE).with_suffix('').parts
        if parts[0] != '.mim':
            found['.'.join(parts[:-1] if len(parts) > 1 and parts[-1] == '__init__' else parts)] = path
    return found


def imports(path: Path, known: set[str]) -> set[str]:
    """What a file imports of the package, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}: a relative import hides the room'
            if path.parent != PACKAGE:
                assert node.module != 'cbam_mmdet', f'{path}: the package itself imports nearly every room'
            names |= {f'{node.module}.{alias.name}' for alias in node.names}
    below = {name.removeprefix('cbam_mmdet.') for name in names if name.startswith('cbam_mmdet.')}
    return {name if name in known else name.rpartition('.')[0] for name in below} & known


def test_a_room_uses_only_rooms_before_it():
    files = modules()
    assert {name.split('.')[0] for name in files} <= {*ROOMS, *DOORS}
    for name, path in files.items():
        if name not in DOORS:
            room = name.split('.')[0]
            for used in imports(path, set(files)):
                assert used not in DOORS, f'{name} imports {used}'
                assert ROOMS.index(used.split('.')[0]) <= ROOMS.index(room), f'{name} imports {used}, of a later room'


def test_no_ring_of_imports():
    files = modules()
    graphlib.TopologicalSorter({name: imports(path, set(files)) - {name} for name, path in files.items()}).prepare()


def test_errors_know_the_standard_library_only():
    tree = ast.parse((PACKAGE / 'errors.py').read_text())
    used = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    used |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert used == {'__future__', 'collections.abc', 'difflib', 're', 'signal'}
