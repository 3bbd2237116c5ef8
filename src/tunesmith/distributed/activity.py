"""The position of this rank: its phase, its step, and what its main thread does at this moment."""

import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from types import FrameType

from tunesmith.distributed.beats import Beat, RunClock

# Seconds without progress. On a machine that holds the model a micro batch or a token takes
# seconds.
STUCK_AFTER_S = 30 * 60.0
# The first forward of a shape compiles the graphs of a layer, in minutes: so much more.
COMPILING_S = 30 * 60.0


@dataclass
class Probes:
    """The questions of a heartbeat to its process; the defaults are a run of one process.

    Attributes:
        current_collective: the collective that the main thread is in, if not one of torch's own.
            Lines of the module that defines it are not where a rank stands.
        find_error: what went wrong with a collective that has raised nothing; empty: nothing.
        store_is_closed: whether the machine of the store answers, and the process that hosted the
            store is gone.
        stop_signal: which signal requires this process to stop; empty: none.
        gpu_is_busy: called where the main thread seems stuck. Collectives return at once on a GPU:
            it is there that they wait.
    """

    current_collective: Callable[[], str] = lambda: ""
    find_error: Callable[[], str] = lambda: ""
    store_is_closed: Callable[[], bool] = lambda: False
    stop_signal: Callable[[], str] = lambda: ""
    gpu_is_busy: Callable[[], bool] = lambda: False


@dataclass(eq=False)
class Activity:
    """The work that this rank does, noted by its main thread and sampled by the heartbeat's.

    Attributes:
        beat: the one that this rank sends next, where all of it is noted.
        step: the last complete one.
        moved_at: when the main thread last moved on, by the clock.
        phase_name: the part of the run that goes on.
        phase_prefix, longest_limit: what phases are part of, and the limit of each.
        waited_thread: the identity of the thread that the main thread waits for.
    """

    beat: Beat
    clock: RunClock
    probes: Probes
    step: int = 0
    moved_at: float = 0.0
    phase_name: str = ""
    phase_prefix: str = ""
    longest_limit: float = inf
    waited_thread: int | None = None

    def phase(self, name: str, limit: float | None = None) -> None:
        """Begin a part of the run; see `Heartbeat.phase`."""
        self.phase_name = name
        self.beat.phase = f"{self.phase_prefix}{name}"
        self.beat.limit = min(limit or inf, self.longest_limit)
        self.progress()

    def progress(self, step: int | None = None) -> None:
        """Note that the main thread moves on; `step`: the last complete one."""
        self.moved_at = self.clock.seconds
        if step is not None:
            self.step = step

    @contextmanager
    def waits_for(self, thread: int | None) -> Iterator[None]:
        """Inside, the main thread waits for another one: where that stands is this rank's place."""
        self.waited_thread = thread
        try:
            yield
        finally:
            self.waited_thread = None

    @property
    def doing(self) -> str:
        """The phase and the last step, in words."""
        if not self.step:
            return self.beat.phase
        return f"{self.beat.phase}, step {self.step}"

    def count_beat(self) -> None:
        """Bring the numbers of the next beat up to date."""
        self.beat.count += 1
        self.beat.idle = self.clock.seconds - self.moved_at

    def sample(self) -> None:
        """Note where the main thread stands now, or the thread that it waits for."""
        frames = sys._current_frames()
        main_thread = frames[threading.main_thread().ident or 0]
        # That thread may have ended a moment ago.
        thread = frames.get(self.waited_thread or 0, main_thread)
        self.locate(traceback.walk_stack(thread))

    def locate(self, frames: Iterable[tuple[FrameType, int]]) -> None:
        """Note the collective and our own line, by frames and lines from the innermost on."""
        collective = self.probes.current_collective()
        own_line = ""
        for frame, line in frames:
            module = str(frame.f_globals.get("__name__"))
            function = frame.f_code.co_name
            if module == self.probes.current_collective.__module__:
                continue
            # torch wraps each of its collectives in a logger's `wrapper`.
            if module.startswith("torch.distributed") and function != "wrapper":
                collective = collective or function
            elif module == "__main__" or module.startswith("tunesmith."):
                own_line = f"{module}:{line}"
                break
        beat = self.beat
        # NCCL's collectives return at once, so a main thread that waits for one shows no frame of
        # it.
        if not collective and beat.idle > beat.limit / 2 and self.probes.gpu_is_busy():
            collective = "a wait for the GPU"
        beat.collective = collective
        places = (beat.phase, f"step {self.step}", collective, own_line)
        beat.place = ", ".join(place for place in places if place)
