"""The package's logger `tunesmith`: its lines on stderr, for commands and for Python programs.

Every module logs to `logging.getLogger(__name__)`: at INFO what a user reads as it is, at WARNING
what is shown after `warning: `. Importing the package sets nothing up. A command shows the lines
itself; what a program calls shows them only if the program has not set up logging.
"""

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from tunesmith.host.streams import show, visible

PACKAGE = logging.getLogger("tunesmith")


class LineFormatter(logging.Formatter):
    """A record as its user reads it, without time or module."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        return f"warning: {text}" if record.levelno >= logging.WARNING else text


class StderrHandler(logging.Handler):
    """Prints records on stderr: stdout is for answers.

    It is looked up anew for each record, because notebooks, progress bars and `lasting` replace it.
    An error of the stream is raised, as print does, and is not shown as one of logging.
    """

    def __init__(self, formatter: logging.Formatter | None = None) -> None:
        super().__init__()
        self.setFormatter(formatter or LineFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        show(self.format(record), sys.stderr)


@contextmanager
def logged_if_slow(log: logging.Logger, text: str, seconds: float = 5.0) -> Iterator[None]:
    """Log what the block does, once it takes longer: silence is not taken for a fault."""
    timer = threading.Timer(seconds, log.info, (text,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _visible_record(*args: Any, **options: Any) -> logging.LogRecord:
    """Make a record whose message is `visible`; arguments that do not fit are left to handlers."""
    record = logging.LogRecord(*args, **options)
    with suppress(TypeError, ValueError, KeyError):
        record.msg = visible(record.getMessage())
        record.args = ()
    return record


@contextmanager
def lines_on_stderr(formatter: logging.Formatter | None = None) -> Iterator[None]:
    """Show the package's lines on stderr in the block, which is a whole command.

    What other packages log, such as a name in a file of the model, cannot control the terminal.

    formatter: makes a line of a record, in place of that of a surrounding block.
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
    """Show the package's lines on stderr in the block, unless the program takes them.

    It does if it has added a handler to the logger `tunesmith`, or has set up logging for INFO.
    """
    has_handler = PACKAGE.hasHandlers() and PACKAGE.isEnabledFor(logging.INFO)
    with ExitStack() as stack:
        if not PACKAGE.handlers and not has_handler:
            _attach(StderrHandler(), stack)
        stack.enter_context(default_level(level))
        yield


@contextmanager
def default_level(level: int) -> Iterator[None]:
    """Log from `level` up in the block, unless the program has set a level of the package."""
    if PACKAGE.level != logging.NOTSET:
        yield
        return
    # Handlers of a root logger at WARNING, such as Colab's, are not for each line.
    propagate = PACKAGE.propagate and PACKAGE.isEnabledFor(logging.INFO)
    with _level(level, propagate=propagate):
        yield


@contextmanager
def stderr_only_from(*names: str) -> Iterator[None]:
    """In the block `StderrHandler` shows what these loggers and those below them log, alone."""

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
