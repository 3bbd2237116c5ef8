"""The host's memory at one moment, and who uses it, by /proc and /sys."""

import os
import resource
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from tunesmith.host.cores import control_groups
from tunesmith.units import ceil_div

ROOT = Path("/")
BLOCK = 2 << 20  # bytes: what a GPU's driver asks the kernel for on unified memory
PAGE = os.sysconf("SC_PAGE_SIZE")
LARGE_ORDER = (BLOCK // PAGE).bit_length() - 1  # of /proc/buddyinfo
# The floor: what a save takes of the host (pieces of 64 MiB, measured: docs/ranks.md), and what
# grows while a micro batch ends. A fiftieth of the memory, within these.
LEAST_FLOOR = 128 << 20
MOST_FLOOR = 1 << 30
FLOOR_SHARE = 50
# On unified memory: a GB10 of 122 GiB froze with 7.7, 6.1 and 0.3 GiB available, and once with
# 12.7. A twelfth, up to this.
MOST_UNIFIED_FLOOR = 8 << 30
UNIFIED_FLOOR_SHARE = 12


class GroupFiles(NamedTuple):
    """The files of a control group for the memory that it may have, and has.

    Attributes:
        cache: lines of memory.stat: the page cache in what is used.
    """

    limits: tuple[str, ...]
    usage: str
    cache: tuple[str, ...]


GROUP_VERSIONS = (
    GroupFiles(
        limits=("memory.max", "memory.high"),
        usage="memory.current",
        cache=("active_file", "inactive_file"),
    ),
    GroupFiles(
        limits=("memory.limit_in_bytes",),
        usage="memory.usage_in_bytes",
        cache=("total_active_file", "total_inactive_file"),
    ),
)
# Limits of one process: what a shell calls each, and the line of /proc/self/status that counts
# against it.
PROCESS_LIMITS = (
    ("ulimit -v", resource.RLIMIT_AS, "VmSize:"),
    ("ulimit -d", resource.RLIMIT_DATA, "VmData:"),
)


@dataclass(frozen=True)
class MemoryLimit:
    """A limit on the memory of this process.

    Attributes:
        name: what sets it, as a user knows it; empty for the machine itself.
        size: in bytes.
        used: bytes that count against it now, without page cache that the kernel can drop.
        used_by_run: those of them that the processes of this run hold.
        ranks: how many processes of this run share it.
        of_process: whether it bounds one process, whose allocations then fail; otherwise the kernel
            kills.
    """

    name: str
    size: int
    used: int
    used_by_run: int
    ranks: int = 1
    of_process: bool = False

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
        if self.of_process:
            return raise_process_limit(self.name)
        enough = ceil_div(self.size + self.ranks * more, 1 << 20)
        options = (
            f"docker run --memory={enough}m, sbatch --mem={enough}M, systemd MemoryMax={enough}M"
        )
        return f"a limit of {enough} MiB for the control group ({options})"


@dataclass(frozen=True)
class MemoryFigures:
    """Bytes of the host's memory, as /proc/meminfo and /proc/buddyinfo have them.

    Attributes:
        available: without swapping.
        free: in use for nothing, not even page cache.
        cached: page cache, without shared memory.
        shared: shared memory and tmpfs, which only a swap can make room of.
        locked: in no way to be moved: mlock, pinned.
        large_blocks: of `free`, in blocks of BLOCK and more.
        limit, used: those of the control group with the least room, of this process's and their
            parents: what its processes hold, without the page cache that the kernel drops before it
            kills. None: there is no limit.
    """

    total: int
    available: int
    free: int
    cached: int
    shared: int
    locked: int
    large_blocks: int
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
            f"MemAvailable {gib(self.available)} of {gib(self.total)}, MemFree {gib(self.free)} "
            f"({gib(self.large_blocks)} in blocks of 2 MiB), page cache {gib(self.cached)}, "
            f"shared memory {gib(self.shared)}, locked {gib(self.locked)} GiB{group}"
        )


class Holder(NamedTuple):
    """A process and the memory that it holds.

    Its proportional share, or what is resident where that may not be read.
    """

    pid: int
    name: str
    bytes: int


def gib(size: int | None) -> str:
    """Bytes as a number of GiB."""
    return f"{(size or 0) / 2**30:.2f}"


