"""Stops a run before the host's memory is used up.

Below a floor all ranks save and end, and the user reads who holds the memory. A kernel without
memory kills the largest process, which is the one that trains; on unified memory (GB10) the driver
fails first and the machine freezes, without a kill. A thread looks at the figures, once a second
while there is room and up to 8 times as often near the floor. A look takes about 1 ms.
"""

import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

import torch

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
from tunesmith.runtime.device import is_integrated

# MemFree on unified memory, below which page cache is dropped, and below which the run ends where
# that did not help: 2.6 GiB was the least that a load passed with, and allocations failed at 2.5
# although 22 were available. Less is enough where a run can take no more than less.
UNIFIED_FREE_BYTES = 8 << 30
UNIFIED_MIN_FREE_BYTES = 3 << 30
# Seconds that a save and the end take, on a busy machine; before it comes `stop.takes`.
SAVE_SECONDS = 3.0
MAX_WORK_SECONDS = 30.0  # seconds of `stop.takes` that count
# Seconds between two looks: the maximum takes a thousandth of a core, the minimum a hundredth.
MAX_LOOK_SECONDS = 1.0
MIN_LOOK_SECONDS = 0.12
# Bytes a second that memory is filled with: page faults of one process.
FILL_BYTES_A_SECOND = 4 << 30
# Seconds between two times that page cache is dropped: while MemFree is below the least; else the
# second, doubled where a drop brought nothing, up to the third.
URGENT_PAUSE_SECONDS = 2.0
PAUSE_SECONDS = 30.0
MAX_PAUSE_SECONDS = 480.0
MIN_CACHED_BYTES = 2 << 30  # of page cache, which are worth it
MAX_DROPPED_FILES = 10_000  # that are opened for it: a folder of rows may hold millions


def drop_page_cache(paths: Sequence[Path], root: Path = ROOT) -> None:
    """Turn page cache into free memory: that of the files below `paths`, and as root that of all.

    The first needs no right, and neither takes memory: beside a full allocator there is none to
    take. The kernel's own switches took GB10s through every load, and give free memory in large
    blocks.
    """
    for file in islice(_files_below(paths), MAX_DROPPED_FILES):
        with suppress(OSError):  # it was removed, or may not be read
            handle = os.open(file, os.O_RDONLY)
            try:
                drop_pages(handle)
            finally:
                os.close(handle)
    with suppress(OSError):  # not root, or a container
        for name in ("drop_caches", "compact_memory"):
            (root / "proc/sys/vm" / name).write_text("1", encoding="ascii")


def _files_below(paths: Sequence[Path]) -> Iterator[Path]:
    """The regular files among `paths` and in their folders; opening others may wait for ever."""
    for path in paths:
        if path.is_file():
            yield path
        for folder, _, names in os.walk(path):
            for name in names:
                file = Path(folder, name)
                if file.is_file():
                    yield file


