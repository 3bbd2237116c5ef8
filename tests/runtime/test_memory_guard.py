"""When the guard asks for a stop: fed with the figures of a machine, and by a clock of the test."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from errors import holds
from page_cache import resident
from tunesmith.distributed.heartbeat import Heartbeat
from tunesmith.distributed.ranks import Ranks
from tunesmith.errors import LowMemoryError
from tunesmith.host.memory import MemoryFigures, memory_floor
from tunesmith.host.signals import StopRequest
from tunesmith.runtime import memory_guard
from tunesmith.runtime.memory_guard import MemoryGuard, drop_page_cache

GIB, MIB = 2**30, 2**20
LAPTOP = MemoryFigures(16 * GIB, 9 * GIB, free=GIB, cached=6 * GIB, shared=0)
SPARK = MemoryFigures(int(121.7 * GIB), 60 * GIB, free=50 * GIB, cached=9 * GIB, shared=0)
PHASE = "loading the model"
FILES = [Path("weights.safetensors")]
Course = Callable[[float], MemoryFigures]  # the figures after so many seconds


def falling(base: MemoryFigures, first: float, last: float, seconds: float) -> Course:
    """MemAvailable falls from `first` to `last` GiB and stays; MemFree is 1 GiB below."""

    def at(now: float) -> MemoryFigures:
        available = int((first + (last - first) * min(1.0, now / seconds)) * GIB)
        return replace(base, available=available, free=max(0, available - GIB), cached=GIB)

    return at


class Pretended:
    """A guard on a machine of the test, looking when it would."""

    def __init__(
        self,
        course: Course,
        monkeypatch: pytest.MonkeyPatch,
        *,
        unified: bool,
        own: Course | None = None,
    ) -> None:
        self.now, self.dropped = 0.0, list[float]()
        self.stop = StopRequest()
        self.stop.defer_signals()
        held = (lambda pids: own(self.now).total) if own else (lambda pids: GIB)
        monkeypatch.setattr(memory_guard, "own_memory", held)
        self.guard = MemoryGuard(
            self.stop, Ranks(), lambda: FILES, read=lambda: course(self.now), clock=lambda: self.now,
            unified=unified, make_room=self.drop,
        )  # fmt: skip

    def drop(self, files: Sequence[Path]) -> None:
        assert files == FILES
        self.dropped.append(self.now)

    def until(self, seconds: float) -> float | None:
        """The second at which it asks for a stop; None if it does not."""
        while self.now < seconds:
            wait = self.guard.look()
            if self.stop.low_memory is not None:
                return self.now
            self.now += wait
        return None


# What GB10s recorded before they froze or their driver failed, with the second at which that was.
CACHE = replace(SPARK, available=int(22.5 * GIB), free=int(2.5 * GIB), cached=int(19.8 * GIB))
SPARKS = {
    # dgx-spark-playbooks#116: 34.0 to 12.7 GiB in 1.5 seconds, when the driver failed.
    "collapse in 1.5 s": (falling(SPARK, 34.0, 12.7, 1.5), 1.5),
    # vllm-ultimate-dgx-spark#9: the last sample before a freeze, of 124,546 MiB.
    "7,894 MiB left": (falling(SPARK, 20, 7894 / 1024, 600), 600.0),
    # vllm#54200: 19.8 of 22.5 GiB available are page cache, and allocations failed.
    "free memory gone, page cache stays": (lambda now: CACHE, 60.0),
}


@pytest.mark.parametrize("name", SPARKS)
def test_it_stops_before_a_gb10_freezes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    course, frozen = SPARKS[name]
    asked = Pretended(course, monkeypatch, unified=True).until(frozen + 60)
    assert asked is not None
    assert asked < frozen


def test_on_unified_memory_page_cache_is_dropped_before_a_stop(monkeypatch):
    flood = replace(SPARK, available=70 * GIB, free=5 * GIB, cached=60 * GIB)
    there = Pretended(lambda now: flood if not there.dropped else SPARK, monkeypatch, unified=True)
    assert there.until(30) is None
    assert len(there.dropped) == 1
    # There the kernel may use it as it likes
    elsewhere = Pretended(lambda now: flood, monkeypatch, unified=False)
    assert elsewhere.until(30) is None
    assert elsewhere.dropped == []


def test_a_full_gb10_trains_on_and_page_cache_is_dropped_rarely(monkeypatch):
    """Dropping brings nothing here: the page cache is of files that another program maps."""
    steady = replace(SPARK, available=11 * GIB, free=int(2.5 * GIB), cached=int(8.5 * GIB))
    there = Pretended(lambda now: steady, monkeypatch, unified=True)
    assert there.until(20 * 60) is None
    assert len(there.dropped) <= 8, "a drop that brings nothing is tried ever more rarely"


@pytest.mark.parametrize("rate", [0.002, 0.4])
def test_a_laptop_stops_while_there_is_room_to_save(rate, monkeypatch):
    """Others take `rate` GiB a second; a stop takes a second or two."""
    there = Pretended(falling(LAPTOP, 9, 0, 9 / rate), monkeypatch, unified=False)
    asked = there.until(20 / rate)
    assert asked is not None
    left = 9 - rate * asked
    assert left * GIB > memory_floor(LAPTOP.total, unified=False) * 0.9 + 2 * rate * GIB
    assert left < 0.4 + 4 * rate


def test_a_control_group_has_a_floor_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    group = replace(LAPTOP, limit=2 * GIB, used=2 * GIB - 120 * MIB)
    assert Pretended(lambda now: group, monkeypatch, unified=False).until(1) == 0.0
    roomy = replace(group, used=2 * GIB - 140 * MIB)
    assert Pretended(lambda now: roomy, monkeypatch, unified=False).until(5) is None


def test_what_a_run_takes_itself_is_no_growth_of_others(monkeypatch: pytest.MonkeyPatch) -> None:

    def swinging(now: float) -> MemoryFigures:
        return replace(LAPTOP, available=9 * GIB if int(now) % 2 else 2 * GIB)

    def own(now: float) -> MemoryFigures:
        return replace(LAPTOP, total=GIB if int(now) % 2 else 8 * GIB)

    assert Pretended(swinging, monkeypatch, unified=False, own=own).until(20) is None
    assert Pretended(swinging, monkeypatch, unified=False).until(20) is not None
    burst = falling(LAPTOP, 9, 6, 2)
    assert Pretended(burst, monkeypatch, unified=False).until(20) is None


def test_the_block_names_phase_figures_and_holders(monkeypatch: pytest.MonkeyPatch) -> None:
    there = Pretended(
        lambda now: replace(LAPTOP, available=100 * MIB, shared=3 * GIB), monkeypatch, unified=False
    )
    there.guard.ranks.heartbeat.phase(PHASE)
    there.stop.saving = GIB
    there.until(1)
    text, record = there.stop.low_memory or ("", {})
    assert text.startswith(f"{PHASE}, ")
    assert holds(text, "0.10 GiB", "1.32 GiB", "3.00", "6.00")
    figures = {"phase": PHASE, "available_bytes": 100 * MIB, "shared_bytes": 3 * GIB}
    figures["floor_bytes"] = 16 * GIB // 50 + GIB
    assert {name: record[name] for name in figures} == figures
    (ours,), others = record["processes"], record["other_processes"]
    assert (ours["pid"], ours["bytes"] > 0) == (os.getpid(), True)
    assert os.getpid() not in [other["pid"] for other in others]
    error = there.stop.not_begun()
    assert (type(error), error.exit_code) == (LowMemoryError, 75)


def test_the_ranks_of_a_host_are_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three ranks one is on another host."""
    heartbeat = Heartbeat(1, ("a", "a", "b"), range(2))
    space, parent = os.readlink("/proc/self/ns/pid"), os.getppid()
    for rank, pid in enumerate((parent, os.getpid(), 1)):
        heartbeat.peers.beats[rank].process = f"{space} {pid}"
    there = Pretended(lambda now: replace(LAPTOP, available=100 * MIB), monkeypatch, unified=False)
    asked: list[list[int]] = []
    monkeypatch.setattr(memory_guard, "own_memory", lambda pids: asked.append(sorted(pids)) or GIB)
    there.guard.ranks = Ranks(1, 3, 1, 2, ("a", "a", "b"), (0,) * 3, heartbeat)
    there.until(1)
    assert asked == [sorted((parent, os.getpid()))]