def read_memory(root: Path = ROOT) -> MemoryFigures | None:
    """The figures of now; None on a system without /proc, such as macOS.

    /proc and /sys are below `root`.
    """
    sizes = {}
    try:
        for line in _read(f"{root}/proc/meminfo").splitlines():
            name, kib = line.split()[:2]
            sizes[name] = int(kib) * 1024
        # KiB in /proc/meminfo, whatever it calls them.
        total = sizes["MemTotal:"]
        available = sizes["MemAvailable:"]
        free = sizes["MemFree:"]
    except (OSError, ValueError, KeyError):
        return None
    shared = sizes.get("Shmem:", 0)
    # Shmem counts as cached there, but cannot be dropped.
    cached = sizes.get("Cached:", 0) + sizes.get("Buffers:", 0) - shared
    groups = _group_limits(root, total).values()
    # The group with the least room is the limit that is met first.
    limit, used = min(groups, key=lambda group: group[0] - group[1], default=(None, None))
    return MemoryFigures(
        total,
        available,
        free,
        cached=max(0, cached),
        shared=shared,
        locked=sizes.get("Unevictable:", 0),
        large_blocks=_large_blocks(root),
        limit=limit,
        used=used,
    )


def _large_blocks(root: Path) -> int:
    """Bytes that are free in blocks of BLOCK and more."""
    size = 0
    with suppress(OSError, ValueError):  # containers may hide it
        # `Node 0, zone Normal`, and the free blocks of one page, of two, of four, ...
        for line in _read(f"{root}/proc/buddyinfo").splitlines():
            for order, count in enumerate(line.split()[4 + LARGE_ORDER :]):
                size += int(count) * BLOCK << order
    return size


