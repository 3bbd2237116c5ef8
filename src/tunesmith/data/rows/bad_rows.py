"""Rows that cannot be read or rendered: counted, the first of them listed with their cause."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tunesmith.config.schema import Source
from tunesmith.data.rows.formats import convert_row
from tunesmith.data.source.open_source import Rows
from tunesmith.errors import DataError

LISTED = 20  # rows
# Of a cause in a list; the whole error of a single row is shown.
_CAUSE_CHARS = 60


@dataclass
class BadRows:
    """The bad rows of a source of so many rows.

    Attributes:
        listed: the first LISTED of them in order: place, index, and what is wrong, with the place
            in the row if there is one.
    """

    rows: int
    count: int = 0
    listed: list[tuple[str, int, str]] = field(default_factory=list)
    first_error: DataError | None = None

    def __len__(self) -> int:
        return self.count

    def add(self, row: int, place: str, error: DataError) -> bool:
        """Count a row by its error; False if the error is not of this row, but of the file."""
        if not is_of_row(error, place):
            return False
        self.count += 1
        self.first_error = self.first_error or error
        inside = error.where.removeprefix(place).lstrip(", ")
        if len(self.listed) < LISTED:
            what = f"{inside}: {error.what}" if inside else error.what
            self.listed.append((place, row, what))
        return True


def error_of_sources(sources: Sequence[BadRows]) -> DataError:
    """One error for the bad rows of one or several sources."""
    first = sources[0].first_error
    assert first is not None
    rows = sum(bad.rows for bad in sources)
    count = sum(map(len, sources))
    listed = [row for bad in sources for row in bad.listed][:LISTED]
    what = first.what
    why = first.why
    fix = first.fix
    if count == rows > 1:
        why = f"{why}; all {rows:,} rows are like it, or cannot be read for other reasons"
    elif count > 1:
        what = f"{count:,} of {rows:,} rows cannot be read"
        # The file's name is enough: its folder is that of the first.
        causes = [
            f"{place.rpartition('/')[2]}: {cause:.{_CAUSE_CHARS}}" for place, _, cause in listed
        ]
        if count > len(listed):
            causes.append(f"and {count - len(listed):,} more")
        why = "; ".join(causes)
    if not any(bad.count == bad.rows for bad in sources):
        fix += "; or data.bad_rows=skip leaves such rows out, counted"
    return DataError(what, where=first.where, why=why.removeprefix("; "), fix=fix)


def is_of_row(error: DataError, place: str) -> bool:
    """Tell whether an error is about the row at a place, not about its file or the template."""
    return error.where == place or error.where.startswith(f"{place}, ")


def find_bad_rows(rows: Rows, source: Source, system: str | None = None) -> BadRows:
    """The rows that are no sample of the source's format; a DataError that is of none is raised.

    system: as of `convert_row`.
    """
    bad = BadRows(len(rows))
    for i in range(len(rows)):
        place = rows.where(i)
        try:
            convert_row(rows[i], source, where=place, system=system)
        except DataError as error:
            if not bad.add(i, place, error):
                raise
    return bad
