"""How this process uses the host's memory and cores."""

import ctypes
import os
import platform
import sys
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tunesmith.host.cores import available_cores

# Parameters of glibc's mallopt(3), from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc takes no more on 64 bit
NEVER = 2**31 - 1
CACHED_SHAPES = (
    "128"  # between the two that were measured; a cached shape holds about half a megabyte
)
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
NAMED = "as the environment says"
SAMPLE_SECONDS = (
    0.06  # six ticks a core: enough to tell a core that computes from one that does not
)


def keep_freed_pages() -> bool:
    """Let malloc keep what is freed; returns whether it was done: on Linux with glibc.

    By default glibc returns blocks above 128 KiB to the kernel at once, which zeroes them again at the next allocation.
    Keeping them more than halves the kernel's time in a LoRA step of SmolLM2-135M; peak memory does not change.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        and libc.mallopt(M_TRIM_THRESHOLD, NEVER)
    )


def return_freed_memory() -> None:
    """Give what was freed back to the system: malloc's pages, and a GPU's cached blocks."""
    import torch

    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def bound_product_caches() -> None:
    """Keep oneDNN's and its wrapper's caches of matmul shapes small; call it before the first matmul.

    Rows of varied length make new shapes in every step, and both caches keep 1,024 of them: six layers of SmolLM2-135M
    grew from 0.8 to 2.5 GiB in 60 steps of LoRA; bounded to 64 they ended at 1.0, to 256 at 1.3, at the same speed.
    Variables that are set stay as they are.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", CACHED_SHAPES)
    os.environ.setdefault("LRU_CACHE_CAPACITY", CACHED_SHAPES)


class Cores(NamedTuple):
    """The physical cores that a process is bound to: how many, how many of them compute, and its share of their time."""

    total: int
    busy: int
    allowed: int

    def threads(self) -> tuple[int, str]:
        """How many threads to compute with, and why: one a core, as far as they are free.

        All threads of a product wait for the slowest, and beside a busy core that one takes twice as long: busy cores
        are left out as long as more than half are free, and beyond that sharing all of them is faster.
        """
        if self.allowed < self.total:
            return self.allowed, f"this process's share of the time of {self.total} cores"
        if 0 < self.busy < self.total / 2:
            why = f"{self.busy} of {self.total} cores are busy; OMP_NUM_THREADS={self.total} takes all of them"
            return self.total - self.busy, why
        return self.total, "one a core"


@cache
def prepare_threads() -> str:
    """Set how many threads torch computes with and how they wait; returns why so many. Call it before torch is loaded.

    libgomp's threads wait in a loop, for milliseconds: on a busy machine that takes the very core which the thread that
    is waited for needs. Beside a busy core they sleep at once, which would cost a quiet machine a third of its speed.
    Variables that are set stay.
    """
    named = any(os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"))
    if "torch" in sys.modules or sys.platform != "linux":
        return NAMED if named else "as torch chose"
    before = _read_stat()
    time.sleep(SAMPLE_SECONDS)
    cores = measure_cores(before, _read_stat())
    if (cores.busy or cores.allowed < cores.total) and not any(
        name in os.environ for name in WAITING
    ):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    count, why = cores.threads()
    if not named:
        os.environ["OMP_NUM_THREADS"] = str(count)
    return NAMED if named else why


def keep_threads(before: int | None) -> str:
    """Give a resumed run the threads that it had `before` (None: not known); returns why so many.

    A sum over a whole tensor is split by threads, and another number of them rounds it otherwise. Numbers within a factor of
    two may be those of one machine, more or less busy; others are left, and so are those that the environment names.
    """
    import torch

    why, now = prepare_threads(), torch.get_num_threads()
    if (
        before is not None
        and before != now
        and why != NAMED
        and max(before, now) < 2 * min(before, now)
    ):
        torch.set_num_threads(before)
        return "those of the checkpoint"
    return why


def _read_stat() -> str:
    return Path("/proc/stat").read_text(encoding="ascii")


def measure_cores(before: str, after: str, root: Path = Path("/")) -> Cores:
    """`before` and `after` are two readings of /proc/stat; `root` is where /proc and /sys are looked for."""
    cpus = os.sched_getaffinity(0)
    siblings = (
        root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list" for cpu in cpus
    )
    total = len(
        {file.read_text(encoding="ascii") if file.exists() else str(file) for file in siblings}
    )
    first, last = _ticks(before, cpus), _ticks(after, cpus)
    idle, ticks = (late - early for early, late in zip(first, last, strict=True))
    return Cores(
        total, round(total * (1 - idle / ticks)) if ticks else 0, min(total, available_cores(root))
    )


def _ticks(stat: str, cpus: set[int]) -> tuple[int, int]:
    """Idle ticks and all ticks since boot of these processors, from the text of /proc/stat."""
    lines = (line.split() for line in stat.splitlines())
    rows = [
        list(map(int, counts[:8]))
        for name, *counts in lines
        if name[:3] == "cpu" and name[3:] in map(str, cpus)
    ]
    return sum(row[3] + row[4] for row in rows), sum(map(sum, rows))
