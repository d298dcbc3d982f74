"""What some versions of torch lack, or charge too much for, and patches of torch. Each entry says when it can go."""

from __future__ import annotations

import _compat_pickle
import collections
import inspect
import io
import pickle
import threading
import types
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.nn.modules import module as torch_module
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.data import DataLoader

from cbam_mmdet.compat.patches import patch, replaced_items

# torch.compile takes such operators as they are. Before torch 2.4 there are none.
HAS_CUSTOM_OPERATORS = hasattr(torch.library, 'custom_op')

# What torch.load(weights_only=True) may build beside tensors, by full name. Before torch 2.6 there is no such list, or
# one without names, and before 2.4 it builds nothing else.
HAS_SAFE_GLOBALS = torch.__version__ >= (2, 6)
_LOADING = threading.RLock()  # torch has one such list for all threads

if hasattr(torch.compiler, 'is_compiling'):
    is_compiling = torch.compiler.is_compiling
else:  # before torch 2.3
    from torch._dynamo.external_utils import is_compiling


def leaves_this_process() -> bool:
    """Whether what is traced now will run elsewhere, and so is to hold PyTorch's own operators."""
    # Not torch.compiler.is_exporting(), which torch.compile takes for True. Where torch cannot tell the two apart, a
    # compilation counts.
    exporting = getattr(torch.compiler, '_is_exporting_flag', None)
    return torch.jit.is_tracing() or (is_compiling() if exporting is None else exporting)


def is_autocast_enabled(device_type: str) -> bool:
    """As torch.is_autocast_enabled, which takes a device type since torch 2.4."""
    if hasattr(torch, 'get_autocast_dtype'):  # has come with that argument
        return torch.is_autocast_enabled(device_type)
    return torch.is_autocast_cpu_enabled() if device_type == 'cpu' else torch.is_autocast_enabled()


def memory_changes(function: Callable[[], object]) -> list[int]:
    """The bytes that tensors on the CPU take and free (negative) during a call, in order, as the profiler sees them."""
    # Without this option later versions forget the events; torch 2.1 does not know it, and tells the time otherwise.
    options = inspect.signature(torch.profiler.profile).parameters.keys() & {'acc_events'}
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, **dict.fromkeys(options, True)) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == '[memory]']
    events.sort(key=lambda event: event.start_ns() if hasattr(event, 'start_ns') else event.start_us())
    return [event.nbytes() for event in events]


def has_global_hooks() -> bool:
    """Whether there are hooks that all modules call. torch's own function for that has come with 2.2."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


@patch('torch.nn.modules.module._global_module_registration_hooks')
def children_registered_with(hook: Callable) -> Iterator[None]:
    """Call a function of (module, name, child) whenever a module gets a child, by torch's own hook for that."""
    handle = register_module_module_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@patch('DataLoader.__dict__')
def loader_parts(loader: DataLoader, **parts: Any) -> Iterator[None]:
    """Put another batch sampler or data set into a DataLoader that is built.

    It refuses new attributes of these names, for the sake of workers that run: none may run yet.
    """
    with replaced_items(vars(loader), **parts):
        yield


def assume_constant_result(function: Callable) -> Callable:
    """As torch.compiler.assume_constant_result: torch.compile takes the function's result as a constant.

    That decorator imports torch._dynamo, which costs every program 1.3 s that compiles nothing. It can be used again
    when torch imports torch._dynamo lazily there (not in 2.11).
    """
    function._dynamo_marked_constant = True
    return function


def load_without_code(
    path: str | io.BytesIO, map_location: str | torch.device | None, allowed: Mapping[str, Any]
) -> Any:
    """torch.load(weights_only=True), with a list of its own of what a file may name.

    Args:
        path: a local file, or what one would hold.
        map_location: that of torch.load.
        allowed: what a file may name beside tensors and plain data, by full name ('numpy.ndarray').

    Raises:
        pickle.UnpicklingError: if the file names anything else, with the words 'GLOBAL {name}'. Nothing of it was run.
    """
    if HAS_SAFE_GLOBALS:
        names = torch.serialization.safe_globals([(value, name) for name, value in allowed.items()])
        with _LOADING, names:
            return torch.load(path, map_location=map_location, weights_only=True)
    # In torch 2.1 torch.load hands TorchScript's archives to torch.jit.
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(PurePosixPath(name).name == 'constants.pkl' for name in archive.namelist()):
                raise pickle.UnpicklingError('a TorchScript archive, GLOBAL torch.jit')
    if isinstance(path, io.BytesIO):
        path.seek(0)
    pickles = _pickle_module({**_plain_globals(), **allowed})
    return torch.load(path, map_location=map_location, pickle_module=pickles, weights_only=False)


def unpickle_without_code(path: str | Path, allowed: Mapping[str, Any]) -> Any:
    """Read a file that pickle.dump wrote, with a list of what it may name as in load_without_code.

    Raises:
        pickle.UnpicklingError: as load_without_code.
    """
    # So pickle writes the storage of a tensor: the bytes of a file of torch.save.
    storages = {'torch.storage._load_from_bytes': lambda content: load_without_code(io.BytesIO(content), 'cpu', {})}
    with open(path, 'rb') as file:
        return _pickle_module({**_plain_globals(), **allowed, **storages}).load(file)


def _plain_globals() -> dict[str, Any]:
    return {**_PLAIN_DATA, **torch._weights_only_unpickler._get_allowed_globals()}


def _latin1(text: str, encoding: str) -> bytes:
    """How pickle of protocol 2 writes bytes: a call of _codecs.encode."""
    if encoding != 'latin1':
        raise pickle.UnpicklingError(f'Unsupported global: GLOBAL _codecs.encode of {encoding!r}')
    return text.encode(encoding)


_PLAIN_DATA = {
    '_codecs.encode': _latin1,
    'builtins.bytearray': bytearray,
    'builtins.complex': complex,
    'builtins.set': set,
    'collections.Counter': collections.Counter,
    'torch.device': torch.device,
}


def _pickle_module(allowed: Mapping[str, Any]) -> types.SimpleNamespace:
    """What torch.load takes for the module pickle: one that finds nothing but the allowed globals."""

    class Unpickler(pickle._Unpickler):  # the one in Python, whose steps a subclass can replace
        def find_class(self, module_name, name):
            if self.proto < 3:  # Python 2's names
                module_name, name = _compat_pickle.NAME_MAPPING.get((module_name, name), (module_name, name))
                module_name = _compat_pickle.IMPORT_MAPPING.get(module_name, module_name)
            full_name = f'{module_name}.{name}'
            if full_name not in allowed:
                raise pickle.UnpicklingError(f'Unsupported global: GLOBAL {full_name}')
            return allowed[full_name]

        def load_build(self):
            if isinstance(self.stack[-2], (type, types.FunctionType, types.BuiltinFunctionType)):
                raise pickle.UnpicklingError(f'Unsupported change of a global: GLOBAL {self.stack[-2].__qualname__}')
            super().load_build()

        dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}

    def load(file, **options):
        return Unpickler(file, **options).load()

    return types.SimpleNamespace(__name__='pickle', Unpickler=Unpickler, load=load)
