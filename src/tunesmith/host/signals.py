"""Handling of stop requests: signals that ask a command to save and end, and low host memory.

The signals are SIGTERM, SIGINT (ctrl-C), SIGHUP (a closed terminal) and SIGUSR1 (from Slurm). If
the host's memory is low, a thread can request a stop in the same way.

A signal that is ignored when a command starts remains ignored. `nohup` ignores SIGHUP for its
command, and a shell ignores SIGINT for its background jobs. In a forked child process, the handlers
from before are restored.
"""

import _thread
import logging
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

from tunesmith.errors import EXIT_INTERRUPTED, LowMemoryError, StoppedEarlyError, StoppedError
from tunesmith.host.streams import visible

log = logging.getLogger(__name__)

SIGNAL_NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
SHORT = "stopped because memory is low"
FREE_MEMORY_FIX = "close the programs that use the memory"
# Environment variable. The job script of `launch slurm` sets it if the script requeues the job
# after SIGUSR1.
REQUEUE = "TUNESMITH_REQUEUE"
# Value of `StopRequest.patience` while a command runs only Python code, which ends quickly after a
# signal.
STOP_PATIENCE_SECONDS = 0.7
# Two SIGINTs within this time (in seconds) count as one press of ctrl-C: the terminal sends a
# SIGINT to all processes, and a wrapper such as `timeout` forwards its SIGINT again.
ONE_PRESS = 0.3
# The same for other signals: schedulers and launchers each send theirs to the ranks. A later signal
# ends a run only if its main thread is blocked, because Slurm repeats SIGTERM at the end of the
# grace time of a preempted job, in which the run may still save.
ONE_REQUEST = 5.0
# Seconds that the main thread has to end after a second signal. It may be blocked in a collective.
END_NOW_SECONDS = 2.0
# Seconds in which the other ranks read that this rank ends.
TELL_SECONDS = 3.0


class Interrupted(KeyboardInterrupt):
    """The exception that a stop signal raises.

    A subclass of KeyboardInterrupt is needed, because `python -m` kills itself with SIGINT after a
    plain KeyboardInterrupt has passed through PyRun_String.
    """


class LowMemory(NamedTuple):
    """A report of low memory: the phase of the run, the memory figures and the largest processes.

    Attributes:
        text: the report in words.
        record: the report in the format of stopped.json.
    """

    text: str
    record: dict[str, Any]


