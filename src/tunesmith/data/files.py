"""Local data files -> tables of rows: json, jsonl, csv, parquet, arrow.

JSON and CSV are read here and not through Arrow, for two reasons. Arrow gives every row the union of all rows' keys,
so the arguments of one tool call would appear, as nulls, in those of another. And a broken row must be named by the
line that a text editor shows. JSON lines stay on disk and are parsed when a row is asked for.

No file is memory-mapped: where another program shortens it, the next access to a mapping kills the process (SIGBUS).
"""

import csv
import difflib
import hashlib
import io
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
from typing import Any

from tunesmith.config.paths import DATA_SUFFIXES as SUFFIXES
from tunesmith.errors import DataError, first_line
from tunesmith.host_memory import drop_pages, open_uncached
from tunesmith.shell import shell_path, shell_word

log = logging.getLogger(__name__)

MAX_ROW_BYTES = 32 << 20  # a longer row is a file with its line breaks lost; tokenising it would take minutes
_BLOCK = 256  # rows of an Arrow table converted to Python at once


@dataclass(frozen=True)
class Table:
    """Rows found by number."""

    size: int
    row: Callable[[int], Any]  # row i as Python values, or a DataError with its place
    where: Callable[[int], str]  # the place of row i that an editor shows
    fingerprint: Callable[[], str]  # sha256 of the content, in hex
    check_unchanged: Callable[[], None] = lambda: None  # DataError if the file is another than when it was opened

    def __len__(self) -> int:
        return self.size


def open_table(path: Path) -> Table:
    """Open a local data file; DataError where it is missing, empty, of an unknown type or broken."""
    check_data_file(path)
    try:
        before = _version(path)
        table = _READERS[path.suffix.lower()](path)
    except OSError as error:
        why, fix = error.strerror or str(error), f"ls -l {shell_path(path)}"
        raise DataError("the file cannot be read", where=str(path), why=why, fix=fix) from error

    def check_unchanged() -> None:
        if _version(path) != before:
            raise _changed(path)

    return replace(table, check_unchanged=check_unchanged)


def check_data_file(path: Path) -> None:
    """Refuse what a look at a data file's name and size tells; raises DataError."""
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            what, why = f"{path.name} is not a supported data file", f"the types are {', '.join(SUFFIXES)}"
            fix = "unpack or convert it to JSON lines, one object a line, and name that file"
            raise DataError(what, where=str(path), why=why, fix=fix)
        if path.stat().st_size == 0:
            raise DataError("the file is empty", where=str(path), fix="write rows into it, or name another file")
        return
    if path.is_symlink() and not path.exists():
        fix = f"ls -l {shell_path(path)}   # name the file itself, or make the link again"
        what = f"the link leads to {os.readlink(path)}, which is not there"
        raise DataError(what, where=str(path), fix=fix)
    folder = path if path.is_dir() else path.parent
    inside = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in SUFFIXES) if folder.is_dir() else []
    has, why = ", ".join(inside[:5]) or "no data file", ""
    if path.is_dir():
        what, why = "the source is a folder, not a file", f"it holds {has}"
        fix = f"source: {path / inside[0]}" if inside else f"name a file that ends in {', '.join(SUFFIXES)}"
    elif path.exists():
        what, fix = "the source is not a regular file", "copy its rows into a file and name that"
    elif not folder.is_dir():
        what, why, fix = "there is no such file", f"there is no folder {folder}", "fix the path"
    else:
        what, why = "there is no such file", f"{folder} has {has}"
        near = difflib.get_close_matches(path.name, [p.name for p in folder.iterdir()], n=1, cutoff=0.5)
        fix = f"did you mean {folder / near[0]}?" if near else "fix the path"
    raise DataError(what, where=str(path), why=why, fix=fix)


def _version(path: Path) -> tuple[int, int, int] | None:
    """What another program changes when it writes the file; None where it is gone."""
    with suppress(OSError):
        found = path.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns
    return None


def _changed(path: Path) -> DataError:
    why, fix = "another program wrote, shortened or deleted it", "start again when it is whole"
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
            code = "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "latin1"
        why = f"byte 0x{error.object[error.start]:02x} at position {error.start + 1}: {error.reason}"
        fix = f"iconv -f {code} -t utf-8 {shell_path(path)} > {_new_name(path, f'fixed{path.suffix}')}"
        raise DataError("the file is not UTF-8 text", where=where(error.start), why=why, fix=fix) from None


def _read_text(path: Path) -> str:
    with open_uncached(path) as file:
        data, end = file.read(), b"\n"
    return _decode(path, data, lambda at: f"{path}:{data.count(end, 0, at) + 1}", "utf-8-sig")


