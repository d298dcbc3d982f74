"""Shared by all tests. Importing the package first switches mmcv's operators on."""

import json
import logging
import multiprocessing
import os
import runpy
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import cbam_mmdet  # noqa: F401  # isort: skip  (before mmdet)

import mmengine.registry
import pytest
import torch
from mmdet.visualization import DetLocalVisualizer
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import DefaultScope, Registry
from mmengine.visualization import Visualizer

from cbam_mmdet.datasets import ensure_shapes
from cbam_mmdet.ops import c_passes

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

SERVED = getattr(sys.modules['mmcv._ext'].__spec__, 'origin', None) == 'cbam_mmdet.compat.mmcv_ops'
needs_served_operators = pytest.mark.skipif(not SERVED, reason='mmcv has its compiled operators here')

# Processes that begin with the package imported, which takes seconds: for tests that need a process, and no fresh one.
# `FORKS.Process(target=in_a_fork, args=(function, ...))` calls a function of a test's module in one.
FORKS = multiprocessing.get_context('forkserver')
FORKS.set_forkserver_preload(['cbam_mmdet.apis.train', 'cbam_mmdet.cli', 'mmdet.models'])

for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE'):  # of a container, say: the tests are one process
    os.environ.pop(name, None)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if 'gpu' in item.keywords:
                item.add_marker(pytest.mark.skip(reason='needs a CUDA device'))


def forget_earlier_runs():
    """MMEngine's global state lives as long as the process: loggers that write to closed streams, the default scope."""
    for logger in MMLogger._instance_dict.values():
        for handler in logger.handlers:
            if isinstance(handler, logging.FileHandler):
                handler.close()
    for manager in (MMLogger, MessageHub, DefaultScope, DetLocalVisualizer, Visualizer):
        manager._instance_dict.clear()


def forget_modules_below(folder):
    """Modules that a test's config imported from its own folder, and what they registered: another may reuse a name."""
    # Not getattr, for which a lazy module imports what it stands for.
    files = {name: getattr(module, '__dict__', {}).get('__file__') for name, module in list(sys.modules.items())}
    names = {name for name, file in files.items() if str(file).startswith(f'{folder}/')}
    for name in names:
        del sys.modules[name]
    registries = [value for value in vars(mmengine.registry).values() if isinstance(value, Registry)] if names else []
    for registry in registries:
        registries += registry.children.values()
        for key, value in list(registry.module_dict.items()):
            if value.__module__ in names:
                del registry.module_dict[key]


@pytest.fixture(autouse=True)
def mmengine_as_it_was(tmp_path_factory):
    """A test finds MMEngine as if it were the first one, whatever the order of the tests."""
    yield
    forget_earlier_runs()
    forget_modules_below(tmp_path_factory.getbasetemp())


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


def run_forks(function, *arguments):
    """Call a function of a test's module in several processes at once, to their end."""
    processes = [FORKS.Process(target=in_a_fork, args=(function, *args)) for args in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0, 'its traceback is on stderr'


def in_a_fork(function, *args):
    c_passes._is_forked = False  # their server has started no thread of OpenMP
    function(*args)


def run_in_this_process(name, *args):
    """Run tools/NAME as its command line would, and return its exit code."""
    forget_earlier_runs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', [name, *map(str, args)])
        patch.syspath_prepend(ROOT / 'tools')  # as Python does for a script
        try:
            runpy.run_path(str(ROOT / 'tools' / name), run_name='__main__')
        except SystemExit as stop:
            return stop.code or 0
    return 0


@pytest.fixture
def run_tool(capfd):
    """Run tools/NAME in this process, as its command line would."""

    def run(name, *args):
        capfd.readouterr()
        code = run_in_this_process(name, *args)
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


def pretend_tested(work_dir, checkpoint='epoch_1.pth'):
    """Leave the record of a test that wrote results.pkl in a work dir."""
    made = next(iter(sorted(work_dir.glob('*/vis_data/run.json'))))
    record = json.loads(made.read_text())
    record |= dict(results=str(work_dir / 'results.pkl'), checkpoint=str(work_dir / checkpoint))
    folder = work_dir / '29990101_000000'
    (folder / 'vis_data').mkdir(parents=True)
    (folder / 'vis_data/run.json').write_text(json.dumps(record))
    shutil.copy(work_dir / record['copy'], folder)


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
    """The demo's data set (shapes/), and its detector trained on it as `make demo` does (work/): takes minutes."""
    folder = tmp_path_factory.mktemp('whole_demo')
    train('--data-root', ensure_shapes(folder / 'shapes'), '--work-dir', folder / 'work')
    return folder


def train(*arguments):
    assert run_in_this_process('train.py', DEMO, *arguments) == 0
