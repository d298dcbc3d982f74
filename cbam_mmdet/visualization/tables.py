"""A table once, written three ways: in the report's HTML, as Markdown, as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass


class Change(float):
    """A difference between two runs: shown with its sign, and as better where it is greater."""


Cell = str | int | float | None
MINUS, NOTHING = '\N{MINUS SIGN}', '\N{EN DASH}'


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header; None is an empty cell.

    Args:
        name: of its files, without suffix.
        caption: what it shows, in a line.
        header: the columns' names.
        rows: as long as the header each.
    """

    name: str
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def markdown(self) -> str:
        """The table as GitHub shows it, numbers to the right."""
        numeric = [any(isinstance(row[i], (int, float)) for row in self.rows) for i in range(len(self.header))]
        rows = [self.header, ['---:' if right else '---' for right in numeric]]
        rows += [[text(cell).replace('|', '\\|').replace('\n', ' ') for cell in row] for row in self.rows]
        return ''.join(f'| {" | ".join(row)} |\n' for row in rows)

    def csv(self) -> str:
        """The table with unrounded numbers."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator='\n')
        writer.writerow(self.header)
        writer.writerows([float(cell) if isinstance(cell, Change) else cell for cell in row] for row in self.rows)
        return out.getvalue()


def text(cell: Cell) -> str:
    """A cell for people: three digits, a minus that is one, a dash for nothing."""
    if cell is None:
        return NOTHING
    if isinstance(cell, Change):
        return f'{cell:+.3f}'.replace('-', MINUS) if abs(cell) >= 5e-4 else '0.000'
    return f'{cell:.3f}' if isinstance(cell, float) else str(cell)


def change(before: float | None, after: float | None) -> Change | None:
    """The second less the first; None if one is not known."""
    return None if before is None or after is None else Change(after - before)
