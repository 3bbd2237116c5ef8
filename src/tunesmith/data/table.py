"""Rows of a file by their number, and what all readers of files share.

A corpus may be larger than memory: readers keep the places of some rows, and read the others again
from there. No file is memory-mapped: where another program shortens it, the next access to a
mapping kills the process (SIGBUS).
"""

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from tunesmith.errors import DataError
from tunesmith.host.memory import drop_pages, open_uncached
from tunesmith.host.shell import shell_path, shell_word

# A longer row is a file with its line breaks lost; tokenizing it would take minutes.
MAX_ROW_BYTES = 32 << 20
# Rows between two whose places are in memory: those between are found by reading on.
ROWS_PER_PLACE = 64
# Of all files of a folder that are open at once; a process may open some 1,000.
MAX_OPEN_FILES = 64
# In memory, for the files of a folder.
DIGESTS_KEPT = 100_000

FileVersion = tuple[int, int, int]


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
        are_documents: whether the rows are texts of files.
        skipped: what of a folder is not read, for a warning; empty for nothing.
    """

    size: int
    row: Callable[[int], Any]
    where: Callable[[int], str]
    fingerprint: Callable[[], str]
    check_unchanged: Callable[[], None] = lambda: None
    layout: str = ""
    continues: Callable[[int], bool] = lambda i: False
    are_documents: bool = False
    skipped: str = ""

    def __len__(self) -> int:
        return self.size


def version_of(path: Path) -> FileVersion | None:
    """What another program changes when it writes the file; None where it is gone."""
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
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise not_utf8_error(path, error, where(error.start), error.start + 1) from None


def not_utf8_error(path: Path, error: UnicodeDecodeError, where: str, position: int) -> DataError:
    """The error for bytes that are no UTF-8; `position` counts from 1."""
    with path.open("rb") as file:
        # Windows writes UTF-16 with a mark of two bytes.
        has_utf16_mark = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
    # Windows calls its own code page by the name of latin1, whose 0x80 to 0x9f are no signs.
    likely_encoding = "utf-16" if has_utf16_mark else "cp1252"
    output = new_name(path, f"fixed{path.suffix}")
    byte = error.object[error.start]
    return DataError(
        "the file is not UTF-8 text",
        where=where,
        why=f"byte 0x{byte:02x} at position {position}: {error.reason}",
        fix=f"iconv -f {likely_encoding} -t utf-8 {shell_path(path)} > {output}",
    )


def new_name(path: Path, name: str) -> str:
    """A name for what a command makes of a file, as a word of the command line.

    It is never the file's own name, which `>` would empty first.
    """
    if path.name == name:
        name = f"new-{name}"
    return shell_word(name)


class OpenFile:
    """A file that is read at any place, by several threads, and is open only now and then.

    Raises DataError from `read` where the file is another than when this was made.
    """

    # The descriptors of all such files that are open, the one that was read last at the end.
    _descriptors: ClassVar[OrderedDict[int, tuple["OpenFile", int]]] = OrderedDict()
    _lock = threading.Lock()

    def __init__(self, path: Path) -> None:
        self.path = path
        self._version = version_of(path)

    def read(self, start: int, size: int) -> bytes:
        """The bytes from `start` on; DataError where there are fewer than `size`."""
        with self._lock:
            descriptor = self._open()
            data = os.pread(descriptor, size, start)
        if len(data) < size:
            raise changed_error(self.path)
        return data

    def close(self) -> None:
        """Close it, if it is open; it is opened again when it is read."""
        with self._lock:
            entry = self._descriptors.pop(id(self), None)
            if entry is not None:
                _close(entry[1])

    def _open(self) -> int:
        entry = self._descriptors.get(id(self))
        if entry is not None:
            self._descriptors.move_to_end(id(self))
            return entry[1]
        if version_of(self.path) != self._version:
            raise changed_error(self.path)
        descriptor = os.open(self.path, os.O_RDONLY)
        self._descriptors[id(self)] = (self, descriptor)
        if len(self._descriptors) > MAX_OPEN_FILES:
            _, (_, oldest) = self._descriptors.popitem(last=False)
            _close(oldest)
        return descriptor


def _close(descriptor: int) -> None:
    drop_pages(descriptor)
    os.close(descriptor)
