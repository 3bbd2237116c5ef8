"""Readers of local data files: json, jsonl, csv, parquet, arrow and text files.

JSON and CSV files are not read with Arrow, for two reasons. First, Arrow gives every row the keys
of all rows, so a tool call would get the arguments of other calls with the value null. Second, an
error must name the line of a broken row. Rows remain on disk and are parsed when they are read.
Only a JSON array is entirely in memory.
"""

import codecs
import json
import os
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

from tunesmith.config.paths import DATA_SUFFIXES as SUFFIXES
from tunesmith.config.paths import TEXT_SUFFIXES
from tunesmith.errors import DataError
from tunesmith.host.files import existing_folder, find_similar_path
from tunesmith.host.memory import available_memory, open_uncached
from tunesmith.host.shell import shell_path, shell_word
from tunesmith.rows.columns import role_key_of
from tunesmith.rows.source.arrow_nulls import without_arrow_nulls
from tunesmith.rows.source.csv_files import read_csv
from tunesmith.rows.source.message_rows import find_conversation_column
from tunesmith.rows.source.sessions import read_sessions, session_form
from tunesmith.rows.source.table import (
    MAX_CACHED_DIGESTS,
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
    skip_bom,
    unreadable_error,
    version_of,
)
from tunesmith.rows.source.text_files import read_text_files

# Suffixes of JSON files. `without_arrow_nulls` searches for null keys in these files only.
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
# Estimated memory of a decoded JSON array, as a multiple of the file's size.
JSON_MEMORY_FACTOR = 8
# Maximum number of bytes that one call of `readline` reads.
READ_BYTES = 1 << 20


def open_table(path: Path) -> Table:
    """Open a local data file as a table.

    Raise DataError if the file is missing, empty or broken, or if its type is not supported.
    """
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


# Cache the table, because the start of a run opens a file several times, and all lines must be read
# to find the conversations.
@lru_cache(maxsize=MAX_CACHED_DIGESTS)
def _read_sessions(path: Path, version: FileVersion | None, form: str) -> Table:
    return read_sessions(_read_json_lines(path), form)


def check_data_file(path: Path) -> None:
    """Raise DataError if the name or the size of a data file shows that it cannot be read."""
    check_is_file(path)
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"{path.name} is not a supported data file",
            where=path,
            why=f"the supported types are {', '.join(SUFFIXES)}",
            fix="unpack the file, or convert it to JSON lines (one object per line); convert a"
            " document to text, for example with pandoc or pdftotext",
        )
    if path.stat().st_size == 0:
        raise DataError("the file is empty", where=path, fix="add rows to it, or use another file")


