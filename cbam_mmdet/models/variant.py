"""What a checkpoint says of its CBAMs beside their weights: the arguments that change no shape.

The weights of the paper's gate load into the unit gate, and compute something else there. So each CBAM writes its
variant into the metadata of its state dict, which torch.save keeps, and compares it where weights are loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar

from torch import nn

from cbam_mmdet.errors import UserError

KEY = 'cbam_variant'  # in the metadata of a module
_ANY = ContextVar('any_variant', default=False)


@contextlib.contextmanager
def any_variant_loaded() -> Iterator[None]:
    """Let CBAM load the weights of any variant inside this context."""
    token = _ANY.set(True)
    try:
        yield
    finally:
        _ANY.reset(token)


def is_any_variant_loaded() -> bool:
    """Whether this runs inside any_variant_loaded."""
    return _ANY.get()


def write_variant(module: nn.Module, state_dict: Mapping, prefix: str, local_metadata: dict) -> None:
    """A state dict hook of CBAM."""
    local_metadata[KEY] = module.variant


def compare_variant(module: nn.Module, prefix: str, local_metadata: Mapping) -> None:
    """Compare what a state dict says of a CBAM with the CBAM into which it is loaded.

    Args:
        module: a CBAM.
        prefix: that of its keys.
        local_metadata: that of the state dict. Nothing is compared if it does not know the variant.

    Raises:
        UserError: for another variant.
    """
    theirs = local_metadata.get(KEY)
    if _ANY.get() or not isinstance(theirs, Mapping):
        return
    for name, here in module.variant.items():
        there = theirs.get(name, here)
        if there != here:
            raise UserError(
                f'the checkpoint was trained with {name}={there!r} in its CBAM {prefix.rstrip(".")}, and the config '
                f'says {name}={here!r}: the same weights would compute something else. Set {name}={there!r} in the '
                'config of CBAM. To load them all the same: --any-variant'
            )
