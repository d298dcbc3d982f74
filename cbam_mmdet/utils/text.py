"""Text for messages."""

from __future__ import annotations

from collections.abc import Sequence


def abridge(names: Sequence[str], most: int = 3, quoted: bool = False) -> str:
    """The first names of a list, separated by commas, and the number of all if there are more."""
    shown = map(repr, names[:most]) if quoted else names[:most]
    return ', '.join(shown) + (f', ... ({len(names)} in all)' if len(names) > most else '')


def brief(error: object, most: int = 200) -> str:
    """The text of an error in one line, cut where it is long: some quote a whole damaged file."""
    text = ' '.join(str(error).split())
    return text if len(text) <= most else f'{text[:most]}...'