class MemoryGuard:
    """Watches the host's memory in a thread, from the load to the save, and asks `stop` for a stop.

    Attributes:
        files: that the run reads and writes, and folders of them; their page cache is dropped on
            unified memory.
        unified: whether the GPU shares the host's memory; None until one is in use.
        others: times, and what this process did not take then.
        pause: seconds between two times that page cache is dropped.
        dropped_at: when that happened last.
        still_short: MemFree was below the least before that, and after it.
    """

    def __init__(
        self,
        stop: StopRequest,
        ranks: Ranks,
        files: Sequence[Path] = (),
        *,
        read: Callable[[], MemoryFigures] = read_memory,
        make_room: Callable[[Sequence[Path]], object] = drop_page_cache,
        clock: Callable[[], float] = time.monotonic,
        unified: bool | None = None,
    ) -> None:
        self.stop = stop
        self.ranks = ranks
        self.files = files
        self.read = read
        self.make_room = make_room
        self.clock = clock
        self.unified = unified
        self.others: deque[tuple[float, int]] = deque()
        self.pause = PAUSE_SECONDS
        self.dropped_at = -MAX_PAUSE_SECONDS
        self.still_short = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> "MemoryGuard":
        if sys.platform == "linux":  # macOS compresses memory, and kills nothing
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
        """Read the figures once, and ask for a stop where it is time.

        Returns:
            Seconds until the next look is due.
        """
        figures = self.read()
        allocator = self._allocator_bytes()
        this_run = own_memory(self.ranks.heartbeat.peers.local_processes()) + allocator
        floor = memory_floor(figures.limit or figures.total, unified=bool(self.unified))
        floor += self.stop.saving
        left = figures.room - floor
        # Others have total - room - this_run; the total is constant, and only growth is read.
        growth = self._growth(-figures.room - this_run)
        reason = ""
        # What others may take while the run is saved would reach below the floor.
        if left < growth:
            reason = f"{gib(figures.room)} GiB are available, and the limit is {gib(floor)} GiB"
            if left >= 0:
                reason += f"; others took {gib(growth)} GiB in {self.ahead:.0f} s"
        elif self.unified:
            # The driver alone needs free memory, for what the allocator may still take: all else
            # drops page cache itself.
            enough = min(UNIFIED_FREE_BYTES, unified_budget(figures))
            if figures.free < enough and figures.cached > MIN_CACHED_BYTES:
                least = min(UNIFIED_MIN_FREE_BYTES, enough)
                reason = self._drop(figures, least)
                # Near the least the next look comes soon.
                left = min(left, max(0, figures.free - least))
        if reason:
            self._ask(reason, figures, floor, allocator)
        # No sooner than memory can be filled as far as the floor.
        return min(MAX_LOOK_SECONDS, max(MIN_LOOK_SECONDS, (left - growth) / FILL_BYTES_A_SECOND))

    def _allocator_bytes(self) -> int:
        """Count the bytes of host memory that torch's allocator has: on unified memory alone."""
        if not torch.cuda.is_initialized():
            return 0
        if self.unified is None:
            self.unified = is_integrated(torch.device("cuda", torch.cuda.current_device()))
        return torch.cuda.memory_reserved() if self.unified else 0

    @property
    def ahead(self) -> float:
        """Seconds that a stop takes.

        The first step compiles, and says nothing of those that follow.
        """
        return SAVE_SECONDS + min(self.stop.takes, MAX_WORK_SECONDS)

    def _growth(self, others: int) -> int:
        """Measure what others took in as long as a stop takes: they may do so again.

        others: a figure that grows as they take memory.
        """
        now = self.clock()
        self.others.append((now, others))
        # One reading as old as a stop takes stays, however rare the looks are.
        while len(self.others) > 2 and self.others[1][0] <= now - self.ahead:
            self.others.popleft()
        least = min(value for _, value in self.others)
        # The readings may cover more than one such time: their growth is that of all of it.
        spans = (now - self.others[0][0]) / self.ahead
        return int((others - least) / max(1.0, spans))

    def _drop(self, figures: MemoryFigures, least: int) -> str:
        """Let the kernel give up page cache where it is time.

        Returns:
            Why the run must end, where that has not helped.
        """
        since = self.clock() - self.dropped_at
        critical = figures.free < least
        if since < (URGENT_PAUSE_SECONDS if critical else self.pause):
            return ""
        if critical and self.still_short:
            free = f"MemFree is {gib(figures.free)} GiB"
            return f"{free}, and dropping page cache leaves it below {gib(least)} GiB"
        self.dropped_at = self.clock()
        self.make_room(self.files)
        after = self.read()
        self.still_short = critical and after.free < least
        if after.free - figures.free >= MIN_CACHED_BYTES / 2:
            self.pause = PAUSE_SECONDS
        else:
            self.pause = min(2 * self.pause, MAX_PAUSE_SECONDS)
        return ""

    def _ask(self, reason: str, figures: MemoryFigures, floor: int, allocator: int) -> None:
        """Ask for a stop, and tell the user who holds the memory."""
        phase = self.ranks.heartbeat.activity.doing
        host = socket.gethostname()
        reserved = f"; the GPU's allocator {gib(allocator)} GiB" if allocator else ""
        text = f"{phase}, on {host}: {reason}. {figures.describe()}{reserved}"
        record = {
            "phase": phase,
            "host": host,
            "floor_bytes": floor,
            "allocator_bytes": allocator,
            **figures.as_record(),
        }
        # At once, because listing the processes takes a tenth of a second.
        self.stop.low_memory = LowMemory(text, record)
        ranks = self.ranks.heartbeat.peers.local_processes()
        ours, others = largest_processes(ranks)
        if self.ranks.world > 1:
            ours = [process._replace(name=f"rank {ranks[process.pid]}") for process in ours]
        text += f"; this run has: {_names(ours)} GiB; others have most: {_names(others)} GiB"
        processes = {
            "processes": [process._asdict() for process in ours],
            "other_processes": [process._asdict() for process in others],
        }
        self.stop.ask(LowMemory(text, record | processes))


def _names(processes: Sequence[Holder]) -> str:
    return ", ".join(f"{name} ({pid}) {gib(size)}" for pid, name, size in processes)
