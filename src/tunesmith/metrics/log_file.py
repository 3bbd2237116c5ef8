"""The log file of a run, log.txt. It contains every line that the run has shown, with the time."""

import contextlib
import logging
import os
import time
from pathlib import Path
from typing import Self

from tunesmith.errors import StoppedError, TunesmithError
from tunesmith.host.logger import PACKAGE, LineFormatter
from tunesmith.host.streams import visible


def log_file_of_run(path: Path) -> "LogFile":
    """Return the log of a run.

    If the command has created a LogFile, return it, because it already has the first lines.
    Otherwise return a new LogFile.
    """
    for handler in PACKAGE.handlers:
        if isinstance(handler, LogFile) and handler.path is None:
            handler.path = path
            return handler
    return LogFile(path)


class LogFile(logging.Handler):
    """A log handler that writes log.txt. It keeps lines in memory until `open` is called, so that a
    start that fails leaves no file.

    Inside a `with` block it also logs the messages of the package and the error that ends the run.
    At the end of the block it closes the file. The block of a run can be inside the block of its
    command. Each line is written with one unbuffered call, so that a signal handler can write a
    line.
    """

    def __init__(self, path: Path | None = None) -> None:
        super().__init__()
        self.setFormatter(LineFormatter())
        self.path = path
        self._file: int | None = None
        self._early = b""

    def open(self) -> None:
        """Open the file and append the lines that were kept in memory. Later lines are written
        directly.
        """
        if self._file is None and self.path is not None:
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            os.write(self._file, self._early)
            self._early = b""

    def write(self, text: str) -> None:
        """Write each line of a text with the current time. Raise OSError if the disk is full."""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        rows = "".join(f"{now}  {row}\n" for row in visible(text).splitlines())
        lines = rows.encode(errors="backslashreplace")
        if self._file is None:
            self._early += lines
        else:
            os.write(self._file, lines)

    def emit(self, record: logging.LogRecord) -> None:
        # Ignore a full disk: a log line must not end the run.
        with contextlib.suppress(OSError):
            self.write(self.format(record))

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
                # Omit the word "error", because a stop is not a failure: everything is saved.
                text = error.text().removeprefix("error: ")
            elif isinstance(error, TunesmithError):
                text = error.text()
            with contextlib.suppress(OSError):
                self.write(text)
        self.close()
