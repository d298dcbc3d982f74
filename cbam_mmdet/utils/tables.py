"""A table that can be written as HTML for the report, as Markdown, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from cbam_mmdet.utils.files import write_text


class Change(float):
    """A difference between two runs. It is shown with its sign."""


Cell = str | int | float | None
MINUS, NOTHING = '\N{MINUS SIGN}', '\N{EN DASH}'


@dataclass(frozen=True)
class Column:
    """The header of a column, and the format of its cells in HTML and Markdown. CSV has unrounded numbers.

    Args:
        name: the header.
        style: a format specification for numbers, such as '.2f', or a function that formats a cell. By default a float
            has three decimals.
        number: whether the cells are aligned to the right. By default they are if all of them are numbers.
    """

    name: str
    style: str | Callable[[Any], str] = ''
    number: bool | None = None

    def text(self, cell: Cell) -> str:
        """The text of a cell that is not empty."""
        if callable(self.style):
            return self.style(cell)
        if isinstance(cell, Change):
            text = format(cell, f'+{self.style or ".3f"}')
            return text.replace('-', MINUS) if float(text) else text[1:]
        if isinstance(cell, str):
            return cell
        return format(cell, self.style or ('.3f' if isinstance(cell, float) else ''))


@dataclass(frozen=True)
class Table:
    """Rows of cells below a header. None is an empty cell.

    Args:
        header: the columns, or just the names of those without a format of their own.
        rows: lists of cells, each as long as the header.
        name: the name of the files, without suffix.
        caption: one line that says what the table shows.
        better: whether a greater number is better, so that a change has a colour besides its sign.
        nothing: the text of an empty cell in HTML and Markdown.
    """

    header: Sequence[str | Column]
    rows: Sequence[Sequence[Cell]]
    name: str = ''
    caption: str = ''
    better: bool = True
    nothing: str = NOTHING

    @classmethod
    def of(cls, records: Iterable, columns: Mapping[str | Column, Callable[[Any], Cell]], **how: Any) -> Table:
        """Make a table with a row for each record.

        Args:
            records: objects of any type.
            columns: for each column a function that takes a record and returns its cell.
            how: the other arguments of a table.
        """
        return cls(list(columns), [[cell(record) for cell in columns.values()] for record in records], **how)

    @property
    def columns(self) -> list[Column]:
        """The header with every column's format."""
        return [column if isinstance(column, Column) else Column(column) for column in self.header]

    def html(self) -> Markup:
        """The table in a frame that scrolls, also by keyboard, if the page is narrower."""
        head = ''.join(
            f'<th scope="col"{" class=number" if self._numeric(i) else ""}>{escape(column.name)}</th>'
            for i, column in enumerate(self.columns)
        )
        body = ''.join(f'<tr>{"".join(self._cell(i, cell) for i, cell in enumerate(row))}</tr>' for row in self.rows)
        return Markup(
            f'<div class="frame" role="region" tabindex="0" aria-labelledby="table-{self.name}"><table>'
            f'<caption id="table-{self.name}">{escape(self.caption)}</caption>'
            f'<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )

    def markdown(self) -> str:
        """The table as GitHub's Markdown, with numbers aligned to the right."""
        columns = self.columns
        rows = [[column.name for column in columns]]
        rows += [['---:' if self._numeric(i) else '---' for i in range(len(columns))]]
        rows += [[self._markdown(i, cell) for i, cell in enumerate(row)] for row in self.rows]
        return ''.join(f'| {" | ".join(row)} |\n' for row in rows)

    def csv(self) -> str:
        """The table with unrounded numbers. An empty cell has no text."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator='\n')
        writer.writerow([column.name for column in self.columns])
        writer.writerows([float(cell) if isinstance(cell, Change) else cell for cell in row] for row in self.rows)
        return out.getvalue()

    def write(self, folder: Path) -> None:
        """Write NAME.csv, and NAME.md with the caption, into an existing folder."""
        write_text(folder / f'{self.name}.csv', self.csv())
        (folder / f'{self.name}.md').write_text(f'{self.caption}\n\n{self.markdown()}', encoding='utf-8')

    def _markdown(self, index: int, cell: Cell) -> str:
        text = self._text(index, cell).replace('|', '\\|').replace('\n', ' ')
        # Names come from data sets. In code nothing is HTML.
        return text if self.columns[index].style is code else text.replace('<', '&lt;')

    def _text(self, index: int, cell: Cell) -> str:
        return self.nothing if cell is None else self.columns[index].text(cell)

    def _cell(self, index: int, cell: Cell) -> str:
        text = escape(self._text(index, cell))
        if index == 0:
            return f'<th scope="row">{text}</th>'
        style = 'number' if self._numeric(index) else 'words'
        if self.better and isinstance(cell, Change) and abs(cell) >= 5e-4:
            style += ' better' if cell > 0 else ' worse'
        return f'<td class="{style}">{text}</td>'

    def _numeric(self, index: int) -> bool:
        number = self.columns[index].number
        if number is not None:
            return number
        if any(not isinstance(row[index], (int, float, type(None))) for row in self.rows):
            return False
        # A column without any number is a column of words.
        return any(isinstance(cell, (int, float)) for row in self.rows for cell in row)


def code(cell: Cell) -> str:
    """A cell as code in Markdown."""
    return f'`{cell}`'


def change(before: float | None, after: float | None) -> Change | None:
    """The difference after - before, or None if one of them is unknown."""
    return None if before is None or after is None else Change(after - before)
