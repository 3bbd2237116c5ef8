"""Local data files -> tables of rows: json, jsonl, csv, parquet, arrow, and texts.

JSON and CSV are read here and not through Arrow, for two reasons. Arrow gives every row the union
of all rows' keys, so the arguments of one tool call would appear, as nulls, in those of another.
And a broken row must be named by the line that a text editor shows. Rows stay on disk and are
parsed when they are read; a JSON array alone is in memory as a whole.
"""

import codecs
import itertools
import json
import os
import re
import sys
from array import array
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from tunesmith.config.paths import DATA_SUFFIXES as SUFFIXES
from tunesmith.config.paths import TEXT_SUFFIXES
from tunesmith.data.source.arrow_nulls import without_arrow_nulls
from tunesmith.data.source.conversions import conversion
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
from tunesmith.data.source.text_files import read_text_file
from tunesmith.errors import DataError
from tunesmith.host.files import near_file
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
            fix=conversion(path)
            or "unpack or convert it to JSON lines, one object per line, and use that file",
        )
    if path.stat().st_size == 0:
        fix = "add rows to it, or use another file"
        raise DataError("the file is empty", where=str(path), fix=fix)


def check_is_file(path: Path) -> None:
    """DataError where there is no regular file."""
    if not path.is_file():
        raise _missing_file(path)


def _missing_file(path: Path) -> DataError:
    """The error for a path at which there is no regular file."""
    if path.is_symlink() and not path.exists():
        return DataError(
            f"the link points to {os.readlink(path)}, which does not exist",
            where=str(path),
            fix=f"ls -l {shell_path(path)}   # use the file itself, or fix the link",
        )
    if path.exists():
        what = "the source is not a regular file"
        return DataError(
            what, where=str(path), fix="copy its rows into a regular file and use that"
        )
    why = "" if path.parent.is_dir() else f"there is no folder {path.parent}"
    near = near_file(path, SUFFIXES)
    fix = "fix the path" if near is None else f"did you mean {near}?"
    return DataError("there is no such file", where=str(path), why=why, fix=fix)


class _RepeatedKeyError(ValueError):
    """An object of JSON with a key twice: one of the two values would be lost."""


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object of JSON, whose keys must differ."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise _RepeatedKeyError(f"an object has {json.dumps(repeated, ensure_ascii=False)} twice")
    return values


# Calls of json.loads with this argument would make one anew each time.
_DECODER = json.JSONDecoder(object_pairs_hook=_without_repeats)


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
    count = len(lines.numbers)
    if not count:
        fix = "add rows to it"
        raise DataError("the file has only blank lines", where=str(path), fix=fix)

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
        data, line_break, _ = read_span(path, version, start, stop).partition(b"\n")
        text = decode_text(path, data, lambda _: where(i), "utf-8")
        try:
            return _DECODER.decode(text)
        except json.JSONDecodeError as error:
            why = f"{error.msg}: column {error.colno}"
        except _RepeatedKeyError as error:
            raise _repeated_key(error, where(i)) from None
        except ValueError:
            raise _long_number(where(i)) from None
        except RecursionError:
            why = "nested too deep"
        if i == 0:
            # The first object may span several lines.
            stop = min(start + READ_BYTES, lines.starts[-1])
            text = read_span(path, version, start, stop).decode(errors="replace")
        is_cut = i == count - 1 and not line_break
        raise _broken_line(path, lines.numbers[i], text, why, is_cut=is_cut)

    return Table(count, row, where, fingerprint=lambda: file_digest(path))


def _broken_line(path: Path, number: int, text: str, why: str, *, is_cut: bool) -> DataError:
    """Return the error for a line that is not JSON.

    Args:
        text: the line; for the first one, the beginning of the file.
        is_cut: whether the file ends in this line, without a line break.
    """
    fix = f"sed -n {number}p {shell_path(path)}   # fix or delete this line: one JSON object a line"
    command = _conversion_of_values(path, text)
    if command:
        fix = command
    elif is_cut:
        why += "; the file ends here without a line break, so it may be cut off"
        fix = "download or write the file again, or delete its last line"
    elif "\n" in text and text.lstrip().startswith("["):
        why += "; the file looks like one JSON array"
        fix = f"mv {shell_path(path)} {shell_path(path.with_suffix('.json'))}   # and name that"
    return DataError("the line is not JSON", where=f"{path}:{number}", why=why, fix=fix)


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
    try:
        rows = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        # ValueError itself stands for a number of too many digits.
        raise _broken_json(path, text, error) from None
    if isinstance(rows, list) and rows:
        return Table(
            len(rows),
            rows.__getitem__,
            where=lambda i: f"{path} row {i + 1}",
            fingerprint=lambda: file_digest(path),
        )
    what = f"the file contains {json_type(rows)}, not an array of rows"
    why = ""
    fix = 'write an array of objects: [{"messages": ...}, ...]'
    if isinstance(rows, list):
        what = "the file has no rows"
    elif isinstance(rows, dict):
        what = "the file contains one object, not an array of rows"
        why = f"its keys are {', '.join(list(rows)[:8]) or 'none'}"
        fix = "put the rows in [ ]"
        lists = [key for key, value in rows.items() if isinstance(_first(value), dict)]
        output = new_name(path, "rows.json")
        program = _program_of_rows(rows)
        if lists:
            fix = f"jq {_jq_key(lists[0])} {shell_path(path)} > {output}"
        elif program:
            fix = f"jq {shell_word(program)} {shell_path(path)} > {output}"
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


