"""The installation, with a C compiler and without, and which library is loaded."""

import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from cbam_mmdet.ops import c_passes

COMPILER = shutil.which('gcc') or shutil.which('cc')
HERE = Path(c_passes.__file__).parent
needs_library = pytest.mark.skipif(bool(c_passes.unavailable()), reason=f'the C library {c_passes.unavailable()}')

SCRIPT = """
import torch
from cbam_mmdet import CBAM
from cbam_mmdet.ops import c_passes
x = torch.rand(2, 32, 9, 9, requires_grad=True)
module = CBAM(32)
module(x).sum().backward()
assert x.grad.abs().sum() > 0
print(c_passes.__file__, '|', module.implementation(x), '|', c_passes.unavailable())
"""


def build_wheel(folder, path):
    """The wheel of a copy of the tracked files, built with that PATH."""
    files = subprocess.run(['git', 'ls-files', 'cbam_mmdet', 'setup.py', 'pyproject.toml', 'README.md'],
                           cwd=ROOT, capture_output=True, text=True, check=True).stdout.split('\n')  # fmt: skip
    for name in filter(None, files):
        if not (ROOT / name).is_dir():  # .mim's links to folders
            (folder / 'source' / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / 'source' / name)
    environment = {key: value for key, value in os.environ.items() if key not in ('CC', 'CXX', 'CFLAGS')}
    command = [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '.', '-w', '../dist']
    subprocess.run(command, cwd=folder / 'source', env={**environment, 'PATH': path}, check=True)
    (wheel,) = (folder / 'dist').iterdir()
    return wheel


def libraries_of(wheel):
    return {Path(name).name.split('.')[0] for name in zipfile.ZipFile(wheel).namelist() if name.endswith('.so')}


def test_without_a_compiler_the_installation_works(tmp_path):
    wheel = build_wheel(tmp_path, str(tmp_path / 'nothing'))
    assert libraries_of(wheel) == set()
    zipfile.ZipFile(wheel).extractall(tmp_path / 'installed')
    environment = {**os.environ, 'PYTHONPATH': str(tmp_path / 'installed')}
    done = subprocess.run([sys.executable, '-c', SCRIPT], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    file, implementation, reason = done.stdout.strip().split(' | ')
    assert file.startswith(str(tmp_path))
    assert (implementation, reason) == ('eager', c_passes.NOT_BUILT)


@pytest.mark.skipif(not COMPILER, reason='needs a C compiler')
def test_with_a_compiler_the_wheel_holds_the_libraries_and_their_sources(tmp_path):
    wheel = build_wheel(tmp_path, os.environ['PATH'])
    assert '_cpu_kernels' in libraries_of(wheel)
    zipfile.ZipFile(wheel).extractall(tmp_path / 'installed')
    loaded, reason = c_passes.load_from(tmp_path / 'installed/cbam_mmdet/ops')
    assert reason is None and loaded.cbam_tiles(100) == 1


@needs_library
@pytest.mark.parametrize('capability', ['DEFAULT', 'AVX2', 'AVX512', 'SVE256'])
def test_the_library_is_one_that_the_cpu_can_run(capability, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    loaded, reason = c_passes.load_from(HERE)
    assert reason is None
    has_avx2 = capability.startswith('AVX') and any(HERE.glob('_cpu_kernels_avx2.*'))
    assert Path(loaded._name).name.split('.')[0] == ('_cpu_kernels_avx2' if has_avx2 else '_cpu_kernels')


@needs_library
@pytest.mark.skipif(not shutil.which('objdump'), reason='needs objdump')
def test_the_portable_library_has_no_avx():
    (portable,) = HERE.glob('_cpu_kernels.*')
    code = subprocess.run(['objdump', '-d', str(portable)], capture_output=True, text=True, check=True).stdout
    assert 'cbam_scale_f32' in code
    assert '%ymm' not in code and '%zmm' not in code


@needs_library
def test_a_library_that_does_not_fit_is_refused(tmp_path):
    assert c_passes.load_from(tmp_path) == (None, c_passes.NOT_BUILT)
    for file in HERE.glob('*cpu_kernels*'):
        shutil.copyfile(file, tmp_path / file.name)
    assert c_passes.load_from(tmp_path)[1] is None
    with open(tmp_path / 'cpu_kernels.h', 'a') as header:
        header.write('\n')
    assert 'was built of other sources' in c_passes.load_from(tmp_path)[1]
    broken = tmp_path / 'broken'
    broken.mkdir()
    for file in HERE.glob('_cpu_kernels*'):
        (broken / file.name).write_bytes(b'no library')
    assert c_passes.load_from(broken)[1].startswith('cannot be loaded: ')


def interpreter(path, *version):
    """A Python that says it is of that version, and that cannot make a virtual environment."""
    path.parent.mkdir(exist_ok=True)
    run = f"import sys; sys.version_info = ({', '.join(map(str, version))}, 0, 'final', 0); exec(sys.argv[1])"
    path.write_text(
        f'#!/bin/sh\ncase $1 in\n--version) echo Python {".".join(map(str, version))}.0 ;;\n'
        f'-c) exec {shlex.quote(sys.executable)} -c "{run}" "$2" ;;\n*) echo no venv in $0; exit 1 ;;\nesac\n'
    )
    path.chmod(0o755)


def set_up(folder, **environment):
    """What tools/setup_env.sh says with the interpreters of this folder alone."""
    for tool in ('sh', 'bash', 'head', 'tail', 'rm', 'grep'):
        (folder / 'bin').mkdir(exist_ok=True)
        (folder / 'bin' / tool).symlink_to(shutil.which(tool))
    script = ['bash', str(ROOT / 'tools/setup_env.sh'), str(folder / 'venv')]
    done = subprocess.run(script, env={'PATH': str(folder / 'bin'), **environment}, capture_output=True, text=True)
    assert done.returncode == 2, done.stdout + done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ('installed', 'chosen'),
    [
        ({'python3': (3, 13), 'python3.10': (3, 10)}, 'python3'),
        ({'python3': (3, 14), 'python3.12': (3, 12)}, 'python3.12'),  # has been tried
        ({'python3': (3, 14)}, 'python3'),  # may work
        ({'python3': (3, 9), 'python3.11': (3, 11)}, 'python3.11'),
    ],
)
def test_an_interpreter_that_was_tried_is_preferred(installed, chosen, tmp_path):
    for name, version in installed.items():
        interpreter(tmp_path / 'bin' / name, *version)
    assert f'no venv in {tmp_path}/bin/{chosen}\n' in set_up(tmp_path)


@pytest.mark.parametrize('chosen', [None, 'python3.8'])
def test_an_old_interpreter_is_refused(chosen, tmp_path):
    interpreter(tmp_path / 'bin/python3', 3, 9)
    interpreter(tmp_path / 'bin/python3.8', 3, 8)
    said = set_up(tmp_path, **({'PYTHON': chosen} if chosen else {}))
    found = '3.8' if chosen else '3.9'
    assert said.startswith(f'error: Python 3.10, 3.11, 3.12 or 3.13 is needed, found Python {found}.0.')
    assert 'make PYTHON=' in said
