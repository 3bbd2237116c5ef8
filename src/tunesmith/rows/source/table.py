"""Tables, which give access to the rows of files by their number, and helper functions for all file
readers.

Data can be larger than memory. Therefore readers keep only the positions of the rows in memory, and
read a row from disk when it is needed. Files are not memory-mapped: if another program truncates a
mapped file, the next access kills the process (SIGBUS).
"""

import bisect
import codecs
import hashlib
import itertools
import json
import os
import re
import weakref
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from tunesmith.errors import DataError
from tunesmith.host.memory import drop_pages, open_uncached
from tunesmith.host.shell import shell_path, shell_word

# Maximum size of a row. A larger row would take minutes to tokenize, and the cause is probably that
# the line breaks in the file are missing.
MAX_ROW_BYTES = 32 << 20
# Number of bytes at the start of a text that are used to detect the encoding.
HEAD_BYTES = 1 << 16
# Maximum number of files whose digests are cached in memory.
MAX_CACHED_DIGESTS = 100_000

# Inode, size and modification time of a file, see `version_of`.
FileVersion = tuple[int, int, int]
# A row: column names and values, as they are in the file.
Row = dict[str, object]


class Place(str):
    """Location of a row as it is shown in error messages, such as "rows.jsonl:3".

    Attributes:
        folder: the folder of the row's file. Paths in the row are relative to this folder. None for
            rows of the Hub.
    """

    folder: Path | None

    def __new__(cls, text: str, folder: Path | None = None) -> "Place":
        place = super().__new__(cls, text)
        place.folder = folder
        return place


@dataclass(frozen=True)
class Table:
    """Access to the rows of a file or a data set by their number.

    Attributes:
        size: number of rows.
        row: returns row i as Python values. Raises DataError with the location of the row if it is
            broken.
        where: returns the location of row i, such as file and line. The location is a `Place` for
            files and Hub data sets.
        fingerprint: returns the SHA-256 (hex) of the content.
        check_unchanged: raises DataError if the file has changed since it was opened.
        layout: text for the user about the detected form of the file, or "".
        continues: returns whether row i + 1 continues the document of row i. Large text files are
            read in blocks, and each block is a row.
        are_documents: whether the rows are blocks of text files.
        is_array: whether the rows are a JSON array, which can be the messages of one conversation.
        skipped: text for a warning that lists what was not read in a folder, or "".
        notes: for agent sessions, the number of omitted and changed lines by kind.
        secrets: for agent sessions, row number -> location and kind of each secret in the row.
        histories: for agent sessions, the hashes of the conversation up to each message of a row.
    """

    size: int
    row: Callable[[int], object]
    where: Callable[[int], str]
    fingerprint: Callable[[], str]
    check_unchanged: Callable[[], None] = lambda: None
    layout: str = ""
    continues: Callable[[int], bool] = lambda i: False
    are_documents: bool = False
    is_array: bool = False
    skipped: str = ""
    notes: Counter[str] = field(default_factory=Counter)
    secrets: Mapping[int, list[str]] = field(default_factory=dict)
    histories: Sequence[Sequence[int]] = ()

    def __len__(self) -> int:
        return self.size


# Python type of a value -> the name of its type in error messages.
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


def json_type(value: object) -> str:
    """Return the type of a JSON value in plain words, for error messages."""
    return _TYPE_NAMES.get(type(value), f"a {type(value).__name__}")


