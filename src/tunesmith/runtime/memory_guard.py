"""Stops a run before the host's memory is used up: below a floor all ranks save and end, and the user reads who holds it.

A kernel without memory kills the largest process, which is the one that trains; on unified memory (GB10) the driver fails
first and the machine freezes, without a kill. A thread looks at the figures, once a second while there is room and up to 8
times as often near the floor. A look takes about 0.1 ms.
"""

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from tunesmith.distributed.ranks import Ranks
from tunesmith.host.memory import (
    ROOT,
    MemoryFigures,
    drop_pages,
    gib,
    largest_processes,
    memory_floor,
    own_memory,
    read_memory,
    unified_budget,
)
from tunesmith.host.signals import Shortage, StopRequest
from tunesmith.runtime.device import is_integrated

# MemFree on unified memory, below which page cache is dropped, and where that did not help: 2.6 GiB was the least that a load
# passed with, and allocations failed at 2.5 although 22 were available. Less is enough where a run can take no more than less.
UNIFIED_FREE, UNIFIED_FREE_LEAST = 8 << 30, 3 << 30
AHEAD = 3.0  # seconds that a save and the end take, on a busy machine; before it `stop.takes`
LONGEST = 30.0  # seconds of `stop.takes` that count
RARELY, OFTEN = 1.0, 0.12  # seconds between two looks: at most a thousandth of a core
FASTEST = 4 << 30  # bytes a second that memory is filled with: page faults of one process
AGAIN = 2.0  # seconds between two times that page cache is dropped while MemFree is below the least
# else: the first, doubled where a drop brought nothing, up to the second
PAUSE, LONGEST_PAUSE = (
    30.0,
    480.0,
)
WORTH = 2 << 30  # bytes of page cache that are worth it
MOST_FILES = 10_000  # that are opened for it: a folder of rows may hold millions


def drop_page_cache(paths: Sequence[Path], root: Path = ROOT) -> None:
    """Turn page cache into free memory: that of the files below `paths`, and as root that of all files.

    The first needs no right, and neither takes memory: beside a full allocator there is none to take. The kernel's own
    switches took GB10s through every load, and give free memory in large blocks.
    """
    for file in islice(_files_below(paths), MOST_FILES):
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
        files: that the run reads and writes, and folders of them; their page cache is dropped on unified memory.
        unified: whether the GPU shares the host's memory; None until one is in use.
    """

    def __init__(
        self,
        stop: StopRequest,
        ranks: Ranks,
        files: Sequence[Path] = (),
        *,
        read: Callable[[], MemoryFigures | None] = read_memory,
        make_room: Callable[[Sequence[Path]], object] = drop_page_cache,
        clock: Callable[[], float] = time.monotonic,
        unified: bool | None = None,
    ) -> None:
        self.stop, self.ranks, self.read, self.clock, self.unified = (
            stop,
            ranks,
            read,
            clock,
            unified,
        )
        self.files, self.make_room = files, make_room
        self.others: deque[tuple[float, int]] = deque()  # time, and what this process did not take
        self.pause = PAUSE
        self.dropped = -LONGEST_PAUSE  # when page cache was dropped last
        self.still_short = False  # MemFree was below the least before that, and after it
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> "MemoryGuard":
        if self.read() is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(1.0)

    def _watch(self) -> None:
        wait = 0.0
        while not self._closing.wait(wait) and self.stop.shortage is None:
            wait = self.look()

    def look(self) -> float:
        """Read the figures once, and ask for a stop where it is time; seconds until the next look is due."""
        figures = self.read()
        if figures is None:
            return RARELY
        if self.unified is None and torch.cuda.is_initialized():
            self.unified = is_integrated(torch.device("cuda", torch.cuda.current_device()))
        allocator = (
            torch.cuda.memory_reserved() if self.unified and torch.cuda.is_initialized() else 0
        )
        own = own_memory(self.ranks.heartbeat.local_processes()) + allocator
        floor = (
            memory_floor(figures.limit or figures.total, unified=bool(self.unified))
            + self.stop.saving
        )
        left, growth = figures.room - floor, self._growth(-figures.room - own)
        why = ""
        if left < growth:
            why = f"{gib(figures.room)} GiB can be had, and the floor is {gib(floor)} GiB"
            why += f"; others took {gib(growth)} GiB in {self.ahead:.0f} s" if left >= 0 else ""
        elif self.unified:
            # The driver alone needs free memory, for what the allocator may still take: all else drops page cache itself.
            wanted = min(UNIFIED_FREE, unified_budget(figures))
            if figures.free < wanted and figures.cached > WORTH:
                least = min(UNIFIED_FREE_LEAST, wanted)
                why = self._drop(figures, least)
                left = min(left, max(0, figures.free - least))
        if why:
            self._ask(why, figures, floor, allocator)
        return min(RARELY, max(OFTEN, (left - growth) / FASTEST))

    @property
    def ahead(self) -> float:
        """Seconds that a stop takes; the first step compiles, and says nothing of those that follow."""
        return AHEAD + min(self.stop.takes, LONGEST)

    def _growth(self, others: int) -> int:
        """What others took in as long as a stop takes, by a figure that grows as they take memory: they may do so again."""
        now, ahead = self.clock(), self.ahead
        self.others.append((now, others))
        while len(self.others) > 2 and self.others[1][0] <= now - ahead:
            self.others.popleft()
        least = min(value for _, value in self.others)
        return int((others - least) / max(1.0, (now - self.others[0][0]) / ahead))

    def _drop(self, figures: MemoryFigures, least: int) -> str:
        """Let the kernel give up page cache where it is time; why the run must end, where that has not helped."""
        since = self.clock() - self.dropped
        critical = figures.free < least
        if since < (AGAIN if critical else self.pause):
            return ""
        if critical and self.still_short:
            return f"MemFree is {gib(figures.free)} GiB, and dropping page cache leaves it below {gib(least)} GiB"
        self.dropped = self.clock()
        self.make_room(self.files)
        after = self.read() or figures
        self.still_short = critical and after.free < least
        if after.free - figures.free >= WORTH / 2:
            self.pause = PAUSE
        else:
            self.pause = min(2 * self.pause, LONGEST_PAUSE)
        return ""

    def _ask(self, why: str, figures: MemoryFigures, floor: int, allocator: int) -> None:
        phase, host = self.ranks.heartbeat.doing, socket.gethostname()
        reserved = f"; the GPU's allocator {gib(allocator)} GiB" if allocator else ""
        text = f"{phase}, on {host}: {why}. {figures.describe()}{reserved}"
        record: dict[str, Any] = {
            "phase": phase,
            "host": host,
            "floor_bytes": floor,
            "allocator_bytes": allocator,
        }
        record |= figures.as_record()
        # At once: to see who holds it takes a tenth of a second
        self.stop.shortage = Shortage(text, record)
        ranks, several = self.ranks.heartbeat.local_processes(), self.ranks.world > 1
        ours, others = largest_processes(ranks)
        ours = [
            holder._replace(name=f"rank {ranks[holder.pid]}" if several else holder.name)
            for holder in ours
        ]
        record |= {
            "processes": [h._asdict() for h in ours],
            "other_processes": [h._asdict() for h in others],
        }
        run, rest = (
            ", ".join(f"{h.name} ({h.pid}) {gib(h.bytes)}" for h in held) for held in (ours, others)
        )
        self.stop.ask(
            Shortage(f"{text}; this run holds: {run} GiB; others hold most: {rest} GiB", record)
        )
