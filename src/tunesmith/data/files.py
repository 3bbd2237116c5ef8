"""Local data files -> tables of rows: json, jsonl, csv, parquet, arrow.

JSON and CSV are read here and not through Arrow, for two reasons. Arrow gives every row the union of all rows' keys,
so the arguments of one tool call would appear, as nulls, in those of another. And a broken row must be named by the
line that a text editor shows. JSON lines stay on the disk and are parsed when a row is asked for.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import mmap
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any, Protocol

from tunesmith.config.paths import DATA_SUFFIXES as SUFFIXES
from tunesmith.errors import DataError, first_line

MAX_ROW_BYTES = 32 << 20  # a longer row is a file with its line breaks lost; tokenising it would take minutes
_BLOCK = 256  # rows of an Arrow table turned into Python at once


class Table(Protocol):
    """Rows that are found by number, each with the place that an editor shows."""

    def __len__(self) -> int: ...

    def row(self, i: int) -> Any:
        """Row i as Python values; a DataError names the place of one that cannot be read."""

    def where(self, i: int) -> str: ...

    def fingerprint(self) -> str:
        """sha256 of the content, in hex."""


def open_table(path: Path) -> Table:
    """Open a local data file.

    Raises:
        DataError: missing, a folder, unreadable, empty, of an unknown type, or broken.
    """
    _must_be_file(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(
            f"{path.name} is not a kind of file that rows are read from",
            where=str(path),
            why=f"the kinds are {', '.join(SUFFIXES)}",
            fix="unpack or convert it to JSON lines, one object a line, and name that file",
        )
    try:
        if path.stat().st_size == 0:
            raise DataError("the file is empty", where=str(path), fix="write rows into it, or name another file")
        if suffix in (".parquet", ".arrow"):
            return ArrowRows(path, _read_arrow(path))
        if suffix == ".csv":
            return _read_csv(path)
        return _read_json(path) if suffix == ".json" else JsonLines(path)
    except OSError as error:
        raise DataError(
            "the file cannot be read",
            where=str(path),
            why=error.strerror or str(error),
            fix=f"ls -l {quote(str(path))}",
        ) from error


def _must_be_file(path: Path) -> None:
    if path.is_file():
        return
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
        raise DataError(
            "the source is a folder, not a file",
            where=str(path),
            why=f"it holds {', '.join(inside[:5])}" if inside else "it holds no data file",
            fix=f"source: {path / inside[0]}" if inside else f"name a file that ends in {', '.join(SUFFIXES)}",
        )
    if path.exists():
        raise DataError(
            "the source is not a regular file", where=str(path), fix="copy its rows into a file and name that"
        )
    if not path.parent.is_dir():
        raise DataError(
            "there is no such file", where=str(path), why=f"{path.parent} is no folder", fix="mend the path"
        )
    names = [p.name for p in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    data = sorted(n for n in names if n.lower().endswith(SUFFIXES))
    raise DataError(
        "there is no such file",
        where=str(path),
        why=f"{path.parent} has {', '.join(data[:5])}" if data else f"{path.parent} has no data file",
        fix=f"did you mean {path.parent / near[0]}?" if near else "mend the path",
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- text -----------------------------------------------------------------------------------------------------------


def _not_utf8(path: Path, where: str, error: UnicodeDecodeError) -> DataError:
    head = path.open("rb").read(2)
    code = "utf-16" if head in (b"\xff\xfe", b"\xfe\xff") else "latin1"
    return DataError(
        "the file is not UTF-8 text",
        where=where,
        why=f"byte 0x{error.object[error.start]:02x} at position {error.start + 1}: {error.reason}",
        fix=f"iconv -f {code} -t utf-8 {quote(str(path))} > fixed{path.suffix}",
    )


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _not_utf8(path, f"{path}:{line}", error) from None


def _check_size(size: int, where: str) -> None:
    if size > MAX_ROW_BYTES:
        raise DataError(
            f"a row of {size / 2**20:.0f} MiB",
            where=where,
            why=f"a row may have {MAX_ROW_BYTES >> 20} MiB; line breaks between rows may be lost",
            fix="write one row a line, or split the text into several rows",
        )


class JsonLines:
    """One JSON object a line; blank lines are passed over. The file is mapped, not read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._starts, self._ends, self._lines = array("q"), array("q"), array("q")
        at = 3 if self._data[:3] == b"\xef\xbb\xbf" else 0
        self._data.seek(at)
        for number, line in enumerate(iter(self._data.readline, b""), 1):
            if line.strip():
                self._starts.append(at)
                self._ends.append(at + len(line))
                self._lines.append(number)
            at += len(line)
        if not self._starts:
            raise DataError("the file has only blank lines", where=str(path), fix="write rows into it")

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, i: int) -> str:
        return f"{self._path}:{self._lines[i]}"

    def row(self, i: int) -> Any:
        _check_size(self._ends[i] - self._starts[i], self.where(i))
        data = self._data[self._starts[i] : self._ends[i]]
        try:
            return json.loads(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise _not_utf8(self._path, self.where(i), error) from None
        except (json.JSONDecodeError, RecursionError) as error:
            raise self._broken(i, data, error) from None

    def _broken(self, i: int, data: bytes, error: Exception) -> DataError:
        last = i == len(self) - 1 and not data.endswith(b"\n")
        why = f"{error.msg}: column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deep"
        fix = f"sed -n {self._lines[i]}p {quote(str(self._path))}   # mend or delete this line: one JSON object a line"
        if last:
            why += "; the file ends here without a line break, as one does that was cut off"
            fix = "fetch or write the file again, or delete its last line"
        elif i == 0 and data.lstrip().startswith(b"["):
            why += "; the file looks like one JSON array"
            fix = f"mv {quote(str(self._path))} {quote(str(self._path.with_suffix('.json')))}   # and name that"
        return DataError("the line is not JSON", where=self.where(i), why=why, fix=fix)

    def fingerprint(self) -> str:
        return _digest(self._path)


class Listed:
    """Rows held in memory: a JSON array, a CSV file, or rows that a program made."""

    def __init__(self, rows: Sequence[Any], where: Sequence[str], digest: str) -> None:
        self._rows, self._where, self._digest = rows, where, digest

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, i: int) -> Any:
        return self._rows[i]

    def where(self, i: int) -> str:
        return self._where[i]

    def fingerprint(self) -> str:
        return self._digest


