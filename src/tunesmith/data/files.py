"""Local data files -> tables of rows: json, jsonl, csv, parquet, arrow.

JSON and CSV are read here and not through Arrow, for two reasons. Arrow gives every row the union
of all rows' keys, so the arguments of one tool call would appear, as nulls, in those of another.
And a broken row must be named by the line that a text editor shows. JSON lines stay on disk and are
parsed when a row is read.

No file is memory-mapped: where another program shortens it, the next access to a mapping kills the
process (SIGBUS).
"""

import codecs
import csv
import difflib
import hashlib
import io
import itertools
import json
import logging
import os
import re
import sys
import weakref
from array import array
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date, datetime
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from tunesmith.config.paths import DATA_SUFFIXES as SUFFIXES
from tunesmith.errors import DataError, first_line
from tunesmith.host.memory import drop_pages, open_uncached
from tunesmith.host.shell import shell_path, shell_word

log = logging.getLogger(__name__)

# A longer row is a file with its line breaks lost; tokenizing it would take minutes.
MAX_ROW_BYTES = 32 << 20
# Rows of an Arrow table converted to Python at once.
_BLOCK = 256
# What may stand between the values of a csv file, in words; the comma is looked for first.
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_NAMED_SEPARATOR = re.compile(r"""["']?sep=([,;\t|])["']?\r?\n""", re.IGNORECASE)
FIRST_ROWS = 20  # that have to agree with the header on another separator than a comma


@dataclass(frozen=True)
class Table:
    """Rows by their number.

    Attributes:
        row: row i as Python values, or a DataError with its place.
        where: the place of row i that an editor shows.
        fingerprint: sha256 of the content, in hex.
        check_unchanged: raises DataError if the file is another than when it was opened.
        layout: what was found out about the file, for the user; empty for nothing.
        continues: whether row i + 1 goes on with the document of row i: a large text is read in
            blocks.
    """

    size: int
    row: Callable[[int], Any]
    where: Callable[[int], str]
    fingerprint: Callable[[], str]
    check_unchanged: Callable[[], None] = lambda: None
    layout: str = ""
    continues: Callable[[int], bool] = lambda i: False

    def __len__(self) -> int:
        return self.size


def open_table(path: Path) -> Table:
    """Open a local data file; DataError if it is missing, empty, broken or of an unknown type."""
    check_data_file(path)
    try:
        version = _version(path)
        table = _READERS[path.suffix.lower()](path)
    except OSError as error:
        raise DataError(
            "the file cannot be read",
            where=str(path),
            why=error.strerror or str(error),
            fix=f"ls -l {shell_path(path)}",
        ) from error

    def check_unchanged() -> None:
        if _version(path) != version:
            raise _changed(path)

    return replace(table, check_unchanged=check_unchanged)


def check_data_file(path: Path) -> None:
    """DataError for a data file whose name or size alone tells that it cannot be read."""
    if not path.is_file():
        raise _missing_file(path)
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"{path.name} is not a supported data file",
            where=str(path),
            why=f"the types are {', '.join(SUFFIXES)}",
            fix="unpack or convert it to JSON lines, one object per line, and use that file",
        )
    if path.stat().st_size == 0:
        fix = "add rows to it, or use another file"
        raise DataError("the file is empty", where=str(path), fix=fix)


def _missing_file(path: Path) -> DataError:
    """The error for a path at which there is no regular file."""
    if path.is_symlink() and not path.exists():
        return DataError(
            f"the link points to {os.readlink(path)}, which does not exist",
            where=str(path),
            fix=f"ls -l {shell_path(path)}   # use the file itself, or fix the link",
        )
    folder = path if path.is_dir() else path.parent
    names = []
    if folder.is_dir():
        names = [file.name for file in folder.iterdir()]
    data_files = sorted(name for name in names if Path(name).suffix.lower() in SUFFIXES)
    data_files_text = ", ".join(data_files[:5]) or "no data file"
    what = "there is no such file"
    why = ""
    fix = "fix the path"
    if path.is_dir():
        what = "the source is a folder, not a file"
        why = f"it contains {data_files_text}"
        fix = f"name a file that ends in {', '.join(SUFFIXES)}"
        if data_files:
            fix = f"source: {path / data_files[0]}"
    elif path.exists():
        what = "the source is not a regular file"
        fix = "copy its rows into a regular file and use that"
    elif not folder.is_dir():
        why = f"there is no folder {folder}"
    else:
        why = f"{folder} has {data_files_text}"
        similar = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
        if similar:
            fix = f"did you mean {folder / similar[0]}?"
    return DataError(what, where=str(path), why=why, fix=fix)


