"""Words for messages."""

from __future__ import annotations

from collections.abc import Sequence


def abridge(names: Sequence[str], most: int = 3) -> str:
    """The first names of a list, separated by commas, and how many there are where that is not all."""
    return ', '.join(names[:most]) + (f', ... ({len(names)} in all)' if len(names) > most else '')
