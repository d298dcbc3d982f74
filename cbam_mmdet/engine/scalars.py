"""What MMEngine logged for a training: the rows of `TIMESTAMP/vis_data/scalars.json` in its work dir.

A file holds rows of three kinds. A row of the training has the losses, and its `step` counts iterations. A row of
GateStatisticsHook has the figures of the gates, and its `step` counts iterations, too. A row of a validation has the
metrics, or none of them if MMDetection's CocoMetric found no detection. Its `step` counts epochs, or iterations in an
IterBasedTrainLoop.
"""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

from cbam_mmdet.engine.record import read_record

SCALARS = 'vis_data/scalars.json'
NOT_METRICS = ('step', 'time', 'data_time', 'memory')


def scalar_logs(work_dir: str | Path) -> list[tuple[Path, list[dict]]]:
    """(log folder, rows) of each start of a training in a work dir, in the order of time."""
    files = sorted(Path(work_dir).glob(f'*/{SCALARS}'))
    return [(path.parent.parent, [row for row in json_lines(path) if 'step' in row]) for path in files]


def training_logs(work_dir: str | Path) -> list[tuple[Path, list[dict]]]:
    """(log folder, rows) of the newest training in a work dir, from its start even if it was resumed.

    A start that was killed early may hold only the validation that it made up for, or nothing but its record.

    Raises:
        UserError: for a malformed record.
    """
    rows_in = dict(scalar_logs(work_dir))
    logs: list[tuple[Path, list[dict]]] = []
    for folder in sorted(path.parent for path in Path(work_dir).glob('*/vis_data')):
        rows, record = rows_in.get(folder, []), read_record(folder)
        if record.get('checkpoint'):  # that of a test
            continue
        has_trained = bool(record) or any(map(is_training, rows))
        if has_trained and _started_anew(folder):
            logs.clear()
        if has_trained or any(map(is_validation, rows)):
            logs.append((folder, rows))
    return logs


def _started_anew(folder: Path) -> bool:
    """Whether a training says that it resumed none, by the config that MMEngine writes beside its log."""
    with contextlib.suppress(OSError):
        text = (folder / 'vis_data/config.py').read_text(encoding='utf-8', errors='replace')
        return re.search(r'^resume = False$', text, re.M) is not None
    return False


def json_lines(path: Path) -> list[dict]:
    """The lines of a log that hold JSON objects, with their numbers. The last one may be cut off by a kill."""
    rows = []
    for line in path.read_text(encoding='utf-8', errors='replace').splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [
        {key: value for key, value in row.items() if _is_number(value)}
        for row in rows
        if isinstance(row, dict) and all(_is_number(row.get(key, 0)) for key in ('loss', 'step'))
    ]


def _is_number(value: object) -> bool:
    """Whether a value is one that can be drawn. MMEngine also logs texts, which repeat the figures."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)


def is_training(row: dict) -> bool:
    """Whether a row holds the losses of training iterations."""
    return 'loss' in row


def is_validation(row: dict) -> bool:
    """Whether a row holds the metrics of a validation."""
    return not is_training(row) and not any(key.startswith('gates/') for key in row)


def metrics_of(row: dict) -> dict[str, float]:
    """The metrics in the row of a validation, without its step and times."""
    return {key: value for key, value in row.items() if key not in NOT_METRICS and isinstance(value, (int, float))}


def final_metrics(work_dir: str | Path, last_step: int) -> dict[str, float] | None:
    """The metrics of the validation that ended a training.

    Args:
        work_dir: the work dir of the training.
        last_step: its last epoch, or its last iteration if validations count iterations.

    Returns:
        The metrics, an empty dict if nothing was detected, or None if the newest training there has not reached this
        validation.
    """
    for _, rows in reversed(training_logs(work_dir)):
        for row in reversed(rows):
            if is_validation(row) and row.get('step') == last_step:
                return metrics_of(row)
    return None
