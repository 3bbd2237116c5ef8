"""Guard thread that stops a run before the host's memory is exhausted.

If the available memory falls below a minimum (the "floor"), all ranks save and end, and a message
says which processes use the memory. Without the guard the kernel would kill the largest process,
which is the training. On unified memory (GB10) the driver fails first, and the machine freezes
without killing a process. A thread checks the memory once per second, and up to 8 times per second
near the floor. A check takes about 1 ms.
"""

import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from tunesmith.distributed.ranks import Ranks
from tunesmith.host.memory import (
    ROOT,
    Holder,
    MemoryFigures,
    drop_pages,
    gib,
    largest_processes,
    memory_floor,
    own_memory,
    read_memory,
    unified_budget,
)
from tunesmith.host.signals import LowMemory, StopRequest

# Limits of MemFree on unified memory. Below UNIFIED_FREE_BYTES, page cache is dropped. If MemFree
# is then below UNIFIED_MIN_FREE_BYTES, the run ends. Measured on GB10: model loads succeeded down
# to 2.6 GiB, and allocations failed at 2.5 GiB although 22 GiB were available. If the run can
# allocate less memory than a limit, the limit is reduced to this amount.
UNIFIED_FREE_BYTES = 8 << 30
UNIFIED_MIN_FREE_BYTES = 3 << 30
# Seconds that a run needs to save and end on a busy machine. Before that, the run completes the
# work in progress, which takes `stop.takes` seconds.
SAVE_SECONDS = 3.0
MAX_WORK_SECONDS = 30.0  # maximum of `stop.takes` that is used in the estimate
# Seconds between two checks. At the maximum interval the checks use 0.1 % of a core, and at the
# minimum interval 1 %.
MAX_LOOK_SECONDS = 1.0
MIN_LOOK_SECONDS = 0.12
# Maximum bytes per second at which one process can fill memory, limited by page faults.
FILL_BYTES_PER_SECOND = 4 << 30
# Seconds between two drops of page cache. URGENT_PAUSE_SECONDS is used while MemFree is below the
# minimum. Otherwise the pause starts at PAUSE_SECONDS and is doubled after each drop that freed
# little, up to the maximum.
URGENT_PAUSE_SECONDS = 2.0
PAUSE_SECONDS = 30.0
MAX_PAUSE_SECONDS = 480.0
MIN_CACHED_BYTES = 2 << 30  # minimum size of page cache that is worth dropping
MAX_DROPPED_FILES = 10_000  # maximum number of files to open; a data folder may have millions


def drop_page_cache(paths: Sequence[Path], root: Path = ROOT) -> None:
    """Drop the page cache of the files in `paths`. If the process runs as root, drop the page cache
    of all files too.

    Dropping the cache of single files needs no permission. As root, the switches in /proc/sys/vm
    are used, because they free memory in large blocks: with them, every load of a model on GB10
    succeeded. Both ways work even when no memory is left.
    """
    for file in islice(_files_below(paths), MAX_DROPPED_FILES):
        with suppress(OSError):  # the file was removed or is not readable
            handle = os.open(file, os.O_RDONLY)
            try:
                drop_pages(handle)
            finally:
                os.close(handle)
    with suppress(OSError):  # not root, or in a container
        for name in ("drop_caches", "compact_memory"):
            (root / "proc/sys/vm" / name).write_text("1", encoding="ascii")


def _files_below(paths: Sequence[Path]) -> Iterator[Path]:
    """Yield the regular files in `paths` and their folders.

    Other files, such as pipes, are skipped because opening them could block forever.
    """
    for path in paths:
        if path.is_file():
            yield path
        for folder, _, names in os.walk(path):
            for name in names:
                file = Path(folder, name)
                if file.is_file():
                    yield file


