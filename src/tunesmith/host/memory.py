"""The host's memory at one moment, and who uses it: by psutil and the files of control groups."""

import os
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

import psutil

from tunesmith.host.cores import control_groups
from tunesmith.units import ceil_div

ROOT = Path("/")
# The floor: what a save takes of the host (pieces of 64 MiB, measured: docs/ranks.md), and what
# grows while a micro batch ends. A fiftieth of the memory, within these.
MIN_FLOOR = 128 << 20
MAX_FLOOR = 1 << 30
FLOOR_SHARE = 50
# On unified memory: a GB10 of 122 GiB froze with 7.7, 6.1 and 0.3 GiB available, and once with
# 12.7. A twelfth, up to this.
MAX_UNIFIED_FLOOR = 8 << 30
UNIFIED_FLOOR_SHARE = 12
# Files of a control group with its limit and its use, and the prefix of the lines of memory.stat
# that count the page cache. Above `memory.high`, the kernel throttles the group.
GROUP_FILES = (
    ("memory.max", "memory.current", ""),  # version 2
    ("memory.high", "memory.current", ""),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),  # version 1
)


@dataclass(frozen=True)
class MemoryLimit:
    """A limit on the memory of this process.

    Attributes:
        name: the control group; empty for the machine itself.
        size: in bytes.
        used: bytes that count against it now, without page cache that the kernel can drop.
        used_by_run: those of them that the processes of this run hold.
        ranks: how many processes of this run share it.
    """

    name: str
    size: int
    used: int
    used_by_run: int = 0
    ranks: int = 1

    def describe(self) -> str:
        """The limit in a clause; empty for the machine."""
        if not self.name:
            return ""
        shared = f", which {self.ranks} ranks share" if self.ranks > 1 else ""
        return f"{self.name} of {gib(self.size)} GiB{shared}"

    def fix(self, more: int) -> str:
        """Say how to raise it until each rank can have `more` bytes; empty for the machine."""
        if not self.name:
            return ""
        enough = ceil_div(self.size + self.ranks * more, 1 << 20)
        options = (
            f"docker run --memory={enough}m, sbatch --mem={enough}M, systemd MemoryMax={enough}M"
        )
        return f"a limit of {enough} MiB for the control group ({options})"


@dataclass(frozen=True)
class MemoryFigures:
    """Bytes of the host's memory.

    Attributes:
        available: without swapping.
        free: in use for nothing, not even page cache.
        cached: page cache, without shared memory.
        shared: shared memory and tmpfs, which only a swap can make room of.
        limit, used: those of the control group with the least room, of this process's and their
            parents: what its processes hold, without the page cache that the kernel drops before it
            kills. None: there is no limit.
    """

    total: int
    available: int
    free: int
    cached: int
    shared: int
    limit: int | None = None
    used: int | None = None

    @property
    def room(self) -> int:
        """Compute what this process can still take before the kernel kills."""
        room = self.available
        if self.limit is not None and self.used is not None:
            room = min(room, self.limit - self.used)
        return max(0, room)

    def as_record(self) -> dict[str, int | None]:
        """The figures as `stopped.json` has them."""
        return {f"{name}_bytes": value for name, value in vars(self).items()}

    def describe(self) -> str:
        """The figures in a clause, in GiB."""
        group = ""
        if self.limit and self.used:
            group = f"; control group {gib(self.used)} of {gib(self.limit)} GiB"
        return (
            f"MemAvailable {gib(self.available)} of {gib(self.total)}, MemFree {gib(self.free)}, "
            f"page cache {gib(self.cached)}, shared memory {gib(self.shared)} GiB{group}"
        )


class Holder(NamedTuple):
    """A process and its resident memory in bytes."""

    pid: int
    name: str
    bytes: int


def gib(size: int | None) -> str:
    """Bytes as a number of GiB."""
    return f"{(size or 0) / 2**30:.2f}"


def read_memory() -> MemoryFigures:
    """Read the figures of now. The control group with the least room is the limit that counts."""
    # macOS has no figures of page cache and shared memory.
    memory = psutil.virtual_memory()._asdict()
    shared = memory.get("shared", 0)
    limits = group_limits()
    group = min(limits, key=lambda limit: limit.size - limit.used) if limits else None
    return MemoryFigures(
        memory["total"],
        memory["available"],
        memory["free"],
        # Shared memory counts as cached, but cannot be dropped.
        cached=max(0, memory.get("cached", 0) + memory.get("buffers", 0) - shared),
        shared=shared,
        limit=group.size if group else None,
        used=group.used if group else None,
    )


