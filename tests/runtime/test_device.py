"""The allocator's limit on a GPU that shares the host's memory, and its segments on another."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from tunesmith.distributed import torch_private
from tunesmith.host.memory import MemoryFigures, MemoryLimit
from tunesmith.runtime import device
from tunesmith.runtime.device import (
    choose_device,
    free_memory,
    host_budget,
    is_integrated,
    prepare_allocator,
)

GIB = 2**30
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


class Pretended:
    """What `torch.cuda` tells of a GPU that this machine lacks, and what it is told."""

    def __init__(
        self, *, integrated: bool, reserved: int = 0, allocated: int = 0, free: int = 0
    ) -> None:
        self.chip = SimpleNamespace(is_integrated=int(integrated), total_memory=119 * GIB)
        self.reserved, self.allocated, self.free = reserved, allocated, free
        self.told: list[object] = []

    def get_device_properties(self, device: torch.device) -> SimpleNamespace:
        return self.chip

    def memory_reserved(self, device: torch.device) -> int:
        return self.reserved

    def memory_allocated(self, device: torch.device) -> int:
        return self.allocated

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return self.free, self.chip.total_memory

    def set_per_process_memory_fraction(self, fraction: float, device: object) -> None:
        """As torch.cuda's: a device without its index is refused, and None is the current one."""
        assert not isinstance(device, torch.device) or device.index is not None, device
        self.told.append(fraction)


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = MemoryFigures(119 * GIB, available=100 * GIB, free=0, cached=0, shared=0)
    monkeypatch.setattr(device, "read_memory", lambda: figures)
    machine = MemoryLimit("", 119 * GIB, used=19 * GIB, used_by_run=3 * GIB)
    monkeypatch.setattr(device, "memory_limits", lambda ranks: [machine])
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)


def prepared(cuda: Pretended, place: torch.device = GPU) -> list[object]:
    with (
        patch.object(device, "cuda", cuda),
        patch.object(torch_private, "set_allocator", cuda.told.append),
    ):
        prepare_allocator(place)
    return cuda.told


def test_a_rank_s_share_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = MemoryLimit("", 119 * GIB, used=19 * GIB, used_by_run=3 * GIB)
    group = MemoryLimit("control group /job", 50 * GIB, used=30 * GIB, used_by_run=9 * GIB, ranks=4)
    limits = [machine, group]
    monkeypatch.setattr(device, "memory_limits", lambda ranks: limits)
    assert host_budget() == (19 * GIB // 4, 40 * GIB // 4, group)
    limits.remove(group)
    assert host_budget() == (99 * GIB, 115 * GIB, machine)


@pytest.mark.parametrize(("reserved", "gib"), [(0, 90), (20 * GIB, 110), (60 * GIB, 119)])
def test_the_allocator_may_take_what_the_host_has_and_what_it_holds(reserved, gib):
    for place in (GPU, torch.device("cuda")):
        told = prepared(Pretended(integrated=True, reserved=reserved), place)
        assert told == [pytest.approx(gib / 119)]


@pytest.mark.parametrize("name", ["", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_segments_expand_on_a_discrete_card_unless_the_user_set_the_allocator(name, monkeypatch):
    if name:
        monkeypatch.setenv(name, "backend:native")
    expected = [] if name else ["expandable_segments:True"]
    assert prepared(Pretended(integrated=False)) == expected
    assert prepared(Pretended(integrated=True), CPU) == []


def test_free_memory_is_the_card_s_or_the_host_s_and_what_the_allocator_holds_unused():
    for integrated, free in ((False, 7), (True, 90 * GIB)):
        cuda = Pretended(integrated=integrated, free=7, reserved=30, allocated=10)
        with patch.object(device, "cuda", cuda):
            assert free_memory(GPU) == free + 20
            assert [is_integrated(place) for place in (GPU, CPU)] == [integrated, False]
    assert free_memory(CPU) == 99 * GIB


def test_this_torch_takes_the_setting() -> None:
    """Its name has moved before; a CPU's allocator ignores the option."""
    torch_private.set_allocator("expandable_segments:False")
    with pytest.raises((RuntimeError, ValueError)):
        torch_private.set_allocator("expandable_segments")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_more_than_the_limit_raises_and_the_segments_expand() -> None:
    place = choose_device()
    share = torch.cuda.get_per_process_memory_fraction(place)
    total = torch.cuda.get_device_properties(place).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction(2**30 / total, place)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2 * 2**30, dtype=torch.uint8, device=place)
    finally:
        torch.cuda.set_per_process_memory_fraction(share, place)
    torch.cuda.empty_cache()
    block = torch.empty(64 * 2**20, dtype=torch.uint8, device=place)
    expandable = [
        segment["is_expandable"]
        for segment in torch.cuda.memory_snapshot()
        if 0 <= block.data_ptr() - segment["address"] < segment["total_size"]
    ]
    assert expandable == [not is_integrated(place)]
