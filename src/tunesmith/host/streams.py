"""Standard streams that outlive their readers.

A closed pipe or descriptor, a terminal that is gone, a full disk.
"""

import io
import os
import re
import select
import sys
import textwrap
from typing import Any, TextIO

# Columns of a line where no terminal says how many it has.
DEFAULT_COLUMNS = 100
# What is copied from a sentence: a command, up to what ends it, settings of a recipe, and a comment
# behind a command, whose rest would be a command of its own on the next line.
_SETTING = r"""[\w.]+=(?:"[^"]*"|'[^']*'|\S+)"""
_COPIED = re.compile(
    r"\b(?:tunesmith|pip|git|cd|ollama|vllm|tensorboard|ssh) [^;,)#]*[^;,)#\s]"
    rf"|{_SETTING}(?: {_SETTING})*"
    r"|(?<=\s)# .*"
)
# All but line breaks and tabs: C0, DEL and C1, then overrides and isolates of the direction.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
# Stands for a space that no line is broken at.
_NO_BREAK = "\u00a0"


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
    """Return what a lasting stream has raised."""
    return stream.output.raised if isinstance(stream, LastingStream) else None


def is_terminal(stream: TextIO) -> bool:
    """Tell whether `stream` can draw a progress bar.

    What rich says, which knows TERM, FORCE_COLOR and TTY_COMPATIBLE.
    """
    from rich.console import Console

    return Console(file=stream).is_interactive


def width_of(stream: TextIO) -> int:
    """Columns of a line on `stream`: COLUMNS, the terminal's, or DEFAULT_COLUMNS if none."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns) > 0:
        return int(columns)
    try:
        return os.get_terminal_size(stream.fileno()).columns or DEFAULT_COLUMNS
    except (OSError, ValueError):  # a pipe, a file, a notebook's stream, a closed one
        return DEFAULT_COLUMNS


def visible(text: str) -> str:
    """The text with what controls a terminal, or turns its direction, as escapes: a row, a column
    or a file's name may hold it.
    """
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def folded(text: str, width: int, *, indent: int | None = None) -> str:
    """The text, `visible`, with its long lines broken between words.

    Words, such as paths, commands and settings stay whole, also where they are longer than `width`:
    they are there to be copied.

    Args:
        width: columns of a line.
        indent: columns before the rest of a line; None: two more than before the line itself.
    """
    lines = []
    for line in visible(text).splitlines():
        if len(line) <= width:
            lines.append(line)
            continue
        rest = len(line) - len(line.lstrip()) + 2 if indent is None else indent
        unbroken = _COPIED.sub(lambda match: match[0].replace(" ", _NO_BREAK), line)
        parts = textwrap.wrap(
            unbroken,
            width,
            subsequent_indent=" " * rest,
            break_long_words=False,
            break_on_hyphens=False,
        )
        lines += [part.replace(_NO_BREAK, " ") for part in parts]
    return "\n".join(lines)


def show(text: str, stream: TextIO, *, indent: int | None = None) -> None:
    """Print text for a person, folded to the width of the stream; see `folded`."""
    print(folded(text, width_of(stream), indent=indent), file=stream, flush=True)
