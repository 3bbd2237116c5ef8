"""A count that goes up, on stderr: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType

SECONDS_BETWEEN_LINES = 10.0


class Counter:
    """`with Counter("answers", 100) as done: done.to(7)`; nothing reaches stdout."""

    def __init__(self, what: str, total: int, *, start: int = 0) -> None:
        self.what, self.total, self.start, self.at = what, total, start, start
        self._bar = sys.stderr.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"

    def __enter__(self) -> Counter:
        self._began = self._told = time.monotonic()
        if self._bar:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=Console(stderr=True))
            self._task = self._progress.add_task(self.what, total=self.total, completed=self.start)
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._progress.stop()
        elif kind is None and self.at > self.start:
            self._line()

    def to(self, count: int) -> None:
        """Show that `count` of the total are done."""
        self.at = count
        if self._bar:
            self._progress.update(self._task, completed=count)
        elif time.monotonic() - self._told >= SECONDS_BETWEEN_LINES:
            self._told = time.monotonic()
            self._line()

    def _line(self) -> None:
        seconds = time.monotonic() - self._began
        rate = (self.at - self.start) / seconds if seconds > 0 else 0.0
        print(f"{self.what}: {self.at}/{self.total}  {rate:.1f}/s", file=sys.stderr, flush=True)