class StopRequest:
    """A context manager that records stop requests of this process: signals and low memory.

    This class handles one process. In `training/stop_control.py`, all ranks of a run agree on a
    stop.

    Until `defer_signals` is called, a signal raises KeyboardInterrupt, because libraries rarely
    catch this exception. At the end of the context, StoppedError replaces it. After `defer_signals`
    a signal is only recorded: the caller reads `signal` and ends the run. A second SIGINT, or a
    second signal of another kind while the main thread is blocked, then sets `now` and raises
    KeyboardInterrupt. If the main thread of a command does not end soon after that, the watcher
    thread ends the process with exit code 130.

    Attributes:
        signal: name of the first stop signal, or None.
        low_memory: the report of low memory, or None.
        now: whether a second signal asked to stop without saving.
        doing: the work that is completed before the run stops, in words for the user.
        takes: duration of this work in seconds.
        saving: bytes of host memory that a save needs.
        saved_step: function that returns the newest saved step of the run, or None.
        nothing_to_save: if True, a deferred signal ends a command immediately. The watcher thread
            calls `on_exit` and exits, because an exception inside torch's C++ code would abort the
            process.
        tell_ranks: function that tells the other ranks that this process ends.
        patience: seconds between a signal that raises KeyboardInterrupt and the exit of the
            process, if the main thread has not ended by then. A library may block the main thread.
            None if the process belongs to another program.

    Args:
        interactive: the command is interactive. SIGTERM and SIGINT are deferred from the start, and
            other signals are not handled.
    """

    # True if this process was started as a command of tunesmith. Only then may a stop signal end
    # the entire process.
    is_of_command = False

    def __init__(self, *, interactive: bool = False) -> None:
        self.signal: str | None = None
        self.low_memory: LowMemory | None = None
        self.now = False
        self.doing = "this step"
        self.takes = 0.0
        self.saving = 0
        self.saved_step: Callable[[], int | None] = lambda: None
        self.nothing_to_save = False
        self.patience: float | None = None
        self.on_exit: Callable[[], object] = lambda: None
        self.tell_ranks: Callable[[], object] = lambda: None
        self._interactive = interactive
        self._deferred = interactive
        self._force_exit = False  # whether the next signal raises Interrupted even if deferred
        self._announces = False
        self._previous_handlers: dict[int, Any] = {}
        self._handled: set[int] = set()  # signals that the main thread has noticed

    def __enter__(self) -> Self:
        # Python sets signal handlers only in the main thread. In another thread, such as a
        # notebook's worker, the caller's handlers are kept.
        if threading.current_thread() is not threading.main_thread():
            return self
        # Defer signals until `__enter__` is complete. If a signal raised an exception inside
        # `__enter__`, `__exit__` would not be called and the handlers would stay installed.
        deferred = self._deferred
        self._deferred = True
        for name in SIGNAL_NAMES[:2] if self._interactive else SIGNAL_NAMES:
            number = signal.Signals[name]
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._previous_handlers[number] = signal.signal(number, self._handle)
        # Python calls a signal handler only between two bytecodes, so a long backward pass delays
        # the handler. But Python writes the number of the signal to this pipe immediately.
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
            raise self.not_begun() from error

    def defer_signals(self, *, announce: bool = True) -> None:
        """Defer signals from now on, because the run has something to save when it stops.

        The training loop then ends the run. Raise StoppedError if a signal came before this call
        and was not deferred.

        Args:
            announce: log a line in another thread as soon as a signal comes.
        """
        deferred = self._deferred
        self._announces = announce
        self._deferred = True
        if self.requested() and not deferred:  # a library has caught the KeyboardInterrupt
            raise self.not_begun()

    def requested(self) -> bool:
        return self.signal is not None or self.low_memory is not None

    def ask(self, low_memory: LowMemory) -> None:
        """Request a stop because of low memory. Another thread may call this."""
        self.low_memory = low_memory
        if self._announces:
            log.info(f"memory is low: stopping after {self.doing}. {low_memory.text}")
        if not self._deferred and self._previous_handlers:
            # Simulate one of the handled signals, so that `_handle` raises KeyboardInterrupt in the
            # main thread.
            _thread.interrupt_main(next(iter(self._previous_handlers)))

    def when(self) -> str:
        """Return a phrase for an error message that says before which step the run was stopped."""
        return "before the next step" if self.saved_step() else "before the first step"

    def not_begun(self) -> StoppedError:
        """Build the error for a stop without a save: before the first training step of this
        process, or at once after a second signal.
        """
        when = self.when()
        fix = how_to_start_again(self.signal)
        why = "there was nothing to save yet"
        if self.now:
            # Steps may have been trained that no checkpoint contains.
            when = "at once, because the signal came twice"
            why = "no checkpoint was written yet"
        step = self.saved_step()
        if step:
            why = f"step {step} is saved"
        if self.low_memory is not None:
            return LowMemoryError(
                f"{SHORT} {when}",
                why=f"{self.low_memory.text}; {why}",
                fix=f"{FREE_MEMORY_FIX}, then {fix}",
            )
        error = StoppedEarlyError(f"stopped by {self.signal} {when}", why=why, fix=fix)
        if self.now:
            error.exit_code = EXIT_INTERRUPTED
        return error

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Record a signal in the main thread. Raise Interrupted if signals are not deferred."""
        is_first = self.signal is None
        self._handled.add(number)
        # The signal was simulated by `ask`, so raise an exception without recording a signal.
        if self.low_memory is not None and is_first and not self._deferred:
            raise Interrupted
        if is_first:
            self.signal = signal.Signals(number).name
        if self._force_exit or (is_first and not self._deferred):
            self._force_exit = False
            raise Interrupted

    def _watch(self, reader: int) -> None:
        """Log each signal once as soon as it comes, and detect a second one.

        This runs in a separate thread.
        """
        received: dict[str, float] = {}  # name -> time
        with open(reader, "rb", buffering=0) as pipe:
            while byte := pipe.read(1):
                number = byte[0]
                if number not in self._previous_handlers:  # a signal that the caller handles
                    continue
                self._end_without_save(number, pipe)
                name = signal.Signals(number).name
                now = time.monotonic()
                is_press = name == "SIGINT"
                seconds = ONE_PRESS if is_press else max(ONE_REQUEST, 2 * self.takes)
                if name not in received:
                    received[name] = now
                    again = "; press ctrl-C again to stop now" if is_press else ""
                    if self._announces:
                        log.info(f"{name}: stopping after {self.doing}{again}")
                elif now - received[name] > seconds and (is_press or number not in self._handled):
                    received[name] = now
                    self.now = True
                    self._force_exit = True
                    # Send the signal again, because `_handle` may have run before `_force_exit` was
                    # set.
                    os.kill(os.getpid(), number)
                    if StopRequest.is_of_command:
                        timer = threading.Timer(END_NOW_SECONDS, self._exit, (name,))
                        timer.daemon = True
                        timer.start()

    def _exit(self, name: str) -> None:
        """Record the stop, print it and exit without the main thread."""
        # `_handle` cannot run while the main thread is blocked.
        self.signal = self.signal or name
        error = self.not_begun()
        with suppress(Exception):
            self.on_exit()
        with suppress(OSError, ValueError):
            print(visible(error.text()), file=sys.stderr, flush=True)
        teller = threading.Thread(target=self.tell_ranks, daemon=True)
        teller.start()
        teller.join(TELL_SECONDS)
        os._exit(error.exit_code)

    def _end_without_save(self, number: int, pipe: FileIO) -> None:
        """Exit if there is nothing to save and the main thread does not end in time.

        This is called in the watcher thread after a signal.
        """
        if self.patience is None or (self._deferred and not self.nothing_to_save):
            return
        end = time.monotonic() + (0 if self._deferred else self.patience)
        # Wait until the main thread leaves the context, which closes the pipe.
        while (left := end - time.monotonic()) > 0:
            if self._deferred or select.select([pipe], [], [], min(left, 0.05))[0]:
                return
        self._exit(signal.Signals(number).name)

    def _leave(self) -> None:
        _entered.remove(self)
        signal.set_wakeup_fd(self._wakeup)
        # Closing the pipe ends the watcher thread. Wait for the thread to end before the handlers
        # are restored, because the thread may still send SIGINT.
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


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Context manager for a block that a stop signal must not interrupt, such as a collective.

    If signals were not deferred before, raise StoppedError at the end of the block for a signal
    that came inside it. In a thread or outside a StopRequest, the block has no effect.
    """
    if not _entered or threading.current_thread() is not threading.main_thread():
        yield
        return
    request = _entered[-1]
    deferred = request._deferred
    request._deferred = True
    try:
        yield
    finally:
        request._deferred = deferred
    if request.requested() and not deferred:
        raise request.not_begun()


