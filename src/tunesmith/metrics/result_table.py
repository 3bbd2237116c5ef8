"""What the Python functions return, as small tables: text where it is printed, HTML in a notebook.

A result says what is in its table (`Tabular.table`); how a table looks is here alone. `repr` stays
that of a dataclass, with every field.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import zip_longest

from rich.cells import cell_len

from tunesmith.host.streams import WIDTH, folded

GAP = "  "  # between columns
NARROWEST = 20  # columns of a terminal, of a cell that is folded


@dataclass(frozen=True)
class ResultTable:
    """A table of texts, which may come from data: HTML is escaped where it is rendered.

    Attributes:
        rows: the cells of each; the first cell names the row.
        columns: headings of the cells after the first; empty for a table without headings.
        title: a line above; empty for none.
        notes: lines below.
    """

    rows: Sequence[Sequence[str]]
    columns: Sequence[str] = ()
    title: str = ""
    notes: Sequence[str] = ()

    def text(self, width: int = WIDTH) -> str:
        """Plain lines with columns side by side; notes are folded to `width` columns.

        A table with headings that is wider has its cells folded too, and columns for which there is
        no room come in a table below. Cells without headings hold commands, which stay whole.
        """
        lines = [_one_line(self.title)] if self.title else []
        headings = [["", *self.columns]] if self.columns else []
        grid = []
        for row in [*headings, *self.rows]:
            grid.append([_one_line(cell) for cell in row])
        widths = [0] * max(map(len, grid), default=0)
        for row in grid:
            for column, cell in enumerate(row):
                widths[column] = max(widths[column], cell_len(cell))
        groups = [list(range(len(widths)))]
        if self.columns and sum(widths) + len(GAP) * len(self.columns) > width:
            widths = _narrowed(widths, width)
            groups = _groups(widths, width)
        for group in groups:
            if group is not groups[0]:
                lines.append("")
            for row in grid:
                lines += _lines_of(
                    [row[i] for i in group if i < len(row)], [widths[i] for i in group]
                )
        for note in self.notes:
            lines.append(folded(_one_line(note), width))
        return "\n".join(lines)

    def html(self) -> str:
        """The same as a `<table>`; every text is escaped."""
        align = ' style="text-align: left"'  # a notebook's own style is right
        parts = ["<table>"]
        if self.title:
            parts.append(f"<caption{align}>{escape(self.title)}</caption>")
        if self.columns:
            headings = "".join(f"<th{align}>{escape(column)}</th>" for column in self.columns)
            parts.append(f"<thead><tr><th></th>{headings}</tr></thead>")
        parts.append("<tbody>")
        for name, *cells in self.rows:
            row = "".join(f"<td{align}>{escape(cell)}</td>" for cell in cells)
            parts.append(f"<tr><th{align}>{escape(name)}</th>{row}</tr>")
        parts.append("</tbody></table>")
        parts += [f"<div>{escape(note)}</div>" for note in self.notes]
        return "\n".join(parts)


def _narrowed(widths: list[int], width: int) -> list[int]:
    """Widths of columns that fit side by side, or NARROWEST where they are too many for that."""
    first = min(widths[0], width // 3)
    widest = (width - first) // max(1, len(widths) - 1) - len(GAP)
    return [first, *(min(column, max(NARROWEST, widest)) for column in widths[1:])]


def _groups(widths: list[int], width: int) -> list[list[int]]:
    """The columns of each table: as many as fit, behind the first, which names the rows."""
    groups = [[0]]
    for column in range(1, len(widths)):
        group = [*groups[-1], column]
        if len(group) > 2 and sum(widths[i] + len(GAP) for i in group) - len(GAP) > width:
            groups.append([0, column])
        else:
            groups[-1] = group
    return groups


def _lines_of(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """The lines of a row, with cells folded to the widths of their columns."""
    columns = []
    for cell, width in zip(row, widths, strict=False):
        parts = [cell] if cell_len(cell) <= width else textwrap.wrap(cell, width)
        columns.append([part + " " * (width - cell_len(part)) for part in parts])
    lines = []
    for cells in zip_longest(*columns):
        padded = [cell or " " * width for cell, width in zip(cells, widths, strict=False)]
        lines.append(GAP.join(padded).rstrip())
    return lines


class Tabular:
    """A result that prints as its table, and that a notebook renders."""

    def table(self) -> ResultTable:
        """What a reader is shown of it."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        """What Jupyter shows. The name is IPython's."""
        return self.table().html()


def _one_line(text: str) -> str:
    """A text in one line, without control characters, which would move a terminal's cursor."""
    return "".join(char if char.isprintable() else " " for char in text)