@dataclass
class MemoryGuard:
    """Thread that checks the host's memory while the run loads, trains and saves. It requests a
    stop from `stop` if memory becomes low.

    Attributes:
        files: function that returns the files and folders that the run reads and writes. Their page
            cache is dropped on unified memory.
        unified: whether the GPU shares the host's memory. None until a GPU is used.
        others: readings of (time, bytes that other processes use plus an unknown constant).
        pause: seconds between two drops of page cache.
        dropped_at: time of the last drop.
        still_short: whether MemFree was below the minimum both before and after the last drop.
    """

    stop: StopRequest
    ranks: Ranks
    files: Callable[[], Sequence[Path]] = tuple
    read: Callable[[], MemoryFigures] = read_memory
    make_room: Callable[[Sequence[Path]], object] = drop_page_cache
    clock: Callable[[], float] = time.monotonic
    unified: bool | None = None
    others: deque[tuple[float, int]] = field(default_factory=deque, init=False)
    pause: float = field(default=PAUSE_SECONDS, init=False)
    dropped_at: float = field(default=-MAX_PAUSE_SECONDS, init=False)
    still_short: bool = field(default=False, init=False)
    _closing: threading.Event = field(default_factory=threading.Event, init=False)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> "MemoryGuard":
        if sys.platform == "linux":  # macOS compresses memory and does not kill processes
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(1.0)

    def _watch(self) -> None:
        wait = 0.0
        while not self._closing.wait(wait) and self.stop.low_memory is None:
            wait = self.look()

    def look(self) -> float:
        """Check the memory once, and request a stop if necessary.

        Returns:
            Seconds until the next check.
        """
        figures = self.read()
        allocator = self._allocator_bytes()
        this_run = own_memory(self.ranks.heartbeat.peers.local_processes()) + allocator
        floor = memory_floor(figures.limit or figures.total, unified=bool(self.unified))
        floor += self.stop.saving
        left = figures.room - floor

        # Other processes use total - room - this_run bytes. The total is constant, so leave it out:
        # only the growth of the value is needed.
        growth = self._growth(-figures.room - this_run)
        reason = ""
        # If other processes allocated `growth` bytes during the save, the available memory would
        # fall below the floor.
        if left < growth:
            reason = f"{gib(figures.room)} GiB are available, but the minimum is {gib(floor)} GiB"
            if left >= 0:
                reason += f"; other processes took {gib(growth)} GiB in {self.ahead:.0f} s"
        elif self.unified:
            # Only the GPU driver needs MemFree, up to the amount that torch's allocator may still
            # request. For all other requests, the kernel drops page cache itself.
            enough = min(UNIFIED_FREE_BYTES, unified_budget(figures))
            if figures.free < enough and figures.cached > MIN_CACHED_BYTES:
                minimum = min(UNIFIED_MIN_FREE_BYTES, enough)
                reason = self._drop_page_cache(figures, minimum)
                # If MemFree is near the minimum, the next check must be soon.
                left = min(left, max(0, figures.free - minimum))

        if reason:
            self._request_stop(reason, figures, floor, allocator)
        # Check again before a process can fill the memory down to the floor.
        seconds_to_floor = (left - growth) / FILL_BYTES_PER_SECOND
        return min(MAX_LOOK_SECONDS, max(MIN_LOOK_SECONDS, seconds_to_floor))

    def _allocator_bytes(self) -> int:
        """Return the bytes of host memory that torch's allocator holds, which is 0 without
        unified memory.
        """
        if "torch" not in sys.modules:
            return 0
        import torch  # waits if another thread is importing torch

        from tunesmith.runtime.device import is_integrated

        if not torch.cuda.is_initialized():
            return 0
        if self.unified is None:
            self.unified = is_integrated(torch.device("cuda", torch.cuda.current_device()))
        return torch.cuda.memory_reserved() if self.unified else 0

    @property
    def ahead(self) -> float:
        """Seconds that a stop of the run takes.

        The time of a step is limited to MAX_WORK_SECONDS, because the first step compiles and takes
        much longer than later steps.
        """
        return SAVE_SECONDS + min(self.stop.takes, MAX_WORK_SECONDS)

    def _growth(self, others: int) -> int:
        """Return the bytes that other processes allocated in a recent period as long as a stop
        takes. They may allocate as much again during the stop.

        Args:
            others: current value of a number that increases by the bytes that other processes
                allocate.
        """
        now = self.clock()
        ahead = self.ahead
        readings = self.others
        readings.append((now, others))
        # Always keep one reading that is at least as old as the duration of a stop, so that the
        # readings cover this duration.
        while len(readings) > 2 and readings[1][0] <= now - ahead:
            readings.popleft()
        minimum = min(value for _, value in readings)
        # The readings may cover more than the duration of a stop. Divide their growth by the number
        # of such durations.
        first_time, _ = readings[0]
        spans = max(1.0, (now - first_time) / ahead)
        return int((others - minimum) / spans)

    def _drop_page_cache(self, figures: MemoryFigures, minimum: int) -> str:
        """Drop the page cache, unless it was dropped only a short time ago.

        Returns:
            The reason why the run must end if an earlier drop did not help, else "".
        """
        since = self.clock() - self.dropped_at
        critical = figures.free < minimum
        if since < (URGENT_PAUSE_SECONDS if critical else self.pause):
            return ""
        if critical and self.still_short:
            free = f"MemFree is {gib(figures.free)} GiB"
            return f"{free}, and dropping page cache did not raise it above {gib(minimum)} GiB"

        self.dropped_at = self.clock()
        self.make_room(self.files())
        after = self.read()
        self.still_short = critical and after.free < minimum
        if after.free - figures.free >= MIN_CACHED_BYTES / 2:
            self.pause = PAUSE_SECONDS
        else:
            self.pause = min(2 * self.pause, MAX_PAUSE_SECONDS)
        return ""

    def _request_stop(
        self, reason: str, figures: MemoryFigures, floor: int, allocator: int
    ) -> None:
        """Request a stop, and print which processes use the memory."""
        phase = self.ranks.heartbeat.activity.doing
        host = socket.gethostname()
        text = f"{phase}, on {host}: {reason}. {figures.describe()}"
        if allocator:
            text += f"; the GPU's allocator holds {gib(allocator)} GiB"
        record = {
            "phase": phase,
            "host": host,
            "floor_bytes": floor,
            "allocator_bytes": allocator,
            **{f"{name}_bytes": value for name, value in vars(figures).items()},
        }

        # Request the stop before the processes are listed, because the list takes 0.1 s.
        self.stop.low_memory = LowMemory(text, record)
        ranks = self.ranks.heartbeat.peers.local_processes()
        ours, others = largest_processes(ranks)
        if self.ranks.world > 1:
            ours = [process._replace(name=f"rank {ranks[process.pid]}") for process in ours]
        text += f"; processes of this run: {_names(ours)} GiB"
        text += f"; largest other processes: {_names(others)} GiB"

        processes = {
            "processes": [process._asdict() for process in ours],
            "other_processes": [process._asdict() for process in others],
        }
        self.stop.ask(LowMemory(text, record | processes))


def _names(processes: Sequence[Holder]) -> str:
    return ", ".join(f"{name} ({pid}) {gib(size)}" for pid, name, size in processes)
