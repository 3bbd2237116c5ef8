"""Standard streams that survive write errors, and functions that wrap text to the terminal's width.

A write can fail because of a closed pipe, a closed terminal or a full disk.
"""

import io
import os
import re
import select
import sys
import textwrap
from typing import Any, TextIO

# Maximum width of a line in columns if the stream is not a terminal.
DEFAULT_COLUMNS = 100
# Parts of a text that must stay on one line, because users copy them: commands, settings of a
# recipe (key=value), and comments after a command. If a comment were broken into two lines, the
# shell would run the second line as a command.
# A setting begins at the start of a word. Otherwise, each letter of a long word would be tried.
_SETTING = r"""(?<![\w.])[\w.]+=(?:"[^"]*"|'[^']*'|\S+)"""
_COPIED = re.compile(
    r"\b(?:tunesmith|pip|git|cd|ollama|vllm|tensorboard|ssh) [^;,)#]*[^;,)#\s]"
    rf"|`[^`]*`|{_SETTING}(?: {_SETTING})*"
    r"|(?<=\s)# .*"
)
# Control characters (C0, DEL and C1) except newlines and tabs, and the Unicode characters that
# change the text direction.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
# A space that does not follow a punctuation mark, so that it is within a clause.
_SPACE_IN_CLAUSE = re.compile(r"(?<![;,.?]) ")
# Temporary replacement of a space at which a line must not be broken.
_NO_BREAK = "\u00a0"


class LastingOutput(io.FileIO):
    """A raw file for the descriptor of a standard stream. Data that cannot be written is dropped.

    Attributes:
        raises: whether the first write error is raised. It should be True for a stream to which a
            command writes its result.
        raised: the write error that was raised, or None.
    """

    raises = False
    raised: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            count = super().write(data)
            while count is None:  # a non-blocking pipe or terminal is full: wait for the reader
                select.select([], [self], [])
                count = super().write(data)
        except OSError as error:
            if self.raises and self.raised is None:
                self.raised = error
                raise
            return memoryview(data).nbytes
        return count


class LastingStream(io.TextIOWrapper):
    """A text stream whose data goes to a `LastingOutput`.

    Characters that cannot be encoded are escaped.
    """

    def __init__(self, stream: io.TextIOWrapper) -> None:
        stream.flush()
        self.output = LastingOutput(stream.fileno(), "w", closefd=False)
        super().__init__(
            io.BufferedWriter(self.output),
            encoding=stream.encoding,
            errors="backslashreplace",
            # `python -u` makes the stream unbuffered (`write_through`). Use line buffering instead.
            line_buffering=stream.line_buffering or stream.write_through,
        )


def survive_write_errors(stream: TextIO | None, *, raises: bool = False) -> TextIO:
    """Return a version of Python's stdout or stderr that survives write errors.

    A stream of a notebook or a test is returned unchanged.

    Args:
        raises: whether the first write error is raised.
    """
    # The caller has closed the stream (`2>&-`). Open /dev/null instead: otherwise the next file
    # that is opened would get the descriptor of the stream.
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    if isinstance(stream, io.TextIOWrapper) and stream in (sys.__stdout__, sys.__stderr__):
        stream = LastingStream(stream)
    if isinstance(stream, LastingStream):
        stream.output.raises = raises
    return stream


def fault_of(stream: TextIO) -> OSError | None:
    """Return the write error that a `LastingStream` has raised, or None."""
    return stream.output.raised if isinstance(stream, LastingStream) else None


def is_terminal(stream: TextIO) -> bool:
    """Return whether a stream can show a progress bar.

    rich decides this. It respects the variables TERM, FORCE_COLOR and TTY_COMPATIBLE.
    """
    from rich.console import Console

    return Console(file=stream).is_interactive


def width_of(stream: TextIO) -> int:
    """Return the width of a stream in columns.

    This is the variable COLUMNS, else the terminal's width, else DEFAULT_COLUMNS.
    """
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns) > 0:
        return int(columns)
    try:
        return os.get_terminal_size(stream.fileno()).columns or DEFAULT_COLUMNS
    except (OSError, ValueError):  # a pipe, a file, a notebook's stream or a closed stream
        return DEFAULT_COLUMNS


def visible(text: str) -> str:
    """Escape the characters of a text that control a terminal or change the text direction.

    Rows, column names and file names of other people may contain such characters.
    """
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def folded(
    text: str, width: int, *, indent: int | None = None, between_clauses: bool = False
) -> str:
    """Break the long lines of a text between words, and escape control characters with `visible`.

    Paths, commands and settings are not broken, even if they are longer than `width`, because users
    copy them.

    Args:
        width: the maximum width of a line in columns.
        indent: the indentation of continuation lines. None means two columns more than the first
            line.
        between_clauses: break lines only after punctuation marks. Set this if the text may contain
            any shell command, because a command with a line break cannot be copied.
    """
    lines = []
    for line in visible(text).splitlines():
        if len(line) <= width:
            lines.append(line)
            continue
        rest = len(line) - len(line.lstrip()) + 2 if indent is None else indent
        unbroken = _COPIED.sub(lambda match: match[0].replace(" ", _NO_BREAK), line)
        if between_clauses:
            unbroken = _SPACE_IN_CLAUSE.sub(_NO_BREAK, unbroken)
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
    """Print a text, with lines wrapped to the width of the terminal."""
    print(folded(text, width_of(stream), indent=indent), file=stream, flush=True)
