"""Text files -> a table of documents, one a file.

A large file is read in blocks, each a row that goes on in the next one (`Table.continues`). They
are cut where a paragraph, a line or at least a word ends, so that hardly a token is another one.
"""

import bisect
import codecs
import hashlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

from tunesmith.data.source.table import (
    FileVersion,
    Table,
    changed_error,
    decode_text,
    file_digest,
    unreadable_error,
    version_of,
)
from tunesmith.errors import DataError
from tunesmith.host.files import from_here
from tunesmith.host.memory import drop_pages, open_uncached
from tunesmith.host.shell import shell_path
from tunesmith.units import count_of

# A larger file is read in blocks. Few books are: the King James Bible has 4 MiB.
DOCUMENT_BYTES = 8 << 20
# A larger block takes more memory while it is tokenized, some 50 bytes a character.
BLOCK_BYTES = 1 << 20
# A smaller file may have nothing but blanks: it is looked at.
BLANK_BYTES = 4096
# Names in a line for the user.
NAMES_SHOWN = 3


def read_text_file(path: Path) -> Table:
    """One text file; DataError if it has no text."""
    table = read_text_files([path])
    if not len(table):
        fix = "add text to it, or use another file"
        raise DataError("the file has only blank lines", where=str(path), fix=fix)
    return table


def read_text_files(paths: Sequence[Path]) -> Table:
    """The documents of some files, in this order; those without text are `skipped`."""
    documents = _Documents()
    blank: list[Path] = []
    for path in paths:
        size = path.stat().st_size
        if size <= BLANK_BYTES and _is_blank(path):
            blank.append(path)
        else:
            documents.add(path, size)
    skipped = ""
    if blank:
        names = ", ".join(from_here(path) for path in blank[:NAMES_SHOWN])
        skipped = f"{count_of(len(blank), 'file')} without text: {names}"
    return Table(
        len(documents),
        documents.row,
        documents.where,
        documents.fingerprint,
        documents.check_unchanged,
        layout=documents.layout(),
        continues=documents.continues,
        are_documents=True,
        skipped=skipped,
    )


class _Documents:
    """Rows that are files or blocks of files; of each its first byte and line are in memory."""

    def __init__(self) -> None:
        self._files: list[Path] = []
        self._versions: list[FileVersion | None] = []
        # Of each file, its size and its first row.
        self._sizes = array("q")
        self._first_rows = array("q")
        self._starts = array("q")
        self._lines = array("q")

    def __len__(self) -> int:
        return len(self._starts)

    def add(self, path: Path, size: int) -> None:
        """Add a file of `size` bytes."""
        self._files.append(path)
        self._versions.append(version_of(path))
        self._sizes.append(size)
        self._first_rows.append(len(self))
        for start, line in _find_blocks(path, size):
            self._starts.append(start)
            self._lines.append(line)

    def _file_of(self, i: int) -> int:
        return bisect.bisect_right(self._first_rows, i) - 1

    def continues(self, i: int) -> bool:
        return i + 1 < len(self) and self._starts[i + 1] > 0

    def row(self, i: int) -> dict[str, str]:
        n = self._file_of(i)
        path = self._files[n]
        start = self._starts[i]
        stop = self._starts[i + 1] if self.continues(i) else self._sizes[n]
        try:
            with open_uncached(path) as file:
                file.seek(start)
                data = file.read(stop - start)
        except OSError as error:
            raise unreadable_error(path, error) from error
        if len(data) < stop - start:
            raise changed_error(path)
        return {"text": _decode(path, data, self.where(i), start, self._lines[i])}

    def where(self, i: int) -> str:
        path = self._files[self._file_of(i)]
        return f"{path}:{self._lines[i]}" if self._starts[i] else str(path)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path in self._files:
            digest.update(file_digest(path).encode())
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        for path, version in zip(self._files, self._versions, strict=True):
            if version_of(path) != version:
                raise changed_error(path)

    def layout(self) -> str:
        """Name the files that are read in blocks."""
        names = []
        for path, size in zip(self._files, self._sizes, strict=True):
            if size > DOCUMENT_BYTES:
                names.append(path.name)
        if not names:
            return ""
        shown = ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
        size = BLOCK_BYTES >> 20
        return f"read in blocks of {size} MiB that end with a paragraph or a line: {shown}"


def _is_blank(path: Path) -> bool:
    with open_uncached(path) as file:
        return not file.read(BLANK_BYTES).removeprefix(codecs.BOM_UTF8).strip()


def _find_blocks(path: Path, size: int) -> Iterator[tuple[int, int]]:
    """The first byte and the line of each block of a file; of a small file one block."""
    yield 0, 1
    if size <= DOCUMENT_BYTES:
        return
    start = 0
    line = 1
    with open_uncached(path) as file:
        while size - start > BLOCK_BYTES:
            file.seek(start)
            block = file.read(BLOCK_BYTES)
            length = _length_of_block(block)
            start += length
            line += block.count(b"\n", 0, length)
            drop_pages(file.fileno(), 0, start)
            yield start, line


def _length_of_block(block: bytes) -> int:
    """Bytes of a block up to where a paragraph, a line, a word or a character ends."""
    least = len(block) // 2
    paragraph = max(block.rfind(b"\n\n") + 2, block.rfind(b"\n\r\n") + 3)
    # A tokenizer joins a space to the word behind it.
    for length in (paragraph, block.rfind(b"\n") + 1, block.rfind(b" ")):
        if length > least:
            return length
    # The first byte of the last character: the others of a character begin with the bits 10.
    length = len(block) - 1
    while length > 1 and block[length] & 0xC0 == 0x80:
        length -= 1
    return length


def _decode(path: Path, data: bytes, place: str, start: int, first_line: int) -> str:
    """The text of a block that begins at `start`, its lines ended as Python reads them.

    `place` is that of the row: a row that is no text can be left out.
    """

    def where(at: int) -> str:
        line_breaks = data.count(b"\n", 0, at)
        return f"{place}, line {first_line + line_breaks}"

    if b"\0" in data and not data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(
            "the file has bytes that are no text",
            where=where(data.index(b"\0")),
            why="a null character is in it, as in the files of other programs",
            fix=f"file {shell_path(path)}   # shows what it is; convert it to text",
        )
    encoding = "utf-8" if start else "utf-8-sig"
    text = decode_text(path, data, where, encoding)
    return text.replace("\r\n", "\n").replace("\r", "\n")
