"""Rows of files by their number, and what all readers of files share.

A corpus may be larger than memory: readers keep the places of its rows, and read a row from
there. No file is memory-mapped: where another program shortens it, the next access to a mapping
kills the process (SIGBUS).
"""

import bisect
import hashlib
import itertools
import json
import os
import re
import weakref
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import Decimal
from functools import lru_cache
from pathlib import Path

from tunesmith.errors import DataError
from tunesmith.host.memory import drop_pages, open_uncached
from tunesmith.host.shell import shell_path, shell_word

# A longer row is a file with its line breaks lost; tokenizing it would take minutes.
MAX_ROW_BYTES = 32 << 20
# Bytes at the beginning of a text from which its encoding is guessed.
HEAD_BYTES = 1 << 16
# In memory, for the files of a folder.
DIGESTS_KEPT = 100_000

FileVersion = tuple[int, int, int]
# The columns of a row, with values as a file has them.
Row = dict[str, object]


class Place(str):
    """The place of a row as errors show it.

    Attributes:
        folder: of the row's file, to which paths in the row are relative; None where there is none,
            as on the Hub.
    """

    folder: Path | None

    def __new__(cls, text: str, folder: Path | None = None) -> "Place":
        place = super().__new__(cls, text)
        place.folder = folder
        return place