def test_floors() -> None:
    floors = [memory_floor(gib * GIB, unified=False) for gib in (1, 16, 512)]
    assert floors == [128 * MIB, 16 * GIB // 50, GIB]
    assert [memory_floor(gib * GIB, unified=True) for gib in (12, 119)] == [GIB, 8 * GIB]


def test_files_leave_the_page_cache_without_a_right(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    weights, rows = tmp_path / "model" / "weights.safetensors", tmp_path / "rows.jsonl"
    os.mkfifo(tmp_path / "model" / "pipe")  # opening it would wait for a writer
    for file in (weights, rows):
        file.write_bytes(os.urandom(16 * MIB))
        with file.open("rb") as f:
            os.fsync(f.fileno())
            f.read()
        assert resident(file) == 16 * MIB // mmap.PAGESIZE
    drop_page_cache([tmp_path / "model", rows, tmp_path / "not there"], tmp_path / "no switches")
    if resident(rows):
        pytest.skip("this file system is nowhere but in the page cache")
    assert (resident(weights), resident(rows)) == (0, 0)


def test_root_drops_all_by_the_kernels_switches(tmp_path: Path) -> None:
    switches = tmp_path / "proc/sys/vm"
    switches.mkdir(parents=True)
    drop_page_cache([], tmp_path)
    written = [(switches / name).read_text() for name in ("drop_caches", "compact_memory")]
    assert written == ["1", "1"]
