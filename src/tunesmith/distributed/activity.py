"""The activity of this rank: its phase, its step, and the current location of its main thread."""

import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from types import FrameType

from tunesmith.distributed.beats import Beat, RunClock
from tunesmith.run_dir import Phase

# Seconds without progress after which a rank counts as stuck. The limit is long compared with the
# seconds that a micro batch or a token takes if the model fits into the memory of the machine.
STUCK_AFTER_S = 30 * 60.0
# Minimum number of seconds that all ranks wait in collectives before these count as endless. After
# the first step, the limit is this number of times the longest step, if that is longer.
ENDLESS_AFTER_S = 5 * 60.0
LONGER_THAN_A_STEP = 10
# A collective in these phases can wait for a disk.
WAITING_PHASES = (Phase.JOINING, Phase.SAVING, Phase.SAVING_FINAL)
# Additional seconds for the first forward pass of each shape. They are needed because compiling a
# layer's graphs takes minutes.
COMPILING_S = 30 * 60.0


@dataclass
class Probes:
    """Callbacks that the heartbeat calls to read the state of its process.

    The defaults fit a run of one process.

    Attributes:
        current_collective: returns the name of the collective that the main thread is in, or "". It
            only knows collectives that are called by `torch_private.collective`. `Activity.locate`
            ignores stack frames of the module that defines this function.
        find_error: returns the error of a collective that failed without an exception, or "".
        store_is_closed: returns True if the host of the store is reachable but the process that
            held the store has ended.
        stop_signal: returns the name of the stop signal that this process has received, or "".
        gpu_is_busy: returns whether the GPU has unfinished work. It is called if the main thread
            seems stuck, because a collective call on a GPU returns at once, while the GPU still
            waits for the other ranks.
    """

    current_collective: Callable[[], str] = lambda: ""
    find_error: Callable[[], str] = lambda: ""
    store_is_closed: Callable[[], bool] = lambda: False
    stop_signal: Callable[[], str] = lambda: ""
    gpu_is_busy: Callable[[], bool] = lambda: False


@dataclass(eq=False)
class Activity:
    """The current activity of this rank.

    The main thread records its phase and its progress. The heartbeat thread reads the stack of the
    main thread.

    Attributes:
        beat: the next heartbeat message of this rank. It holds the recorded phase and location.
        step: the last complete step.
        moved_at: the time of the last progress of the main thread, in seconds of `clock`.
        waits_since: the time at which the main thread was first seen in its current collective.
        longest_step: seconds of the longest step so far.
        phase_name: the current phase of the run.
        waited_thread: the identity of the thread that the main thread waits for, or None.
    """

    beat: Beat
    clock: RunClock
    probes: Probes
    step: int = 0
    moved_at: float = 0.0
    waits_since: float = 0.0
    longest_step: float = 0.0
    phase_name: str = ""
    waited_thread: int | None = None

    def phase(self, name: str, limit: float | None = None) -> None:
        """Begin a phase of the run. See `Heartbeat.phase`."""
        self.phase_name = name
        self.beat.phase = name
        self.beat.limit = limit or inf
        self.beat.waiting_limit = self.beat.limit
        if limit is not None and name not in WAITING_PHASES:
            endless = max(ENDLESS_AFTER_S, LONGER_THAN_A_STEP * self.longest_step)
            self.beat.waiting_limit = min(self.beat.limit, endless)
        self.progress()

    def progress(self, step: int | None = None) -> None:
        """Record that the main thread has made progress.

        Args:
            step: the last complete step, if it has changed.
        """
        self.moved_at = self.clock.seconds
        if step is not None:
            self.step = step

    @contextmanager
    def waits_for(self, thread: int | None) -> Iterator[None]:
        """Report the stack of another thread as the location of this rank while the `with` block
        runs.

        Use this while the main thread waits for the other thread.

        Args:
            thread: the identity of the thread, or None to report the main thread.
        """
        self.waited_thread = thread
        try:
            yield
        finally:
            self.waited_thread = None

    @property
    def doing(self) -> str:
        """The phase and the last step as text."""
        if not self.step:
            return self.beat.phase
        return f"{self.beat.phase}, step {self.step}"

    def count_beat(self) -> None:
        """Update the counter and the idle time of the next heartbeat message."""
        self.beat.count += 1
        self.beat.idle = self.clock.seconds - self.moved_at
        self.beat.waiting = min(self.beat.idle, self.clock.seconds - self.waits_since)

    def sample(self) -> None:
        """Record the current location of the main thread, or of the thread that it waits for."""
        frames = sys._current_frames()
        main_thread = frames[threading.main_thread().ident or 0]
        # If the thread that the main thread waits for has ended, use the main thread.
        self.locate(traceback.walk_stack(frames.get(self.waited_thread or 0, main_thread)))

    def locate(self, frames: Iterable[tuple[FrameType, int]]) -> None:
        """Record the collective and the line of tunesmith's code that a stack is currently in.

        Args:
            frames: pairs of a stack frame and a line number, the innermost frame first.
        """
        collective = self.probes.current_collective()
        own_line = ""
        for frame, line in frames:
            module = str(frame.f_globals.get("__name__"))
            function = frame.f_code.co_name
            if module == self.probes.current_collective.__module__:
                continue
            # Skip the function `wrapper`: torch's logger wraps each collective in it.
            if module.startswith("torch.distributed") and function != "wrapper":
                collective = collective or function
            elif module == "__main__" or module.startswith("tunesmith."):
                own_line = f"{module}:{line}"
                break
        beat = self.beat
        # A call of an NCCL collective returns at once. If the main thread waits for its result, no
        # stack frame shows the collective.
        # Before the first step has been measured, the GPU may also be busy with autotuning.
        limit = beat.waiting_limit if self.longest_step else beat.limit
        if not collective and beat.idle > limit / 2 and self.probes.gpu_is_busy():
            collective = "a wait for the GPU"
        if not collective or collective != beat.collective:
            self.waits_since = self.clock.seconds
        beat.collective = collective
        places = (beat.phase, f"step {self.step}", collective, own_line)
        beat.place = ", ".join(place for place in places if place)
