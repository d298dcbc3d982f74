"""Text for messages."""

from __future__ import annotations

from collections.abc import Sequence


def abridge(names: Sequence[str], most: int = 3, quoted: bool = False) -> str:
    """The first names of a list, separated by commas, and the number of all if there are more."""
    shown = map(repr, names[:most]) if quoted else names[:most]
    return ', '.join(shown) + (f', ... ({len(names)} in all)' if len(names) > most else '')
