"""Signals that ask a command to save and end: SIGTERM, SIGINT (ctrl-C), SIGHUP (a closed laptop) and SIGUSR1 (Slurm).
A thread may ask for the same where the host's memory is short.

A signal that is ignored when a command starts stays ignored: `nohup` does that with SIGHUP, a shell with the SIGINT of
its background jobs. A forked child has its parent's handlers of before.
"""

import _thread
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple, Self

from tunesmith.errors import ShortOfMemoryError, StoppedEarlyError, StoppedError

NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
SHORT, END = "stopped because memory is short", "end what holds the memory"
RESTART = "TUNESMITH_RESTART"  # of the environment: a launcher whose process is the run has it start again, once
ONE_PRESS = 0.3  # seconds; a wrapper such as `timeout` passes on the SIGINT that the terminal has sent to all


class Interrupted(KeyboardInterrupt):
    """Raised by a stop signal: `python -m` ends by SIGINT once a plain KeyboardInterrupt has passed PyRun_String."""


class Shortage(NamedTuple):
    """Memory is short: the phase, the figures and who holds it, in words and as stopped.json has them."""

    text: str
    record: dict[str, Any]


class StopRequest:
    """A context that notes the first stop signal in `signal`, and a `shortage` of memory.

    Before `hold` a signal raises a KeyboardInterrupt, which libraries let pass, and the context ends with StoppedError
    whatever a library made of it. From `hold` on the caller looks at `signal` and ends by itself; a second ctrl-C sets
    `now` and raises the same. `interactive` is for commands that answer: it holds SIGTERM and SIGINT from the start.
    `doing` is what is completed before the stop, as told to the user, and `takes` the seconds of that; a save takes
    `saving` bytes of the host.
    """

    def __init__(self, *, interactive: bool = False) -> None:
        self.signal: str | None = None
        self.shortage: Shortage | None = None
        self.now = False
        self.doing, self.takes, self.saving = "this step", 0.0, 0
        self._interactive = self._held = interactive
        self._say: Callable[[str], None] | None = None
        self._strike = False  # the next signal raises
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # Python lets only the main thread take signals; elsewhere (a notebook's worker) the caller keeps its own.
        if threading.current_thread() is not threading.main_thread():
            return self
        # Without `__exit__` an exception from here would leave the handlers
        held, self._held = (
            self._held,
            True,
        )
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
        if self.requested() and not held:
            raise self.not_begun() from error
        if self.now and isinstance(error, KeyboardInterrupt) and not self._interactive:
            raise StoppedError(
                f"stopped by {self.signal}", fix="start the same command again"
            ) from error

    def hold(self, say: Callable[[str], None] | None = None) -> None:
        """From here on there is something to save: the loop ends the run, not the handler. When a signal comes, `say` takes
        a line at once, in another thread. Held already, the loop that comes sees a signal of before."""
        held, self._say, self._held = self._held, say, True
        if self.requested() and not held:  # a library swallowed the KeyboardInterrupt
            raise self.not_begun()

    def requested(self) -> bool:
        return self.signal is not None or self.shortage is not None

    def ask(self, shortage: Shortage) -> None:
        """Ask for a stop from another thread, as a signal would."""
        self.shortage = shortage
        if self._say is not None:
            self._say(f"memory is short: stopping after {self.doing}. {shortage.text}")
        if not self._held and self._before:
            _thread.interrupt_main(next(iter(self._before)))

    def not_begun(self) -> StoppedError:
        """The error of a stop before the first step."""
        why, fix = "there was nothing to save yet", "start the same command again"
        if self.shortage is not None:
            return ShortOfMemoryError(
                f"{SHORT} before the first step",
                why=f"{self.shortage.text}; {why}",
                fix=f"{END}, then {fix}",
            )
        return StoppedEarlyError(
            f"stopped by {self.signal} before the first step", why=why, fix=fix
        )

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.shortage is not None and not self._held and self.signal is None:
            raise Interrupted
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
                    # The handler may have run before `_strike` was set
                    os.kill(os.getpid(), signal.SIGINT)
                elif name not in told:
                    told.add(name)
                    again = "; press again to stop now" if name == "SIGINT" else ""
                    pressed = now if again else pressed
                    if self._say is not None:
                        self._say(f"{name}: stopping after {self.doing}{again}")

    def _leave(self) -> None:
        _entered.remove(self)
        signal.set_wakeup_fd(self._wakeup)
        # Ends the watcher, whose own signal comes while the handler is still there
        os.close(self._writer)
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
