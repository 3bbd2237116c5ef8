"""Tables for the results of Python functions, for `print` and for notebooks.

The class of a result defines the contents of the table (`Tabular.table`), and this module defines
the layout. `repr(result)` shows all fields of the dataclass, not the table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from tunesmith.host.streams import DEFAULT_COLUMNS, folded

GAP = "  "  # space between two columns
MIN_COLUMNS = 20  # minimum width of a cell with wrapped text, in terminal columns
MAX_COLUMNS = 100_000  # width of a table without wrapped text, in terminal columns


@dataclass(frozen=True)
class ResultTable:
    """A table whose cells are texts. The texts may be from a data set and contain any character.

    Attributes:
        rows: cells of each row. The first cell is the name of the row.
        columns: headings of the cells after the first. Empty for a table without headings.
        title: line above the table. Empty if there is none.
        notes: lines below the table.
    """

    rows: Sequence[Sequence[str]]
    columns: Sequence[str] = ()
    title: str = ""
    notes: Sequence[str] = ()

    def text(self, width: int = DEFAULT_COLUMNS) -> str:
        """Return the table as plain text with aligned columns. Notes are wrapped to `width`
        columns.

        If the table has headings, long cells are wrapped too. A wrapped cell is at least
        MIN_COLUMNS wide. If it has no headings, the cells contain commands, which must not be
        wrapped.
        """
        # Import here, because the import takes 0.1 s, which commands that only search for a run do
        # not need.
        from rich.console import Console
        from rich.table import Table

        has_headings = bool(self.columns)
        columns = MAX_COLUMNS
        max_name_width = None
        if has_headings:
            columns = max(width, len(self.columns) * (MIN_COLUMNS + len(GAP)))
            max_name_width = DEFAULT_COLUMNS // 3

        table = Table(box=None, padding=(0, len(GAP), 0, 0), show_header=has_headings)
        table.add_column(no_wrap=not has_headings, max_width=max_name_width)
        for heading in self.columns:
            table.add_column(_one_line(heading), overflow="fold")
        for row in self.rows:
            table.add_row(*map(_one_line, row))

        console = Console(width=columns, color_system=None, force_jupyter=False)
        with console.capture() as capture:
            console.print(table, markup=False, emoji=False, highlight=False)

        title = [_one_line(self.title)] if self.title else []
        lines = [line.rstrip() for line in capture.get().splitlines()]
        notes = [folded(_one_line(note), width) for note in self.notes]
        return "\n".join([*title, *lines, *notes])


class Tabular:
    """A base class for results that are printed as a table, also in a notebook."""

    def table(self) -> ResultTable:
        """Return the table that is printed for this result."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        """Return the text of the table as HTML. Jupyter calls this method."""
        return f"<pre>{escape(str(self))}</pre>"


def _one_line(text: str) -> str:
    """Replace line breaks and control characters by spaces, because they would move the
    terminal's cursor.
    """
    return "".join(char if char.isprintable() else " " for char in text)
