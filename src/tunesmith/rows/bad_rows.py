"""Collection of the rows that cannot be read: their number, and the errors of the first of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tunesmith.config.schema import Source
from tunesmith.errors import DataError
from tunesmith.rows.formats import convert_row
from tunesmith.rows.source.open_source import Rows

# Maximum number of bad rows that are listed with their cause.
LISTED = 20
# Maximum length of an error's cause if the errors of several rows are listed. If only one row is
# bad, its cause is not shortened.
_MAX_CAUSE_CHARS = 60


# A bad row: file and line of the row, index of the row, and cause of the error.
_Listed = tuple[str, int, str]


@dataclass
class BadRows:
    """The rows of one source that cannot be read.

    Attributes:
        rows: number of all rows of the source.
        count: number of bad rows.
        listed: the first LISTED bad rows in order. If the error has a position within the row, such
            as "message 2", the cause starts with this position.
        first_error: the complete error of the first bad row.
    """

    rows: int
    count: int = 0
    listed: list[_Listed] = field(default_factory=list)
    first_error: DataError | None = None

    def __len__(self) -> int:
        return self.count

    def add(self, row: int, place: str, error: DataError) -> None:
        """Add the error of a row. Raise the error if it is not about the row.

        Args:
            row: index of the row.
            place: file and line of the row.
        """
        if not is_row_error(error, place):
            raise error
        self.count += 1
        self.first_error = self.first_error or error
        if len(self.listed) < LISTED:
            what = error.what
            inside = error.where.removeprefix(place).lstrip(", ")
            if inside:
                what = f"{inside}: {what}"
            self.listed.append((place, row, what))


def error_of_sources(sources: Sequence[BadRows]) -> DataError:
    """Build one error that describes the bad rows of all sources."""
    first = sources[0].first_error
    assert first is not None
    rows = 0
    count = 0
    listed = []
    for bad in sources:
        rows += bad.rows
        count += bad.count
        listed += bad.listed
    what = first.what
    why = first.why
    fix = first.fix
    if count == rows > 1:
        why = f"{why}; all {rows:,} rows have this error or another error"
    elif count > 1:
        what = f"{count:,} of {rows:,} rows cannot be read"
        # Show only the file name of each row. The complete path of the first row is in `where` of
        # the error.
        causes = []
        for place, _, cause in listed[:LISTED]:
            name = place.rpartition("/")[2]
            causes.append(f"{name}: {cause:.{_MAX_CAUSE_CHARS}}")
        more = count - len(causes)
        if more:
            causes.append(f"and {more:,} more")
        why = "; ".join(causes)
    if not any(bad.count == bad.rows for bad in sources):
        fix += "; to skip and count such rows, set data.bad_rows=skip"
    return DataError(what, where=first.where, why=why.removeprefix("; "), fix=fix)


def is_row_error(error: DataError, place: str) -> bool:
    """Return True if an error is about the row at `place`, and False if it is about the file or the
    template.
    """
    return error.where == place or error.where.startswith(f"{place}, ")


def find_bad_rows(rows: Rows, source: Source, system: str | None = None) -> BadRows:
    """Return the rows that cannot be read in the source's format.

    Args:
        source: the data source with its row format and columns.
        system: the system message, see `convert_row`.

    Raises:
        DataError: an error that is not about a single row, for example about the file.
    """
    bad = BadRows(len(rows))
    for i in range(len(rows)):
        place = rows.where(i)
        try:
            convert_row(rows[i], source, where=place, system=system)
        except DataError as error:
            bad.add(i, place, error)
    return bad
