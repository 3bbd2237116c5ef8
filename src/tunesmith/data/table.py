"""Rows of a file by their number, and what all readers of files share.

A corpus may be larger than memory: readers keep the places of its rows, and read a row from
there. No file is memory-mapped: where another program shortens it, the next access to a mapping
kills the process (SIGBUS).
"""

import hashlib
import os
import threading
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


class ReadInTurn:
    """A file that is read by several threads; the one that was read last alone is open.

    A folder may have more files than a process may open.
    """

    lock = threading.RLock()
    _latest: ClassVar["ReadInTurn | None"] = None

    def take_turn(self) -> None:
        """Close the file that was read last, where it is another one."""
        latest = ReadInTurn._latest
        if latest is not None and latest is not self:
            latest.close()
        ReadInTurn._latest = self

    def close(self) -> None:
        """Close it, if it is open; it is opened again when it is read."""
        raise NotImplementedError


class OpenFile(ReadInTurn):
    """A file that is read at any place.

    Raises DataError from `read` where the file is another than when this was made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._version = version_of(path)
        self._descriptor: int | None = None

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop`; DataError where there are fewer."""
        with self.lock:
            self.take_turn()
            if self._descriptor is None:
                self.check_unchanged()
                self._descriptor = os.open(self.path, os.O_RDONLY)
            data = os.pread(self._descriptor, stop - start, start)
        if len(data) < stop - start:
            raise changed_error(self.path)
        return data

    def check_unchanged(self) -> None:
        """DataError where the file is another than when this was made."""
        if version_of(self.path) != self._version:
            raise changed_error(self.path)

    def close(self) -> None:
        with self.lock:
            if self._descriptor is not None:
                drop_pages(self._descriptor)
                os.close(self._descriptor)
                self._descriptor = None
