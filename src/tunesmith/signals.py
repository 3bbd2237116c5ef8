"""Signals that ask a run to save and end: SIGTERM, SIGINT (ctrl-C), SIGHUP (a closed laptop) and SIGUSR1 (Slurm)."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from tunesmith.errors import StoppedError

NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")


class StopRequest:
    """A context in which those signals are noted instead of ending the process.

    Until `hold()` is called nothing has been learnt that could be lost, so a signal ends the run at once; afterwards
    it only sets `signal`, which the loop reads between steps.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._held = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Python lets only the main thread take signals; elsewhere (a notebook's worker) the caller keeps its own.
        if threading.current_thread() is threading.main_thread():
            for name in NAMES:
                number = signal.Signals[name]
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def hold(self) -> None:
        """From here on there is something to save: the loop ends the run, not the handler."""
        self._held = True

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        if not self._held:
            raise StoppedError(
                f"stopped by {self.signal} before the first step",
                why="nothing was learnt yet, so there was nothing to save",
                fix="start the same command again",
            )
