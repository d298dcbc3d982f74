"""What MMEngine logged of a training: the rows of `TIMESTAMP/vis_data/scalars.json` in its work dir.

A file holds rows of three kinds. A training's row has the losses, and its `step` counts iterations. A row of
GateStatisticsHook has the figures of the gates, and its `step` counts iterations too. A validation's row has the
metrics, none of them where nothing was detected, and its `step` counts epochs or, in a loop of iterations, iterations.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

SCALARS = 'vis_data/scalars.json'
NOT_METRICS = ('step', 'time', 'data_time', 'memory')


def scalar_logs(work_dir: str | Path) -> list[tuple[Path, list[dict]]]:
    """(log folder, rows) of each start of a training in a work dir, by time."""
    return [(path.parent.parent, json_lines(path)) for path in sorted(Path(work_dir).glob(f'*/{SCALARS}'))]


def json_lines(path: Path) -> list[dict]:
    """The lines of a log that hold JSON objects; a kill may have cut the last one."""
    rows = []
    for line in path.read_text(encoding='utf-8', errors='replace').splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


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
        work_dir: where the training wrote.
        last_step: its last epoch, or iteration where validations count these.

    Returns:
        The metrics, none of them where nothing was detected; None if the training has not come to this validation.
    """
    for _, rows in reversed(scalar_logs(work_dir)):
        for row in reversed(rows):
            if is_validation(row) and row.get('step') == last_step:
                return metrics_of(row)
    return None
