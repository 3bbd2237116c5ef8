"""Rows that cannot be read or rendered: counted, the first of them listed with their cause."""

from dataclasses import dataclass, field
from typing import NamedTuple

from tunesmith.config.schema import Source
from tunesmith.data.formats import convert_row
from tunesmith.data.source import Rows
from tunesmith.errors import DataError

LISTED = 20  # rows
# Of a cause in a list; the whole error of a single row is shown.
_CAUSE_CHARS = 60


class BadRow(NamedTuple):
    """One of them: its index, and what is wrong, with the place in the row if there is one."""

    row: int
    what: str


@dataclass
class BadRows:
    """The bad rows of a source.

    Attributes:
        first: at most LISTED of them.
    """

    count: int = 0
    first: list[BadRow] = field(default_factory=list)
    _places: list[str] = field(default_factory=list)
    _first_error: DataError | None = None

    def __len__(self) -> int:
        return self.count

    def add(self, row: int, place: str, error: DataError) -> bool:
        """Count a row by its error; False if the error is not of this row, but of the file."""
        if not is_of_row(error, place):
            return False
        self.count += 1
        self._first_error = self._first_error or error
        if len(self.first) < LISTED:
            inside = error.where.removeprefix(place).lstrip(", ")
            self.first.append(BadRow(row, f"{inside}: {error.what}" if inside else error.what))
            self._places.append(place)
        return True

    def error(self, rows: int) -> DataError:
        """The error for all of them, of so many rows."""
        first = self._first_error
        assert first is not None
        skip = "data.bad_rows=skip leaves such rows out, counted"
        if self.count == 1:
            fix = f"{first.fix}; or {skip}" if rows > 1 else first.fix
            return DataError(first.what, where=first.where, why=first.why, fix=fix)
        if self.count == rows:
            why = f"all {rows:,} rows are like it, or cannot be read for other reasons"
            why = f"{first.why}; {why}" if first.why else why
            return DataError(first.what, where=first.where, why=why, fix=first.fix)
        listed = []
        for place, bad in zip(self._places, self.first, strict=True):
            cause = bad.what if len(bad.what) <= _CAUSE_CHARS else f"{bad.what[:_CAUSE_CHARS]}..."
            # The file's name alone: its folder is that of the first.
            listed.append(f"{place.rpartition('/')[2]}: {cause}")
        if self.count > len(listed):
            listed.append(f"and {self.count - len(listed):,} more")
        return DataError(
            f"{self.count:,} of {rows:,} rows cannot be read",
            where=first.where,
            why="; ".join(listed),
            fix=f"{first.fix}; or {skip}",
        )


def is_of_row(error: DataError, place: str) -> bool:
    """Whether an error is about the row at a place; others are about its file, or the template."""
    return error.where == place or error.where.startswith(f"{place}, ")


def find_bad_rows(rows: Rows, source: Source, system: str | None = None) -> BadRows:
    """The rows that are no sample of the source's format; a DataError that is of none is raised.

    system: as of `convert_row`.
    """
    bad = BadRows()
    for i in range(len(rows)):
        try:
            convert_row(rows[i], source, where=rows.where(i), system=system)
        except DataError as error:
            if not bad.add(i, rows.where(i), error):
                raise
    return bad
