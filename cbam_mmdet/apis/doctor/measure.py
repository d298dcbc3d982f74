"""The doctor's measurements: the scripts of benchmarks/, each in a process of its own, and the records that they write.

Only the standard library is imported here.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cbam_mmdet.apis.doctor.case import Case, Skip, without_paths

TIMEOUT = 1200  # seconds for one script
REMEDY = 'run the script by itself to see its output; if memory is short, end other programs first'
# Name of a measurement -> the script, and its arguments: on a CPU about a minute in all, on a GPU some minutes.
ON_CPU = {
    'cbam_op': ('cbam_op.py', '--shapes C4 C5 SSD38 --rounds 3 --what textbook eager fused'),
    'network': ('network.py', '--networks r18 --rounds 3 --what textbook ours'),
}
ON_GPU = {
    'cbam_op': ('cbam_op.py', '--dtypes float32 bfloat16'),
    'network': ('network.py', '--networks r50 r18 ssd300 faster_rcnn_r50 --dtypes float32 bfloat16'),
}


def cases(folder: Path, gpu: bool, records: dict[str, Any]) -> Iterator[Case]:
    """A case for each measurement; what it measured goes into records.

    Args:
        folder: benchmarks/ of a clone.
        gpu: whether there is a GPU, which the scripts then take.
        records: name of a measurement -> its record, plain values with `rows`.
    """
    for name, (script, arguments) in (ON_GPU if gpu else ON_CPU).items():

        def measure(name: str = name, script: str = script, arguments: str = arguments) -> str | None:
            records[name] = _record(folder / script, arguments.split())
            return None

        yield Case(f'measurement: {name}', measure, REMEDY)


def _record(script: Path, arguments: list[str]) -> dict:
    if not script.parent.is_dir():
        raise Skip('the benchmarks are not installed with the package: run tools/doctor.py of a clone')
    if not script.is_file():
        raise Skip(f'there is no benchmarks/{script.name}')
    print(f'measuring: benchmarks/{script.name} {" ".join(arguments)}', file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, str(script), *arguments, '--out', f'{out}/record']
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
        if done.returncode:
            last = next(filter(None, map(str.strip, reversed(done.stderr.splitlines()))), 'no message')
            raise RuntimeError(f'it ended with {done.returncode}: {last}')
        record = json.loads(Path(f'{out}/record.json').read_text(encoding='utf-8'))
    record.pop('plot', None)
    record['command'] = without_paths(re.sub(r' --out \S+', '', record['command']))
    return record
