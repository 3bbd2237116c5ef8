"""Local data files -> tables of rows: json, jsonl, csv, parquet, arrow, and texts.

JSON and CSV are read here and not through Arrow, for two reasons. Arrow gives every row the union
of all rows' keys, so the arguments of one tool call would appear, as nulls, in those of another.
And a broken row must be named by the line that a text editor shows. Rows stay on disk and are
parsed when they are read; a JSON array alone is in memory as a whole.
"""

import codecs
import json
import os
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from tunesmith.config.paths import DATA_SUFFIXES as SUFFIXES
from tunesmith.config.paths import TEXT_SUFFIXES
from tunesmith.data.source.arrow_nulls import without_arrow_nulls
from tunesmith.data.source.csv_files import read_csv
from tunesmith.data.source.sessions import read_sessions, session_form
from tunesmith.data.source.table import (
    DIGESTS_KEPT,
    MAX_ROW_BYTES,
    FileVersion,
    Place,
    Table,
    changed_error,
    decode_text,
    file_digest,
    json_type,
    new_name,
    read_span,
    unreadable_error,
    version_of,
)
from tunesmith.data.source.text_files import read_text_files
from tunesmith.errors import DataError
from tunesmith.host.files import near_path
from tunesmith.host.memory import available_memory, open_uncached
from tunesmith.host.shell import shell_path, shell_word

# Files whose objects are read as they stand; those of Arrow are read without null keys.
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
# Of a JSON array, how many times its size it takes in memory.
JSON_MEMORY = 8
# Of a file of lines, read at once.
READ_BYTES = 1 << 20


def open_table(path: Path) -> Table:
    """Open a local data file; DataError if it is missing, empty, broken or of an unknown type."""
    check_data_file(path)
    try:
        version = version_of(path)
        if form := session_form(path):
            table = _read_sessions(path, version, form)
        else:
            table = _FILE_READERS[path.suffix.lower()](path)
            if path.suffix.lower() in JSON_SUFFIXES:
                table = without_arrow_nulls(table)
    except OSError as error:
        raise unreadable_error(path, error) from error

    def check_unchanged() -> None:
        if version_of(path) != version:
            raise changed_error(path)

    return replace(
        table,
        where=lambda i: Place(table.where(i), path.parent),
        check_unchanged=check_unchanged,
    )


# A start opens a file several times, and all lines are read to find the conversations.
@lru_cache(maxsize=DIGESTS_KEPT)
def _read_sessions(path: Path, version: FileVersion | None, form: str) -> Table:
    return read_sessions(path, _read_json_lines(path), form)


def check_data_file(path: Path) -> None:
    """DataError for a data file whose name or size alone tells that it cannot be read."""
    check_is_file(path)
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"{path.name} is not a supported data file",
            where=str(path),
            why=f"the types are {', '.join(SUFFIXES)}",
            fix="unpack or convert it to JSON lines, one object per line, or a document to text,"
            " for example with pandoc or pdftotext; and use that file",
        )
    if path.stat().st_size == 0:
        fix = "add rows to it, or use another file"
        raise DataError("the file is empty", where=str(path), fix=fix)


