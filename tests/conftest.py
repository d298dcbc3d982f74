"""Shared by all tests. Importing the package first switches mmcv's operators on."""

import os
import runpy
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import cbam_mmdet  # noqa: F401  # isort: skip  (before mmdet)

import pytest
import torch
from mmdet.visualization import DetLocalVisualizer
from mmengine.logging import MMLogger
from mmengine.visualization import Visualizer

from cbam_mmdet.datasets import ensure_shapes

ROOT = Path(__file__).parent.parent
# Real images for tests that skip without them: coco/ and bccd/ in their own layouts.
DATA = Path(os.environ.get('CBAM_TEST_DATA', ROOT.parent / 'shared/data'))
DEMO = str(ROOT / 'configs/demo/faster_rcnn_cbam.py')
# Settings of the demo's config: a small detector, a short training, and images that are loaded in this process.
SMALL = {'model.backbone.base_channels': 4, 'model.neck.in_channels': [16, 32, 64, 128]}
ONE_EPOCH = {'train_cfg.max_epochs': 1, 'train_cfg.val_interval': 1}
IN_THIS_PROCESS = {
    f'{split}_dataloader.{key}': value
    for split in ('train', 'val', 'test')
    for key, value in (('num_workers', 0), ('persistent_workers', False))
}

for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE'):  # of a container, say: the tests are one process
    os.environ.pop(name, None)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if 'gpu' in item.keywords:
                item.add_marker(pytest.mark.skip(reason='needs a CUDA device'))


def forget_earlier_runs():
    """MMEngine's loggers and visualizers live as long as the process, and write to streams that are closed by now."""
    for manager in (MMLogger, DetLocalVisualizer, Visualizer):
        manager._instance_dict.clear()


class WritesAFile:
    """Unpickled by force, it writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (Path.write_text, (Path(self.path), 'code ran'))


@dataclass
class Result:
    """How a tool ended: its exit code and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def run_tool(monkeypatch, capfd):
    """Run tools/NAME.py in this process, as its command line would."""

    def run(name, *args):
        monkeypatch.setattr(sys, 'argv', [name, *map(str, args)])
        monkeypatch.syspath_prepend(ROOT / 'tools')  # as Python does for a script
        capfd.readouterr()
        forget_earlier_runs()
        code = 0
        try:
            runpy.run_path(str(ROOT / 'tools' / name), run_name='__main__')
        except SystemExit as stop:
            code = stop.code or 0
        return Result(code, *capfd.readouterr())

    return run


@pytest.fixture
def logged(caplog):
    """What MMEngine logs; its loggers do not propagate, so pytest's caplog alone hears nothing."""
    forget_earlier_runs()
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture(scope='session')
def shapes(tmp_path_factory):
    """A tiny data set in COCO's layout: 8 + 4 images of 64x64. Not to be written to."""
    return ensure_shapes(tmp_path_factory.mktemp('shapes'), num_train=8, num_val=4, image_size=64, progress=False)


@pytest.fixture
def own_shapes(shapes, tmp_path):
    """A copy of the tiny data set, to break."""
    return Path(shutil.copytree(shapes, tmp_path / 'data'))


def cfg_options(settings, *options):
    """Settings (key -> value) and options ('key=value') as arguments of a tool; of equal keys the last one counts."""
    settings = {key: str(value).replace(' ', '') for key, value in settings.items()}
    settings |= dict(option.split('=', 1) for option in options)
    return ['--cfg-options', *(f'{key}={value}' for key, value in settings.items())]


def tiny(work_dir, data_root, *options, schedule=ONE_EPOCH, model=SMALL):
    """Arguments that make the demo config train one epoch on the tiny data set in a few seconds.

    Args:
        work_dir: where the run goes.
        data_root: the data set.
        options: 'key=value' as on a command line; they replace what stands here under the same key.
        schedule: settings of the training loop, for a config whose loop is another one.
        model: settings of the detector, for a config that holds them already.
    """
    settings = {**schedule, **IN_THIS_PROCESS, 'train_dataloader.batch_size': 4, **model}
    return ['--work-dir', work_dir, '--data-root', data_root, *cfg_options(settings, *options)]


@pytest.fixture(scope='session')
def trained(shapes, tmp_path_factory):
    """A work dir in which the demo's detector was trained for one epoch on the tiny data set."""
    work_dir = tmp_path_factory.mktemp('work') / 'demo'
    train(*tiny(work_dir, shapes))
    return work_dir


@pytest.fixture(scope='session')
def demo(tmp_path_factory):
    """A folder with the demo's data set (shapes/), and the demo's detector trained on it as `make demo` does (work/): minutes."""
    folder = tmp_path_factory.mktemp('whole_demo')
    train('--data-root', ensure_shapes(folder / 'shapes'), '--work-dir', folder / 'work')
    return folder


def train(*arguments):
    forget_earlier_runs()
    argv, sys.argv = sys.argv, ['train.py', DEMO, *map(str, arguments)]
    sys.path.insert(0, str(ROOT / 'tools'))
    try:
        runpy.run_path(str(ROOT / 'tools/train.py'), run_name='__main__')
    except SystemExit as stop:
        assert not stop.code
    finally:
        sys.path.remove(str(ROOT / 'tools'))
        sys.argv = argv
