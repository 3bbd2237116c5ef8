"""log.txt: every line that a run showed, with its time."""

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from tunesmith.errors import StoppedError, TunesmithError
from tunesmith.host.logger import PACKAGE, LineFormatter
from tunesmith.host.streams import visible


def log_file_of_run(path: Path) -> "LogFile":
    """The log of a run: that of the command, whose lines so far come first, or a new one."""
    for handler in PACKAGE.handlers:
        if isinstance(handler, LogFile) and handler.path is None:
            handler.path = path
            return handler
    return LogFile(path)


class LogFile(logging.Handler):
    """Lines stay in memory until `open`, since a start that is refused writes nothing.

    As a context it also writes what the package logs, and the error that ends the run, and closes
    the file. A line is one write, without a buffer, so that a signal's handler may write.
    """

    def __init__(self, path: Path | None = None) -> None:
        super().__init__()
        self.setFormatter(LineFormatter())
        self.path = path
        self._file: int | None = None
        self._early = b""

    def open(self) -> None:
        """Append to the file from here on, what was written before included."""
        if self._file is None and self.path is not None:
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            os.write(self._file, self._early)
            self._early = b""

    def write(self, text: str) -> None:
        """Write each line of a text; OSError where the disk is full."""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        rows = "".join(f"{now}  {row}\n" for row in visible(text).splitlines())
        lines = rows.encode(errors="backslashreplace")
        if self._file is None:
            self._early += lines
        else:
            os.write(self._file, lines)

    def emit(self, record: logging.LogRecord) -> None:
        # As far as the disk takes it.
        with contextlib.suppress(OSError):
            self.write(self.format(record))

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Write what the package logs in the block."""
        PACKAGE.addHandler(self)
        try:
            yield
        finally:
            PACKAGE.removeHandler(self)

    def close(self) -> None:
        super().close()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Self:
        PACKAGE.addHandler(self)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        PACKAGE.removeHandler(self)
        if error is not None:
            text = f"{type(error).__name__}: {error}"
            if isinstance(error, StoppedError):
                # With everything saved a stop is no error.
                text = error.text().removeprefix("error: ")
            elif isinstance(error, TunesmithError):
                text = error.text()
            with contextlib.suppress(OSError):
                self.write(text)
        self.close()
