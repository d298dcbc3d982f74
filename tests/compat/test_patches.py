"""Every change of another package is listed, and undone."""

import importlib
import logging
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from unittest import mock

import pytest
import torch
from conftest import DEMO, tiny
from mmdet.models.dense_heads import SSDHead
from mmengine import logging as mmengine_logging
from mmengine import runner
from mmengine.config import Config
from mmengine.fileio import LocalBackend, get_file_backend, io
from mmengine.fileio.backends import registry_utils
from mmengine.fileio.handlers import yaml_handler
from mmengine.hooks import CheckpointHook, LoggerHook
from mmengine.runner import CheckpointLoader, checkpoint
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

import cbam_mmdet.compat.mmengine as mmengine_patches
import cbam_mmdet.compat.ssd_head as ssd_head
import cbam_mmdet.compat.torch as torch_patches
from cbam_mmdet.compat import mmcv_ops
from cbam_mmdet.compat.patches import PATCHES


class Backend(LocalBackend):
    pass


class DerivedHook(CheckpointHook):
    pass


HOOK = CheckpointHook()
LOADER = DataLoader([1, 2, 3], batch_size=2)
SAMPLER = BatchSampler(SequentialSampler([1]), 1, False)


def nothing(*args):
    return args


# Patch -> how to enter it, and what it changes, as a function that reads the present state.
CASES = {
    'mmengine.package_configs': (
        lambda: mmengine_patches.package_configs('theirs::', nothing),
        lambda: vars(Config)['_get_cfg_path'],
    ),
    'mmengine.debug_messages_left_out': (
        mmengine_patches.debug_messages_left_out,
        lambda: mmengine_logging.print_log,
    ),
    'mmengine.checkpoints_loaded_by': (
        lambda: mmengine_patches.checkpoints_loaded_by(nothing, nothing),
        lambda: (list(CheckpointLoader._schemes.items()), checkpoint.load_url),
    ),
    'mmengine.local_files_written_by': (
        lambda: mmengine_patches.local_files_written_by(Backend),
        lambda: (dict(registry_utils.backends), dict(registry_utils.prefix_to_backends), dict(io.backend_instances)),
    ),
    'mmengine.state_dicts_loaded_by': (
        lambda: mmengine_patches.state_dicts_loaded_by(nothing),
        lambda: (runner.load_state_dict, checkpoint.load_state_dict),
    ),
    'mmengine.hooks_of_class': (
        lambda: mmengine_patches.hooks_of_class([HOOK], CheckpointHook, DerivedHook),
        lambda: type(HOOK),
    ),
    'mmengine.scores_written_once': (
        mmengine_patches.scores_written_once,
        lambda: vars(LoggerHook)['after_test_epoch'],
    ),
    'mmengine.config_not_printed': (
        mmengine_patches.config_not_printed,
        lambda: (vars(runner.Runner)['_log_env'], vars(runner.FlexibleRunner)['_log_env']),
    ),
    'mmengine.config_not_dumped': (
        mmengine_patches.config_not_dumped,
        lambda: (vars(runner.Runner)['dump_config'], vars(runner.FlexibleRunner)['dump_config']),
    ),
    'mmengine.prefixes_keep_metadata': (
        lambda: mmengine_patches.prefixes_keep_metadata(nothing),
        lambda: checkpoint._load_checkpoint_with_prefix,
    ),
    'mmengine.yaml_without_code': (mmengine_patches.yaml_without_code, lambda: yaml_handler.Loader),
    'torch.children_registered_with': (
        lambda: torch_patches.children_registered_with(nothing),
        lambda: list(torch_module._global_module_registration_hooks.values()),
    ),
    'torch.loader_parts': (
        lambda: torch_patches.loader_parts(LOADER, batch_sampler=SAMPLER),
        lambda: LOADER.batch_sampler,
    ),
    'ssd_head.ssd_predicts': (ssd_head.ssd_predicts, lambda: hasattr(SSDHead, 'loss_cls')),
    'mmcv_ops.served_operators': (mmcv_ops.served_operators, lambda: sys.modules.get('mmcv._ext')),
}


@pytest.fixture(autouse=True)
def without_the_permanent_ones(monkeypatch):
    """SSDHead as MMDetection has it: the patch that lasts would hide the one under test."""
    if vars(SSDHead).get('loss_cls', 0) is None:
        monkeypatch.delattr(SSDHead, 'loss_cls')
    get_file_backend('plain/path', enable_singleton=True)  # so that MMEngine holds an instance of its own


def test_every_patch_of_the_room_has_a_case():
    assert {name.removeprefix('cbam_mmdet.compat.') for name in PATCHES} == CASES.keys()