def _read_json(path: Path) -> Table:
    """A JSON array of objects; a file of JSON lines that is named .json is taken as what it is."""
    text = _text(path)
    first = text.lstrip()[:1]
    if first == "{" and _has_second_value(text):
        return JsonLines(path)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise _broken_array(path, text, error) from None
    except RecursionError:
        raise DataError("the file is nested too deep", where=str(path), fix="write an array of flat objects") from None
    if isinstance(rows, dict):
        lists = [k for k, v in rows.items() if isinstance(v, list) and v]
        name = lists[0] if lists else None
        raise DataError(
            "the file holds one object, not an array of rows",
            where=str(path),
            why=f"its keys are {', '.join(map(str, list(rows)[:8])) or 'none'}",
            fix=f"jq '.{name}' {quote(str(path))} > rows.json"
            if name
            else "put the rows in [ ], or one a line in a .jsonl",
        )
    if not isinstance(rows, list) or not rows:
        what = "the file holds no rows" if rows == [] else f"the file holds {kind_of_value(rows)}, not an array of rows"
        raise DataError(what, where=str(path), fix='write an array of objects: [{"messages": ...}, ...]')
    return Listed(rows, _Numbered(path, len(rows)), _digest(path))


def _has_second_value(text: str) -> bool:
    try:
        _, end = json.JSONDecoder().raw_decode(text, len(text) - len(text.lstrip()))
    except (json.JSONDecodeError, RecursionError):
        line = text.lstrip().partition("\n")[0]
        return line.rstrip().endswith("}") and bool(text.lstrip().partition("\n")[2].strip())
    return bool(text[end:].strip())


class _Numbered(Sequence[str]):
    """`file row N`, from 1."""

    def __init__(self, path: Path, n: int) -> None:
        self._path, self._n = path, n

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, i: Any) -> Any:
        return f"{self._path} row {i + 1}"