def _version(path: Path) -> tuple[int, int, int] | None:
    """What another program changes when it writes the file; None where it is gone."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _changed(path: Path) -> DataError:
    why = "another program wrote, truncated or deleted it"
    fix = "start again when it is complete"
    return DataError("the file was changed while it was read", where=str(path), why=why, fix=fix)


def _file_digest(path: Path) -> str:
    try:
        with open_uncached(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _changed(path) from error


def _decode(path: Path, data: bytes, where: Callable[[int], str], encoding: str) -> str:
    """Bytes as text; `where` names the place of a byte."""
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        with path.open("rb") as file:
            # Windows writes UTF-16 with a mark of two bytes.
            has_utf16_mark = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
        likely_encoding = "utf-16" if has_utf16_mark else "latin1"
        output = _new_name(path, f"fixed{path.suffix}")
        byte = error.object[error.start]
        raise DataError(
            "the file is not UTF-8 text",
            where=where(error.start),
            why=f"byte 0x{byte:02x} at position {error.start + 1}: {error.reason}",
            fix=f"iconv -f {likely_encoding} -t utf-8 {shell_path(path)} > {output}",
        ) from None


def _read_text(path: Path) -> str:
    with open_uncached(path) as file:
        data = file.read()

    def where(at: int) -> str:
        line_breaks = data.count(b"\n", 0, at)
        return f"{path}:{line_breaks + 1}"

    return _decode(path, data, where, "utf-8-sig")


def _numbered_rows(path: Path, rows: list[Any]) -> Table:
    """Rows in memory that an editor shows by no line of their own."""
    return Table(
        len(rows),
        rows.__getitem__,
        where=lambda i: f"{path} row {i + 1}",
        fingerprint=lambda: _file_digest(path),
    )


def _read_json_lines(path: Path) -> Table:
    """One JSON object a line; blank lines are skipped. Only the places of rows are in memory."""
    with path.open("rb") as file:
        starts, ends, numbers = _line_places(file)
        if not starts:
            fix = "add rows to it"
            raise DataError("the file has only blank lines", where=str(path), fix=fix)
        # A descriptor of its own: rows are read long after this function ends.
        descriptor = os.dup(file.fileno())

    def where(i: int) -> str:
        return f"{path}:{numbers[i]}"

    def row(i: int) -> Any:
        size = ends[i] - starts[i]
        if size > MAX_ROW_BYTES:
            limit = f"a row may have {MAX_ROW_BYTES >> 20} MiB"
            raise DataError(
                f"a row of {size / 2**20:.0f} MiB",
                where=where(i),
                why=f"{limit}; line breaks between rows may be missing",
                fix="write one row per line, or split the text into several rows",
            )
        # `pread` has no position, so processes and threads may share the descriptor.
        data = os.pread(descriptor, size, starts[i])
        # The file became shorter after it was opened.
        if len(data) < size:
            raise _changed(path)
        text = _decode(path, data, lambda _: where(i), "utf-8")
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            why = f"{error.msg}: column {error.colno}"
        except ValueError:
            raise long_number(where(i)) from None
        except RecursionError:
            why = "nested too deep"
        fix = (
            f"sed -n {numbers[i]}p {shell_path(path)}"
            "   # fix or delete this line: one JSON object a line"
        )
        if i == len(starts) - 1 and not data.endswith(b"\n"):
            why += "; the file ends here without a line break, so it may be cut off"
            fix = "download or write the file again, or delete its last line"
        elif i == 0 and data.lstrip().startswith(b"["):
            why += "; the file looks like one JSON array"
            renamed = shell_path(path.with_suffix(".json"))
            fix = f"mv {shell_path(path)} {renamed}   # and name that"
        raise DataError("the line is not JSON", where=where(i), why=why, fix=fix)

    def close() -> None:
        drop_pages(descriptor)
        os.close(descriptor)

    # The table holds `row`, and so the descriptor, as long as somebody reads.
    weakref.finalize(row, close)
    return Table(len(starts), row, where, fingerprint=lambda: _file_digest(path))


def _line_places(file: BinaryIO) -> tuple["array[int]", "array[int]", "array[int]"]:
    """Of each line that is not blank: its first byte, the one after its last, and its number."""
    starts = array("q")
    ends = array("q")
    numbers = array("q")
    position = 0
    for number, line in enumerate(file, 1):
        # A mark of UTF-8 at the start is no part of the first row.
        has_mark = number == 1 and line.startswith(codecs.BOM_UTF8)
        mark = len(codecs.BOM_UTF8) if has_mark else 0
        if line[mark:].strip():
            starts.append(position + mark)
            ends.append(position + len(line))
            numbers.append(number)
        position += len(line)
    return starts, ends, numbers


def _read_json(path: Path) -> Table:
    """A JSON array of objects; a file of JSON lines named .json is read as such."""
    text = _read_text(path)
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        # ValueError itself stands for a number of too many digits.
        if _looks_like_json_lines(text, error):
            return _read_json_lines(path)
        raise _broken_json(path, text, error) from None
    if isinstance(rows, list) and rows:
        return _numbered_rows(path, rows)
    what = f"the file contains {json_type(rows)}, not an array of rows"
    why = ""
    fix = 'write an array of objects: [{"messages": ...}, ...]'
    if isinstance(rows, list):
        what = "the file has no rows"
    elif isinstance(rows, dict):
        what = "the file contains one object, not an array of rows"
        why = f"its keys are {', '.join(list(rows)[:8]) or 'none'}"
        fix = "put the rows in [ ]"
        lists = [key for key, value in rows.items() if isinstance(value, list) and value]
        if lists:
            output = _new_name(path, "rows.json")
            fix = f"jq {_jq_key(lists[0])} {shell_path(path)} > {output}"
    raise DataError(what, where=str(path), why=why, fix=fix)


def _looks_like_json_lines(text: str, error: Exception) -> bool:
    """Whether a text that is not JSON, for this error, has an object a line."""
    first_line_text, _, rest = text.strip().partition("\n")
    if not first_line_text.startswith("{"):
        return False
    if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
        return True
    return first_line_text.rstrip().endswith("}") and bool(rest)


def _jq_key(key: str) -> str:
    """The program of jq that takes a key, as a word of a command line."""
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
        return f"'.{key}'"
    return shell_word(f".[{json.dumps(key)}]")


def _new_name(path: Path, name: str) -> str:
    """A name for what a command makes of a file, as a word of the command line.

    It is never the file's own name, which `>` would empty first.
    """
    if path.name == name:
        name = f"new-{name}"
    return shell_word(name)


def _broken_json(path: Path, text: str, error: Exception) -> DataError:
    """Count the whole rows before the fault, so that the broken one is named by its number."""
    if isinstance(error, RecursionError):
        fix = "write an array of flat objects"
        return DataError("the file is nested too deep", where=str(path), fix=fix)
    fault_at = error.pos if isinstance(error, json.JSONDecodeError) else len(text)
    row = 0
    # Behind the bracket that opens the array.
    at = len(text) - len(text.lstrip()) + 1
    with suppress(ValueError, RecursionError):
        while at <= fault_at:
            while at < len(text) and text[at] in " \t\r\n,":
                at += 1
            row += 1
            _, at = json.JSONDecoder().raw_decode(text, at)
    if not isinstance(error, json.JSONDecodeError):
        return long_number(f"{path} row {row}")
    place = f"line {error.lineno} column {error.colno}"
    what = "the file is not JSON"
    fix = f"fix it at {place}"
    is_at_end = error.pos >= len(text.rstrip()) - 1
    # The fault at the end of the text: the file was cut.
    if is_at_end or error.msg.startswith("Unterminated string"):
        what = "the file ends in the middle of its JSON"
        fix = "download or write the file again"
    where = f"{path}:{error.lineno}"
    if text.lstrip().startswith("["):
        where = f"{path} row {row}"
    return DataError(what, where=where, why=f"{error.msg}, {place}", fix=fix)


def long_number(where: str) -> DataError:
    """The error for JSON with a whole number that Python does not read.

    int() of a text takes a time of its square.
    """
    what = f"a whole number of more than {sys.get_int_max_str_digits():,} digits"
    return DataError(what, where=where, fix='write it as a string, "123...", or delete it')


def _read_csv(path: Path) -> Table:
    """Values with a header, separated by commas or as `_separator` finds; every value is text."""
    csv.field_size_limit(MAX_ROW_BYTES)
    text = _read_text(path)
    # Excel reads the separator from such a first line, which is no row.
    named = _NAMED_SEPARATOR.match(text)
    if named is not None:
        separator = named[1]
        # The line stays as a blank one, so that rows keep their numbers.
        text = text[named.end() - 1 :]
    else:
        separator = _separator(path, text)
    rows, lines = _parse_csv(path, text, separator)
    # `DataFrame.to_csv` writes its index as a first column without a name.
    if _has_row_numbers(rows):
        log.warning(
            "%s: the first column has no name and contains numbers of rows, as pandas writes:"
            " ignored",
            path.name,
        )
        rows = [values[1:] for values in rows]
    header = rows[0] if rows else []
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated or "" in header:
        what = "the header has an unnamed column"
        if repeated:
            what = f"the header names {', '.join(repeated)} twice"
        fix = "give each column a unique name in the first line"
        raise DataError(what, where=f"{path}:1", fix=fix)
    if len(rows) < 2:
        fix = "add rows below the header"
        raise DataError("the file has a header and no rows", where=str(path), fix=fix)
    table = [dict(zip(header, values, strict=True)) for values in rows[1:]]
    return Table(
        len(table),
        table.__getitem__,
        where=lambda i: f"{path}:{lines[i + 1]}",
        fingerprint=lambda: _file_digest(path),
        layout="" if separator == "," else f"separated by {SEPARATORS[separator]}",
    )


def _separator(path: Path, text: str) -> str:
    """What stands between the values of a row: a comma, or what the header shows in its place.

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
    output = _new_name(path, "commas.csv")
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
    """Whether the header and the first rows have the same number of values, and more than one."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    counts = set()
    # A row that is broken is named when all are read.
    with suppress(csv.Error):
        for values in itertools.islice(reader, FIRST_ROWS):
            if values:
                counts.add(len(values))
    return len(counts) == 1 and counts.pop() > 1


def _parse_csv(path: Path, text: str, separator: str) -> tuple[list[list[str]], "array[int]"]:
    """The values of the header and of all rows, and the line in which each begins."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows: list[list[str]] = []
    # A quoted value may go over several lines.
    lines = array("q")
    last_line = 0
    try:
        for values in reader:
            first_line_number = last_line + 1
            last_line = reader.line_num
            if not values:
                continue
            if rows and len(values) != len(rows[0]):
                fix = f"add the missing values, or {SEPARATORS[separator]} for empty ones"
                if len(values) > len(rows[0]):
                    # A terminal shows a tab as spaces.
                    example = "" if separator == "\t" else f': "a{separator} b"'
                    mark = SEPARATORS[separator]
                    fix = f"put values with {mark} or line breaks in double quotes{example}"
                raise DataError(
                    f"a row of {len(values)} values under a header of {len(rows[0])}",
                    where=f"{path}:{first_line_number}",
                    why=f"the header is {', '.join(rows[0])}",
                    fix=fix,
                )
            rows.append(values)
            lines.append(first_line_number)
    except csv.Error as error:
        raise DataError(
            "the file is not CSV",
            where=f"{path}:{last_line + 1}",
            why=str(error),
            fix="close the quote that opens in this row; a quote within a quoted value is written"
            ' twice: "say ""hi"""',
        ) from None
    return rows, lines


