"""Run the tests in the environments that people have, and print a table of how many passed.

    python .ci/stacks/run.py                 every stack, all tests that do not concern our own installation
    python .ci/stacks/run.py users --core    one stack, the core of the tests

Each file NAME.txt beside this one lists what makes a stack. Its environment is build/stacks/NAME: made where it is
missing, and anew where the list, or how it is installed, has changed since. The exit code is that of the worst stack.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PYTHONS = dict.fromkeys(('users', 'mmyolo'), ('python3.11', 'python3.10'))  # torch 2.1 has no wheels for later ones

# Operators, CBAM, PluginBackbone, checkpoints, one training, one resume, one evaluation.
CORE = (
    'tests/compat/test_mmcv_ops.py',
    'tests/models/plugins',
    'tests/models/test_cbam.py',
    'tests/models/test_variant.py',
    'tests/ops/test_c_cbam.py',
    'tests/ops/test_functional.py',
    'tests/engine/checkpoint',
    'tests/engine/hooks/test_resume.py::test_stopped_and_resumed_equals_uninterrupted',
    'tests/engine/test_run_reader.py',
    'tests/evaluation/test_coco.py',
    'tests/apis/test_other_packages.py',
)
# What looks at the environment that `make` installs, or measures there.
OURS = ('tests/test_setup.py', 'tests/docs', 'tests/benchmarks', 'tests/visualization/test_report.py')


def main() -> int:
    args = parse_args()
    rows, worst = [], 0
    for name in args.stacks:
        python = environment(name)
        started = time.monotonic()
        results = ROOT / f'build/stacks/{name}.xml'
        results.unlink(missing_ok=True)
        paths = CORE if args.core else ('tests', *(f'--deselect={path}' for path in OURS))
        code = subprocess.run(
            [python, '-m', 'pytest', '-n', '2', '--dist', 'loadfile', f'--junitxml={results}', *paths, *args.pytest],
            cwd=ROOT,
            env={**os.environ, 'OMP_NUM_THREADS': '1'},
        ).returncode
        worst = worst or code
        rows.append((name, *versions(python), *counts(results), f'{time.monotonic() - started:.0f} s'))
    print_table(('stack', 'Python', *PACKAGES, 'passed', 'failed', 'skipped', 'time'), rows)
    return worst


def parse_args() -> argparse.Namespace:
    known = sorted(path.stem for path in HERE.glob('*.txt'))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('stacks', nargs='*', default=known, metavar='STACK', help=f'any of {", ".join(known)}')
    parser.add_argument('--core', action='store_true', help='run the core of the tests only, in minutes')
    args, args.pytest = parser.parse_known_args()
    if unknown := [name for name in args.stacks if name not in known]:
        parser.error(f'no stack {unknown[0]}, choose from {known}')
    return args


def environment(name: str) -> Path:
    """The Python of the stack's environment."""
    folder, listed = ROOT / 'build/stacks' / name, HERE / f'{name}.txt'
    ready, recipe = folder / '.ready', listed.read_text() + (ROOT / 'tools/setup_env.sh').read_text()
    if not ready.is_file() or ready.read_text() != recipe:
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        python = next(filter(runs, PYTHONS.get(name, ())), None)
        if python is None and name in PYTHONS:
            sys.exit(f"the stack '{name}' needs one of {', '.join(PYTHONS[name])}, none is installed")
        chosen = {} if python is None else {'PYTHON': python}
        subprocess.run(
            ['bash', 'tools/setup_env.sh', folder, '--stack', listed],
            cwd=ROOT,
            env={**os.environ, **chosen},
            check=True,
        )
        ready.write_text(recipe)
    return folder / 'bin/python'


def runs(python: str) -> bool:
    """Whether an interpreter can be started. A version manager may have a name on the PATH for one that it has not."""
    return bool(shutil.which(python)) and not subprocess.run([python, '-c', ''], stderr=subprocess.DEVNULL).returncode


PACKAGES = ('torch', 'mmcv', 'mmengine', 'mmdet', 'numpy')


def versions(python: Path) -> list[str]:
    code = (
        'import importlib, platform; print(platform.python_version());'
        f'[print(importlib.import_module(name).__version__) for name in {PACKAGES}]'
    )
    return subprocess.run(
        [python, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True
    ).stdout.split()


def counts(results: Path) -> tuple[int, int, int]:
    """Tests that passed, failed and were skipped."""
    if not results.is_file():
        return 0, 0, 0
    suite = ElementTree.parse(results).getroot().find('testsuite')
    total, failed, skipped = (
        sum(int(suite.get(key)) for key in keys) for keys in (('tests',), ('failures', 'errors'), ('skipped',))
    )
    return total - failed - skipped, failed, skipped


def print_table(header: tuple[str, ...], rows: list[tuple]) -> None:
    table = [header, *rows]
    widths = [max(len(str(cell)) for cell in column) for column in zip(*table, strict=True)]
    for row in table:
        print('  '.join(f'{cell!s:<{width}}' for cell, width in zip(row, widths, strict=True)))


if __name__ == '__main__':
    sys.exit(main())
