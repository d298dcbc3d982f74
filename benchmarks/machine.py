"""Where a figure was measured: what every record under benchmarks/results/ carries."""

import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

import torch


def describe() -> dict[str, str | int]:
    """The machine, the versions, and the command of this program."""
    program = Path(sys.argv[0]).resolve()
    root = Path(__file__).resolve().parent.parent
    name = program.relative_to(root) if program.is_relative_to(root) else program.name
    described = dict(
        processor=processor(),
        cores=os.cpu_count(),
        python=platform.python_version(),
        torch=torch.__version__,
        mmdet=version('onedl-mmdetection'),
        command=f'python {name} {shlex.join(sys.argv[1:])}'.strip(),
    )
    if torch.cuda.is_available():
        described['gpu'] = torch.cuda.get_device_name()
    return described


def processor() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(': ', 1)[1] for line in lines if line.startswith('model name')), platform.machine())