def _read_json_lines(path: Path) -> Table:
    """One JSON object a line; blank lines are skipped. Only the places of the rows are kept in memory."""
    starts, ends, numbers = array("q"), array("q"), array("q")
    at = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            mark = 3 if number == 1 and line.startswith(b"\xef\xbb\xbf") else 0
            if line[mark:].strip():
                starts.append(at + mark)
                ends.append(at + len(line))
                numbers.append(number)
            at += len(line)
        if not starts:
            raise DataError("the file has only blank lines", where=str(path), fix="write rows into it")
        descriptor = os.dup(file.fileno())

    def where(i: int) -> str:
        return f"{path}:{numbers[i]}"

    def row(i: int) -> Any:
        if (size := ends[i] - starts[i]) > MAX_ROW_BYTES:
            why = f"a row may have {MAX_ROW_BYTES >> 20} MiB; line breaks between rows may be lost"
            fix = "write one row a line, or split the text into several rows"
            raise DataError(f"a row of {size / 2**20:.0f} MiB", where=where(i), why=why, fix=fix)
        if len(data := os.pread(descriptor, size, starts[i])) < size:
            raise _changed(path)
        text = _decode(path, data, lambda _: where(i), "utf-8")
        fix = f"sed -n {numbers[i]}p {shell_path(path)}   # fix or delete this line: one JSON object a line"
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            why = f"{error.msg}: column {error.colno}"
        except ValueError:
            raise long_number(where(i)) from None
        except RecursionError:
            why = "nested too deep"
        if i == len(starts) - 1 and not data.endswith(b"\n"):
            why += "; the file ends here without a line break, so it may be cut off"
            fix = "download or write the file again, or delete its last line"
        elif i == 0 and data.lstrip().startswith(b"["):
            why += "; the file looks like one JSON array"
            fix = f"mv {shell_path(path)} {shell_path(path.with_suffix('.json'))}   # and name that"
        raise DataError("the line is not JSON", where=where(i), why=why, fix=fix)

    def close() -> None:
        drop_pages(descriptor)
        os.close(descriptor)

    weakref.finalize(row, close)
    return Table(len(starts), row, where, lambda: _file_digest(path))


def _read_json(path: Path) -> Table:
    """A JSON array of objects; a file of JSON lines named .json is read as such."""
    text = _read_text(path)
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError itself: a number of too many digits
        first, _, rest = text.strip().partition("\n")
        extra = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
        if first.startswith("{") and (extra or (first.rstrip().endswith("}") and rest)):
            return _read_json_lines(path)
        raise _broken_json(path, text, error) from None
    if isinstance(rows, list) and rows:
        return Table(len(rows), rows.__getitem__, lambda i: f"{path} row {i + 1}", lambda: _file_digest(path))
    what, why = f"the file holds {'no rows' if rows == [] else f'{json_type(rows)}, not an array of rows'}", ""
    fix = 'write an array of objects: [{"messages": ...}, ...]'
    if isinstance(rows, dict):
        what = "the file holds one object, not an array of rows"
        why = f"its keys are {', '.join(list(rows)[:8]) or 'none'}"
        lists = [key for key, value in rows.items() if isinstance(value, list) and value]
        fix = (
            f"jq {_jq_key(lists[0])} {shell_path(path)} > {_new_name(path, 'rows.json')}"
            if lists
            else "put the rows in [ ]"
        )
    raise DataError(what, where=str(path), why=why, fix=fix)


def _jq_key(key: str) -> str:
    """The program of jq that takes a key, as a word of a command line."""
    return f"'.{key}'" if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key) else shell_word(f".[{json.dumps(key)}]")


def _new_name(path: Path, name: str) -> str:
    """A name for what a command makes of a file, as a word: never the file's own, which `>` would empty first."""
    return shell_word(name if path.name != name else f"new-{name}")


def _broken_json(path: Path, text: str, error: Exception) -> DataError:
    """Count the whole rows before the fault, so that the broken one is named by its number."""
    if isinstance(error, RecursionError):
        return DataError("the file is nested too deep", where=str(path), fix="write an array of flat objects")
    row, at = 0, len(text) - len(text.lstrip()) + 1
    end = error.pos if isinstance(error, json.JSONDecodeError) else len(text)
    with suppress(ValueError, RecursionError):
        while at <= end:
            while at < len(text) and text[at] in " \t\r\n,":
                at += 1
            row += 1
            _, at = json.JSONDecoder().raw_decode(text, at)
    if not isinstance(error, json.JSONDecodeError):
        return long_number(f"{path} row {row}")
    place = f"line {error.lineno} column {error.colno}"
    what, fix = "the file is not JSON", f"fix it at {place}"
    if error.pos >= len(text.rstrip()) - 1 or error.msg.startswith("Unterminated string"):
        what, fix = "the file ends in the middle of its JSON", "download or write the file again"
    where = f"{path} row {row}" if text.lstrip().startswith("[") else f"{path}:{error.lineno}"
    return DataError(what, where=where, why=f"{error.msg}, {place}", fix=fix)


def long_number(where: str) -> DataError:
    """The error for JSON with a whole number that Python does not read: int() of a text takes a time of its square."""
    what = f"a whole number of more than {sys.get_int_max_str_digits():,} digits"
    return DataError(what, where=where, fix='write it as a text, "123...", or delete it')


