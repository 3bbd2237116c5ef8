"""Standard streams that outlive their readers: a closed pipe or descriptor, a terminal that is gone, a full disk."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class LastingOutput(io.FileIO):
    """The descriptor of a standard stream: what cannot be written is dropped.

    Args:
        raises: raise the first error, and drop what comes after it: for the output that a command is there for.

    Attributes:
        raised: that error.
    """

    def __init__(self, descriptor: int, *, raises: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.raises = raises
        self.raised: OSError | None = None

    def write(self, data: ReadableBuffer, /) -> int:
        size = memoryview(data).nbytes
        try:
            return super().write(data) or size
        except OSError as error:
            if self.raises and self.raised is None:
                self.raised = error
                raise
            return size


def lasting(stream: TextIO | None, *, raises: bool = False) -> TextIO:
    """The same stream over a `LastingOutput`; a stream that is not a file (a notebook's, a test's) stays what it is."""
    if stream is None:  # closed by the caller (`2>&-`): the next file opened would take its number
        return open(os.devnull, "w", encoding="utf-8")
    if not isinstance(stream, io.TextIOWrapper) or (raw := _raw(stream)) is None:
        return stream
    if isinstance(raw, LastingOutput):
        raw.raises = raises
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(LastingOutput(raw.fileno(), raises=raises)),
        encoding=stream.encoding,
        errors="backslashreplace",  # a terminal that cannot show a character gets its escape, not an error
        line_buffering=stream.line_buffering or stream.write_through,
    )


def fault_of(stream: TextIO) -> OSError | None:
    """What a lasting stream has raised."""
    raw = _raw(stream)
    return raw.raised if isinstance(raw, LastingOutput) else None


def _raw(stream: TextIO) -> io.FileIO | None:
    """The descriptor under a stream, which with `python -u` has no buffer between."""
    binary = stream.buffer if isinstance(stream, io.TextIOWrapper) else None
    raw = binary.raw if isinstance(binary, io.BufferedWriter) else binary
    return raw if isinstance(raw, io.FileIO) else None
