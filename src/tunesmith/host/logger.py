"""Setup of the logger `tunesmith`.

Its lines are printed to stderr, both in commands and in Python programs that use tunesmith.

Every module logs to `logging.getLogger(__name__)`. INFO lines are shown unchanged, and WARNING
lines get the prefix `warning: `. Importing the package does not configure logging. A command always
shows the lines. A function that a Python program calls shows the lines only if the program has not
configured logging.
"""

import logging
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from tunesmith.host.streams import show, visible

PACKAGE = logging.getLogger("tunesmith")


class LineFormatter(logging.Formatter):
    """Formatter that shows only the message, without time and module."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        return f"warning: {text}" if record.levelno >= logging.WARNING else text


class StderrHandler(logging.Handler):
    """Handler that prints records to stderr, because stdout is for results.

    `sys.stderr` is looked up for each record, because notebooks, progress bars and the function
    `survive_write_errors` replace it. If the write fails, the error is raised, as `print` does. The
    standard handler would only print the error.
    """

    def __init__(self, formatter: logging.Formatter | None = None) -> None:
        super().__init__()
        self.setFormatter(formatter or LineFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        show(self.format(record), sys.stderr)


def log_lines(lines: Iterable[str]) -> None:
    """Log each line at level INFO."""
    for line in lines:
        PACKAGE.info(line)


@contextmanager
def logged_if_slow(log: logging.Logger, text: str, seconds: float = 5.0) -> Iterator[None]:
    """Log `text` if the block takes longer than `seconds`, so that the user knows the reason."""
    timer = threading.Timer(seconds, log.info, (text,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _visible_record(*args: Any, **options: Any) -> logging.LogRecord:
    """Build a log record whose control characters are escaped by `visible`.

    If the arguments do not fit the message, the record is unchanged and the handler reports it.
    """
    record = logging.LogRecord(*args, **options)
    with suppress(TypeError, ValueError, KeyError):
        record.msg = visible(record.getMessage())
        record.args = ()
    return record


@contextmanager
def lines_on_stderr(formatter: logging.Formatter | None = None) -> Iterator[None]:
    """Show the package's log lines on stderr in the block, which runs an entire command.

    Control characters in the log lines of all packages are escaped, because the lines may contain
    text from files of other people.

    Args:
        formatter: converts a record to a line. It replaces the formatter of a surrounding block.
    """
    with ExitStack() as stack:
        stack.callback(logging.setLogRecordFactory, logging.getLogRecordFactory())
        logging.setLogRecordFactory(_visible_record)
        stack.enter_context(stderr_only_from())
        _attach(StderrHandler(formatter), stack)
        if not PACKAGE.isEnabledFor(logging.INFO):
            stack.enter_context(_level(logging.INFO, propagate=False))
        yield


@contextmanager
def lines_by_default(level: int = logging.INFO) -> Iterator[None]:
    """Show the package's log lines on stderr in the block, unless the Python program handles them.

    The program handles them if it has added a handler to the logger `tunesmith`, or has configured
    logging for level INFO.
    """
    has_handler = PACKAGE.hasHandlers() and PACKAGE.isEnabledFor(logging.INFO)
    with ExitStack() as stack:
        if not PACKAGE.handlers and not has_handler:
            _attach(StderrHandler(), stack)
        stack.enter_context(default_level(level))
        yield


@contextmanager
def default_level(level: int) -> Iterator[None]:
    """Set the package's log level in the block, unless the Python program has set a level."""
    if PACKAGE.level != logging.NOTSET:
        yield
        return
    # If the root logger has level WARNING, as in Colab, do not pass INFO lines to its handlers.
    propagate = PACKAGE.propagate and PACKAGE.isEnabledFor(logging.INFO)
    with _level(level, propagate=propagate):
        yield


@contextmanager
def stderr_only_from(*names: str) -> Iterator[None]:
    """Let `StderrHandler` show only the lines of these loggers and their children in the block."""

    def is_shown(record: logging.LogRecord) -> bool:
        return f"{record.name}.".startswith(prefixes)

    prefixes = tuple(f"{name}." for name in names)
    handlers = [handler for handler in PACKAGE.handlers if isinstance(handler, StderrHandler)]
    for handler in handlers:
        handler.addFilter(is_shown)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(is_shown)


def _attach(handler: logging.Handler, stack: ExitStack) -> None:
    PACKAGE.addHandler(handler)
    stack.callback(PACKAGE.removeHandler, handler)


@contextmanager
def _level(level: int, *, propagate: bool) -> Iterator[None]:
    previous = PACKAGE.level, PACKAGE.propagate
    PACKAGE.setLevel(level)
    PACKAGE.propagate = propagate
    try:
        yield
    finally:
        PACKAGE.setLevel(previous[0])
        PACKAGE.propagate = previous[1]
