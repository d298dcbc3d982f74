"""A table once, written three ways: in the report's HTML, as Markdown, as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape


class Change(float):
    """A difference between two runs, shown with its sign."""


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
        better: whether a greater number is a better one, so that a change has a colour besides its sign.
    """

    name: str
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    better: bool = True

    def html(self) -> Markup:
        """The table in a frame that scrolls, by keyboard too, where the page is narrower."""
        head = ''.join(
            f'<th scope="col"{" class=number" if self._numeric(i) else ""}>{escape(name)}</th>'
            for i, name in enumerate(self.header)
        )
        body = ''.join(f'<tr>{"".join(self._cell(i, cell) for i, cell in enumerate(row))}</tr>' for row in self.rows)
        return Markup(
            f'<div class="frame" role="region" tabindex="0" aria-labelledby="table-{self.name}"><table>'
            f'<caption id="table-{self.name}">{escape(self.caption)}</caption>'
            f'<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )

    def _cell(self, column: int, cell: Cell) -> str:
        if column == 0:
            return f'<th scope="row">{escape(text(cell))}</th>'
        style = 'number' if self._numeric(column) else 'words'
        if self.better and isinstance(cell, Change) and abs(cell) >= 5e-4:
            style += ' better' if cell > 0 else ' worse'
        return f'<td class="{style}">{escape(text(cell))}</td>'

    def _numeric(self, column: int) -> bool:
        cells = [row[column] for row in self.rows]
        if any(isinstance(cell, str) for cell in cells):
            return False
        # A column of a table of numbers may be empty.
        return any(isinstance(cell, (int, float)) for row in self.rows for cell in row)

    def markdown(self) -> str:
        """The table as GitHub shows it, numbers to the right."""
        rows = [self.header, ['---:' if self._numeric(i) else '---' for i in range(len(self.header))]]
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
