"""How a tool ends: one message and an exit code for a user's mistake, a traceback for a bug of ours."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable
from typing import NoReturn

from cbam_mmdet.cli.messages import explain
from cbam_mmdet.compat.mmengine import debug_messages_left_out
from cbam_mmdet.engine.distributed import end_process
from cbam_mmdet.errors import Stopped

FAILED = 1
USER_ERROR = 2
INTERRUPTED = 130  # what a shell reports for Ctrl-C


def run_tool(main: Callable[[], int | None]) -> NoReturn:
    """Run a tool's main function and exit with its code; turn known failures into one message on stderr.

    Under torchrun each process writes its message into the error file that torchrun names, and tools/launch.py prints
    the first one of its machine. An attempt that torchrun will restart prints its messages itself. What all processes
    do together, to stop at a signal, the first process prints.
    """
    for stream in (sys.stdout, sys.stderr):  # a file's name may hold bytes that are no UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')
    # MMDetection warns of it in every program that imports it.
    warnings.filterwarnings('ignore', 'faster_coco_eval is not installed')
    # MMEngine's visualizer, of every box at the edge of an image.
    warnings.filterwarnings('ignore', r'Warning: The \w+ is out of bounds')
    if int(os.environ.get('RANK', 0)) > 0:  # the first of several processes prints the same
        sys.stdout = open(os.devnull, 'w')  # noqa: SIM115
        warnings.simplefilter('ignore')
    try:
        with debug_messages_left_out():
            code = main()
    except Stopped as stop:
        _say(str(stop), int(os.environ.get('RANK', 0)) == 0)
        _end(stop.code)
    except BrokenPipeError:  # what reads the output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _end(FAILED)
    except KeyboardInterrupt:
        _say('interrupted', int(os.environ.get('RANK', 0)) == 0)
        _end(INTERRUPTED)
    except Exception as error:
        if _lost_contact(error):
            rank = os.environ.get('RANK')
            _leave(f'process {rank} lost contact with another process of this run: {error}', FAILED)
        message = explain(error)
        if message is None:
            raise
        _leave(message, USER_ERROR)
    _end(code or 0)


def _leave(message: str, code: int) -> NoReturn:
    if not _write_error_file(message) or _will_be_restarted():
        _say(f'error: {message}')
    _end(code)


def _write_error_file(message: str) -> bool:
    """Hand a message to torchrun, where that has started this process; whether it could be written."""
    path = os.environ.get('TORCHELASTIC_ERROR_FILE')
    if not path:
        return False
    # As torch.distributed.elastic.multiprocessing.errors.record writes it, but for the traceback.
    content = dict(message=dict(message=message, extraInfo=dict(timestamp=str(int(time.time())))))
    try:
        with open(path, 'w', encoding='utf-8') as file:
            json.dump(content, file)
    except OSError:  # a full disk may be what the message is about
        return False
    return True


def _will_be_restarted() -> bool:
    """torchrun reports the errors of the last attempt alone."""
    restarts, attempt = (int(os.environ.get(f'TORCHELASTIC_{name}', 0)) for name in ('MAX_RESTARTS', 'RESTART_COUNT'))
    return attempt < restarts


def _say(message: str, aloud: bool = True) -> None:
    sys.stdout.flush()
    if aloud:
        print(f'\n{message}', file=sys.stderr, flush=True)


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
