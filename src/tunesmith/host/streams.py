"""Standard streams that outlive their readers.

A closed pipe or descriptor, a terminal that is gone, a full disk.
"""

import io
import os
import select
import sys
from typing import Any, TextIO


class LastingOutput(io.FileIO):
    """The descriptor of a standard stream: what cannot be written is dropped.

    With `raises` the first error is raised, and kept in `raised`: for the output that a command is
    there for.
    """

    raises = False
    raised: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            count = super().write(data)
            while count is None:  # a non-blocking pipe or terminal whose reader is behind
                select.select([], [self], [])
                count = super().write(data)
        except OSError as error:
            if self.raises and self.raised is None:
                self.raised = error
                raise
            return memoryview(data).nbytes
        return count


class LastingStream(io.TextIOWrapper):
    """The text stream over a `LastingOutput`; what its encoding lacks is written as an escape."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        stream.flush()
        self.output = LastingOutput(stream.fileno(), "w", closefd=False)
        super().__init__(
            io.BufferedWriter(self.output),
            encoding=stream.encoding,
            errors="backslashreplace",
            # `python -u` writes through.
            line_buffering=stream.line_buffering or stream.write_through,
        )


def lasting(stream: TextIO | None, *, raises: bool = False) -> TextIO:
    """The lasting form of Python's own stdout or stderr.

    Another stream (a notebook's, a test's) stays what it is.
    """
    if stream is None:  # closed by the caller (`2>&-`): the next file opened would take its number
        return open(os.devnull, "w", encoding="utf-8")
    if isinstance(stream, io.TextIOWrapper) and stream in (sys.__stdout__, sys.__stderr__):
        stream = LastingStream(stream)
    if isinstance(stream, LastingStream):
        stream.output.raises = raises
    return stream


def fault_of(stream: TextIO) -> OSError | None:
    """What a lasting stream has raised."""
    return stream.output.raised if isinstance(stream, LastingStream) else None


def is_terminal(stream: TextIO) -> bool:
    """Whether `stream` can draw a progress bar.

    What rich says, which knows TERM, FORCE_COLOR and TTY_COMPATIBLE.
    """
    from rich.console import Console

    return Console(file=stream).is_interactive
