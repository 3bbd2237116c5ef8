"""Selection of the device of a run, and the memory limit of torch's allocator on the device."""

import gc
import os
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import cuda

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
    """Host memory in bytes that this process can still allocate.

    Attributes:
        free: bytes that are available now.
        ceiling: bytes that would be available if no other programs used memory.
        limit: the memory limit that determines `ceiling`.
    """

    free: int
    ceiling: int
    limit: MemoryLimit


def host_budget(ranks: Collection[int] = ()) -> HostBudget:
    """Return the host memory that this process can still allocate.

    The memory below the floor is not included, because `memory_guard` stops a run when the
    available memory falls to this floor.

    Args:
        ranks: process ids of the run's ranks on this host.
    """
    limits = memory_limits(ranks)
    free = []
    ceilings = []
    for limit in limits:
        usable = limit.size - memory_floor(limit.size, unified=False)
        free.append((usable - limit.used) // limit.ranks)
        ceilings.append((usable - limit.used_by_run) // limit.ranks)

    ceiling = min(ceilings)
    narrowest = limits[ceilings.index(ceiling)]
    return HostBudget(max(0, min(free)), max(0, ceiling), narrowest)


def chip_of(device: torch.device, ranks: Collection[int] = ()) -> Chip:
    """Return the name, the free memory and the bf16 support of the chip. These values determine the
    dtype of the run.

    Args:
        ranks: process ids of the run's ranks on this host.
    """
    if device.type == "cpu":
        return Chip("cpu", host_budget(ranks).free / 2**30, bf16=multiplies_bf16())
    return Chip(
        cuda.get_device_name(device),
        free_memory(device) / 2**30,
        bf16=cuda.is_bf16_supported(including_emulation=False),
    )


def choose_device() -> torch.device:
    """Return the CUDA device or, if there is none, the CPU.

    The memory allocator of the device is configured, which must happen before its first use.
    """
    device = torch.device("cpu")
    if cuda.is_available():
        device = torch.device("cuda", cuda.current_device())
    prepare_allocator(device)
    return device


def is_integrated(device: torch.device) -> bool:
    """Return whether `device` is a GPU that shares the host's memory (GB10)."""
    return device.type == "cuda" and bool(cuda.get_device_properties(device).is_integrated)


def free_memory(device: torch.device) -> int:
    """Return the number of bytes that can still be allocated on `device`.

    For a CPU, the result does not include the memory that `memory_guard` keeps free.
    """
    if device.type == "cpu":
        return host_budget().free
    # Bytes that the allocator has reserved but does not use, for example because an earlier run has
    # freed them.
    idle = int(cuda.memory_reserved(device) - cuda.memory_allocated(device))
    # With unified memory, the driver reports only unused memory. It does not count page cache,
    # which the kernel could free.
    if is_integrated(device):
        return unified_budget(read_memory()) + idle
    return int(cuda.mem_get_info(device)[0]) + idle


def prepare_allocator(device: torch.device) -> None:
    """Set up the allocator of a GPU before its first allocation.

    An integrated GPU gets a memory limit, so that an overrun raises torch.OutOfMemoryError instead
    of freezing the machine. A discrete GPU gets expandable segments, unless the user has configured
    the allocator. Expandable segments waste less memory if micro batches differ in length, but they
    caused driver errors on GB10.
    """
    if is_integrated(device):
        # The limit includes the memory that the allocator already holds.
        limit = free_memory(device) + cuda.memory_allocated(device)
        share = min(1.0, limit / cuda.get_device_properties(device).total_memory)
        # device.index is None for the current device. torch does not accept `cuda` without an
        # index.
        cuda.set_per_process_memory_fraction(share, device.index)
    elif device.type == "cuda" and not ALLOCATOR_VARIABLES & os.environ.keys():
        torch_private.set_allocator("expandable_segments:True")


def free_device_memory() -> None:
    """Free the memory of runs in this process that have ended, and reset the GPU's counter of peak
    memory.
    """
    torch.compiler.reset()  # compiled layers may reference their model
    gc.collect()
    if cuda.is_initialized():
        cuda.empty_cache()
        cuda.reset_peak_memory_stats()