@pytest.mark.parametrize('name', CASES)
def test_a_patch_is_undone_also_after_a_failure(name):
    enter, state = CASES[name]
    before = state()
    with pytest.raises(ZeroDivisionError), enter():
        assert state() != before
        raise ZeroDivisionError
    assert state() == before


def test_tools_leave_mmengine_as_it_was(run_tool, shapes, tmp_path):
    states = {name: state for name, (_, state) in CASES.items() if name.startswith('mmengine.')}
    before = {name: state() for name, state in states.items()}
    result = run_tool('train.py', DEMO, *tiny(tmp_path, shapes))
    assert result.code == 0, result.err
    (log,) = tmp_path.glob('*/*.log')
    for long in ('Config:\n', 'Hooks will be executed'):
        assert long in log.read_text() and long not in result.out + result.err
    assert run_tool('test.py', DEMO, tmp_path, *tiny(tmp_path, shapes)).code == 0
    assert {name: state() for name, state in states.items()} == before


@pytest.mark.parametrize('rank', [0, 1])
def test_the_first_process_writes_the_scores(rank, tmp_path, monkeypatch):
    """Both wrote one file: where the first had more digits, its last ones stayed behind the second's JSON."""
    monkeypatch.setattr('mmengine.dist.utils.get_rank', lambda group=None: rank)
    process = mock.MagicMock(log_dir=str(tmp_path))
    process.log_processor.get_log_after_epoch.return_value = {'mAP': 0.25}, 'mAP: 0.25'
    hook = LoggerHook()
    hook.json_log_path = 'scores.json'
    with mmengine_patches.scores_written_once():
        hook.after_test_epoch(process)
    assert [path.read_text() for path in tmp_path.iterdir()] == ['{"mAP": 0.25}'] * (rank == 0)


def test_messages_for_debugging_are_not_printed(capsys):
    with mmengine_patches.debug_messages_left_out():
        from mmengine.logging import print_log

        print_log('Could not import OneDL', level=logging.DEBUG)
        print_log('a figure')
    assert capsys.readouterr().out == 'a figure\n'
    print_log('afterwards', level=logging.DEBUG)
    assert capsys.readouterr().out == 'afterwards\n'


def test_what_others_set_meanwhile_is_kept():
    """MMEngine's registry of file backends, and a DataLoader's attributes, take more than our patch while it lasts."""

    class Other(LocalBackend):
        pass

    with mmengine_patches.local_files_written_by(Backend):
        registry_utils.register_backend('other', Other)
    assert registry_utils.backends.pop('other') is Other
    loader = DataLoader([1, 2, 3], batch_size=2)
    with torch_patches.loader_parts(loader, batch_sampler=SAMPLER):
        loader.worker_init_fn = nothing
    assert loader.worker_init_fn is nothing and loader.batch_sampler is not SAMPLER


def test_assume_constant_result_does_what_torch_does():
    """It sets an attribute in torch's place; a torch that marks such functions in another way fails here."""

    def ours():
        return 1

    def theirs():
        return 1

    torch_patches.assume_constant_result(ours)
    importlib.import_module('torch._dynamo')
    torch.compiler.assume_constant_result(theirs)
    assert vars(ours) == vars(theirs)


def test_children_are_reported_while_it_lasts():
    norm = nn.BatchNorm2d(3)
    calls = []
    with torch_patches.children_registered_with(lambda *args: calls.append(args[1])):
        norm.add_module('child', nn.Identity())
    norm.add_module('other', nn.Identity())
    assert calls == ['child']


def test_files_that_two_threads_load_at_once(tmp_path):
    """torch's list of what a file may name is one for all threads: the first thread's end would empty it."""
    torch.save([torch.zeros(1), Fraction(1, 2)], tmp_path / 'a.pth')  # the number comes after the tensor
    first_is_inside, second_is_inside, first_is_done = (threading.Event() for _ in range(3))

    def load(mine, other, seconds):
        def to_cpu(storage, location):
            mine.set()
            other.wait(seconds)
            return storage

        return torch_patches.load_without_code(tmp_path / 'a.pth', to_cpu, {'fractions.Fraction': Fraction})[1]

    def load_second():
        first_is_inside.wait(10)
        return load(second_is_inside, first_is_done, 10)

    with ThreadPoolExecutor() as pool:
        second = pool.submit(load_second)
        # Not longer: the second one waits for the first, and the other way round.
        assert load(first_is_inside, second_is_inside, 0.5) == Fraction(1, 2)
        first_is_done.set()
        assert second.result() == Fraction(1, 2)