def _first(value: object) -> object:
    """The first of a list; None for what is none, or empty."""
    return value[0] if isinstance(value, list) and value else None


def _program_of_rows(value: dict[str, object]) -> str:
    """The program of jq that makes rows of an object of columns, or of one that has rows by their
    ids; empty for another.

    A column is a list, or an object with the numbers of the rows, as pandas writes it.
    """
    parts = list(value.values())
    objects = [part for part in parts if isinstance(part, dict)]
    if len(objects) == len(parts) and not all(map(str.isdigit, itertools.chain(*objects))):
        return "[.[]]"
    columns = [part for part in parts if isinstance(part, list | dict)]
    is_even = len(columns) == len(parts) and len(set(map(len, columns))) == 1
    if not is_even or not columns[0] or any(isinstance(_first(part), list) for part in parts):
        return ""
    return "[(.[keys_unsorted[0]] | keys_unsorted[]) as $row | map_values(.[$row])]"


def _jq_key(key: str) -> str:
    """The program of jq that takes a key, as a word of a command line."""
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
        return f"'.{key}'"
    return shell_word(f".[{json.dumps(key)}]")


def _broken_json(path: Path, text: str, error: Exception) -> DataError:
    if isinstance(error, RecursionError):
        fix = "write an array of flat objects"
        return DataError("the file is nested too deep", where=str(path), fix=fix)
    if isinstance(error, _RepeatedKeyError):
        return _repeated_key(error, str(path))
    if not isinstance(error, json.JSONDecodeError):
        return _long_number(str(path))
    place = f"line {error.lineno} column {error.colno}"
    what = "the file is not JSON"
    fix = f"fix it at {place}"
    command = _conversion_of_values(path, text)
    if command:
        what = "the file has JSON values one after another, not an array of rows"
        return DataError(what, where=f"{path}:{error.lineno}", why=place, fix=command)
    is_at_end = error.pos >= len(text.rstrip()) - 1
    # The fault at the end of the text: the file was cut.
    if is_at_end or error.msg.startswith("Unterminated string"):
        what = "the file ends in the middle of its JSON"
        fix = "download or write the file again"
    return DataError(what, where=f"{path}:{error.lineno}", why=f"{error.msg}, {place}", fix=fix)


def _conversion_of_values(path: Path, text: str) -> str:
    """Return the command that converts a file of JSON values one after another to rows.

    Return an empty text if `text`, the beginning of the file or a line, does not begin as one.
    """
    text = text.lstrip()
    try:
        rest = text[_DECODER.raw_decode(text)[1] :].lstrip()
    except (ValueError, RecursionError):
        return ""
    marks = text[0] + (rest or text)[0]
    if marks == "{,":
        program = "1s/^/[/; $s/,*[[:space:]]*$/]/"
        return f"sed '{program}' {shell_path(path)} > {new_name(path, 'rows.json')}"
    command = {"{{": "jq -c .", "[[": "jq -c '.[]'"}.get(marks)
    output = new_name(path, "rows.jsonl")
    return f"{command} {shell_path(path)} > {output}" if command else ""


def _repeated_key(error: _RepeatedKeyError, where: str) -> DataError:
    """The error for JSON with a key twice in an object."""
    fix = "delete one of them, or give it another name"
    return DataError(str(error), where=where, why="only one would be read", fix=fix)


def _long_number(where: str) -> DataError:
    """The error for JSON with a whole number that Python does not read.

    int() of a text takes a time of its square.
    """
    what = f"a whole number of more than {sys.get_int_max_str_digits():,} digits"
    return DataError(what, where=where, fix='write it as a string, "123...", or delete it')


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
    **dict.fromkeys(TEXT_SUFFIXES, read_text_file),
}