@dataclass(frozen=True)
class Table:
    """Rows by their number.

    Attributes:
        row: row i as Python values, or a DataError with its place.
        where: the place of row i that an editor shows; of a file or the Hub a `Place`.
        fingerprint: sha256 of the content, in hex.
        check_unchanged: raises DataError if the file is another than when it was opened.
        layout: what was found out about the file, for the user; empty for nothing.
        continues: whether row i + 1 goes on with the document of row i: a large text is read in
            blocks.
        are_documents: whether the rows are texts of files.
        skipped: what of a folder is not read, for a warning; empty for nothing.
        notes: what was made of the lines of sessions, by its name.
        secrets: of rows of sessions, the place of each secret and what it is.
    """

    size: int
    row: Callable[[int], object]
    where: Callable[[int], str]
    fingerprint: Callable[[], str]
    check_unchanged: Callable[[], None] = lambda: None
    layout: str = ""
    continues: Callable[[int], bool] = lambda i: False
    are_documents: bool = False
    skipped: str = ""
    notes: Counter[str] = field(default_factory=Counter)
    secrets: Mapping[int, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.size


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
    """Name the type of a JSON value in plain words."""
    return _TYPE_NAMES.get(type(value), f"a {type(value).__name__}")


class Rows:
    """The rows of one source, in order.

    `rows[i]` is a dict, `rows.where(i)` its place, counted from 1.

    Args:
        tables: those that the rows are of.
        numbers: of the rows, counted over all tables; None: all.
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
        """All rows of the files and splits, before a selection."""
        return sum(len(table) for table in self._tables)

    @property
    def layout(self) -> str:
        """Describe the layout of the files, such as `separated by semicolons`."""
        layouts = dict.fromkeys(table.layout for table in self._tables if table.layout)
        notes = sum((table.notes for table in self._tables), Counter[str]())
        lines = [", ".join(layouts), *(f"{what}: {count:,}" for what, count in notes.items())]
        return "; ".join(filter(None, lines))

    @property
    def secrets(self) -> dict[int, list[str]]:
        """The places of secrets in rows of sessions, by the index of the row."""
        found = {}
        for i in range(len(self)):
            table, at = self._find(i)
            if places := table.secrets.get(at):
                found[i] = places
        return found

    @property
    def are_documents(self) -> bool:
        """Tell whether the rows are texts of files: their format is text."""
        return all(table.are_documents for table in self._tables)

    @property
    def skipped(self) -> str:
        """Say in a clause what of the folder is not read."""
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
                why="each row is an object with named columns",
                fix='write it as {"column": value, ...}, or delete it',
            )
        return row

    def where(self, i: int) -> str:
        """`file:line`, `file row N` or `id split row N`."""
        table, at = self._find(i)
        return table.where(at)

    def ends_document(self, i: int) -> bool:
        """Tell whether no other row goes on with the document of row i, selected or not."""
        table, at = self._find(i)
        return not table.continues(at)

    def continues(self, i: int) -> bool:
        """Tell whether row i + 1 goes on with the document of row i."""
        table, at = self._find(i)
        if i + 1 == len(self) or not table.continues(at):
            return False
        next_table, next_at = self._find(i + 1)
        return next_table is table and next_at == at + 1

    def take(self, indices: Sequence[int]) -> "Rows":
        """Some of the rows, by their indices."""
        numbers = array("q", map(self._numbers.__getitem__, indices))
        return Rows(self.name, self._tables, numbers)

    def check_unchanged(self) -> None:
        """DataError if a file was changed since it was opened."""
        for table in self._tables:
            table.check_unchanged()

    def digest(self) -> str:
        """sha256 (hex) of the content and of which rows are selected.

        The file's name and folder do not enter.
        """
        digest = hashlib.sha256(array("q", self._numbers))
        for table in self._tables:
            digest.update(f"{len(table)} {table.fingerprint()}".encode())
        return digest.hexdigest()


def version_of(path: Path) -> FileVersion | None:
    """Read what another program changes when it writes the file; None where it is gone."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def changed_error(path: Path) -> DataError:
    """The error for a file that is another than when it was opened."""
    why = "another program wrote, truncated or deleted it"
    fix = "start again when it is complete"
    return DataError("the file was changed while it was read", where=str(path), why=why, fix=fix)


def unreadable_error(path: Path, error: OSError) -> DataError:
    """The error for a file or folder that the system does not let us read."""
    return DataError(
        "the file cannot be read",
        where=str(path),
        why=error.strerror or str(error),
        fix=f"ls -l {shell_path(path)}",
    )


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    return _digest_of_version(path, version_of(path))


# A start asks several times, and files may have gigabytes.
@lru_cache(maxsize=DIGESTS_KEPT)
def _digest_of_version(path: Path, version: FileVersion | None) -> str:
    try:
        with open_uncached(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise changed_error(path) from error


def decode_text(path: Path, data: bytes, where: Callable[[int], str], encoding: str) -> str:
    """Bytes as text; `where` names the place of a byte."""
    check_not_wide(path, data, where(0))
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        why = f"byte 0x{data[error.start]:02x} at position {error.start + 1}: {error.reason}"
        raise _not_utf8_error(path, where(error.start), why, "cp1252") from None


def check_not_wide(path: Path, data: bytes, where: str) -> None:
    """Raise DataError if `data` begins as UTF-16 or UTF-32."""
    encoding: str = json.detect_encoding(data)
    if not encoding.startswith("utf-8"):
        # The last character may be cut.
        head = data[:HEAD_BYTES].decode(encoding, "replace")[:-1]
        if not re.search("[\x00-\x08\ufffd]", head):
            # iconv's name of utf-16-le is utf-16le.
            encoding = encoding.replace("6-", "6").replace("2-", "2")
            raise _not_utf8_error(path, where, f"it begins as {encoding} text does", encoding)


def _not_utf8_error(path: Path, where: str, why: str, encoding: str) -> DataError:
    output = new_name(path, f"fixed{path.suffix}")
    return DataError(
        "the file is not UTF-8 text",
        where=where,
        why=why,
        fix=f"iconv -f {encoding} -t utf-8 {shell_path(path)} > {output}"
        "   # or the encoding that it has, such as cp1251, gb18030, cp932 or euc-kr",
    )


def new_name(path: Path, name: str) -> str:
    """A name for what a command makes of a file, as a word of the command line.

    It is never the file's own name, which `>` would empty first.
    """
    if path.name == name:
        name = f"new-{name}"
    return shell_word(name)


class _OpenFile:
    """A file that is closed where nothing uses it; then no page of it stays in the page cache."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, _close, self.descriptor, os.getpid())


def _close(descriptor: int, process: int) -> None:
    if os.getpid() == process:
        drop_pages(descriptor)
        os.close(descriptor)


# A folder may have more files than a process may open. A process that is forked opens its own: the
# number of a file that it inherits can be another file's by then.
@lru_cache(maxsize=16)
def _open_version(path: Path, version: FileVersion | None, process: int) -> _OpenFile:
    if version_of(path) != version:
        raise changed_error(path)
    return _OpenFile(path)


def read_span(path: Path, version: FileVersion | None, start: int, stop: int) -> bytes:
    """The bytes of a file from `start` to `stop`; DataError where it has not this version now."""
    try:
        # Held while it is read: another thread may open so many files that this one is let go.
        file = _open_version(path, version, os.getpid())
        data = os.pread(file.descriptor, stop - start, start)
    except OSError as error:
        raise unreadable_error(path, error) from error
    if len(data) < stop - start:
        raise changed_error(path)
    return data
