"""Patches of MMEngine 0.10. What MMEngine is to call instead is passed in: this room knows no other."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from mmengine.config import Config

from cbam_mmdet.compat.patches import emptied, patch, replaced, replaced_items


@patch('mmengine.config.Config._get_cfg_path')
def package_configs(prefix: str, resolve: Callable[[str], str]) -> Iterator[None]:
    """Make `_base_ = 'PREFIXNAME.py'` mean the file that `resolve` gives for the name.

    MMEngine knows the packages that may stand before '::' from a list of its own, and wants a folder in the name.
    """
    original = Config._get_cfg_path

    def get_cfg_path(cfg_path: str, filename: str) -> tuple[str, str | None]:
        if cfg_path.startswith(prefix):
            return resolve(cfg_path.removeprefix(prefix)), None
        return original(cfg_path, filename)

    with replaced(Config, _get_cfg_path=staticmethod(get_cfg_path)):
        yield


@patch('mmengine.fileio.handlers.yaml_handler.Loader')
def yaml_without_code() -> Iterator[None]:
    """Let MMEngine read YAML files as data. Its own loader calls what their tags name."""
    from mmengine.fileio.handlers import yaml_handler

    from cbam_mmdet.compat.yaml import PlainLoader

    with replaced(yaml_handler, Loader=PlainLoader):
        yield


@patch('mmengine.logging.print_log')
def debug_messages_left_out() -> Iterator[None]:
    """Let print_log leave out messages of the level DEBUG for which no logger is named. MMEngine's own prints them.

    MMDetection has two of them, `Could not import OneDL`, each time it is imported.
    """
    from mmengine import logging as mmengine_logging

    original, entered = mmengine_logging.print_log, True

    def print_log(msg: Any, logger: Any = None, level: int = logging.INFO) -> None:
        # A module that was imported meanwhile keeps this function.
        if logger is not None or level > logging.DEBUG or not entered:
            original(msg, logger, level)

    try:
        with replaced(mmengine_logging, print_log=print_log):
            yield
    finally:
        entered = False


@patch('mmengine.runner.Runner._log_env', 'mmengine.runner.FlexibleRunner._log_env')
def config_not_printed() -> Iterator[None]:
    """Leave the config and the list of hooks out of the terminal, several hundred lines. The log file keeps them."""
    from mmengine.runner import FlexibleRunner, Runner

    def is_short(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(('Config:\n', 'Hooks will be executed'))

    def quiet(original: Callable) -> Callable:
        def log_env(self: Any, *args: Any) -> None:
            for handler in self.logger.handlers:
                if type(handler) is logging.StreamHandler:
                    handler.addFilter(is_short)
            original(self, *args)

        return log_env

    classes = Runner, FlexibleRunner
    with ExitStack() as stack:
        for each in classes:
            stack.enter_context(replaced(each, _log_env=quiet(each._log_env)))
        yield


@patch('mmengine.runner.CheckpointLoader._schemes', 'mmengine.runner.checkpoint.load_url')
def checkpoints_loaded_by(load_file: Callable, load_url: Callable) -> Iterator[None]:
    """Let all that MMEngine loads by a path or a URL go through these functions.

    'https://', 'torchvision://' and 'open-mmlab://' end in load_url. MMEngine's own loaders fall back to unpickling
    whatever a file holds.
    """
    from mmengine.runner import CheckpointLoader, checkpoint

    schemes = type(CheckpointLoader._schemes)(CheckpointLoader._schemes)
    schemes[''] = load_file
    with replaced(CheckpointLoader, _schemes=schemes), replaced(checkpoint, load_url=load_url):
        yield


@patch('mmengine.fileio.backends.registry_utils.backends', 'mmengine.fileio.io.backend_instances')
def local_files_written_by(backend: type) -> Iterator[None]:
    """Let MMEngine write to the disk by this subclass of its LocalBackend: its own writes checkpoints in place."""
    from mmengine.fileio import io
    from mmengine.fileio.backends import registry_utils

    with (
        replaced_items(registry_utils.backends, local=backend),
        replaced_items(registry_utils.prefix_to_backends, **{'': backend}),
        emptied(io.backend_instances),
    ):
        yield


@patch('mmengine.runner.checkpoint._load_checkpoint_with_prefix')
def prefixes_keep_metadata(check: Callable) -> Iterator[None]:
    """Let init_cfg=dict(type='Pretrained', prefix=...) keep the metadata of the modules under the prefix.

    `check` is called with the loaded checkpoint, the prefix and the file's name. The 'module.' of DataParallel is taken
    off the prefix, as it is off the keys.
    """
    from mmengine.runner import checkpoint

    original = checkpoint._load_checkpoint_with_prefix

    def load(prefix: str, filename: str, map_location: Any = None) -> OrderedDict:
        loaded = []
        prefix = prefix.removeprefix('module.')

        def remember(*args: Any, **kwargs: Any) -> Any:
            loaded.append(load_file(*args, **kwargs))
            check(loaded[-1], prefix, filename)
            return loaded[-1]

        load_file = checkpoint._load_checkpoint
        with replaced(checkpoint, _load_checkpoint=remember):
            part = OrderedDict(original(prefix, filename, map_location))
        metadata = getattr(loaded[0].get('state_dict', loaded[0]), '_metadata', {})
        start = prefix.rstrip('.') + '.'
        part._metadata = {  # type: ignore[attr-defined]
            name.removeprefix(start): value for name, value in metadata.items() if name.startswith(start)
        }
        return part

    with replaced(checkpoint, _load_checkpoint_with_prefix=load):
        yield


@patch('mmengine.runner.load_state_dict', 'mmengine.runner.checkpoint.load_state_dict')
def state_dicts_loaded_by(function: Callable) -> Iterator[None]:
    """Let MMEngine load state dicts by this function, which takes what MMEngine's own takes."""
    from mmengine import runner
    from mmengine.runner import checkpoint

    with replaced(runner, load_state_dict=function), replaced(checkpoint, load_state_dict=function):
        yield


@patch('mmengine.hooks.LoggerHook.after_test_epoch')
def scores_written_once() -> Iterator[None]:
    """Let the first process alone write the JSON of a test's scores.

    MMEngine's LoggerHook writes it from every process to one file: the longer one's end may stay behind the other.
    """
    from mmengine.dist import master_only
    from mmengine.hooks import LoggerHook

    with replaced(LoggerHook, after_test_epoch=master_only(LoggerHook.after_test_epoch)):
        yield


@patch('mmengine.runner.Runner.dump_config', 'mmengine.runner.FlexibleRunner.dump_config')
def config_not_dumped() -> Iterator[None]:
    """Let a Runner that is built leave the config in its work dir as it is.

    MMEngine's writes there at once, in place: a test, or a training that fails before its first iteration, replaces the
    config of what was trained.
    """
    from mmengine.runner import FlexibleRunner, Runner

    def leave(runner: object) -> None:
        pass

    with replaced(Runner, dump_config=leave), replaced(FlexibleRunner, dump_config=leave):
        yield


@patch('hook.__class__')
def hooks_of_class(hooks: Sequence, original: type, derived: type) -> Iterator[None]:
    """Make the hooks that are exactly of one class, of a Runner that is built, hooks of a class derived from it.

    The config keeps the original's name, so the copy in a work dir works in a program without this package.
    """
    changed = [hook for hook in hooks if type(hook) is original]
    for hook in changed:
        hook.__class__ = derived
    try:
        yield
    finally:
        for hook in changed:
            hook.__class__ = original
