"""The figures of the host's memory, read below a root that a test writes."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from tunesmith.host import memory
from tunesmith.host.memory import (
    available_memory,
    largest_processes,
    read_memory,
    unavailable_percent,
)

MIB = 2**20
MEMINFO = """MemTotal:       8388608 kB
MemFree:        1048576 kB
MemAvailable:   4194304 kB
Buffers:          10240 kB
Cached:         3145728 kB
Unevictable:       2048 kB
Shmem:           524288 kB
HugePages_Total:       0
"""
# Orders 0 to 10 of 4 KiB; order 9 is 2 MiB.
BUDDYINFO = """Node 0, zone      DMA      1      0      0      0      0      0      0      0      1      1      3
Node 0, zone   Normal   8877   6018  25993  13941   7298   3970   1624    423    136      1     57
"""


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def test_the_figures_of_a_machine(tmp_path: Path) -> None:
    found = read_memory(write(tmp_path, {"proc/buddyinfo": BUDDYINFO}))
    assert found is not None
    assert (found.total, found.available, found.free) == (8192 * MIB, 4096 * MIB, 1024 * MIB)
    assert (found.cached, found.shared, found.locked) == (
        (3072 + 10 - 512) * MIB,
        512 * MIB,
        2 * MIB,
    )
    if memory.PAGE == 4096:
        assert found.large_blocks == (2 * 2 + 60 * 4) * MIB
    assert (found.limit, found.used, found.room) == (None, None, 4096 * MIB)
    assert "MemAvailable 4.00 of 8.00, MemFree 1.00" in found.describe()
    assert (available_memory(tmp_path), unavailable_percent(tmp_path)) == (4096 * MIB, 50.0)


def stat(prefix: str, active: int, inactive: int) -> str:
    return f"anon 7\n{prefix}active_file {active * MIB}\n{prefix}inactive_file {inactive * MIB}\n"


FIRST = "sys/fs/cgroup/memory"
CASES = {
    "version 2, its own limit": (
        "0::/job\n",
        {"memory.max": "2147483648", "memory.high": "max", "memory.current": f"{1500 * MIB}", "memory.stat": stat("", 100, 200)},
        "sys/fs/cgroup/job",
        2048 - 1200,
    ),
    "version 2, throttled before its limit": (
        "0::/job\n",
        {"memory.max": "2147483648", "memory.high": f"{1800 * MIB}", "memory.current": f"{1500 * MIB}", "memory.stat": stat("", 0, 0)},
        "sys/fs/cgroup/job",
        300,
    ),
    "version 2, a parent's limit": (
        "0::/job/step\n",
        {"memory.max": f"{1000 * MIB}", "memory.high": "max", "memory.current": f"{400 * MIB}", "memory.stat": stat("", 0, 0)},
        "sys/fs/cgroup/job",
        600,
    ),
    "version 1": (
        "4:memory:/job\n1:cpu:/\n",
        {"memory.limit_in_bytes": f"{1000 * MIB}", "memory.usage_in_bytes": f"{900 * MIB}", "memory.stat": stat("total_", 50, 250)},
        f"{FIRST}/job",
        400,
    ),
    "version 1 in a container": (
        "4:memory:/docker/1f3a\n",
        {"memory.limit_in_bytes": f"{1000 * MIB}", "memory.usage_in_bytes": f"{900 * MIB}", "memory.stat": stat("total_", 0, 0)},
        FIRST,
        100,
    ),
    "version 1 without a limit": (
        "4:memory:/\n",
        {"memory.limit_in_bytes": "9223372036854771712", "memory.usage_in_bytes": "7", "memory.stat": stat("total_", 0, 0)},
        FIRST,
        4096,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_room_of_a_control_group_is_its_limit_less_what_cannot_be_dropped(
    case: str, tmp_path: Path
) -> None:
    groups, files, folder, room = CASES[case]
    write(
        tmp_path,
        {"proc/self/cgroup": groups} | {f"{folder}/{name}": text for name, text in files.items()},
    )
    assert available_memory(tmp_path) == room * MIB


def test_ranks_share_the_machine_and_the_groups_that_hold_them(tmp_path: Path) -> None:
    """Rank 0, this process, and rank 1 are in groups of their own within one of 1,000 MiB; a third
    is elsewhere.
    """
    page = memory.PAGE
    outer = {"memory.max": f"{1000 * MIB}", "memory.high": "max", "memory.current": f"{400 * MIB}"}
    inner = {"memory.max": f"{900 * MIB}", "memory.high": "max", "memory.current": f"{100 * MIB}"}
    files = {
        "proc/self/cgroup": "0::/job/a\n",
        "proc/7/cgroup": "0::/job/b\n",
        "proc/8/cgroup": "0::/else\n",
    }
    files |= {
        f"proc/{pid}/statm": f"9 {mib * MIB // page} 0 0 0 0 0"
        for pid, mib in ((os.getpid(), 50), (7, 70))
    }
    for folder, group in (("job", outer), ("job/a", inner)):
        files |= {f"sys/fs/cgroup/{folder}/{name}": text for name, text in group.items()}
        files[f"sys/fs/cgroup/{folder}/memory.stat"] = stat("", 0, 0)
    limits = memory.memory_limits((7, 8), write(tmp_path, files))
    figures = {
        limit.name.rpartition("/")[2]: (limit.size, limit.used, limit.used_by_run, limit.ranks)
        for limit in limits
    }
    assert figures["a"] == (900 * MIB, 100 * MIB, 50 * MIB, 1)
    assert figures["job"] == (1000 * MIB, 400 * MIB, 120 * MIB, 2)
    assert figures[""] == (8192 * MIB, 4096 * MIB, 120 * MIB, 3)
    assert "1100 MiB" in limits[1].fix(200 * MIB)
    assert "1400 MiB" in limits[2].fix(200 * MIB)


def test_a_system_without_such_files_is_not_known(tmp_path: Path) -> None:
    assert read_memory(tmp_path) is None
    assert available_memory(tmp_path) > 1 << 20  # psutil's figure of this machine


def test_the_largest_processes_are_named_by_their_share(tmp_path: Path) -> None:
    page = memory.PAGE
    for pid, name, pages in (
        (10, "small", 5),
        (20, "large", 900),
        (30, "shares", 1000),
        (40, "tiny", 1),
    ):
        write(
            tmp_path, {f"proc/{pid}/statm": f"9 {pages} 0 0 0 0 0", f"proc/{pid}/comm": f"{name}\n"}
        )
    write(tmp_path, {"proc/30/smaps_rollup": "00 ---p\nRss: 4000 kB\nPss: 100 kB\n"})
    ours, others = largest_processes((40, 50), 2, tmp_path)
    assert [(h.pid, h.name, h.bytes) for h in others] == [
        (20, "large", 900 * page),
        (30, "shares", 100 * 1024),
    ]
    assert [(h.pid, h.name, h.bytes) for h in ours] == [(40, "tiny", page)]  # 50 has ended
    assert memory.own_memory((20, 30, 50), tmp_path) == 1900 * page


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="this system has no /proc")
def test_this_machine_and_this_process() -> None:
    found = read_memory()
    assert found is not None
    assert 0 < found.free <= found.total
    before = memory.own_memory([os.getpid()])
    with mmap.mmap(
        -1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    ) as held:  # malloc might reuse what it has
        held.write(b"x" * len(held))
        assert memory.own_memory([os.getpid()]) - before > 60 * MIB
    ours, others = largest_processes([os.getpid()], 10_000)
    assert [holder.pid for holder in ours] == [os.getpid()]
    assert os.getppid() in [holder.pid for holder in others]