def _broken_array(path: Path, text: str, error: json.JSONDecodeError) -> DataError:
    """Count the whole rows before the fault, so that the broken one is named by its number."""
    decoder, row, at = json.JSONDecoder(), 0, len(text) - len(text.lstrip()) + 1
    while at <= error.pos:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        row += 1
        try:
            _, at = decoder.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError):
            break
    cut = error.pos >= len(text.rstrip()) - 1 or error.msg.startswith("Unterminated string")
    array_like = text.lstrip().startswith("[")
    return DataError(
        "the file ends in the middle of its JSON" if cut else "the file is not JSON",
        where=f"{path} row {row}" if array_like else f"{path}:{error.lineno}",
        why=f"{error.msg}, line {error.lineno} column {error.colno}",
        fix="fetch or write the file again" if cut else f"mend it at line {error.lineno} column {error.colno}",
    )


def _read_csv(path: Path) -> Table:
    """Comma-separated values with a header; every value is text."""
    csv.field_size_limit(MAX_ROW_BYTES)
    text = _text(path)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[Mapping[str, str]] = []
    places: list[str] = []
    header: list[str] = []
    line = 0
    try:
        for values in reader:
            start, line = line + 1, reader.line_num
            if not values:
                continue
            if not header:
                header = _header(path, values)
                continue
            if len(values) != len(header):
                raise DataError(
                    f"a row of {len(values)} values under a header of {len(header)}",
                    where=f"{path}:{start}",
                    why=f"the header is {', '.join(header)}",
                    fix='put values that hold a comma or a line break in double quotes: "a, b"',
                )
            rows.append(dict(zip(header, values, strict=True)))
            places.append(f"{path}:{start}")
    except csv.Error as error:
        raise DataError(
            "the file is not CSV", where=f"{path}:{line + 1}", why=str(error), fix="quote values by RFC 4180"
        ) from None
    if not rows:
        raise DataError("the file has a header and no rows", where=str(path), fix="write rows below the header")
    return Listed(rows, places, _digest(path))


def _header(path: Path, names: list[str]) -> list[str]:
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice or "" in names:
        raise DataError(
            f"the header names {', '.join(twice)} twice" if twice else "the header has a column without a name",
            where=f"{path}:1",
            fix="give each column a name of its own in the first line",
        )
    return names


# --- Arrow ----------------------------------------------------------------------------------------------------------


def _read_arrow(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.suffix.lower() == ".parquet":
            return pq.read_table(path, memory_map=True)
        with pa.memory_map(str(path)) as file:
            head = file.read(6)
        opened = pa.memory_map(str(path))
        # Two containers share the suffix: the file format, and the stream that `datasets` writes.
        return (pa.ipc.open_file(opened) if head == b"ARROW1" else pa.ipc.open_stream(opened)).read_all()
    except pa.ArrowException as error:
        what, fix = f"the file is not {path.suffix[1:]}", "fetch or write the file again"
        raise DataError(what, where=str(path), why=first_line(error), fix=fix) from None


class ArrowRows:
    """A pyarrow.Table as Python rows."""

    def __init__(self, path: Path, table: Any) -> None:
        if table.num_rows == 0:
            raise DataError("the file holds no rows", where=str(path), fix="name a file that does")
        self._path, self._table = path, table
        self._block: tuple[int, list[Any]] = (-1, [])

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def where(self, i: int) -> str:
        return f"{self._path} row {i + 1}"

    def row(self, i: int) -> Any:
        block, at = divmod(i, _BLOCK)
        if self._block[0] != block:
            self._block = (block, self._table.slice(block * _BLOCK, _BLOCK).to_pylist())
        return without_nulls(self._block[1][at])

    def fingerprint(self) -> str:
        return _digest(self._path)


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """Drop null keys inside nested values: Arrow adds to every struct the keys that any other row has there."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items() if v is not None}
        return [clean(v) for v in value] if isinstance(value, list) else value

    return {k: clean(v) for k, v in row.items()}


def kind_of_value(value: Any) -> str:
    """What a JSON value is, in a user's words."""
    names = {
        str: "a text",
        int: "a number",
        float: "a number",
        bool: "true or false",
        list: "an array",
        dict: "an object",
    }
    return names.get(type(value), "null")