def _read_csv(path: Path) -> Table:
    """Comma-separated values with a header; every value is text."""
    csv.field_size_limit(MAX_ROW_BYTES)
    text = _read_text(path)
    names = text.partition("\n")[0]
    if "," not in names and (other := next((mark for mark in ";\t|" if mark in names), "")):
        convert = f"import csv, sys; csv.writer(sys.stdout).writerows(csv.reader(sys.stdin, delimiter={other!r}))"
        fix = f"python3 -c {shell_word(convert)} < {shell_path(path)} > {_new_name(path, 'commas.csv')}"
        raise DataError(f"the header has {other!r} between its names, not a comma", where=f"{path}:1", fix=fix)
    if text.lstrip().startswith("{") and '":' in names:
        fix = f"mv -n {shell_path(path)} {shell_path(path.with_suffix('.jsonl'))}   # and name that"
        raise DataError("the file holds JSON lines, not CSV", where=f"{path}:1", fix=fix)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[list[str]] = []
    lines = array("q")  # where each row begins: a quoted value may go over several lines
    line = 0
    try:
        for values in reader:
            start, line = line + 1, reader.line_num
            if not values:
                continue
            if rows and len(values) != len(rows[0]):
                what = f"a row of {len(values)} values under a header of {len(rows[0])}"
                fix = 'put values that hold a comma or a line break in double quotes: "a, b"'
                fix = fix if len(values) > len(rows[0]) else "write what is missing, or a comma for an empty value"
                raise DataError(what, where=f"{path}:{start}", why=f"the header is {', '.join(rows[0])}", fix=fix)
            rows.append(values)
            lines.append(start)
    except csv.Error as error:
        where = f"{path}:{line + 1}"
        fix = 'close the quote that opens in this row; a quote within a quoted value is written twice: "say ""hi"""'
        raise DataError("the file is not CSV", where=where, why=str(error), fix=fix) from None
    header = rows[0] if rows else []
    if _has_row_numbers(rows):
        log.warning("%s: the first column has no name and holds numbers of rows, as pandas writes: left out", path.name)
        rows = [values[1:] for values in rows]
        header = rows[0]
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice or "" in header:
        what = f"the header names {', '.join(twice)} twice" if twice else "the header has a column without a name"
        raise DataError(what, where=f"{path}:1", fix="give each column a name of its own in the first line")
    if len(rows) < 2:
        raise DataError("the file has a header and no rows", where=str(path), fix="write rows below the header")
    table = [dict(zip(header, values, strict=True)) for values in rows[1:]]
    return Table(len(table), table.__getitem__, lambda i: f"{path}:{lines[i + 1]}", lambda: _file_digest(path))


def _has_row_numbers(rows: list[list[str]]) -> bool:
    """Whether the first column is the index that pandas' `to_csv` writes: without a name, and of whole numbers."""
    if len(rows) < 2 or len(rows[0]) < 2 or rows[0][0] != "":
        return False
    return all(values[0].isdecimal() for values in rows[1:])


def _read_arrow(path: Path) -> Table:
    """A Parquet or Arrow file, read whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.suffix.lower() == ".parquet":
            names = pq.read_schema(path).names
            if twice := sorted({name for name in names if names.count(name) > 1}):
                what = f"the file has several columns named {', '.join(twice)}"
                raise DataError(what, where=str(path), fix="write it again, with a name of its own for each column")
            table = pq.read_table(path)
        else:
            with pa.OSFile(str(path)) as file:
                # Two containers share the suffix: the file format, and the stream that `datasets` writes.
                is_file = file.read(6) == b"ARROW1"
                file.seek(0)
                table = (pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)).read_all()
    except pa.ArrowException as error:
        what, fix = f"the file is not {path.suffix[1:]}", "download or write the file again"
        raise DataError(what, where=str(path), why=first_line(error), fix=fix) from None
    if table.num_rows == 0:
        raise DataError("the file holds no rows", where=str(path), fix="name a file that does")

    @lru_cache(maxsize=1)
    def block(n: int) -> list[dict[str, Any]]:
        return table.slice(n * _BLOCK, _BLOCK).to_pylist()

    def row(i: int) -> dict[str, Any]:
        return without_nulls(block(i // _BLOCK)[i % _BLOCK])

    return Table(table.num_rows, row, lambda i: f"{path} row {i + 1}", lambda: _file_digest(path))


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """Drop null keys inside nested values: Arrow adds to every struct the keys that any other row has there."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items() if v is not None}
        return [clean(v) for v in value] if isinstance(value, list) else value

    return {k: clean(v) for k, v in row.items()}


def json_type(value: Any) -> str:
    """What a JSON value is, in plain words."""
    number, text = "a number", "a text"
    names = {str: text, int: number, float: number, bool: "true or false", list: "an array", dict: "an object"}
    names |= {type(None): "null", bytes: "bytes", Decimal: number, datetime: "a date with a time", date: "a date"}
    return names.get(type(value), f"a {type(value).__name__}")


_READERS: dict[str, Callable[[Path], Table]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".csv": _read_csv,
    ".parquet": _read_arrow,
    ".arrow": _read_arrow,
}
