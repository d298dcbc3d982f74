"""Log lines that only one of several processes writes."""

from __future__ import annotations

import logging
import os

from mmengine.logging import print_log


def is_first_process() -> bool:
    """Whether this is the only or the first process of the job. It works before MMEngine has a process group."""
    return int(os.environ.get('RANK', os.environ.get('SLURM_PROCID', 0))) == 0


def log(message: str, level: int = logging.INFO) -> None:
    """Log a change of a config. Every process makes the change, and the first one logs it."""
    if is_first_process():
        print_log(message, logger='current', level=level)
