"""Reader of text files, in which each file is one document.

A large file is read in blocks. Each block is a row, and the next row continues the document
(`Table.continues`). A block ends after a paragraph, a line or a word. Therefore the tokens are
nearly the same as if the file were read as one row.
"""

import codecs
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tunesmith.errors import DataError
from tunesmith.host.memory import drop_pages, open_uncached
from tunesmith.host.shell import shell_path
from tunesmith.rows.source.table import (
    FileVersion,
    Table,
    changed_error,
    decode_text,
    file_digest,
    read_span,
    version_of,
)
from tunesmith.units import count_of

# Maximum size of a file that is read as one row. Nearly all books are smaller: for example, the
# King James Bible has 4 MiB.
DOCUMENT_BYTES = 8 << 20
# Maximum size of a block. The limit saves memory, because tokenization needs about 50 bytes per
# character.
BLOCK_BYTES = 1 << 20
# Maximum size of a file that is checked for being blank. Larger files practically always contain
# text.
BLANK_BYTES = 4096


def read_text_files(paths: Sequence[Path]) -> Table:
    """Return a table with the documents of the files, in this order. Skip files without text."""
    blocks: list[_Block] = []
    blank = 0
    for path in paths:
        size = path.stat().st_size
        if size <= BLANK_BYTES and _is_blank(path):
            blank += 1
        else:
            blocks += _find_blocks(path, size)
    cut = len({block.path for block in blocks if block.start})
    kind = f"blocks of {BLOCK_BYTES >> 20} MiB that end with a paragraph or a line"
    versions = dict.fromkeys((block.path, block.version) for block in blocks)

    def fingerprint() -> str:
        digest = hashlib.sha256()
        for path, _ in versions:
            digest.update(file_digest(path).encode())
        return digest.hexdigest()

    def check_unchanged() -> None:
        for path, version in versions:
            if version_of(path) != version:
                raise changed_error(path)

    return Table(
        len(blocks),
        lambda i: blocks[i].row(),
        lambda i: blocks[i].where,
        fingerprint,
        check_unchanged,
        layout=f"{count_of(cut, 'file')} read in {kind}" if cut else "",
        continues=lambda i: i + 1 < len(blocks) and blocks[i + 1].start > 0,
        are_documents=True,
        skipped=f"{count_of(blank, 'file')} without text" if blank else "",
    )


class _Block(NamedTuple):
    """A block of a file, which is one row: the bytes [start, stop).

    Attributes:
        line: line number of the first byte.
    """

    path: Path
    version: FileVersion | None
    start: int
    stop: int
    line: int

    @property
    def where(self) -> str:
        return f"{self.path}:{self.line}" if self.start else str(self.path)

    def row(self) -> dict[str, str]:
        """Return the text of the block, with LF as line end."""
        data = read_span(self.path, self.version, self.start, self.stop)

        def where(at: int) -> str:
            # The location starts with the location of the row, so that `data.bad_rows: skip`
            # recognizes the error as a row error and can skip the row.
            line = self.line + data.count(b"\n", 0, at)
            return f"{self.where}, line {line}"

        text = decode_text(self.path, data, where, "utf-8" if self.start else "utf-8-sig")
        if "\0" in text:
            raise DataError(
                "the file is not text",
                where=where(data.index(b"\0")),
                why="it contains a null character, as binary files do",
                fix=f"convert the file to text; `file {shell_path(self.path)}` shows its type",
            )
        return {"text": text.replace("\r\n", "\n").replace("\r", "\n")}


def _is_blank(path: Path) -> bool:
    with open_uncached(path) as file:
        return not file.read(BLANK_BYTES).removeprefix(codecs.BOM_UTF8).strip()


def _find_blocks(path: Path, size: int) -> Iterator[_Block]:
    """Yield the blocks of a file. A small file is a single block."""
    version = version_of(path)
    start = 0
    line = 1
    if size > DOCUMENT_BYTES:
        with open_uncached(path) as file:
            while size - start > BLOCK_BYTES:
                file.seek(start)
                block = file.read(BLOCK_BYTES)
                length = _length_of_block(block)
                yield _Block(path, version, start, start + length, line)
                start += length
                line += block.count(b"\n", 0, length)
                drop_pages(file.fileno(), 0, start)
    yield _Block(path, version, start, size, line)


def _length_of_block(block: bytes) -> int:
    """Return the length to which a block is shortened, so that it ends after a paragraph, line or
    word.
    """
    paragraph = max(block.rfind(b"\n\n") + 2, block.rfind(b"\n\r\n") + 3)
    # If the block ends after a word, cut before the space, because tokenizers join a space with the
    # following word.
    for length in (paragraph, block.rfind(b"\n") + 1, block.rfind(b" ")):
        if length > (len(block) // 2):
            return length
    # Cut before the last character. To find its first byte, skip the bytes that start with the bits
    # 10: all bytes of a UTF-8 character start with them, except the first byte.
    length = len(block) - 1
    while length > 1 and block[length] & 0xC0 == 0x80:
        length -= 1
    return length
