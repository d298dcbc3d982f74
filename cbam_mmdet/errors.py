"""A user's mistake ends in one message and exit code 2, without a traceback; a bug of ours keeps its traceback."""

from __future__ import annotations

import difflib
import re
import signal
from collections.abc import Iterable


class UserError(ValueError):
    """What was given, what was expected and what to do, in words for the person at the keyboard."""


class Stopped(Exception):
    """A training that a signal stopped, and has saved a checkpoint, or (None) could not."""

    def __init__(self, number: int, checkpoint: str | None) -> None:
        name = signal.Signals(number).name
        if checkpoint:
            super().__init__(f'stopped by {name}; {checkpoint} is saved, and --resume continues from there')
        else:
            super().__init__(f'stopped by {name}, without a new checkpoint; --resume continues from the last one')
        self.code = 128 + number


def did_you_mean(name: str, choices: Iterable[str], n: int = 3) -> str:
    """A hint '; did you mean 'a' or 'b'?' for a misspelt name; empty if no name is similar."""
    choices = [choice for choice in choices if choice != name]
    folded = {choice.lower(): choice for choice in choices}
    matches = [folded[m] for m in difflib.get_close_matches(name.lower(), folded, n=n, cutoff=0.6)]
    return f'; did you mean {" or ".join(map(repr, matches))}?' if matches else ''


def is_dead_worker(error: BaseException) -> bool:
    """What a DataLoader raises when one of its processes is gone."""
    return isinstance(error, RuntimeError) and bool(
        re.search(r'DataLoader worker \(pid.*\) (is killed|exited)', str(error))
    )


class OperatorError(RuntimeError):
    """An operator, or a mode of one, that only a compiled mmcv has."""
