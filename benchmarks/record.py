"""Write the record of a benchmark with a description of the machine: as JSON, as a Markdown table, and as a plot."""

import ctypes
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import torch

from cbam_mmdet.utils.tables import Column, Table


def machine(script: str, *packages: str) -> dict:
    """The command, the machine and its load, and the versions of packages."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f'CPU, {torch.get_num_threads()} threads'
    return dict(
        command=' '.join(['python', script, *sys.argv[1:]]),
        device=device,
        processor=_processor(),
        cores=os.cpu_count(),
        load_average_before=round(os.getloadavg()[0], 2),
        python=platform.python_version(),
        versions={name: _version(name) for name in ('torch', *packages)},
    )


def rotated(names: list[str], turn: int) -> list[str]:
    """The names in another order each turn, so that none always follows the same one."""
    first = turn % len(names)
    return names[first:] + names[:first]


def keep_freed_memory() -> bool:
    """Let glibc's malloc keep what is freed, as MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_=2147483647 do.

    So the time of a network on a CPU is not that of clearing fresh pages. Whether it was set.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if sys.platform == 'linux' else None
    m_trim_threshold, m_mmap_max = -1, -4  # of malloc.h
    return bool(mallopt and mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, 2**31 - 1))


def write(record: dict, out: Path | None, labels: list[str], bars: dict[str, list[float | None]], unit: str) -> None:
    """Print the record's rows, and with `out` also write OUT.json, OUT.md and OUT.png.

    Args:
        record: plain values, with `rows`, a list of dicts with the same keys.
        out: path without suffix.
        labels: of the plot's groups.
        bars: for each name a height in every group; None for none.
        unit: of the heights.
    """
    record = json.loads(json.dumps({**record, 'load_average_after': round(os.getloadavg()[0], 2)}))
    table = markdown(record)
    print(table)
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    # The file includes the groups, so that the plot can be drawn again from it.
    record['plot'] = dict(labels=labels, bars=bars, unit=unit)
    out.with_suffix('.json').write_text(json.dumps(record, indent=1) + '\n')
    out.with_suffix('.md').write_text(table)
    plot(json.loads(out.with_suffix('.json').read_text()), out.with_suffix('.png'))


def markdown(record: dict) -> str:
    """The facts of a record, and its rows as a table."""
    rows = record['rows']
    header = [Column(key.replace('_', ' '), _plain) for key in rows[0]]
    table = Table(header, [list(row.values()) for row in rows], nothing=_plain(None))
    return '\n'.join([*head(record), '', table.markdown()])


def head(record: dict) -> list[str]:
    """Lines of Markdown with the command and all other facts, without the rows."""
    facts = {key: value for key, value in record.items() if key not in ('rows', 'command')}
    return [
        f'    {record["command"]}\n',
        *(f'- {key.replace("_", " ")}: {_plain(value)}' for key, value in facts.items()),
    ]


def plot(record: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    labels, bars = record['plot']['labels'], record['plot']['bars']
    figure = Figure(figsize=(max(4, 1.1 * len(labels) + 2), 3.2), layout='constrained')
    axes = figure.subplots()
    width = 0.8 / len(bars)
    for i, (name, heights) in enumerate(bars.items()):
        places = [g + i * width for g in range(len(labels)) if heights[g] is not None]
        axes.bar(places, [h for h in heights if h is not None], width, label=name)
    axes.set_xticks([g + 0.4 - width / 2 for g in range(len(labels))], labels, fontsize=8)
    axes.set_ylabel(record['plot']['unit'])
    axes.set_title(record['device'], fontsize=8)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=80)


def _plain(value) -> str:
    if isinstance(value, dict):
        return ', '.join(f'{key} {_plain(inner)}' for key, inner in value.items())
    if isinstance(value, float):
        return f'{value:.4g}'
    return '-' if value is None else str(value)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(': ', 1)[1] for line in lines if line.startswith('model name')), platform.machine())
