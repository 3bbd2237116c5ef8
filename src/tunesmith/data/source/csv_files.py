"""CSV files -> tables of rows; of a file only the places of its rows are in memory."""

import codecs
import csv
import io
import itertools
import logging
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from tunesmith.data.source.table import (
    MAX_ROW_BYTES,
    Table,
    changed_error,
    check_not_wide,
    file_digest,
    new_name,
    not_utf8_error,
    read_span,
    version_of,
)
from tunesmith.errors import DataError
from tunesmith.host.memory import open_uncached
from tunesmith.host.shell import shell_path, shell_word
from tunesmith.units import count_of

log = logging.getLogger(__name__)

# What may stand between the values of a csv file, in words; the comma is looked for first.
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_NAMED_SEPARATOR = re.compile(r"""["']?sep=([,;\t|])["']?\r?\n""", re.IGNORECASE)
# A text that is probably a value and not a column's name: a number, a sentence, or a long text.
_VALUE = re.compile(r"^[\d\s.,:/-]+$|[.?!。？！]\s*$|(?:\S+\s+){5}|^.{60}")
FIRST_ROWS = 20  # that have to agree with the header on another separator than a comma
CSV_HEAD_BYTES = 1 << 19  # of a file, in which these first rows are searched


def read_csv(path: Path) -> Table:
    """Values with a header, separated by commas or as `_separator` finds; every value is text."""
    csv.field_size_limit(MAX_ROW_BYTES)
    try:
        index = _index_rows(path)
    except UnicodeDecodeError:
        raise _not_utf8(path) from None
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
        what = "the header has an unnamed column"
        if repeated:
            what = f"the header names {', '.join(repeated)} twice"
        fix = "give each column a unique name in the first line, or write a header above it"
        raise DataError(what, where=f"{path}:1", fix=fix)
    if not index.lines:
        fix = "add rows below the header"
        raise DataError("the file has a header and no rows", where=str(path), fix=fix)
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
            raise _wrong_count(f"{path}:{index.lines[i]}", values, index.header, separator)
        return dict(zip(header, values[index.has_row_numbers :], strict=True))

    return Table(
        len(index.lines),
        row,
        where=lambda i: f"{path}:{index.lines[i]}",
        fingerprint=lambda: file_digest(path),
        layout="" if separator == "," else f"values separated by {SEPARATORS[separator]}",
    )


def propose_header(where: str, columns: Sequence[str], names: Mapping[str, str]) -> str:
    """Propose the command that writes a header above the rows of a CSV file. Return an empty text
    unless the first line looks like a row.

    Args:
        where: the place of a row.
        columns: the values of the first line.
        names: the format's name of a column -> the value.
    """
    path = Path(where.rpartition(":")[0])
    if path.suffix.lower() != ".csv" or not any(map(_VALUE.search, columns)):
        return ""
    own_names = {column: name for name, column in names.items()}
    header = [own_names.get(column, f"column{n}") for n, column in enumerate(columns, 1)]
    line = _index_rows(path).separator.replace("\t", "\\t").join(header)
    program = f'NR == 1 {{ sub(/^\\357\\273\\277/, ""); print "{line}" }} 1'
    output = new_name(path, "with-header.csv")
    command = f"awk {shell_word(program)} {shell_path(path)} > {output}"
    return f"if line 1 is a row, write a header above it: {command}; else "


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

    def __init__(self, file: BufferedReader) -> None:
        mark = codecs.BOM_UTF8
        self.position = len(mark) if file.read(len(mark)) == mark else 0
        file.seek(self.position)
        self._text = io.TextIOWrapper(file, encoding="utf-8", newline="")

    def __next__(self) -> str:
        line = next(self._text)
        self.position += len(line) if line.isascii() else len(line.encode())
        return line


