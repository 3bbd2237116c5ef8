"""Settings of this process for memory allocation and CPU threads on the host."""

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
LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc's maximum on 64-bit systems
NEVER = 2**31 - 1
# Number of shapes that oneDNN caches. It is between 64 and 256, the values that were measured. A
# cached shape takes about 0.5 MB.
CACHED_SHAPES = "128"
# Environment variables that determine how libgomp's threads wait.
WAIT_VARIABLES = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
BY_ENVIRONMENT = "set by the environment"
# Duration of the measurement: six kernel ticks per core, which is enough to recognize a busy core.
SAMPLE_SECONDS = 0.06


def keep_freed_pages() -> bool:
    """Let malloc keep freed memory. Return whether this succeeded, which requires Linux and glibc.

    By default glibc returns blocks above 128 KiB to the kernel at once, and the kernel zeroes them
    at the next allocation. Keeping the blocks more than halves the kernel's time in a LoRA step of
    SmolLM2-135M. The peak memory does not change.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    is_set = mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
    return bool(is_set and mallopt(M_TRIM_THRESHOLD, NEVER))


def return_freed_memory() -> None:
    """Return freed memory to the system: malloc's pages, and the cached blocks of a GPU."""
    import torch

    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def bound_shape_caches() -> None:
    """Limit the memory and time that libraries use for each new shape. Environment variables that
    are already set are not changed.

    Call this before the first matmul and the first attention.

    oneDNN and its wrapper in torch each cache 1,024 shapes of matmuls by default. If rows have
    different lengths, every step has new shapes. A process that trained six layers of SmolLM2-135M
    grew from 0.8 to 2.5 GiB in 60 LoRA steps. With a limit of 64 shapes it grew to 1.0 GiB, and
    with 256 shapes to 1.3 GiB, at the same speed.

    On Hopper and data-center Blackwell, torch's attention prefers cuDNN, which takes tens of
    milliseconds to build a plan for each new shape. Each image size is a new shape, and so is each
    length of the cache in decoding. FlashAttention and the memory-efficient kernel need no plan, so
    torch is set to prefer them.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", CACHED_SHAPES)
    os.environ.setdefault("LRU_CACHE_CAPACITY", CACHED_SHAPES)
    os.environ.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")


class Cores(NamedTuple):
    """The physical cores that a process may use.

    Attributes:
        busy: number of cores that are computing now.
        allowed: maximum number of cores, computed from the process's limit of CPU time.
    """

    total: int
    busy: int
    allowed: int

    def threads(self) -> tuple[int, str]:
        """Return the number of compute threads, one per free core, and the reason for this number.

        All threads of a matmul wait for the slowest, and a thread on a busy core takes twice as
        long. Busy cores are therefore not used if more than half of the cores are free. Otherwise
        it is faster to use all cores.
        """
        total, busy, allowed = self
        if allowed < total:
            return allowed, f"this process may use only a part of the {total} cores"
        if 0 < busy < total / 2:
            why = f"busy cores: {busy} of {total}; OMP_NUM_THREADS={total} uses all of them"
            return total - busy, why
        return total, "one per core"


@cache
def prepare_threads() -> str:
    """Set the number of torch's threads and the way in which they wait. Return the reason for the
    number.

    Call this before torch is imported. libgomp's threads wait in a busy loop for milliseconds. On a
    busy machine, the loop occupies the core that the slowest thread needs. Therefore the threads
    are set to sleep at once if a core is busy. On an idle machine they are not, because sleeping
    would cost a third of the speed. Variables that are already set are unchanged.
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
    """Set the number of threads of a resumed run to `previous`, the number before it was resumed.
    Return the reason for the number.

    A sum over an entire tensor is divided among threads, so another number of threads changes the
    rounding. If the current and the previous number differ by less than a factor of two, it may be
    the same machine with another load, so the previous number is used. Otherwise, or if the
    environment sets the number, the current number is kept.

    Args:
        previous: number of threads before the run was resumed. None if it is not known.
    """
    import torch

    why = prepare_threads()
    now = torch.get_num_threads()
    if previous is None or previous == now or why == BY_ENVIRONMENT:
        return why
    if not now / 2 < previous < 2 * now:
        return why
    torch.set_num_threads(previous)
    return "from the checkpoint"


def _read_stat() -> str:
    return Path("/proc/stat").read_text(encoding="ascii")


def measure_cores(first: str, second: str, root: Path = Path("/")) -> Cores:
    """Return the cores of this process from two readings of /proc/stat.

    Args:
        root: folder that contains /proc and /sys, for tests.
    """
    cpus = os.sched_getaffinity(0)
    # The logical CPUs of one physical core have the same list of siblings.
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
        # Compute the number of busy cores from the share of ticks that were not idle.
        busy = round(total * (1 - (second_idle - first_idle) / ticks))
    return Cores(total, busy, min(total, available_cores(root)))


def _ticks(stat: str, cpus: set[int]) -> tuple[int, int]:
    """Return the idle ticks and all ticks of these CPUs since boot, from the text of /proc/stat."""
    names = {f"cpu{cpu}" for cpu in cpus}
    rows = [line.split() for line in stat.splitlines()]
    # user nice system idle iowait irq softirq steal. The values after these are already included
    # in user.
    ticks = [[int(count) for count in counts[:8]] for name, *counts in rows if name in names]
    return sum(values[3] + values[4] for values in ticks), sum(map(sum, ticks))
