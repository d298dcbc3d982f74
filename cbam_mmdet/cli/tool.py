"""How a tool ends: one message and an exit code for a user's mistake, a traceback for a bug of ours."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

from cbam_mmdet.cli.messages import explain
from cbam_mmdet.engine.distributed import end_process, speak_for_all
from cbam_mmdet.errors import Stopped

FAILED = 1
USER_ERROR = 2
INTERRUPTED = 130  # what a shell reports for Ctrl-C


def run_tool(main: Callable[[], int | None]) -> NoReturn:
    """Run a tool's main function and exit with its code; turn known failures into one message on stderr."""
    if int(os.environ.get('RANK', 0)) > 0:  # the first of several processes prints the same
        sys.stdout = open(os.devnull, 'w')  # noqa: SIM115
        warnings.simplefilter('ignore')
    try:
        code = main()
    except Stopped as stop:
        _leave(str(stop), stop.code)
    except KeyboardInterrupt:
        _leave('interrupted', INTERRUPTED)
    except Exception as error:
        if _lost_contact(error):
            _leave(
                f'error: process {os.environ.get("RANK")} lost contact with another process of this run: {error}',
                FAILED,
            )
        message = explain(error)
        if message is None:
            raise
        _leave(f'error: {message}', USER_ERROR)
    _end(code or 0)


def _leave(message: str, code: int) -> NoReturn:
    sys.stdout.flush()
    speaks = True
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        speaks, code = speak_for_all(code)
    if speaks:
        print(f'\n{message}', file=sys.stderr, flush=True)
    _end(code)


def _end(code: int) -> NoReturn:
    distributed = sys.modules.get('torch.distributed')
    if distributed and distributed.is_available() and distributed.is_initialized():
        end_process(code)
    sys.exit(code)


def _lost_contact(error: BaseException) -> bool:
    """What a collective of gloo or NCCL raises when another process has ended, or cannot be reached."""
    return isinstance(error, RuntimeError) and bool(
        re.search(r'gloo/transport|remote process exited|NCCL communicator was aborted', str(error))
    )
