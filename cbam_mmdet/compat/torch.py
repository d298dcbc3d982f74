"""What some versions of torch lack, or charge too much for, and patches of torch. Each entry says when it can go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.data import DataLoader

from cbam_mmdet.compat.patches import patch, replaced_items


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