def _has_row_numbers(rows: list[list[str]]) -> bool:
    """Whether the first column is the index that pandas' `to_csv` writes.

    It has no name, and holds whole numbers.
    """
    if len(rows) < 2 or len(rows[0]) < 2 or rows[0][0] != "":
        return False
    return all(values[0].isdecimal() for values in rows[1:])


def _read_arrow(path: Path) -> Table:
    """A Parquet or Arrow file, read whole."""
    import pyarrow as pa

    try:
        if path.suffix.lower() == ".parquet":
            table = _parquet_table(path)
        else:
            with pa.OSFile(str(path)) as file:
                # Two containers share the suffix: the file format, and the stream that `datasets`
                # writes.
                is_file = file.read(6) == b"ARROW1"
                file.seek(0)
                reader = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
                table = reader.read_all()
    except pa.ArrowException as error:
        raise DataError(
            f"the file is not {path.suffix[1:]}",
            where=str(path),
            why=first_line(error),
            fix="download or write the file again",
        ) from None
    if table.num_rows == 0:
        raise DataError("the file has no rows", where=str(path), fix="name a file that does")

    @lru_cache(maxsize=1)
    def block(n: int) -> list[dict[str, Any]]:
        return table.slice(n * _BLOCK, _BLOCK).to_pylist()

    def row(i: int) -> dict[str, Any]:
        return without_nulls(block(i // _BLOCK)[i % _BLOCK])

    return Table(
        table.num_rows,
        row,
        where=lambda i: f"{path} row {i + 1}",
        fingerprint=lambda: _file_digest(path),
    )


def _parquet_table(path: Path) -> Any:
    import pyarrow.parquet as pq

    names = pq.read_schema(path).names
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        what = f"the file has several columns named {', '.join(repeated)}"
        fix = "write it again with unique column names"
        raise DataError(what, where=str(path), fix=fix)
    return pq.read_table(path)


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """Drop null keys inside nested values.

    Arrow adds to every struct the keys that any other row has there.
    """

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items() if item is not None}
        if isinstance(value, list):
            return [clean(item) for item in value]
        return value

    return {column: clean(value) for column, value in row.items()}


_TYPE_NAMES: dict[type, str] = {
    str: "a text",
    int: "a number",
    float: "a number",
    Decimal: "a number",
    bool: "true or false",
    list: "an array",
    dict: "an object",
    type(None): "null",
    bytes: "bytes",
    datetime: "a date with a time",
    date: "a date",
}


def json_type(value: Any) -> str:
    """What a JSON value is, in plain words."""
    return _TYPE_NAMES.get(type(value), f"a {type(value).__name__}")


_READERS: dict[str, Callable[[Path], Table]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".csv": _read_csv,
    ".parquet": _read_arrow,
    ".arrow": _read_arrow,
}
