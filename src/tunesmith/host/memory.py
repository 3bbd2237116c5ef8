"""Functions that measure the size and the use of the host's memory.

They use psutil and the files of control groups.
"""

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
# The memory floor is the number of bytes of host memory that a run leaves free. A save needs this
# memory to copy pieces of 64 MiB (see docs/ranks.md), and the process needs it because it grows
# until the end of a micro batch. The floor is the total memory / FLOOR_SHARE, but at least
# MIN_FLOOR and at most MAX_FLOOR.
MIN_FLOOR = 128 << 20
MAX_FLOOR = 1 << 30
FLOOR_SHARE = 50
# If the GPU shares the host's memory, the memory floor is the total memory / UNIFIED_FLOOR_SHARE,
# but at most MAX_UNIFIED_FLOOR. A GB10 with 122 GiB froze when 7.7, 6.1 and 0.3 GiB were available,
# and once with 12.7 GiB.
MAX_UNIFIED_FLOOR = 8 << 30
UNIFIED_FLOOR_SHARE = 12
# Each entry has two files of a control group, for the limit and for the used memory, and the prefix
# of the page cache lines in memory.stat. The kernel throttles a group that uses more than
# `memory.high`.
GROUP_FILES = (
    ("memory.max", "memory.current", ""),  # version 2
    ("memory.high", "memory.current", ""),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),  # version 1
)


@dataclass(frozen=True)
class MemoryLimit:
    """A limit on the memory of this process.

    Attributes:
        name: the control group, or "" for the entire machine.
        size: the limit in bytes.
        used: bytes in use now, without page cache that the kernel can drop.
        used_by_run: the part of `used` that the processes of this run hold.
        ranks: number of processes of this run that share the limit.
    """

    name: str
    size: int
    used: int
    used_by_run: int = 0
    ranks: int = 1

    def describe(self) -> str:
        """Describe the limit in words. Return "" for the limit of the entire machine."""
        if not self.name:
            return ""
        shared = f", which {self.ranks} ranks share" if self.ranks > 1 else ""
        return f"{self.name} of {gib(self.size)} GiB{shared}"

    def fix(self, more: int) -> str:
        """Return how the user can raise the limit, so that each rank can use `more` additional
        bytes.

        Return "" for the entire machine.
        """
        if not self.name:
            return ""
        enough = ceil_div(self.size + self.ranks * more, 1 << 20)
        options = (
            f"docker run --memory={enough}m, sbatch --mem={enough}M, systemd MemoryMax={enough}M"
        )
        return f"set a limit of {enough} MiB for the control group ({options})"


NO_LIMIT = MemoryLimit("", 0, 0)


