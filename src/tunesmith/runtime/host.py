"""The host's memory and cores, as this process uses them."""

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
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc takes no more on 64 bit
NEVER = 2**31 - 1
# Between the two that were measured; a cached shape holds about half a megabyte.
CACHED_SHAPES = "128"
# Variables for how libgomp's threads wait.
WAIT_VARIABLES = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
BY_ENVIRONMENT = "set by the environment"
# Six ticks a core: enough to tell a core that computes from one that does not.
SAMPLE_SECONDS = 0.06


def keep_freed_pages() -> bool:
    """Let malloc keep what is freed; returns whether it does: on Linux with glibc.

    By default glibc returns blocks above 128 KiB to the kernel at once, which zeroes them again at
    the next allocation. Keeping them more than halves the kernel's time in a LoRA step of
    SmolLM2-135M; peak memory does not change.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    if not mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD):
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, NEVER))


def return_freed_memory() -> None:
    """Give what was freed back to the system: malloc's pages, and a GPU's cached blocks."""
    import torch

    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def bound_shape_caches() -> None:
    """Limit what libraries keep for each new shape. Variables that are set stay as they are.

    Call it before the first matmul and the first attention.
    oneDNN and its wrapper keep 1,024 shapes of matmuls each, and rows of varied length make new
    ones in every step: six layers of SmolLM2-135M grew from 0.8 to 2.5 GiB in 60 steps of LoRA;
    bounded to 64 they ended at 1.0, to 256 at 1.3, at the same speed.
    On Hopper and data-center Blackwell torch's attention prefers cuDNN, which builds a plan for
    each new shape, in tens of milliseconds: each size of a picture, and each length of the cache
    when a model decodes. FlashAttention and the memory-efficient kernel need no plan.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", CACHED_SHAPES)
    os.environ.setdefault("LRU_CACHE_CAPACITY", CACHED_SHAPES)
    os.environ.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")


class Cores(NamedTuple):
    """The physical cores that a process is bound to.

    Attributes:
        busy: those that compute now.
        allowed: as many as its share of their time makes.
    """

    total: int
    busy: int
    allowed: int

    def threads(self) -> tuple[int, str]:
        """Choose how many threads compute, and say why: one a core, as far as they are free.

        All threads of a product wait for the slowest, and beside a busy core that one takes twice
        as long: busy cores are left out as long as more than half are free, and beyond that sharing
        all of them is faster.
        """
        if self.allowed < self.total:
            return self.allowed, f"this process's share of the time of {self.total} cores"
        if 0 < self.busy < self.total / 2:
            busy = f"busy cores: {self.busy} of {self.total}"
            why = f"{busy}; OMP_NUM_THREADS={self.total} uses all of them"
            return self.total - self.busy, why
        return self.total, "one a core"


@cache
def prepare_threads() -> str:
    """Set how many threads torch computes with and how they wait; returns why so many.

    Call it before torch is loaded. libgomp's threads wait in a loop, for milliseconds: on a busy
    machine that takes the very core which the thread that is waited for needs. Beside a busy core
    they sleep at once, which would cost a quiet machine a third of its speed. Variables that are
    set stay.
    """
    has_count = any(os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"))
    if "torch" in sys.modules or sys.platform != "linux":
        return BY_ENVIRONMENT if has_count else "torch's default"
    first = _read_stat()
    time.sleep(SAMPLE_SECONDS)
    cores = measure_cores(first, _read_stat())
    shares_cores = cores.busy > 0 or cores.allowed < cores.total
    if shares_cores and not WAIT_VARIABLES & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    if has_count:
        return BY_ENVIRONMENT
    count, why = cores.threads()
    os.environ["OMP_NUM_THREADS"] = str(count)
    return why


def keep_threads(previous: int | None) -> str:
    """Give a resumed run the threads of its `previous` start; returns why so many.

    A sum over a whole tensor is split by threads, and another number of them rounds it otherwise.
    Numbers within a factor of two may be those of one machine, more or less busy; others are left,
    and so are those that the environment names. None: unknown.
    """
    import torch

    why = prepare_threads()
    now = torch.get_num_threads()
    if previous is None or previous == now or why == BY_ENVIRONMENT:
        return why
    if max(previous, now) >= 2 * min(previous, now):
        return why
    torch.set_num_threads(previous)
    return "from the checkpoint"


def _read_stat() -> str:
    return Path("/proc/stat").read_text(encoding="ascii")


def measure_cores(first: str, second: str, root: Path = Path("/")) -> Cores:
    """Cores by two readings of /proc/stat.

    /proc and /sys are below `root`.
    """
    cpus = os.sched_getaffinity(0)
    # Processors of one physical core have the same list of siblings.
    physical = set()
    for cpu in cpus:
        file = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        physical.add(file.read_text(encoding="ascii") if file.exists() else str(file))
    total = len(physical)
    first_idle, first_ticks = _ticks(first, cpus)
    second_idle, second_ticks = _ticks(second, cpus)
    ticks = second_ticks - first_ticks
    busy = 0
    if ticks:
        # The ticks that were not idle, as a number of cores.
        busy = round(total * (1 - (second_idle - first_idle) / ticks))
    return Cores(total, busy, min(total, available_cores(root)))


def _ticks(stat: str, cpus: set[int]) -> tuple[int, int]:
    """Idle ticks and all ticks since boot of these processors, from the text of /proc/stat."""
    idle = 0
    total = 0
    for line in stat.splitlines():
        name, *counts = line.split()
        if name[:3] == "cpu" and name[3:] in map(str, cpus):
            # user nice system idle iowait irq softirq steal; what follows counts in user, too.
            ticks = [int(count) for count in counts[:8]]
            idle += ticks[3] + ticks[4]
            total += sum(ticks)
    return idle, total
