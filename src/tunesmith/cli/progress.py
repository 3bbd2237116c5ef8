"""A count that goes up, on stderr: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time

from tunesmith.host_files import is_terminal

SECONDS_BETWEEN_LINES = 10.0


class ProgressCounter:
    """`progress("answers", 7, 100)` in its block; another name starts another count, from where its first call says."""

    def __enter__(self) -> ProgressCounter:
        self._what, self._done, self._start, self._bar = "", 0, 0, None
        if is_terminal(sys.stderr):
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
        return self

    def __call__(self, what: str, done: int, total: int) -> None:
        """`done` of `total` are done."""
        now = time.monotonic()
        if what != self._what:
            self._line()
            self._what, self._start, self._began, self._printed = what, done, now, now
            self._task = self._bar.add_task(what, total=total, completed=done) if self._bar else None
        self._done, self._total = done, total
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=done)
        elif now - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = now
            self._line()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar:
            self._bar.stop()
        elif kind is None:
            self._line()

    def _line(self) -> None:
        if self._bar is None and self._done > self._start:
            rate = (self._done - self._start) / max(time.monotonic() - self._began, 1e-9)
            print(f"{self._what}: {self._done}/{self._total}  {rate:.1f}/s", file=sys.stderr, flush=True)