@dataclass(frozen=True)
class MemoryFigures:
    """The state of the host's memory, in bytes.

    Attributes:
        available: memory that can be used without swapping.
        free: unused memory, which is not even page cache.
        cached: page cache, without shared memory.
        shared: shared memory and tmpfs, which the kernel can only free by swapping.
        limit, used: limit and use of the control group with the fewest free bytes. `used` does not
            count page cache, because the kernel drops it before it kills a process. None if no
            control group has a limit.
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
        """Bytes that this process can still allocate before the kernel kills a process."""
        room = self.available
        if self.limit is not None and self.used is not None:
            room = min(room, self.limit - self.used)
        return max(0, room)

    def describe(self) -> str:
        """Describe the memory figures in words, in GiB."""
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
    """Convert bytes to a text in GiB with two decimals."""
    return f"{(size or 0) / 2**30:.2f}"


def read_memory() -> MemoryFigures:
    """Read the current state of the host's memory.

    If several control groups have limits, `limit` is the limit of the group with the fewest free
    bytes.
    """
    # On macOS psutil does not report page cache and shared memory.
    memory = psutil.virtual_memory()._asdict()
    shared = memory.get("shared", 0)
    limits = group_limits()
    group = min(limits, key=lambda limit: limit.size - limit.used) if limits else None
    return MemoryFigures(
        memory["total"],
        memory["available"],
        memory["free"],
        # The kernel counts shared memory as cached, but it cannot drop shared memory.
        cached=max(0, memory.get("cached", 0) + memory.get("buffers", 0) - shared),
        shared=shared,
        limit=group.size if group else None,
        used=group.used if group else None,
    )


def group_limits(root: Path = ROOT) -> list[MemoryLimit]:
    """Return the memory limits of this process's control groups.

    A limit is omitted if it is not lower than the machine's memory.

    Args:
        root: the folder that contains /proc and /sys. Tests use another folder.
    """
    total = psutil.virtual_memory().total
    limits = []
    for folder in control_groups("memory", root):
        for limit_file, usage_file, prefix in GROUP_FILES:
            # Skip a file that does not exist in this version of control groups. Also skip the limit
            # `max`, which means no limit.
            with suppress(OSError, ValueError):
                size = int((folder / limit_file).read_text(encoding="ascii"))
                if size >= total:
                    continue
                stat = (folder / "memory.stat").read_text(encoding="ascii")
                counts = dict(line.split() for line in stat.splitlines())
                # Do not count page cache as used, because the kernel drops the page cache of a
                # group before it kills one of the group's processes.
                cached = int(counts[f"{prefix}active_file"]) + int(counts[f"{prefix}inactive_file"])
                used = int((folder / usage_file).read_text(encoding="ascii")) - cached
                limits.append(MemoryLimit(f"control group {folder}", size, max(0, used)))
    return limits


def memory_floor(total: int, *, unified: bool) -> int:
    """Return the bytes that a run leaves free.

    `total` is the memory of the machine or of the control group, in bytes.

    Args:
        unified: whether the GPU shares the host's memory.
    """
    if unified:
        return min(MAX_UNIFIED_FLOOR, total // UNIFIED_FLOOR_SHARE)
    return min(max(MIN_FLOOR, total // FLOOR_SHARE), MAX_FLOOR)


def unified_budget(figures: MemoryFigures) -> int:
    """Return the bytes that a run can allocate if the GPU shares the host's memory.

    1.25 times the memory floor is left free, because the driver's context and the process also grow
    outside torch's allocator.
    """
    floor = memory_floor(figures.limit or figures.total, unified=True)
    return max(0, figures.room - floor * 5 // 4)


def memory_limits(ranks: Collection[int] = ()) -> list[MemoryLimit]:
    """Return every memory limit of this process: the memory of the machine, and the limit of each
    control group.

    Args:
        ranks: the process ids of the run's ranks on this host. They share the limits.
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
    """Remove a file from the page cache. This has an effect only on Linux.

    Pages that are not yet written to the disk, and pages that a process maps, are kept.

    Args:
        handle: the file descriptor.
        start, size: the range in bytes. A size of 0 means to the end of the file.
    """
    if sys.platform == "linux":  # macOS has no posix_fadvise
        os.posix_fadvise(handle, start, size, os.POSIX_FADV_DONTNEED)


@contextmanager
def open_uncached(path: Path) -> Iterator[BufferedReader]:
    """Open a file for reading. After the block, close it and remove it from the page cache."""
    with path.open("rb") as file:
        try:
            yield file
        finally:
            drop_pages(file.fileno())


def own_memory(pids: Collection[int]) -> int:
    """Return the resident memory of these processes in bytes. Memory-mapped files do not count."""
    size = 0
    for pid in pids:
        with suppress(psutil.Error):  # the process has ended
            memory = psutil.Process(pid).memory_info()._asdict()
            size += memory["rss"] - memory.get("shared", 0)
    return size


def largest_processes(ours: Collection[int], count: int = 4) -> tuple[list[Holder], list[Holder]]:
    """Return two lists: the processes `ours`, and the `count` largest other processes.

    Both lists are sorted by resident memory, the largest first.
    """
    holders = []
    for process in psutil.process_iter(["name", "memory_info"]):
        # psutil returns None if this user is not allowed to read the process's memory.
        memory = process.info["memory_info"]
        if memory is not None:
            holders.append(Holder(process.pid, process.info["name"], memory.rss))
    holders.sort(key=lambda holder: holder.bytes, reverse=True)
    in_run = [holder for holder in holders if holder.pid in ours]
    return in_run, [holder for holder in holders if holder.pid not in ours][:count]


def available_memory() -> int:
    """Return the bytes of host memory that this process can allocate without swapping."""
    return read_memory().room


def oom_kills() -> int:
    """Return how many processes the kernel has killed since boot because memory was exhausted.

    Return 0 if the kernel does not report the number.
    """
    with suppress(OSError, ValueError):
        lines = Path("/proc/vmstat").read_text(encoding="ascii").splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    return 0
