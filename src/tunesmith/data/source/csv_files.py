"""CSV files -> tables of rows; of a file only the places of its rows are in memory."""

import codecs
import csv
import io
import itertools
import logging
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from tunesmith.data.source.table import (
    MAX_ROW_BYTES,
    Table,
    changed_error,
    decode_text,
    file_digest,
    read_span,
    version_of,
)
from tunesmith.errors import DataError
from tunesmith.host.memory import open_uncached
from tunesmith.units import count_of

log = logging.getLogger(__name__)

# What may stand between the values of a csv file, in words; the comma is looked for first.
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
# A text that is probably a value and not a column's name: a number, a sentence, or a long text.
_VALUE = re.compile(r"^[\d\s.,:/-]+$|[.?!。？！]\s*$|(?:\S+\s+){5}|^.{60}")
FIRST_ROWS = 20  # that have to agree with the header on another separator than a comma
CSV_HEAD_BYTES = 1 << 19  # of a file, in which these first rows are searched


def read_csv(path: Path) -> Table:
    """Values with a header, separated by commas or as `_separator` finds; every value is text."""
    csv.field_size_limit(MAX_ROW_BYTES)
    index = _index_rows(path)
    # `DataFrame.to_csv` writes its index as a first column without a name.
    if index.has_row_numbers:
        log.warning(
            "%s: the first column has no name and contains numbers of rows, as pandas writes:"
            " ignored",
            path.name,
        )
    header = index.header[index.has_row_numbers :]
    repeated = sorted(name for name, count in Counter(header).items() if count > 1)
    if repeated or "" in header:
        what = f"the header has columns without a name of their own: {', '.join(repeated)}"
        fix = "give each column a unique name in the first line, or write a header above it"
        raise DataError(what, where=f"{path}:1", fix=fix)
    separator = index.separator
    version = version_of(path)

    def row(i: int) -> dict[str, str]:
        text = read_span(path, version, *index.places[i : i + 2]).decode(errors="replace")
        try:
            # Blank lines may follow it.
            values = next(
                csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
            )
        except (csv.Error, StopIteration):
            raise changed_error(path) from None
        if len(values) != len(index.header):
            if version_of(path) != version:
                raise changed_error(path)
            fix = f"add the missing values, or put values with {SEPARATORS[separator]} in quotes"
            raise DataError(
                f"a row of {count_of(len(values), 'value')} under a header of {len(index.header)}",
                where=f"{path}:{index.lines[i]}",
                why=f"the header is {', '.join(index.header)}",
                fix=fix,
            )
        return dict(zip(header, values[index.has_row_numbers :], strict=True))

    return Table(
        len(index.lines),
        row,
        where=lambda i: f"{path}:{index.lines[i]}",
        fingerprint=lambda: file_digest(path),
        layout="" if separator == "," else f"values separated by {SEPARATORS[separator]}",
    )


def propose_header(where: str, columns: Iterable[str]) -> str:
    """Propose a header for a CSV file at the beginning of a fix. Return an empty text unless the
    first line looks like a row.

    Args:
        where: the place of a row.
        columns: the values of the first line.
    """
    if ".csv:" not in where.lower() or not any(map(_VALUE.search, columns)):
        return ""
    return "if line 1 is a row, write a header above it; else "


class _CsvIndex(NamedTuple):
    """The index of a file: its header and the places of its rows.

    Attributes:
        places, lines: the byte and the line where each row begins; the last place is where the rows
            end.
        has_row_numbers: whether the first column is the index that pandas' `to_csv` writes: it has
            no name, and holds whole numbers.
    """

    header: list[str]
    separator: str
    places: "array[int]"
    lines: "array[int]"
    has_row_numbers: bool


class _CsvLines(Iterator[str]):
    """The lines of an open file as text, and the byte behind the one that was taken last."""

    def __init__(self, path: Path, file: BufferedReader) -> None:
        mark = codecs.BOM_UTF8
        self.position = len(mark) if file.read(len(mark)) == mark else 0
        file.seek(self.position)
        self._path = path
        self._file = file
        self._number = 0

    def __next__(self) -> str:
        line = self._file.readline()
        if not line:
            raise StopIteration
        self._number += 1
        self.position += len(line)
        return decode_text(self._path, line, lambda _: f"{self._path}:{self._number}", "utf-8")


def _index_rows(path: Path) -> _CsvIndex:
    """Read a file once; DataError where a quote is broken."""
    with open_uncached(path) as file:
        head = file.read(CSV_HEAD_BYTES)
        if len(head) == CSV_HEAD_BYTES:
            # Up to the end of a line.
            head = head[: head.rfind(b"\n") + 1]
        separator = _separator(head.decode("utf-8-sig", errors="replace"))
        file.seek(0)
        return _index_lines(path, _CsvLines(path, file), separator)


def _index_lines(path: Path, lines: _CsvLines, separator: str) -> _CsvIndex:
    reader = csv.reader(lines, delimiter=separator, strict=True)
    header: list[str] = []
    places = array("q")
    line_numbers = array("q")
    is_numbered = True
    # A quoted value may go over several lines.
    last_line = 0
    position = lines.position
    try:
        for values in reader:
            first_line = last_line + 1
            start = position
            last_line = reader.line_num
            position = lines.position
            if not values:
                continue
            if not header:
                header = values
                is_numbered = len(header) > 1 and header[0] == ""
                continue
            places.append(start)
            line_numbers.append(first_line)
            # A row that does not fit the header is listed with other bad rows.
            if len(values) == len(header):
                is_numbered = is_numbered and values[0].isdecimal()
    except csv.Error as error:
        raise DataError(
            "the file is not CSV",
            where=f"{path}:{last_line + 1}",
            why=str(error),
            fix="close the quote that opens in this row; a quote within a quoted value is written"
            ' twice: "say ""hi"""',
        ) from None
    places.append(position)
    return _CsvIndex(header, separator, places, line_numbers, is_numbered and len(line_numbers) > 0)


def _separator(text: str) -> str:
    """Return the mark at which a header and its first rows split evenly: the first of SEPARATORS.

    Excel writes semicolons where numbers have a decimal comma. If rows split evenly at no mark of
    the header, its first mark is taken, and the row of another length is an error.
    """
    header = text.partition("\n")[0]
    marks = [mark for mark in SEPARATORS if mark in header]
    return next((mark for mark in marks if _splits_evenly(text, mark)), [*marks, ","][0])


def _splits_evenly(text: str, separator: str) -> bool:
    """Tell whether the header and the first rows have the same number of values, above one."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    counts = set()
    # A row that is broken is named when all are read.
    with suppress(csv.Error):
        for values in itertools.islice(reader, FIRST_ROWS):
            if values:
                counts.add(len(values))
    return len(counts) == 1 and counts.pop() > 1