class Rows:
    """The selected rows of one data source, in order.

    `rows[i]` is a dict, and `rows.where(i)` is the location of this row, such as file and line.

    Args:
        name: the name of the source.
        tables: the tables of the source.
        numbers: numbers of the selected rows, counted over all tables. None selects all rows.
    """

    def __init__(
        self, name: str, tables: Sequence[Table], numbers: Sequence[int] | None = None
    ) -> None:
        self.name = name
        self._tables = tables
        self._ends = list(itertools.accumulate(map(len, tables)))
        self._numbers = range(self.available) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def available(self) -> int:
        """Number of all rows of the tables, including rows that are not selected."""
        return sum(map(len, self._tables))

    @property
    def layout(self) -> str:
        """Text about the detected form of the files, such as "values separated by semicolons"."""
        layouts = dict.fromkeys(table.layout for table in self._tables if table.layout)
        notes = sum((table.notes for table in self._tables), Counter[str]())
        noted = [f"{what}: {count:,}" for what, count in notes.items()]
        return "; ".join(filter(None, [", ".join(layouts), *noted]))

    @property
    def secrets(self) -> dict[int, list[str]]:
        """Index of a row -> locations and kinds of the secrets that this row of an agent session
        contains.
        """
        found = {}
        for i in range(len(self)):
            table, at = self._find(i)
            if places := table.secrets.get(at):
                found[i] = places
        return found

    @property
    def are_documents(self) -> bool:
        """Return whether all rows are text files or blocks of text files."""
        return all(table.are_documents for table in self._tables)

    @property
    def skipped(self) -> str:
        """Text for a warning that lists what was not read in the folder, or ""."""
        return ", ".join(dict.fromkeys(table.skipped for table in self._tables if table.skipped))

    def _find(self, i: int) -> tuple[Table, int]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        number = self._numbers[i]
        p = bisect.bisect_right(self._ends, number)
        table = self._tables[p]
        return table, number - (self._ends[p] - len(table))

    def __getitem__(self, i: int) -> Row:
        table, at = self._find(i)
        row = table.row(at)
        if not isinstance(row, dict):
            raise DataError(
                f"the row is {json_type(row)}, not an object",
                where=table.where(at),
                fix='write the row as {"column": value, ...}, or delete the row',
            )
        return row

    def where(self, i: int) -> str:
        """Return the location of row i: `file:line`, `file row N` or `id split row N`."""
        table, at = self._find(i)
        return table.where(at)

    def ends_document(self, i: int) -> bool:
        """Return whether row i is the last block of its document.

        If the next block of the document exists but is not selected, the result is False.
        """
        table, at = self._find(i)
        return not table.continues(at)

    def continues(self, i: int) -> bool:
        """Return whether row i + 1 continues the document of row i."""
        if i + 1 == len(self) or self.ends_document(i):
            return False
        table, at = self._find(i)
        next_table, next_at = self._find(i + 1)
        return next_table is table and next_at == at + 1

    def take(self, indices: Sequence[int]) -> "Rows":
        """Return only the rows with the given indices."""
        return Rows(self.name, self._tables, array("q", map(self._numbers.__getitem__, indices)))

    def check_unchanged(self) -> None:
        """Raise DataError if a file has changed since it was opened."""
        for table in self._tables:
            table.check_unchanged()

    def digest(self) -> str:
        """Return the SHA-256 (hex) of the content and of the selected row numbers.

        The digest does not depend on the file's name and folder.
        """
        digest = hashlib.sha256(array("q", self._numbers))
        for table in self._tables:
            digest.update(f"{len(table)} {table.fingerprint()}".encode())
        return digest.hexdigest()


def version_of(path: Path) -> FileVersion | None:
    """Return inode, size and modification time of a file, or None if it does not exist.

    At least one of these values changes when another program writes the file.
    """
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def changed_error(path: Path) -> DataError:
    """Build the error for a file that has changed since it was opened."""
    return DataError(
        "the file was changed while it was read",
        where=path,
        why="another program wrote, truncated or deleted it",
        fix="start again when the file is complete",
    )


def unreadable_error(path: Path, error: OSError) -> DataError:
    """Build the error for a file or folder that the operating system cannot read."""
    return DataError(
        "the file cannot be read",
        where=path,
        why=error.strerror or str(error),
        fix=f"check its permissions: ls -l {shell_path(path)}",
    )


