"""Signals that ask a command to save and end, and the same request where memory is short.

SIGTERM, SIGINT (ctrl-C), SIGHUP (a closed laptop) and SIGUSR1 (Slurm). A thread may ask for the
same where the host's memory is short.

A signal that is ignored when a command starts stays ignored: `nohup` does that with SIGHUP, a shell
with the SIGINT of its background jobs. A forked child has the handlers that its parent had before.
"""

import _thread
import logging
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from types import FrameType
from typing import Any, NamedTuple, Self

from tunesmith.errors import EXIT_STOPPED, LowMemoryError, StoppedEarlyError, StoppedError
from tunesmith.host.streams import visible

log = logging.getLogger(__name__)

SIGNAL_NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
SHORT = "stopped because memory is low"
FREE_MEMORY_FIX = "close the programs that use the memory"
# Set by the script of `launch slurm` where it puts the job back into the queue after SIGUSR1.
REQUEUE = "TUNESMITH_REQUEUE"
# For `StopRequest.patience`, where Python alone has to end.
STOP_PATIENCE_SECONDS = 0.7
# Seconds; a wrapper such as `timeout` passes on the SIGINT that the terminal has sent to all.
ONE_PRESS = 0.3


class Interrupted(KeyboardInterrupt):
    """Raised by a stop signal.

    `python -m` ends by SIGINT once a plain KeyboardInterrupt has passed PyRun_String.
    """


class LowMemory(NamedTuple):
    """Memory is short: the phase, the figures and who holds it.

    In words, and as stopped.json has them.
    """

    text: str
    record: dict[str, Any]


