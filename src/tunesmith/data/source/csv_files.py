"""Reader of CSV files that keeps only the byte positions of the rows in memory."""

import csv
import io
import itertools
import logging
import re
from array import array
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
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
    repeated_in,
    skip_bom,
    version_of,
)
from tunesmith.errors import DataError
from tunesmith.host.memory import open_uncached
from tunesmith.units import count_of

log = logging.getLogger(__name__)

# Supported separators and their names. They are tried in this order.
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
# Text that is probably a value and not a column name, because it is a number, a sentence, or long.
_VALUE = re.compile(r"^[\d\s.,:/-]+$|[.?!。？！]\s*$|(?:\S+\s+){5}|^.{60}")
# Number of rows that are examined to find the separator. The header is one of them.
FIRST_ROWS = 20
# Number of bytes at the start of a file that are read to examine the first FIRST_ROWS rows.
CSV_HEAD_BYTES = 1 << 19


def read_csv(path: Path) -> Table:
    """Open a CSV file with a header as a table. Every value is text."""
    csv.field_size_limit(MAX_ROW_BYTES)
    index = _index_rows(path)
    # `DataFrame.to_csv` writes the index of the frame as the first column, without a name.
    if index.has_row_numbers:
        log.warning(
            "%s: the first column is ignored, because it has no name and contains row numbers,"
            " as written by pandas",
            path.name,
        )
    header = index.header[index.has_row_numbers :]
    repeated = repeated_in(header)
    if repeated or "" in header:
        raise DataError(
            f"the header has columns without a name or with the same name: {', '.join(repeated)}",
            where=f"{path}:1",
            fix="give each column a unique name in the first line, or write a header above it",
        )
    separator = index.separator
    version = version_of(path)

    def row(i: int) -> dict[str, str]:
        start, stop = index.places[i : i + 2]
        text = read_span(path, version, start, stop).decode(errors="replace")
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        try:
            # Read only one row, because blank lines can follow the row in `text`.
            values = next(reader)
        except (csv.Error, StopIteration):
            raise changed_error(path) from None
        if len(values) != len(index.header):
            if version_of(path) != version:
                raise changed_error(path)
            raise DataError(
                f"a row has {count_of(len(values), 'value')}, but the header has"
                f" {len(index.header)}",
                where=f"{path}:{index.lines[i]}",
                why=f"the header is {', '.join(index.header)}",
                fix=f"add the missing values, or put values with {SEPARATORS[separator]} in quotes",
            )
        return dict(zip(header, values[index.has_row_numbers :], strict=True))

    return Table(
        len(index.lines),
        row,
        lambda i: f"{path}:{index.lines[i]}",
        partial(file_digest, path),
        layout="" if separator == "," else f"values separated by {SEPARATORS[separator]}",
    )


def propose_header(where: str, columns: Iterable[str]) -> str:
    """Return text that proposes to add a header to a CSV file, for the fix of an error.

    Return "" if the file is not a CSV file, or if its first line does not look like a row.

    Args:
        where: file and line of a row.
        columns: the values of the first line.
    """
    if ".csv:" not in where.lower() or not any(map(_VALUE.search, columns)):
        return ""
    return "if line 1 is a row, write a header above it; else "


class _CsvIndex(NamedTuple):
    """The header of a CSV file and the positions of its rows.

    Attributes:
        places: byte position at which each row starts, followed by the end of the last row.
        lines: line number at which each row starts.
        has_row_numbers: whether the first column has no name and contains only integers, because
            pandas' `to_csv` wrote the index of the frame into it.
    """

    header: list[str]
    separator: str
    places: "array[int]"
    lines: "array[int]"
    has_row_numbers: bool


def _index_rows(path: Path) -> _CsvIndex:
    """Read the entire file once to find its rows. Raise DataError for an unclosed quote."""
    with open_uncached(path) as file:
        head = file.read(CSV_HEAD_BYTES)
        if len(head) == CSV_HEAD_BYTES:
            # Drop the last line, because it can be incomplete.
            head = head[: head.rfind(b"\n") + 1]
        separator = _separator(head.decode("utf-8-sig", errors="replace"))
        file.seek(0)
        return _index_lines(path, file, separator)


def _index_lines(path: Path, file: BufferedReader, separator: str) -> _CsvIndex:
    """Find the header, and the position and line of each row. The file is at its start."""
    # Byte position after the last line that was read.
    position = skip_bom(file)

    def read_lines() -> Iterator[str]:
        nonlocal position
        while line := file.readline():
            position += len(line)
            yield decode_text(path, line, lambda _: f"{path}:{reader.line_num + 1}", "utf-8")

    reader = csv.reader(read_lines(), delimiter=separator, strict=True)
    header: list[str] = []
    places = array("q")
    line_numbers = array("q")
    is_numbered = True
    # A row can have several lines, because a quoted value can contain line breaks.
    last_line = 0
    end = position
    try:
        for values in reader:
            first_line = last_line + 1
            start = end
            last_line = reader.line_num
            end = position
            if not values:
                continue
            if not header:
                header = values
                is_numbered = len(header) > 1 and header[0] == ""
                continue
            places.append(start)
            line_numbers.append(first_line)
            # Ignore a row with a wrong number of values, because reading the row later raises an
            # error.
            if len(values) == len(header):
                is_numbered = is_numbered and values[0].isdecimal()
    except csv.Error as error:
        raise DataError(
            "the file is not valid CSV",
            where=f"{path}:{last_line + 1}",
            why=str(error),
            fix="close the quoted value that begins in this row; a quote inside of a quoted value "
            'must be doubled: "a ""quoted"" word"',
        ) from None
    places.append(position)
    return _CsvIndex(header, separator, places, line_numbers, is_numbered and len(line_numbers) > 0)


def _separator(text: str) -> str:
    """Return the separator of a CSV file, which must be one of SEPARATORS.

    Return the first separator that splits the header and the first rows into the same number of
    values. Excel uses semicolons in countries with a decimal comma. If no separator gives the same
    numbers, return the first separator that the header contains. Reading a row with another number
    of values then raises an error.
    """
    header = text.partition("\n")[0]
    candidates = [separator for separator in SEPARATORS if separator in header]
    for separator in candidates:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        counts: set[int] = set()
        # Ignore a broken quote: `_index_lines` raises an error for it.
        with suppress(csv.Error):
            counts.update(map(len, filter(None, itertools.islice(reader, FIRST_ROWS))))
        if len(counts) == 1 and counts.pop() > 1:
            return separator
    return candidates[0] if candidates else ","