def memory_floor(total: int, *, unified: bool) -> int:
    """Bytes that stay free where `total` is all that there is, of the machine or its group."""
    if unified:
        return min(MOST_UNIFIED_FLOOR, total // UNIFIED_FLOOR_SHARE)
    return min(max(LEAST_FLOOR, total // FLOOR_SHARE), MOST_FLOOR)


def unified_budget(figures: MemoryFigures) -> int:
    """Bytes that a run can allocate where the GPU shares the host's memory.

    A quarter of the floor more than the floor is left: the driver's context and the process grow
    beside the allocator.
    """
    floor = memory_floor(figures.limit or figures.total, unified=True)
    return max(0, figures.room - floor * 5 // 4)


def memory_limits(ranks: Collection[int] = (), root: Path = ROOT) -> list[MemoryLimit]:
    """Every limit on the memory of this process; none on a system without /proc, such as macOS.

    `ranks` are the process ids of the run's ranks on this host. Ranks share the machine, and
    control groups that hold them both; the limits of a process are its own.
    """
    figures = read_memory(root)
    if figures is None:
        return []
    processes = {os.getpid(), *ranks}
    used = figures.total - figures.available
    limits = [MemoryLimit("", figures.total, used, own_memory(processes, root), len(processes))]
    members: dict[str, set[int]] = {}
    for process in processes:
        name = "self" if process == os.getpid() else str(process)
        # Ranks may be in groups of their own, and share those above.
        for folder in control_groups("memory", root, name):
            members.setdefault(str(folder), set()).add(process)
    for group, (size, group_used) in _group_limits(root, figures.total).items():
        sharing = members[group]
        used_by_run = own_memory(sharing, root)
        limits.append(
            MemoryLimit(f"control group {group}", size, group_used, used_by_run, len(sharing))
        )
    return limits + process_limits(root)


def process_limits(root: Path = ROOT) -> list[MemoryLimit]:
    """The limits that `ulimit` sets on this process, and what counts against them."""
    limits = []
    with suppress(OSError, ValueError):  # macOS
        sizes = {}
        for line in _read(f"{root}/proc/self/status").splitlines():
            if line.endswith(" kB"):
                name, kib = line.split()[:2]
                sizes[name] = int(kib) << 10
        for command, kind, counted in PROCESS_LIMITS:
            size, _ = resource.getrlimit(kind)
            if size != resource.RLIM_INFINITY:
                used = sizes.get(counted, 0)
                limits.append(MemoryLimit(command, size, used, used, of_process=True))
    return limits


def suspected_limit() -> MemoryLimit | None:
    """The limit of this process that an allocation may have failed for.

    The one with the least room, if any is smaller than the machine's memory.
    """
    figures = read_memory()
    total = figures.total if figures else 0
    limits = [limit for limit in process_limits() if limit.size < total]
    return min(limits, key=lambda limit: limit.size - limit.used, default=None)


def raise_process_limit(name: str) -> str:
    """The command that lifts a limit that `ulimit` has set, or who can do so."""
    kinds = {command: kind for command, kind, _ in PROCESS_LIMITS}
    _, hard = resource.getrlimit(kinds[name])
    if hard == resource.RLIM_INFINITY or os.geteuid() == 0:
        return f"{name} unlimited"
    where = "remove the command that sets it, or raise it in /etc/security/limits.conf"
    return f"{name} unlimited in a new shell (this one may not raise it); {where}"


def _group_limits(root: Path, total: int) -> dict[str, tuple[int, int]]:
    """Limit and use of the control groups that bound the memory of this process, by folder.

    total: the machine's memory; a group that may have as much has no limit.
    """
    limits = {}
    with suppress(OSError):  # no control groups here
        for folder, files in _group_folders(root, _read(f"{root}/proc/self/cgroup")):
            group = _read_group(folder, files, total)
            if group is not None:
                limits[folder] = group
    return limits


@lru_cache(8)
def _group_folders(root: Path, text: str) -> list[tuple[str, GroupFiles]]:
    """The control groups that may bound memory; `text` is what /proc/self/cgroup holds now."""
    groups = []
    for files in GROUP_VERSIONS:
        for folder in control_groups("memory", root):
            if (folder / files.usage).exists():
                groups.append((str(folder), files))
    return groups


def _read_group(folder: str, files: GroupFiles, total: int) -> tuple[int, int] | None:
    """Limit and use of a control group; None where it has no limit."""
    with suppress(OSError, ValueError):
        limit = total
        # A group has several limits; the smallest holds.
        for name in files.limits:
            text = _read(f"{folder}/{name}").strip()
            if text != "max":
                limit = min(limit, int(text))
        if limit < total:
            stat = dict(line.split() for line in _read(f"{folder}/memory.stat").splitlines())
            # The cache of a group is dropped before its limit kills.
            cached = sum(int(stat[name]) for name in files.cache)
            return limit, max(0, int(_read(f"{folder}/{files.usage}")) - cached)
    return None


def _read(path: str) -> str:
    handle = os.open(path, os.O_RDONLY)  # a fifth of the time that a file object takes
    parts = []
    try:
        # Small blocks, which a process has room for that is at its limit.
        while part := os.read(handle, 4096):
            parts.append(part)
    finally:
        os.close(handle)
    return b"".join(parts).decode("utf-8", "replace")


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


def own_memory(pids: Collection[int], root: Path = ROOT) -> int:
    """Bytes of these processes that are resident, without files that they map."""
    pages = 0
    for pid in pids:
        with suppress(OSError, ValueError):  # it has ended
            resident, shared = _read(f"{root}/proc/{pid}/statm").split()[1:3]
            pages += int(resident) - int(shared)
    return pages * PAGE


def largest_processes(
    ours: Collection[int], count: int = 4, root: Path = ROOT
) -> tuple[list[Holder], list[Holder]]:
    """The processes `ours`, and the `count` of others that hold the most, the largest first."""
    holders = []
    for folder in (root / "proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):  # it has ended
            resident = int(_read(f"{folder}/statm").split()[1]) * PAGE
            name = _read(f"{folder}/comm").strip()
            holders.append(Holder(int(folder.name), name, resident))
    holders.sort(key=lambda holder: holder.bytes, reverse=True)
    of_run = [holder for holder in holders if holder.pid in ours]
    # The kernel walks all pages of a process for its share: the shares of a few are read.
    others = [holder for holder in holders if holder.pid not in ours][: 2 * count]
    return _by_share(of_run, root), _by_share(others, root)[:count]


def _by_share(holders: list[Holder], root: Path) -> list[Holder]:
    """Processes with their proportional shares, the largest first."""
    with_shares = [_with_share(holder, root) for holder in holders]
    return sorted(with_shares, key=lambda holder: holder.bytes, reverse=True)


def _with_share(holder: Holder, root: Path) -> Holder:
    with suppress(OSError, ValueError):  # another user's
        for line in _read(f"{root}/proc/{holder.pid}/smaps_rollup").splitlines():
            if line.startswith("Pss:"):
                return holder._replace(bytes=int(line.split()[1]) * 1024)
    return holder


def available_memory(root: Path = ROOT) -> int:
    """Bytes of host memory that this process can use without swapping."""
    figures = read_memory(root)
    if figures is not None:
        limits = process_limits(root)
        return min([figures.room, *(max(0, limit.size - limit.used) for limit in limits)])
    import psutil

    return int(psutil.virtual_memory().available)


def unavailable_percent(root: Path = ROOT) -> float:
    """100 less the available share of the host's memory."""
    import psutil

    figures = read_memory(root) or psutil.virtual_memory()
    return 100.0 * (1 - figures.available / figures.total)


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
    import psutil

    return int(psutil.virtual_memory().total)
