"""What the package logs, for tests of what a user reads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tunesmith.host.logger import PACKAGE, LineFormatter, default_level


class LineList(logging.Handler):
    """Takes the place of stderr: each record as its user reads it."""

    def __init__(self, note: Callable[[str], object] | None) -> None:
        super().__init__()
        self.setFormatter(LineFormatter())
        self.lines: list[str] = []
        self.note = note or self.lines.append

    def emit(self, record: logging.LogRecord) -> None:
        self.note(self.format(record))


@contextmanager
def logged_lines(note: Callable[[str], object] | None = None) -> Iterator[list[str]]:
    """The lines that are logged in the block; `note` takes each in place of the list."""
    handler = LineList(note)
    PACKAGE.addHandler(handler)
    try:
        with default_level(logging.INFO):
            yield handler.lines
    finally:
        PACKAGE.removeHandler(handler)
