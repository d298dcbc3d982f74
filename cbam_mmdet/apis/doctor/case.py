"""What the doctor's sections share: a self-test, and texts without the paths of the machine."""

from __future__ import annotations

import os
import re
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LONGEST = 300  # characters of a message
OTHER_PATH = re.compile(r'(?<![\w.~:/-])/(?:[^\s/:\'"]+/)+([^\s/:\'"]*)')  # not a URL


class Skip(Exception):
    """Why a self-test does not apply here."""


@dataclass(frozen=True)
class Case:
    """A self-test: it returns what is wrong, or None, and may raise anything; and what to do if something is."""

    name: str
    test: Callable[[], str | None]
    remedy: str


def in_one_line(error: BaseException) -> str:
    """The type of an exception and the first line of its message."""
    first = next(filter(None, map(str.strip, str(error).splitlines())), '')
    return without_paths(f'{type(error).__name__}: {first}' if first else type(error).__name__)


def without_paths(text: str) -> str:
    """The text with short names for the folders of this environment and this user, and of bounded length."""
    folders = {
        os.getcwd(): '.',
        tempfile.gettempdir(): 'tmp',
        str(Path.home()): '~',
        sys.base_prefix: 'python',
        sys.prefix: 'environment',
        str(Path(__file__).parents[3]): 'cbam-mmdet',
        sysconfig.get_paths()['stdlib']: 'python',
        sysconfig.get_paths()['purelib']: 'site-packages',
    }
    for folder in sorted(folders, key=len, reverse=True):  # the inner ones first
        if len(folder) > 1:
            text = text.replace(folder, folders[folder])
    text = OTHER_PATH.sub(r'.../\1', text)
    return text if len(text) <= LONGEST else f'{text[:LONGEST]} ...'