def group_limits(root: Path = ROOT) -> list[MemoryLimit]:
    """Return the limits of the control groups of this process, read below `root`.

    A group that may have as much as the machine has no limit.
    """
    total = physical_memory()
    limits = []
    for folder in control_groups("memory", root):
        for limit_file, usage_file, prefix in GROUP_FILES:
            # The group has the files of the other version, or no limit: `max` is no number.
            with suppress(OSError, ValueError):
                size = int((folder / limit_file).read_text(encoding="ascii"))
                if size >= total:
                    continue
                stat = (folder / "memory.stat").read_text(encoding="ascii")
                counts = dict(line.split() for line in stat.splitlines())
                # The cache of a group is dropped before its limit kills.
                cached = int(counts[f"{prefix}active_file"]) + int(counts[f"{prefix}inactive_file"])
                used = int((folder / usage_file).read_text(encoding="ascii")) - cached
                limits.append(MemoryLimit(f"control group {folder}", size, max(0, used)))
    return limits


def memory_floor(total: int, *, unified: bool) -> int:
    """Bytes that stay free where `total` is all that there is, of the machine or its group."""
    if unified:
        return min(MAX_UNIFIED_FLOOR, total // UNIFIED_FLOOR_SHARE)
    return min(max(MIN_FLOOR, total // FLOOR_SHARE), MAX_FLOOR)


def unified_budget(figures: MemoryFigures) -> int:
    """Bytes that a run can allocate where the GPU shares the host's memory.

    A quarter of the floor more than the floor is left: the driver's context and the process grow
    beside the allocator.
    """
    floor = memory_floor(figures.limit or figures.total, unified=True)
    return max(0, figures.room - floor * 5 // 4)


def memory_limits(ranks: Collection[int] = ()) -> list[MemoryLimit]:
    """Return every limit on the memory of this process.

    `ranks` are the process ids of the run's ranks on this host, which share the limits.
    """
    processes = {os.getpid(), *ranks}
    memory = psutil.virtual_memory()
    machine = MemoryLimit("", memory.total, memory.total - memory.available)
    used_by_run = own_memory(processes)
    return [
        replace(limit, used_by_run=used_by_run, ranks=len(processes))
        for limit in (machine, *group_limits())
    ]


def drop_pages(handle: int, start: int = 0, size: int = 0) -> None:
    """Tell the kernel that a file's pages are not needed again, where it has such a call.

    Pages that are not on the disk yet, or that a process maps, stay. `size` 0: all from `start` on.
    """
    if sys.platform == "linux":  # macOS has no such call
        os.posix_fadvise(handle, start, size, os.POSIX_FADV_DONTNEED)


@contextmanager
def open_uncached(path: Path) -> Iterator[BufferedReader]:
    """The open file, closed at the end; no page of it stays in the page cache."""
    with path.open("rb") as file:
        try:
            yield file
        finally:
            drop_pages(file.fileno())


def own_memory(pids: Collection[int]) -> int:
    """Bytes of these processes that are resident, without files that they map."""
    size = 0
    for pid in pids:
        with suppress(psutil.Error):  # it has ended
            memory = psutil.Process(pid).memory_info()._asdict()
            size += memory["rss"] - memory.get("shared", 0)
    return size


def largest_processes(ours: Collection[int], count: int = 4) -> tuple[list[Holder], list[Holder]]:
    """The processes `ours`, and the `count` of others that hold the most, the largest first."""
    holders = []
    for process in psutil.process_iter(["name", "memory_info"]):
        # psutil gives None if this user must not read it.
        memory = process.info["memory_info"]
        if memory is not None:
            holders.append(Holder(process.pid, process.info["name"], memory.rss))
    holders.sort(key=lambda holder: holder.bytes, reverse=True)
    of_run = [holder for holder in holders if holder.pid in ours]
    others = [holder for holder in holders if holder.pid not in ours]
    return of_run, others[:count]


def available_memory() -> int:
    """Bytes of host memory that this process can use without swapping."""
    return read_memory().room


def unavailable_percent() -> float:
    """100 less the available share of the host's memory."""
    return float(psutil.virtual_memory().percent)


def oom_kills(root: Path = ROOT) -> int:
    """Processes of this machine that the kernel has ended for want of memory since it booted.

    /proc is below `root`.
    """
    with suppress(OSError, ValueError):
        lines = (root / "proc/vmstat").read_text(encoding="ascii").splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    return 0


def physical_memory() -> int:
    """Bytes of host memory, in use or not."""
    return int(psutil.virtual_memory().total)