def _index_rows(path: Path) -> _CsvIndex:
    """Read a file once; DataError where a quote is broken."""
    with open_uncached(path) as file:
        first_bytes = file.read(CSV_HEAD_BYTES)
        check_not_wide(path, first_bytes, f"{path}:1")
        if len(first_bytes) == CSV_HEAD_BYTES:
            # Up to the end of a line.
            first_bytes = first_bytes[: first_bytes.rfind(b"\n") + 1]
        head = first_bytes.decode("utf-8-sig", errors="replace")
        # Excel reads the separator from such a first line, which is no row.
        named = _NAMED_SEPARATOR.match(head)
        separator = named[1] if named else _separator(path, head)
        file.seek(0)
        lines = _CsvLines(file)
        if named:
            next(lines)
        return _index_lines(path, lines, separator, skipped=1 if named else 0)


def _index_lines(path: Path, lines: _CsvLines, separator: str, *, skipped: int) -> _CsvIndex:
    """Read the lines behind the first `skipped` ones."""
    reader = csv.reader(lines, delimiter=separator, strict=True)
    header: list[str] = []
    places = array("q")
    line_numbers = array("q")
    is_numbered = True
    # A quoted value may go over several lines.
    last_line = skipped
    position = lines.position
    try:
        for values in reader:
            first_line = last_line + 1
            start = position
            last_line = skipped + reader.line_num
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


def _wrong_count(where: str, values: list[str], header: list[str], separator: str) -> DataError:
    """The error for a row with more or fewer values than the header."""
    fix = f"add the missing values, or {SEPARATORS[separator]} for empty ones"
    if len(values) > len(header):
        # A terminal shows a tab as spaces.
        example = "" if separator == "\t" else f': "a{separator} b"'
        mark = SEPARATORS[separator]
        fix = f"put values with {mark} or line breaks in double quotes{example}"
    return DataError(
        f"a row of {count_of(len(values), 'value')} under a header of {len(header)}",
        where=where,
        why=f"the header is {', '.join(header)}",
        fix=fix,
    )


def _not_utf8(path: Path) -> DataError:
    """The error for the first line that is no UTF-8."""
    position = 0
    with open_uncached(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                byte = f"byte 0x{line[error.start]:02x} at position {position + error.start + 1}"
                return not_utf8_error(path, line, f"{path}:{number}", f"{byte}: {error.reason}")
            position += len(line)
    return changed_error(path)


def _separator(path: Path, text: str) -> str:
    """Find what separates the values of a row: a comma, or what the header shows in its place.

    Excel writes semicolons where numbers have a decimal comma. A comma in the header counts less
    where the first rows agree with it on another mark alone: it stands in a name. DataError where
    they do not agree on one mark, and for JSON lines.
    """
    header = text.partition("\n")[0]
    if text.lstrip().startswith("{") and '":' in header:
        renamed = shell_path(path.with_suffix(".jsonl"))
        raise DataError(
            "the file contains JSON lines, not CSV",
            where=f"{path}:1",
            fix=f"mv -n {shell_path(path)} {renamed}   # and name that",
        )
    marks = [mark for mark in SEPARATORS if mark in header]
    if marks in ([], [","]):
        return ","
    fitting = [mark for mark in marks if _splits_evenly(text, mark)]
    # A row that breaks a file with commas is named when all are read.
    if "," in fitting or ("," in marks and not fitting):
        return ","
    if len(fitting) == 1:
        return fitting[0]
    candidates = fitting or marks
    separator = candidates[0]
    program = (
        "import csv, sys; csv.writer(sys.stdout).writerows("
        f"csv.reader(sys.stdin, delimiter={separator!r}))"
    )
    output = new_name(path, "commas.csv")
    names = " and ".join(SEPARATORS[mark] for mark in candidates)
    why = f"the first rows have a different number of values than the header when split at {names}"
    if fitting:
        why = f"the first rows can be split at {names}"
    raise DataError(
        f"the header has {separator!r} between its names, not a comma",
        where=f"{path}:1",
        why=why,
        fix=f"python3 -c {shell_word(program)} < {shell_path(path)} > {output}",
    )


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
