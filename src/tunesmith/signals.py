"""Signals that ask a command to save and end: SIGTERM, SIGINT (ctrl-C), SIGHUP (a closed laptop) and SIGUSR1 (Slurm)."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from tunesmith.errors import StoppedError

NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")


class StopRequest:
    """A context that notes the first signal in `signal` once there is something to save; before, it ends the process.

    Args:
        interactive: for commands that answer: hold SIGTERM and SIGINT from the start, and let a second one raise
            KeyboardInterrupt.
    """

    def __init__(self, *, interactive: bool = False) -> None:
        self.signal: str | None = None
        self._interactive = self._held = interactive
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Python lets only the main thread take signals; elsewhere (a notebook's worker) the caller keeps its own.
        if threading.current_thread() is threading.main_thread():
            for name in NAMES[:2] if self._interactive else NAMES:
                number = signal.Signals[name]
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def hold(self) -> None:
        """From here on there is something to save: the loop ends the run, not the handler."""
        self._held = True

    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._interactive and self.requested():
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
        if not self._held:
            what, why = f"stopped by {self.signal} before the first step", "there was nothing to save yet"
            raise StoppedError(what, why=why, fix="start the same command again")
