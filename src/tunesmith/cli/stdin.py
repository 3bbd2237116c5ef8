"""Lines of standard input, whatever a caller pipes into it."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator

from tunesmith.errors import DataError


def stdin_lines() -> Iterator[tuple[int, str]]:
    """(number from 1, text) of every line that is not blank; UTF-8 in any locale.

    Raises:
        DataError: a line is not UTF-8.
    """
    stream = sys.stdin.buffer if isinstance(sys.stdin, io.TextIOWrapper) else sys.stdin
    for number, line in enumerate(stream, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8") if isinstance(line, bytes) else line
        except UnicodeDecodeError as error:
            raise DataError(
                "the line is not UTF-8 text",
                where=f"stdin:{number}",
                why=f"byte 0x{error.object[error.start]:02x} at position {error.start + 1}: {error.reason}",
                fix="convert it first: iconv -f latin1 -t utf-8 rows.jsonl | tunesmith ...",
            ) from None
        if text.strip():
            yield number, text
