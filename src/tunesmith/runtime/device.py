"""The device of a run, and how much of its memory torch's allocator may take."""

import gc
import os
from collections.abc import Callable, Collection
from types import ModuleType
from typing import NamedTuple

import torch

from tunesmith.distributed import torch_private
from tunesmith.host.chips import Chip
from tunesmith.host.cores import multiplies_bf16
from tunesmith.host.memory import (
    MemoryLimit,
    memory_floor,
    memory_limits,
    read_memory,
    unified_budget,
)

ALLOCATOR_VARIABLES = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}


class HostBudget(NamedTuple):
    """Bytes of the host's memory that a rank can allocate beside what it holds.

    Attributes:
        free: now.
        ceiling: if all other programs gave way.
        limit: what bounds the second figure.
    """

    free: int
    ceiling: int
    limit: MemoryLimit


def host_budget(ranks: Collection[int] = ()) -> HostBudget:
    """The share of this process in the host's memory.

    `ranks` are the process ids of the run's ranks on this host. The floor is left out: a run that
    comes below it is stopped (memory_guard).
    """
    limits = memory_limits(ranks)
    free = []
    ceilings = []
    for limit in limits:
        floor = memory_floor(limit.size, unified=False)
        free.append((limit.size - floor - limit.used) // limit.ranks)
        ceilings.append((limit.size - floor - limit.used_by_run) // limit.ranks)
    ceiling = min(ceilings)
    return HostBudget(max(0, min(free)), max(0, ceiling), limits[ceilings.index(ceiling)])


def chip_of(device: torch.device, ranks: Collection[int] = ()) -> Chip:
    """The chip that a dtype is chosen for: its name, memory that is free, and whether it has bf16.

    `ranks` are the process ids of the run's ranks on this host.
    """
    if device.type == "cpu":
        return Chip("cpu", host_budget(ranks).free / 2**30, bf16=multiplies_bf16())
    return Chip(
        torch.cuda.get_device_name(device),
        free_memory(device) / 2**30,
        bf16=torch.cuda.is_bf16_supported(including_emulation=False),
    )


def choose_device() -> torch.device:
    """CUDA where there is one, else the CPU; the allocator is prepared before its first use."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    prepare_allocator(device)
    return device


def is_integrated(device: torch.device, cuda: ModuleType = torch.cuda) -> bool:
    """Tell whether `device` is a GPU that shares the host's memory (GB10)."""
    return device.type == "cuda" and bool(cuda.get_device_properties(device).is_integrated)


def free_memory(device: torch.device, cuda: ModuleType = torch.cuda) -> int:
    """Bytes that can be allocated on `device` beside those that are.

    Of the host's memory those above the floor.
    """
    if device.type == "cpu":
        return host_budget().free
    # In the allocator's hands since an earlier run.
    idle = int(cuda.memory_reserved(device) - cuda.memory_allocated(device))
    # A driver of unified memory reports what is unused, not what can be had.
    if is_integrated(device, cuda):
        return unified_budget(read_memory()) + idle
    return int(cuda.mem_get_info(device)[0]) + idle


def prepare_allocator(
    device: torch.device,
    cuda: ModuleType = torch.cuda,
    configure: Callable[[str], object] = torch_private.set_allocator,
) -> None:
    """Set up the allocator of a GPU before its first allocation; `cuda` is torch.cuda.

    An integrated GPU gets a limit, so that an overrun raises torch.OutOfMemoryError and does not
    freeze the machine. A discrete one gets expandable segments, unless the user has set the
    allocator's variable: they waste less where micro batches differ in length, but gave driver
    errors on GB10.
    """
    if is_integrated(device, cuda):
        # The fraction bounds all that the allocator holds: what it has by now counts too.
        limit = free_memory(device, cuda) + cuda.memory_allocated(device)
        share = min(1.0, limit / cuda.get_device_properties(device).total_memory)
        # None is the current device; torch takes no `cuda` without an index here.
        cuda.set_per_process_memory_fraction(share, device.index)
    elif device.type == "cuda" and not ALLOCATOR_VARIABLES & os.environ.keys():
        configure("expandable_segments:True")


def free_device_memory(cuda: ModuleType = torch.cuda) -> None:
    """Give back what ended runs of this process still hold, and begin a GPU's peak anew."""
    torch.compiler.reset()  # compiled layers may keep their model alive
    gc.collect()
    if cuda.is_initialized():
        cuda.empty_cache()
        cuda.reset_peak_memory_stats()
