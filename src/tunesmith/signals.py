"""Signals that ask a command to save and end: SIGTERM, SIGINT (ctrl-C), SIGHUP (a closed laptop) and SIGUSR1 (Slurm).

A signal that is ignored when a command starts stays ignored: `nohup` does that with SIGHUP, a shell with the SIGINT of
its background jobs. A forked child has its parent's handlers of before.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

from tunesmith.errors import StoppedError

NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
ONE_PRESS = 0.3  # seconds; a wrapper such as `timeout` passes on the SIGINT that the terminal has sent to all


class Interrupted(KeyboardInterrupt):
    """Raised by a stop signal: `python -m` ends by SIGINT once a plain KeyboardInterrupt has passed PyRun_String."""


class StopRequest:
    """A context that notes the first stop signal in `signal`.

    Before `hold` a signal raises a KeyboardInterrupt, which libraries let pass, and the context ends with StoppedError
    whatever a library made of it. From `hold` on the caller looks at `signal` and ends by itself; a second ctrl-C sets
    `now` and raises the same. `interactive` is for commands that answer: it holds SIGTERM and SIGINT from the start.
    `doing` is what is completed before the stop, as told to the user.
    """

    def __init__(self, *, interactive: bool = False) -> None:
        self.signal: str | None = None
        self.now = False
        self.doing = "this step"
        self._interactive = self._held = interactive
        self._say: Callable[[str], None] | None = None
        self._strike = False  # the next signal raises
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # Python lets only the main thread take signals; elsewhere (a notebook's worker) the caller keeps its own.
        if threading.current_thread() is not threading.main_thread():
            return self
        held, self._held = self._held, True  # without `__exit__` an exception from here would leave the handlers
        for name in NAMES[:2] if self._interactive else NAMES:
            number = signal.Signals[name]
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._before[number] = signal.signal(number, self._note)
        # Python calls a handler between two bytecodes, which may be a whole backward later; it writes the signal's
        # number to this pipe at once.
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, args=(reader,), daemon=True)
        self._watcher.start()
        _entered.append(self)
        self._held = held
        return self

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        held, self._held = self._held, True
        if self in _entered:
            self._leave()
        if self.signal and not held:
            raise self.not_begun() from error
        if self.now and isinstance(error, KeyboardInterrupt) and not self._interactive:
            raise StoppedError(f"stopped by {self.signal}", fix="start the same command again") from error

    def hold(self, say: Callable[[str], None] | None = None) -> None:
        """From here on there is something to save: the loop ends the run, not the handler. When a signal comes, `say` takes
        a line at once, in another thread. Held already, the loop that comes sees a signal of before."""
        held, self._say, self._held = self._held, say, True
        if self.signal and not held:  # a library swallowed the KeyboardInterrupt
            raise self.not_begun()

    def requested(self) -> bool:
        return self.signal is not None

    def not_begun(self) -> StoppedError:
        """The error of a stop before the first step."""
        what, why = f"stopped by {self.signal} before the first step", "there was nothing to save yet"
        return StoppedError(what, why=why, fix="start the same command again")

    def _note(self, number: int, frame: FrameType | None) -> None:
        first, self.signal = self.signal is None, self.signal or signal.Signals(number).name
        if self._strike or (first and not self._held):
            self._strike = False
            raise Interrupted

    def _watch(self, reader: int) -> None:
        told, pressed = set(), math.inf
        with open(reader, "rb", buffering=0) as pipe:
            while byte := pipe.read(1):
                if byte[0] not in self._before:  # the caller's own
                    continue
                name, now = signal.Signals(byte[0]).name, time.monotonic()
                if name == "SIGINT" and now - pressed > ONE_PRESS:
                    pressed, self.now, self._strike = now, True, True
                    os.kill(os.getpid(), signal.SIGINT)  # the handler may have run before `_strike` was set
                elif name not in told:
                    told.add(name)
                    again = "; press again to stop now" if name == "SIGINT" else ""
                    pressed = now if again else pressed
                    if self._say is not None:
                        self._say(f"{name}: stopping after {self.doing}{again}")

    def _leave(self) -> None:
        _entered.remove(self)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writer)  # ends the watcher, whose own signal comes while the handler is still there
        try:
            self._watcher.join(1.0)
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)


_entered: list[StopRequest] = []


def _leave_all() -> None:
    while _entered:
        _entered[-1]._leave()


os.register_at_fork(after_in_child=_leave_all)


def ignore_stop_signals() -> None:
    """Ignore them from here on: the exit code is known, and one that comes while the interpreter ends must not change it."""
    for name in NAMES:
        signal.signal(signal.Signals[name], signal.SIG_IGN)