class StopRequest:
    """A context that notes the first stop signal, and in `low_memory` that memory is short.

    What this process was asked; what the ranks of a run agree on is in `training/stop_control.py`.

    Before `defer_signals` a signal raises a KeyboardInterrupt, which libraries let pass, and the
    context ends with StoppedError whatever a library raised for it. From `defer_signals` on signals
    are deferred: the caller looks at `signal` and ends by itself; a second ctrl-C sets `now` and
    raises the same.

    Attributes:
        doing: what is completed before the stop, as a user reads it.
        takes: seconds of that.
        saving: bytes of the host that a save takes.
        saved_step: that an earlier start has saved, 0 for none.
        nothing_to_save: while it is set, a signal that is deferred ends a command at once, after
            `on_exit`, in the watcher's thread; an exception inside torch's C++ code would abort.
        patience: of a command, seconds that the main thread has to end after a signal that raises:
            a library may hold it for long. Then the process ends too. None: it is a program's.

    Args:
        interactive: for commands that answer: SIGTERM and SIGINT are deferred from the start.
    """

    # The process is a command's: a start may end it.
    is_of_command = False

    def __init__(self, *, interactive: bool = False) -> None:
        self.signal: str | None = None
        self.low_memory: LowMemory | None = None
        self.now = False
        self.doing = "this step"
        self.takes = 0.0
        self.saving = 0
        self.saved_step = 0
        self.nothing_to_save = False
        self.patience: float | None = None
        self.on_exit: Callable[[], object] = lambda: None
        self._interactive = interactive
        self._deferred = interactive
        self._force_exit = False  # the next signal raises
        self._announces = False
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # Python lets only the main thread take signals; elsewhere (a notebook's worker) the caller
        # keeps its own.
        if threading.current_thread() is not threading.main_thread():
            return self
        # Without `__exit__` an exception from here would leave the handlers.
        deferred = self._deferred
        self._deferred = True
        for name in SIGNAL_NAMES[:2] if self._interactive else SIGNAL_NAMES:
            number = signal.Signals[name]
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._previous_handlers[number] = signal.signal(number, self._handle)
        # Python calls a handler between two bytecodes, which may be a whole backward later; it
        # writes the signal's number to this pipe at once.
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, args=(reader,), daemon=True)
        self._watcher.start()
        _entered.append(self)
        self._deferred = deferred
        return self

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        deferred = self._deferred
        self._deferred = True
        if self in _entered:
            self._leave()
        if self.requested() and not deferred:
            raise self.not_begun() from error
        if self.now and isinstance(error, KeyboardInterrupt) and not self._interactive:
            fix = "start the same command again"
            raise StoppedError(f"stopped by {self.signal}", fix=fix) from error

    def defer_signals(self, *, announce: bool = True) -> None:
        """Defer signals: from here on there is something to save, and the loop ends the run.

        When a signal comes, `announce` logs a line at once, in another thread. Deferred already,
        the loop that comes sees a signal of before.
        """
        deferred = self._deferred
        self._announces = announce
        self._deferred = True
        if self.requested() and not deferred:  # a library swallowed the KeyboardInterrupt
            raise self.not_begun()

    @contextmanager
    def loading_libraries(self) -> Iterator[None]:
        """Defer signals in the block, while there is nothing to save."""
        deferred = self._deferred
        self._deferred = self.nothing_to_save = True
        try:
            yield
        finally:
            self._deferred = deferred
            self.nothing_to_save = False

    def requested(self) -> bool:
        return self.signal is not None or self.low_memory is not None

    def ask(self, low_memory: LowMemory) -> None:
        """Ask for a stop from another thread, as a signal would."""
        self.low_memory = low_memory
        if self._announces:
            log.info(f"memory is low: stopping after {self.doing}. {low_memory.text}")
        if not self._deferred and self._previous_handlers:
            # Any signal that has our handler, which raises in the main thread.
            _thread.interrupt_main(next(iter(self._previous_handlers)))

    def when(self) -> str:
        """When the stop came that ended a start while it was loading, in words for an error."""
        return "before a further step" if self.saved_step else "before the first step"

    def not_begun(self) -> StoppedError:
        """The error of a stop before the first step."""
        when = self.when()
        why = "there was nothing to save yet"
        if self.saved_step:
            why = f"there was nothing new to save: step {self.saved_step} is saved"
        fix = "start the same command again"
        if self.low_memory is not None:
            return LowMemoryError(
                f"{SHORT} {when}",
                why=f"{self.low_memory.text}; {why}",
                fix=f"{FREE_MEMORY_FIX}, then {fix}",
            )
        what = f"stopped by {self.signal} {when}"
        return StoppedEarlyError(what, why=why, fix=fix)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """The handler of the signals, in the main thread."""
        is_first = self.signal is None
        # `ask` interrupts by a signal that nobody has sent: it is not noted.
        if self.low_memory is not None and is_first and not self._deferred:
            raise Interrupted
        if is_first:
            self.signal = signal.Signals(number).name
        if self._force_exit or (is_first and not self._deferred):
            self._force_exit = False
            raise Interrupted

    def _watch(self, reader: int) -> None:
        """Log each signal once, as soon as it comes, and count presses of ctrl-C; in a thread."""
        logged = set()
        last_press = math.inf
        with open(reader, "rb", buffering=0) as pipe:
            while byte := pipe.read(1):
                number = byte[0]
                if number not in self._previous_handlers:  # the caller's own
                    continue
                self._end_without_save(number, pipe)
                name = signal.Signals(number).name
                now = time.monotonic()
                if name == "SIGINT" and now - last_press > ONE_PRESS:
                    last_press = now
                    self.now = True
                    self._force_exit = True
                    # The handler may have run before `_force_exit` was set.
                    os.kill(os.getpid(), signal.SIGINT)
                elif name not in logged:
                    logged.add(name)
                    again = ""
                    if name == "SIGINT":
                        last_press = now
                        again = "; press again to stop now"
                    if self._announces:
                        log.info(f"{name}: stopping after {self.doing}{again}")

    def _end_without_save(self, number: int, pipe: FileIO) -> None:
        """End a command that has nothing to save, if its main thread does not by itself."""
        if self.patience is None or (self._deferred and not self.nothing_to_save):
            return
        end = time.monotonic() + (0 if self._deferred else self.patience)
        # The pipe is closed where the context is left.
        while (left := end - time.monotonic()) > 0:
            if self._deferred or select.select([pipe], [], [], min(left, 0.05))[0]:
                return
        # The handler may have to wait for the main thread.
        self.signal = self.signal or signal.Signals(number).name
        with suppress(Exception):
            self.on_exit()
        with suppress(OSError, ValueError):
            print(visible(self.not_begun().text()), file=sys.stderr, flush=True)
        os._exit(EXIT_STOPPED)

    def _leave(self) -> None:
        _entered.remove(self)
        signal.set_wakeup_fd(self._wakeup)
        # Ends the watcher, whose own signal comes while the handler is still there.
        os.close(self._writer)
        try:
            self._watcher.join(1.0)
        finally:
            for number, handler in self._previous_handlers.items():
                signal.signal(number, handler)


_entered: list[StopRequest] = []


def _leave_all() -> None:
    while _entered:
        _entered[-1]._leave()


os.register_at_fork(after_in_child=_leave_all)


def wait_for_signal(seconds: float) -> None:
    """Wait until a stop signal comes that a StopRequest defers, at most so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not any(request.requested() for request in _entered):
        time.sleep(0.05)


def ignore_stop_signals() -> None:
    """Ignore them from here on.

    The exit code is decided, and one that comes while the interpreter ends must not change it.
    """
    for name in SIGNAL_NAMES:
        signal.signal(signal.Signals[name], signal.SIG_IGN)
