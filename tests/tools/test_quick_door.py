"""A tool answers what needs neither torch nor MMDetection before it imports them."""

import subprocess
import sys

import pytest
import torch
from conftest import DEMO, ROOT

SSD = str(ROOT / 'configs/ssd300_vgg16_cbam_voc0712.py')
TOOLS = sorted(path.name for path in (ROOT / 'tools').glob('*.py') if path.name != 'arguments.py')
# Runs a script as Python would, and reports at the end which of some modules it has imported.
PROGRAM = """
import atexit, runpy, sys
heavy = {'torch', 'mmengine', 'mmcv', 'mmdet', 'cbam_mmdet'}
atexit.register(lambda: print('imported:', *sorted(heavy & set(sys.modules))))
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition('/')[0])
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def run(name, *args):
    command = [sys.executable, '-c', PROGRAM, str(ROOT / 'tools' / name), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    *_, imported = done.stdout.splitlines()
    return done, imported.removeprefix('imported:').split()


@pytest.mark.parametrize('name', TOOLS)
def test_help_and_a_wrong_argument_import_the_standard_library_alone(name):
    done, imported = run(name, '--help')
    assert done.returncode == 0 and 'usage:' in done.stdout and not imported
    done, imported = run(name, '--no-such-argument')
    assert done.returncode == 2 and 'error:' in done.stderr and not imported


@pytest.mark.parametrize('name, args', [('train.py', [DEMO]), ('test.py', [DEMO, 'x.pth']), ('ablate.py', [DEMO])])
def test_a_missing_data_root_is_found_before_torch_is_imported(name, args, tmp_path):
    done, imported = run(name, *args, '--data-root', tmp_path / 'nowhere')
    assert done.returncode == 2 and not imported
    assert f'there is no folder {tmp_path}/nowhere' in done.stderr and 'Traceback' not in done.stderr


def test_a_pair_without_equals_sign_is_found_before_torch_is_imported():
    done, imported = run('train.py', DEMO, '--cfg-options', 'lr', '0.1')
    assert done.returncode == 2 and not imported
    assert 'KEY=VALUE' in done.stderr and "'lr'" in done.stderr


@pytest.mark.parametrize(
    ('name', 'args', 'message'),
    [
        ('train.py', ['configs/faster_rcnn_r5_cbam.py'], "did you mean 'configs/faster_rcnn_r50_cbam.py'"),
        ('train.py', ['configs/faster_rcnn_r50_cbam_voc0712.py'], 'no folder data/VOCdevkit/'),
        # A config whose custom_imports import MMDetection.
        ('infer.py', [SSD, 'nothing.pth', 'photo.jpg'], 'checkpoint nothing.pth does not exist'),
        pytest.param('gradcam.py', [SSD, DEMO, 'photo.jpg'], 'is not a checkpoint of PyTorch', marks=pytest.mark.slow),
        pytest.param('ablate.py', ['nothing.py'], "config 'nothing.py' does not exist", marks=pytest.mark.slow),
        ('report.py', ['nothing'], 'nothing is not a folder'),
        pytest.param('draw_run.py', ['nothing'], 'nothing is not a folder', marks=pytest.mark.slow),
        pytest.param(
            'convert_annotations.py', ['nothing.txt', 'x.json'], 'nothing.txt does not exist', marks=pytest.mark.slow
        ),
    ],
)
def test_what_is_missing_is_found_before_mmdetection_is_imported(name, args, message, tmp_path):
    done, imported = run(name, *args)
    assert done.returncode == 2 and message in done.stderr and 'Traceback' not in done.stderr
    assert 'mmdet' not in imported


def test_the_package_imports_no_more_than_registration_needs():
    program = 'import sys, cbam_mmdet; print(*sys.modules)'
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, cwd=ROOT, check=True)
    modules = set(done.stdout.split())
    assert {'cbam_mmdet.models.cbam', 'cbam_mmdet.engine.hooks'} <= modules
    unneeded = {'mmdet', 'torch._dynamo', 'torchvision', 'triton', 'pycocotools', 'cbam_mmdet.apis.train'}
    if not hasattr(torch.compiler, 'is_compiling'):  # before torch 2.3 it stands in torch._dynamo, as MMEngine knows
        unneeded -= {'torch._dynamo'}
    assert not modules & unneeded
