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

from tunesmith.errors import DataError
from tunesmith.host.memory import open_uncached
from tunesmith.host.shell import shell_path
from tunesmith.rows.source.table import (
    MAX_ROW_BYTES,
    Table,
    changed_error,
    decode_text,
    file_digest,
    new_name,
    read_span,
    repeated_in,
    skip_bom,
    version_of,
)
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
    header = index.header
    if index.is_title:
        raise DataError(
            "line 1 is not the header",
            where=f"{path}:1",
            why=f"{index.separator.join(header):.60} does not name the columns of the rows below",
            fix=f"tail -n +2 {shell_path(path)} > {new_name(path, 'fixed.csv')}   # or, if it is"
            f" the header, put values with {SEPARATORS[index.separator]} in quotes",
        )
    repeated = repeated_in(list(filter(None, header)))
    if repeated:
        raise DataError(
            f"the header has columns with the same name: {', '.join(repeated)}",
            where=f"{path}:1",
            fix="give each column a unique name in the first line, or write a header above it",
        )
    # A column without a name and without values is left out. Excel writes such columns.
    for column, line in index.unnamed.items():
        if column or not index.has_row_numbers:
            raise DataError(
                f"column {column + 1} has values, but the header has no name for it",
                where=f"{path}:{line}",
                fix="name the column in line 1, or put values with"
                f" {SEPARATORS[index.separator]} in quotes",
            )
    width = max((i for i, name in enumerate(header, 1) if name), default=0)
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
        if not width <= len(values) <= len(header):
            raise DataError(
                f"a row has {count_of(len(values), 'value')}, but the header has {width}",
                where=f"{path}:{index.lines[i]}",
                why=f"the header is {', '.join(header)}",
                fix=f"add the missing values, or put values with {SEPARATORS[separator]} in quotes",
            )
        return {name: value for name, value in zip(header, values, strict=False) if name}

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
        unnamed: number of each column that has values but no name -> line of its first value.
        is_title: whether the first line is a comment, a title or `sep=;`, and not the header.
    """

    header: list[str]
    separator: str
    places: "array[int]"
    lines: "array[int]"
    has_row_numbers: bool
    unnamed: dict[int, int]
    is_title: bool


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
    unnamed: dict[int, int] = {}
    nameless: list[int] = []
    sizes = set()
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
                nameless = [column for column, name in enumerate(header) if not name]
                is_numbered = len(header) > 1 and header[0] == ""
                continue
            places.append(start)
            line_numbers.append(first_line)
            sizes.add(len(values))
            for column in nameless:
                if "".join(values[column : column + 1]):
                    unnamed.setdefault(column, first_line)
            # Ignore a row with a wrong number of values, because reading the row later raises an
            # error.
            if len(values) == len(header):
                is_numbered = is_numbered and values[0].isdecimal()
    except csv.Error as error:
        if "new-line" in str(error):
            raise DataError(
                "a line ends with CR, not with LF",
                where=f"{path}:{last_line + 1}",
                fix=f"tr '\\r' '\\n' < {shell_path(path)} > {new_name(path, 'fixed.csv')}"
                "   # or put the value with the line break in quotes",
            ) from None
        raise DataError(
            "the file is not valid CSV",
            where=f"{path}:{last_line + 1}",
            why=str(error),
            fix="close the quoted value that begins in this row; a quote inside of a quoted value "
            'must be doubled: "a ""quoted"" word"',
        ) from None
    places.append(position)
    is_numbered = is_numbered and len(line_numbers) > 0
    is_title = _is_title("".join(header[:1]), len(header), sizes)
    return _CsvIndex(header, separator, places, line_numbers, is_numbered, unnamed, is_title)


def _is_title(first: str, size: int, sizes: set[int]) -> bool:
    """Return whether the first line is a title, a comment or `sep=;`, and not the header.

    Args:
        first: the first value of the line.
        size: number of values of the line.
        sizes: numbers of values of the rows.
    """
    if first.startswith("#"):
        return size == 1 or size not in sizes
    return first.lower().startswith("sep=") or (size == 1 and bool(sizes) and 1 not in sizes)


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