@contextmanager
def loading_libraries() -> Iterator[None]:
    """Context manager for the import of libraries such as torch, which must not be interrupted.

    Stop signals are deferred inside the block. If they were not deferred before, nothing needs to
    be saved, so a signal ends a command immediately. Outside a StopRequest, the block has no
    effect.
    """
    if not _entered:
        yield
        return
    request = _entered[-1]
    before = request.nothing_to_save
    request.nothing_to_save = before or not request._deferred
    try:
        with signals_deferred():
            yield
    finally:
        request.nothing_to_save = before


def how_to_start_again(signal_name: str | None) -> str:
    """Return a text that tells the user how to start a run again after a signal."""
    if signal_name == "SIGUSR1" and os.environ.get(REQUEUE):
        return "do nothing: Slurm requeues the job, and the run resumes by itself"
    return "start the same command again"


def wait_for_signal(seconds: float) -> None:
    """Wait for `seconds`, or until a StopRequest records a stop signal."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not any(request.requested() for request in _entered):
        time.sleep(0.05)


def ignore_stop_signals() -> None:
    """Ignore stop signals until the process ends.

    Call this when the exit code is known, so that a signal during the interpreter's shutdown cannot
    change the exit code.
    """
    for name in SIGNAL_NAMES:
        signal.signal(signal.Signals[name], signal.SIG_IGN)
