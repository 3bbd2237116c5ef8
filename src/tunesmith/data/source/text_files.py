"""Text files -> a table of documents, one a file.

A large file is read in blocks, each a row that goes on in the next one (`Table.continues`). They
are cut where a paragraph, a line or at least a word ends, so that hardly a token is another one.
"""

import codecs
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tunesmith.data.source.table import (
    FileVersion,
    Table,
    changed_error,
    decode_text,
    file_digest,
    read_span,
    version_of,
)
from tunesmith.errors import DataError
from tunesmith.host.memory import drop_pages, open_uncached
from tunesmith.host.shell import shell_path
from tunesmith.units import count_of

# A larger file is read in blocks. Few books are: the King James Bible has 4 MiB.
DOCUMENT_BYTES = 8 << 20
# A larger block takes more memory while it is tokenized, some 50 bytes a character.
BLOCK_BYTES = 1 << 20
# A smaller file may have nothing but blanks: it is looked at.
BLANK_BYTES = 4096


def read_text_files(paths: Sequence[Path]) -> Table:
    """The documents of some files, in this order; those without text are `skipped`."""
    blocks: list[_Block] = []
    blank = 0
    for path in paths:
        size = path.stat().st_size
        if size <= BLANK_BYTES and _is_blank(path):
            blank += 1
        else:
            blocks += _find_blocks(path, size)
    skipped = f"{count_of(blank, 'file')} without text" if blank else ""
    cut = len({block.path for block in blocks if block.start})
    layout = ""
    if cut:
        kind = f"blocks of {BLOCK_BYTES >> 20} MiB that end with a paragraph or a line"
        layout = f"{count_of(cut, 'file')} read in {kind}"
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
        layout=layout,
        continues=lambda i: i + 1 < len(blocks) and blocks[i + 1].start > 0,
        are_documents=True,
        skipped=skipped,
    )


class _Block(NamedTuple):
    """A file, or a part of one: its bytes [start, stop), of which the first is in `line`."""

    path: Path
    version: FileVersion | None
    start: int
    stop: int
    line: int

    @property
    def where(self) -> str:
        return f"{self.path}:{self.line}" if self.start else str(self.path)

    def row(self) -> dict[str, str]:
        data = read_span(self.path, self.version, self.start, self.stop)
        return {"text": _decode(self.path, data, self.where, self.start, self.line)}


def _is_blank(path: Path) -> bool:
    with open_uncached(path) as file:
        return not file.read(BLANK_BYTES).removeprefix(codecs.BOM_UTF8).strip()


def _find_blocks(path: Path, size: int) -> Iterator[_Block]:
    """The blocks of a file; of a small file one."""
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

    text = decode_text(path, data, where, "utf-8" if start else "utf-8-sig")
    if "\0" in text:
        raise DataError(
            "the file has bytes that are no text",
            where=where(data.index(b"\0")),
            why="a null character is in it, as in the files of other programs",
            fix=f"file {shell_path(path)}   # shows what it is; convert it to text",
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")
