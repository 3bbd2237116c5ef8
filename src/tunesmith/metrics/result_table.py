"""The small tables that show what Python functions return, in print and in a notebook.

A result says what is in its table (`Tabular.table`); how a table looks is here alone. `repr` stays
that of a dataclass, with every field.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from tunesmith.host.streams import DEFAULT_COLUMNS, folded

GAP = "  "  # between columns
MIN_COLUMNS = 20  # of a terminal, of a cell that is folded
MAX_COLUMNS = 100_000  # of a terminal, of a line that is not folded


@dataclass(frozen=True)
class ResultTable:
    """A table of texts, which may come from data.

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

    def text(self, width: int = DEFAULT_COLUMNS) -> str:
        """Plain lines with columns side by side; notes are folded to `width` columns.

        The cells of a table with headings are folded too, down to MIN_COLUMNS. Cells without
        headings hold commands, which stay whole.
        """
        # A tenth of a second, which commands that only find a run do without.
        from rich.console import Console
        from rich.table import Table

        has_headings = bool(self.columns)
        columns = MAX_COLUMNS
        if has_headings:
            columns = max(width, len(self.columns) * (MIN_COLUMNS + len(GAP)))
        table = Table(box=None, padding=(0, len(GAP), 0, 0), show_header=has_headings)
        table.add_column(
            no_wrap=not has_headings, max_width=DEFAULT_COLUMNS // 3 if has_headings else None
        )
        for heading in self.columns:
            table.add_column(_one_line(heading), overflow="fold")
        for row in self.rows:
            table.add_row(*map(_one_line, row))
        console = Console(width=columns, color_system=None, force_jupyter=False)
        with console.capture() as capture:
            console.print(table, markup=False, emoji=False, highlight=False)
        lines = [_one_line(self.title)] if self.title else []
        lines += [line.rstrip() for line in capture.get().splitlines()]
        return "\n".join([*lines, *(folded(_one_line(note), width) for note in self.notes)])


class Tabular:
    """A result that prints as its table, in a notebook too."""

    def table(self) -> ResultTable:
        """Build the table that a reader is shown of it."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        """Return what Jupyter shows: the text of the table. The name is IPython's."""
        return f"<pre>{escape(str(self))}</pre>"


def _one_line(text: str) -> str:
    """A text in one line, without control characters, which would move a terminal's cursor."""
    return "".join(char if char.isprintable() else " " for char in text)