def check_is_file(path: Path) -> None:
    """Raise DataError if there is no regular file at a path."""
    if path.is_file():
        return
    what = "there is no such file"
    why = "" if path.parent.is_dir() else f"there is no folder {path.parent}"
    fix = "fix the path"
    if path.exists():
        what = "the source is not a regular file"
        fix = "copy its rows into a regular file and use that"
    elif path.is_symlink():
        why = f"it is a link to {os.readlink(path)}, which does not exist"
    elif near := near_path(path):
        fix = f"did you mean {near}?"
    raise DataError(what, where=str(path), why=why, fix=fix)


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return an object of JSON. Raise ValueError if a key repeats, because a value is lost."""
    values = dict(pairs)
    if len(values) < len(pairs):
        [(repeated, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f'an object has "{repeated}" twice')
    return values


# Calls of json.loads with this argument would make one anew each time.
_DECODER = json.JSONDecoder(object_pairs_hook=_without_repeats)


def _decode_json(path: Path, line: int, text: str, *, is_line: bool) -> object:
    """Decode JSON that begins in a line of a file; `is_line`: it is expected to end there, too."""
    is_several = is_line and (text.startswith("[") or text.rstrip().endswith("{"))
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        why = f"{error.msg}: column {error.colno}"
        is_several = is_several or (error.msg == "Extra data" and text[error.pos] in "[{")
    except RecursionError:
        why = "it is nested too deep"
    except ValueError as error:
        # A repeated key, or a whole number of more digits than Python reads.
        why = str(error).partition(";")[0]
    what = "this is not JSON"
    fix = f"sed -n {line}p {shell_path(path)}   # fix this line, or write the file again"
    if is_several:
        what = "the file is neither one JSON array nor one JSON object a line"
        output = new_name(path, "rows.jsonl")
        fix = f"jq -c 'if type == \"array\" then .[] else . end' {shell_path(path)} > {output}"
    raise DataError(what, where=f"{path}:{line}", why=why, fix=fix)


class _JsonLines:
    """The places and numbers of the lines of a file that are not blank.

    `starts` has one entry more, the end of the file.
    """

    def __init__(self, path: Path) -> None:
        self.starts = array("q")
        self.numbers = array("q")
        number = 1
        is_counted = False
        with open_uncached(path) as file:
            # A mark of UTF-8 at the start is no part of the first row.
            mark = codecs.BOM_UTF8
            position = start = len(mark) if file.read(len(mark)) == mark else 0
            file.seek(start)
            # Where the line breaks are lost, a file of gigabytes is one line.
            while part := file.readline(READ_BYTES):
                if not is_counted and part.strip():
                    is_counted = True
                    self.starts.append(start)
                    self.numbers.append(number)
                position += len(part)
                if part.endswith(b"\n"):
                    start = position
                    number += 1
                    is_counted = False
        self.starts.append(position)


def _read_json_lines(path: Path) -> Table:
    """One JSON object a line; blank lines are skipped."""
    version = version_of(path)
    lines = _JsonLines(path)

    def where(i: int) -> str:
        return f"{path}:{lines.numbers[i]}"

    def row(i: int) -> object:
        start, stop = lines.starts[i : i + 2]
        if stop - start > MAX_ROW_BYTES:
            raise DataError(
                f"a row of {(stop - start) / 2**20:.0f} MiB",
                where=where(i),
                why=f"a row may have {MAX_ROW_BYTES >> 20} MiB; line breaks between rows may be"
                " missing",
                fix="write one row per line, or split the text into several rows",
            )
        # Blank lines may follow it.
        data = read_span(path, version, start, stop).partition(b"\n")[0]
        text = decode_text(path, data, lambda _: where(i), "utf-8")
        return _decode_json(path, lines.numbers[i], text, is_line=True)

    return Table(len(lines.numbers), row, where, fingerprint=lambda: file_digest(path))


def _read_json(path: Path) -> Table:
    """A JSON array of objects; a file of JSON lines named .json is read as such."""
    if _has_object_a_line(path):
        return _read_json_lines(path)
    size = path.stat().st_size
    if size * JSON_MEMORY > available_memory():
        output = new_name(path, f"{path.stem}.jsonl")
        raise DataError(
            f"the file of {size / 2**30:.1f} GiB does not fit in memory",
            where=str(path),
            why="a JSON array is read as a whole; JSON lines are read one by one",
            fix=f"jq -cn --stream 'fromstream(1|truncate_stream(inputs))' {shell_path(path)}"
            f" > {output}",
        )
    with open_uncached(path) as file:
        data = file.read()

    def where(at: int) -> str:
        line_breaks = data.count(b"\n", 0, at)
        return f"{path}:{line_breaks + 1}"

    text = decode_text(path, data, where, "utf-8-sig")
    rows = _decode_json(path, 1, text, is_line=False)
    if isinstance(rows, list):
        return Table(
            len(rows),
            rows.__getitem__,
            where=lambda i: f"{path} row {i + 1}",
            fingerprint=lambda: file_digest(path),
        )
    why = ""
    fix = "write an array of objects; in pandas: df.to_json('rows.json', orient='records')"
    if isinstance(rows, dict):
        why = f"its keys are {', '.join(list(rows)[:8]) or 'none'}"
        for key, value in rows.items():
            if isinstance(value, list) and value and isinstance(value[0], dict):
                output = new_name(path, "rows.json")
                fix = f"jq {shell_word(f'.[{json.dumps(key)}]')} {shell_path(path)} > {output}"
    what = f"the file contains {json_type(rows)}, not an array of rows"
    raise DataError(what, where=str(path), why=why, fix=fix)


def _has_object_a_line(path: Path) -> bool:
    """Tell whether a file begins with an object in one line, and goes on behind it."""
    with open_uncached(path) as file:
        first = file.readline(MAX_ROW_BYTES).removeprefix(codecs.BOM_UTF8)
        while first.isspace():
            first = file.readline(MAX_ROW_BYTES)
        if not first.lstrip().startswith(b"{") or not file.read(READ_BYTES).strip():
            return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def _read_arrow(path: Path) -> Table:
    # It takes a moment to load.
    from tunesmith.data.source.arrow_files import read_arrow

    return read_arrow(path)


_FILE_READERS: dict[str, Callable[[Path], Table]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".csv": read_csv,
    ".parquet": _read_arrow,
    ".arrow": _read_arrow,
    **dict.fromkeys(TEXT_SUFFIXES, lambda path: read_text_files([path])),
}
