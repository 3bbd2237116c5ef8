"""The host's memory at one moment, and who holds it: the one place that reads /proc and /sys for it."""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from tunesmith.host_files import control_groups

ROOT = Path("/")
BLOCK = 2 << 20  # bytes: what a GPU's driver asks the kernel for on unified memory
PAGE = os.sysconf("SC_PAGE_SIZE")
LARGE_ORDER = (BLOCK // PAGE).bit_length() - 1  # of /proc/buddyinfo
# Of a control group's memory: limits, use, and the names of its page cache, by version 2 and version 1.
_GROUPS: tuple[tuple[tuple[str, ...], str, tuple[str, ...]], ...] = (
    (("memory.max", "memory.high"), "memory.current", ("active_file", "inactive_file")),
    (("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
)


@dataclass(frozen=True)
class MemoryFigures:
    """Bytes of the host's memory, as /proc/meminfo and /proc/buddyinfo tell them.

    `limit` and `used` are those of the control group with the least room, of this process's and their parents: what its
    processes hold, without the page cache that the kernel drops before it kills. None: there is no limit.
    """

    total: int
    available: int  # without swapping
    free: int  # in use for nothing, not even page cache
    cached: int  # page cache, without shared memory
    shared: int  # shared memory and tmpfs, which only a swap can make room of
    locked: int  # in no way to be moved: mlock, pinned
    large_blocks: int  # of `free`, in blocks of BLOCK and more
    limit: int | None = None
    used: int | None = None

    @property
    def room(self) -> int:
        """What this process can still take before the kernel kills."""
        group = self.available if self.limit is None or self.used is None else self.limit - self.used
        return max(0, min(self.available, group))

    def as_record(self) -> dict[str, int | None]:
        """The figures as `stopped.json` has them."""
        return {f"{name}_bytes": value for name, value in vars(self).items()}

    def describe(self) -> str:
        """The figures in a clause, in GiB."""
        group = f"; control group {gib(self.used)} of {gib(self.limit)} GiB" if self.limit and self.used else ""
        return (
            f"MemAvailable {gib(self.available)} of {gib(self.total)}, MemFree {gib(self.free)} "
            f"({gib(self.large_blocks)} in blocks of 2 MiB), page cache {gib(self.cached)}, shared memory "
            f"{gib(self.shared)}, locked {gib(self.locked)} GiB{group}"
        )


class Holder(NamedTuple):
    """A process and the memory that it holds: its proportional share, or what is resident where that may not be read."""

    pid: int
    name: str
    bytes: int


def gib(size: int | None) -> str:
    """Bytes as a number of GiB."""
    return f"{(size or 0) / 2**30:.2f}"


def read_memory(root: Path = ROOT) -> MemoryFigures | None:
    """The figures of now; /proc and /sys are below `root`. None on a system without them, such as macOS."""
    try:
        text = _read(f"{root}/proc/meminfo")
        info = {name: int(value) * 1024 for name, value in (line.split()[:2] for line in text.splitlines())}
        total, available, free = info["MemTotal:"], info["MemAvailable:"], info["MemFree:"]
    except (OSError, ValueError, KeyError):
        return None
    shared = info.get("Shmem:", 0)
    cached = max(0, info.get("Cached:", 0) + info.get("Buffers:", 0) - shared)
    large = 0
    with suppress(OSError, ValueError):  # containers may hide it
        for line in _read(f"{root}/proc/buddyinfo").splitlines():
            counts = map(int, line.split()[4 + LARGE_ORDER :])
            large += sum(count * BLOCK << order for order, count in enumerate(counts))
    groups: list[tuple[int, int]] = []
    with suppress(OSError):  # no control groups here
        folders = _group_folders(root, _read(f"{root}/proc/self/cgroup"))
        groups = [found for folder, version in folders if (found := _group(folder, *_GROUPS[version], total))]
    limit, used = min(groups, key=lambda group: group[0] - group[1], default=(None, None))
    return MemoryFigures(total, available, free, cached, shared, info.get("Unevictable:", 0), large, limit, used)


@lru_cache(8)
def _group_folders(root: Path, text: str) -> list[tuple[str, int]]:
    """The control groups of /proc/self/cgroup (`text`) that may bound memory, and 0 for version 2, 1 for version 1."""
    versions = enumerate(usage for _, usage, _ in _GROUPS)
    return [(str(f), v) for v, usage in versions for f in control_groups("memory", root) if (f / usage).exists()]


def _group(
    folder: str, limits: tuple[str, ...], usage: str, cache: tuple[str, ...], total: int
) -> tuple[int, int] | None:
    """Limit and use of a control group; None where it has no limit."""
    with suppress(OSError, ValueError):
        texts = [_read(f"{folder}/{name}").strip() for name in limits]
        limit = min(int(text) if text != "max" else total for text in texts)
        if limit < total:
            stat = dict(line.split() for line in _read(f"{folder}/memory.stat").splitlines())
            return limit, max(0, int(_read(f"{folder}/{usage}")) - sum(int(stat[name]) for name in cache))
    return None


def _read(path: str) -> str:
    handle = os.open(path, os.O_RDONLY)  # a fifth of the time that a file object takes
    try:
        return os.read(handle, 1 << 16).decode("utf-8", "replace")
    finally:
        os.close(handle)


def drop_pages(handle: int, start: int = 0, size: int = 0) -> None:
    """Tell the kernel that a file's pages (`size` 0: all from `start` on) are not needed again, where it can be told.

    Pages that are not on the disk yet, or that a process maps, stay.
    """
    if hasattr(os, "posix_fadvise"):  # Linux; macOS has no such call
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


def largest_processes(ours: Collection[int], count: int = 4, root: Path = ROOT) -> tuple[list[Holder], list[Holder]]:
    """The processes `ours`, and the `count` of others that hold the most memory, each the largest first."""
    found = []
    for folder in (root / "proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):  # it has ended
            resident = int(_read(f"{folder}/statm").split()[1]) * PAGE
            found.append(Holder(int(folder.name), _read(f"{folder}/comm").strip(), resident))
    others = sorted((h for h in found if h.pid not in ours), key=lambda holder: -holder.bytes)[: 2 * count]
    largest = [h for h in found if h.pid in ours] + others
    for index, holder in enumerate(largest):
        with suppress(OSError, ValueError, StopIteration):  # another user's
            lines = _read(f"{root}/proc/{holder.pid}/smaps_rollup").splitlines()
            share = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
            largest[index] = holder._replace(bytes=share)
    largest.sort(key=lambda holder: -holder.bytes)
    return [h for h in largest if h.pid in ours], [h for h in largest if h.pid not in ours][:count]


def available_memory(root: Path = ROOT) -> int:
    """Bytes of host memory that this process can use without swapping."""
    if figures := read_memory(root):
        return figures.room
    import psutil

    return int(psutil.virtual_memory().available)


def unavailable_percent(root: Path = ROOT) -> float:
    """100 less the available share of the host's memory."""
    import psutil

    figures = read_memory(root) or psutil.virtual_memory()
    return 100.0 * (1 - figures.available / figures.total)
