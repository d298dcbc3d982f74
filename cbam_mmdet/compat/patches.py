"""Changes to objects of other packages: each is a context manager that undoes itself, and PATCHES lists them all.

    with state_dicts_loaded_by(function):  # MMEngine's load_state_dict is another one
        ...                                # here it is MMEngine's own again

The tools and apis/ enter a patch for as long as they run. `import cbam_mmdet` enters those that a program needs from
then on; they stand in PERMANENT, whose `close()` undoes them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

# Name of the patch -> the dotted names of what it changes.
PATCHES: dict[str, tuple[str, ...]] = {}
PERMANENT = contextlib.ExitStack()


def patch(*targets: str) -> Callable[[Callable[..., Iterator[None]]], Callable[..., Any]]:
    """Make a context manager of a function with one yield, and list it as a change of these targets."""

    def register(function: Callable[..., Iterator[None]]) -> Callable[..., Any]:
        PATCHES[f'{function.__module__}.{function.__name__}'] = targets
        return functools.wraps(function)(contextlib.contextmanager(function))

    return register


@contextlib.contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Set attributes of an object, and put back at the end what stood there."""
    missing = object()
    before = {name: vars(owner).get(name, missing) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is missing:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


@contextlib.contextmanager
def replaced_items(mapping: dict, **values: Any) -> Iterator[None]:
    """Set items of a dict, and put back at the end what stood under these keys. Other keys are left alone."""
    before = {key: mapping[key] for key in values if key in mapping}
    mapping.update(values)
    try:
        yield
    finally:
        for key in values:
            mapping.pop(key, None)
        mapping.update(before)


@contextlib.contextmanager
def emptied(mapping: dict) -> Iterator[None]:
    """Empty a dict that remembers results, and put them back at the end in place of those of the meantime."""
    before = dict(mapping)
    mapping.clear()
    try:
        yield
    finally:
        mapping.clear()
        mapping.update(before)
