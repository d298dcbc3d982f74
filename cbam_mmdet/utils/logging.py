"""Log lines that one of several processes writes."""

from __future__ import annotations

import logging
import os

from mmengine.logging import print_log


def is_first_process() -> bool:
    """Whether this is the job's only process or its first, also before MMEngine knows."""
    return int(os.environ.get('RANK', os.environ.get('SLURM_PROCID', 0))) == 0


def log(message: str, level: int = logging.INFO) -> None:
    """Log what was done to a config: every process does it, the first one tells."""
    if is_first_process():
        print_log(message, logger='current', level=level)
