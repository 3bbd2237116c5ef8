"""Standard streams that outlive their readers: a closed pipe or descriptor, a terminal that is gone, a full disk."""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class LastingOutput(io.FileIO):
    """The descriptor of a standard stream: what cannot be written is dropped.

    Attributes:
        raises: raise the first error, and drop what comes after it: for the output that a command is there for.
        raised: that error.
    """

    raises = False
    raised: OSError | None = None

    def write(self, data: ReadableBuffer, /) -> int:
        size = memoryview(data).nbytes
        try:
            return super().write(data) or size
        except OSError as error:
            if self.raises and self.raised is None:
                self.raised = error
                raise
            return size


class LastingStream(io.TextIOWrapper):
    """The text stream over a `LastingOutput`; what its encoding lacks is written as an escape."""

    def __init__(self, stream: TextIO) -> None:
        stream.flush()
        self.output = LastingOutput(stream.fileno(), "w", closefd=False)
        buffer, lines = io.BufferedWriter(self.output), bool(stream.line_buffering)
        super().__init__(buffer, encoding=stream.encoding, errors="backslashreplace", line_buffering=lines)


def lasting(stream: TextIO | None, *, raises: bool = False) -> TextIO:
    """The lasting form of Python's own stdout or stderr; another stream (a notebook's, a test's) stays what it is."""
    if stream is None:  # closed by the caller (`2>&-`): the next file opened would take its number
        return open(os.devnull, "w", encoding="utf-8")
    own = stream is sys.__stdout__ or stream is sys.__stderr__
    made = LastingStream(stream) if own else stream
    if isinstance(made, LastingStream):
        made.output.raises = raises
    return made


def fault_of(stream: TextIO) -> OSError | None:
    """What a lasting stream has raised."""
    return stream.output.raised if isinstance(stream, LastingStream) else None