def check_is_file(path: Path) -> None:
    """Raise DataError if the path is not a regular file."""
    if path.is_file():
        return
    what = "there is no such file"
    why = "" if path.parent.is_dir() else f"there is no folder {path.parent}"
    folder = existing_folder(path.absolute())
    fix = f"list the files with `ls {shell_path(folder)}`, and use the path of one with rows"
    if path.exists():
        what = "the source is not a regular file"
        fix = "copy its rows into a regular file, and use this file"
    elif path.is_symlink():
        why = f"the path is a link to {os.readlink(path)}, which does not exist"
        fix = f"link to the file with the rows: ln -sf FILE {shell_path(path)}"
    else:
        near = find_similar_path(path)
        # A recipe's paths are relative to the recipe, but the file can be in the working directory.
        for same_name in (folder / path.name, Path(path.name)):
            if near is None and same_name.is_file():
                near = same_name.absolute()
        if near is not None:
            fix = f"did you mean {near}?"
    raise DataError(what, where=path, why=why, fix=fix)


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return a JSON object as a dict. Raise ValueError if a key is repeated."""
    values = dict(pairs)
    if len(values) < len(pairs):
        [(repeated, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f'an object has the key "{repeated}" twice')
    return values


# Create the decoder once, because json.loads with `object_pairs_hook` creates a new decoder in each
# call.
_DECODER = json.JSONDecoder(object_pairs_hook=_without_repeats)


def _decode_json(path: Path, line: int, text: str, *, is_line: bool) -> object:
    """Decode JSON text from a file. Raise DataError with the file and the line of the mistake.

    Args:
        line: number of the line at which the text starts.
        is_line: whether the text is a line of a file with one JSON object per line.
    """
    is_several = is_line and (text.startswith("[") or text.rstrip().endswith("{"))
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        why = f"{error.msg} in column {error.colno}"
        is_several = is_several or (error.msg == "Extra data" and text[error.pos] in "[{")
    except RecursionError:
        why = "the JSON value is nested too deeply"
    except ValueError as error:
        # json raises this ValueError for a repeated key (`_without_repeats`), or for an integer
        # with too many digits.
        why = str(error).partition(";")[0]
    what = "the text is not JSON"
    fix = f"sed -n {line}p {shell_path(path)}   # fix this line, or write the file again"
    if is_several:
        what = "the file is neither one JSON array nor one JSON object per line"
        output = new_name(path, "rows.jsonl")
        fix = f"jq -c 'if type == \"array\" then .[] else . end' {shell_path(path)} > {output}"
    raise DataError(what, where=f"{path}:{line}", why=why, fix=fix)


def _find_lines(path: Path) -> tuple["array[int]", "array[int]"]:
    """Return the byte positions and the line numbers of all lines that are not blank.

    After the positions of the lines, the first array contains the end of the file.
    """
    starts = array("q")
    numbers = array("q")
    number = 1
    is_counted = False
    with open_uncached(path) as file:
        start = skip_bom(file)
        position = start
        # Read long lines in parts, because a file without line breaks can be a single line of
        # gigabytes.
        while part := file.readline(READ_BYTES):
            if not is_counted and part.strip():
                is_counted = True
                starts.append(start)
                numbers.append(number)
            position += len(part)
            if part.endswith(b"\n"):
                start = position
                number += 1
                is_counted = False
    starts.append(position)
    return starts, numbers


def _read_json_lines(path: Path) -> Table:
    """Open a file with one JSON object per line. Blank lines are skipped."""
    version = version_of(path)
    starts, numbers = _find_lines(path)

    def where(i: int) -> str:
        return f"{path}:{numbers[i]}"

    def row(i: int) -> object:
        start, stop = starts[i : i + 2]
        size = stop - start
        if size > MAX_ROW_BYTES:
            raise DataError(
                f"the row has {size / 2**20:.0f} MiB",
                where=where(i),
                why=f"a row can have at most {MAX_ROW_BYTES >> 20} MiB; perhaps the line breaks"
                " between the rows are missing",
                fix="write one row per line, or split the text into several rows",
            )
        # Remove the blank lines that can follow the row in this span.
        data = read_span(path, version, start, stop).partition(b"\n")[0]
        text = decode_text(path, data, lambda _: where(i), "utf-8")
        return _decode_json(path, numbers[i], text, is_line=True)

    return Table(len(numbers), row, where, partial(file_digest, path))


def _read_json(path: Path) -> Table:
    """Open a .json file that contains a JSON array of objects, or one JSON object per line."""
    if _has_object_per_line(path):
        return _read_json_lines(path)
    size = path.stat().st_size
    if size * JSON_MEMORY_FACTOR > available_memory():
        output = new_name(path, f"{path.stem}.jsonl")
        raise DataError(
            f"the file of {size / 2**30:.1f} GiB does not fit in memory",
            where=path,
            why="the entire JSON array must be in memory, but JSON lines are read one by one",
            fix=f"jq -cn --stream 'fromstream(1|truncate_stream(inputs))' {shell_path(path)}"
            f" > {output}",
        )
    with open_uncached(path) as file:
        data = file.read()

    def where(at: int) -> str:
        line_breaks = data.count(b"\n", 0, at)
        return f"{path}:{line_breaks + 1}"

    rows = _decode_json(path, 1, decode_text(path, data, where, "utf-8-sig"), is_line=False)
    if isinstance(rows, dict) and any(map(_is_chat, rows.values())):
        rows = [rows]  # The file has one conversation.
    if isinstance(rows, list):
        return Table(
            len(rows),
            rows.__getitem__,
            lambda i: f"{path} row {i + 1}",
            partial(file_digest, path),
            is_array=True,
        )
    why = ""
    fix = "write an array of objects, as df.to_json('rows.json', orient='records') of pandas does"
    if isinstance(rows, dict):
        why = f"the keys of the object are {', '.join(list(rows)[:8]) or 'none'}"
        for key, value in rows.items():
            if isinstance(value, list) and value and isinstance(value[0], dict):
                output = new_name(path, "rows.json")
                fix = f"jq {shell_word(f'.[{json.dumps(key)}]')} {shell_path(path)} > {output}"
    raise DataError(
        f"the file contains {json_type(rows)}, not an array of rows",
        where=path,
        why=why,
        fix=fix,
    )


def _is_chat(value: object) -> bool:
    """Return whether a value is the list of messages of one conversation."""
    if not isinstance(value, list) or not role_key_of(value):
        return False
    return not find_conversation_column(value[0])


def _has_object_per_line(path: Path) -> bool:
    """Return whether the first line is a complete JSON object, and more text follows."""
    with open_uncached(path) as file:
        first = file.readline(MAX_ROW_BYTES).removeprefix(codecs.BOM_UTF8)
        while first.isspace():
            first = file.readline(MAX_ROW_BYTES)
        if not first.lstrip().startswith(b"{"):
            return False
        if not file.read(READ_BYTES).strip():
            return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def _read_arrow(path: Path) -> Table:
    # Import pyarrow only when it is needed, because the import is slow.
    from tunesmith.rows.source.arrow_files import read_arrow

    return read_arrow(path)


# Suffix of a file -> the function that opens the file as a table.
_FILE_READERS: dict[str, Callable[[Path], Table]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".csv": read_csv,
    ".parquet": _read_arrow,
    ".arrow": _read_arrow,
    **dict.fromkeys(TEXT_SUFFIXES, lambda path: read_text_files([path])),
}