def file_digest(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's bytes."""
    return _digest_of_version(path, version_of(path))


# Cache the digests, because the start of a run needs each digest several times, and files can have
# gigabytes.
@lru_cache(maxsize=MAX_CACHED_DIGESTS)
def _digest_of_version(path: Path, version: FileVersion | None) -> str:
    try:
        with open_uncached(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise changed_error(path) from error


def skip_bom(file: BinaryIO) -> int:
    """Skip the UTF-8 byte order mark at the start of a file, and return the new position."""
    bom = codecs.BOM_UTF8
    position = len(bom) if file.read(len(bom)) == bom else 0
    return file.seek(position)


def repeated_in(names: Sequence[str]) -> list[str]:
    """Return the names that occur more than once, sorted."""
    counts = Counter(names)
    return sorted(name for name in counts if counts[name] > 1)


def decode_text(path: Path, data: bytes, where: Callable[[int], str], encoding: str) -> str:
    """Decode bytes of a file. Raise DataError if they are not valid in this encoding.

    Args:
        where: function that takes a byte position and returns the location for the error message.
    """
    # Check first for text in UTF-16 or UTF-32.
    wide: str = json.detect_encoding(data)
    if not wide.startswith("utf-8"):
        # Convert Python's name of the encoding to iconv's name: utf-16-le becomes utf-16le.
        wide = wide.replace("6-", "6").replace("2-", "2")
        raise _not_utf8_error(path, where(0), f"the file looks like {wide} text", wide)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        at = error.start
        raise _not_utf8_error(
            path,
            where(at),
            f"byte 0x{data[at]:02x} at position {at + 1}: {error.reason}",
            _guess_encoding(data[:HEAD_BYTES]),
        ) from None


# Encoding -> the letters that most texts in this encoding consist of. Korean text is also valid
# GB 18030, so it comes first.
_ENCODING_LETTERS = {
    "cp932": "[ぁ-ヿ一-鿿]",
    "euc-kr": "[가-힣]",
    "gb18030": "[一-鿿]",
    "koi8-r": "[а-я]",
    "cp1251": "[а-я]",
}


def _guess_encoding(data: bytes) -> str:
    """Return the encoding of a text that is not UTF-8, by its letters."""
    shares = {"cp1252": 0.5}
    # Only single letters of a text in a Western language are not ASCII.
    for encoding, letters in (
        _ENCODING_LETTERS.items() if re.search(b"[\x80-\xff]{3}", data) else ()
    ):
        with suppress(UnicodeDecodeError):
            # An incremental decoder ignores an incomplete letter at the end.
            text = codecs.getincrementaldecoder(encoding)().decode(data)
            found = re.findall(r"[^\W\x00-\x7f]", text)
            shares[encoding] = len(re.findall(letters, text)) / max(1, len(found))
    return max(shares, key=shares.__getitem__)


def _not_utf8_error(path: Path, where: str, why: str, encoding: str) -> DataError:
    output = new_name(path, f"fixed{path.suffix}")
    return DataError(
        "the file is not UTF-8 text",
        where=where,
        why=why,
        fix=f"iconv -f {encoding} -t utf-8 {shell_path(path)} > {output}"
        "   # or use another encoding, such as cp1251, gb18030, cp932 or euc-kr",
    )


def new_name(path: Path, name: str) -> str:
    """Return `name`, quoted for the shell, as the output file of a command that reads `path`.

    If the input file has the same name, the result is `new-{name}`, because the shell's `>` would
    otherwise empty the input file before the command reads it.
    """
    if path.name == name:
        name = f"new-{name}"
    return shell_word(name)


class _OpenFile:
    """An open file that is closed automatically when it is no longer used.

    When it is closed, its pages are removed from the page cache.
    """

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, _close, self.descriptor, os.getpid())


def _close(descriptor: int, process: int) -> None:
    if os.getpid() == process:
        drop_pages(descriptor)
        os.close(descriptor)


# Cache a limited number of open files, because a folder can have more files than a process can
# open. The process id is part of the key, because a forked process must not use its parent's file
# descriptors.
@lru_cache(maxsize=16)
def _open_version(path: Path, version: FileVersion | None, process: int) -> _OpenFile:
    if version_of(path) != version:
        raise changed_error(path)
    return _OpenFile(path)


def read_span(path: Path, version: FileVersion | None, start: int, stop: int) -> bytes:
    """Return the bytes `start` to `stop` of a file.

    Raise DataError if the file has changed, and `version` is no longer its version.
    """
    try:
        # Keep a reference to the file. Otherwise the cache could drop and close the file during the
        # read, if another thread opens many files.
        file = _open_version(path, version, os.getpid())
        data = os.pread(file.descriptor, stop - start, start)
    except OSError as error:
        raise unreadable_error(path, error) from error
    if len(data) < stop - start:
        raise changed_error(path)
    return data
