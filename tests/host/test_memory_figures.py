"""The figures of the host's memory, read below a root that a test writes."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from tunesmith.host import memory
from tunesmith.host.memory import available_memory, largest_processes, read_memory

MIB = 2**20
MEMINFO = """MemTotal:       8388608 kB
MemFree:        1048576 kB
MemAvailable:   4194304 kB
Buffers:          10240 kB
Cached:         3145728 kB
Shmem:           524288 kB
Active:              0 kB
Inactive:            0 kB
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a machine with 8 GiB, 4 of which are available."""
    write(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/\n"})
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path / "proc"))
    limits = memory.group_limits
    monkeypatch.setattr(memory, "group_limits", lambda: limits(tmp_path))
    return tmp_path


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")


def test_the_figures_of_a_machine(root: Path) -> None:
    found = read_memory()
    assert (found.total, found.available, found.free) == (8192 * MIB, 4096 * MIB, 1024 * MIB)
    assert (found.cached, found.shared) == ((3072 + 10 - 512) * MIB, 512 * MIB)
    assert (found.limit, found.used, found.room) == (None, None, 4096 * MIB)
    assert available_memory() == 4096 * MIB


def stat(prefix: str, active: int, inactive: int) -> str:
    return f"anon 7\n{prefix}active_file {active * MIB}\n{prefix}inactive_file {inactive * MIB}\n"


V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"
# groups, folder, limit, throttled at, used, active and inactive files, room; in MiB
CASES = {
    "version 2, its own limit": ("0::/job\n", f"{V2}/job", 2048, "max", 1500, (100, 200), 848),
    "version 2, throttled before": ("0::/job\n", f"{V2}/job", 2048, 1800, 1500, (0, 0), 300),
    "version 2, a parent's limit": ("0::/job/step\n", f"{V2}/job", 1000, "max", 400, (0, 0), 600),
    "version 1": ("4:memory:/job\n1:cpu:/\n", f"{V1}/job", 1000, None, 900, (50, 250), 400),
    "version 1 without a limit": ("4:memory:/\n", V1, 2**43 - 1, None, 0, (0, 0), 4096),
}


@pytest.mark.parametrize("case", CASES)
def test_the_room_of_a_control_group_is_its_limit_less_what_cannot_be_dropped(case, root):
    groups, folder, limit, high, used, cached, room = CASES[case]
    if high is None:
        files = {"memory.limit_in_bytes": limit * MIB, "memory.usage_in_bytes": used * MIB}
    else:
        files = {"memory.max": limit * MIB, "memory.current": used * MIB}
        files["memory.high"] = high if high == "max" else high * MIB
    files["memory.stat"] = stat("total_" if high is None else "", *cached)
    written = {f"{folder}/{name}": str(text) for name, text in files.items()}
    write(root, {"proc/self/cgroup": groups} | written)
    assert available_memory() == room * MIB


def test_ranks_share_the_machine_and_the_groups(root, monkeypatch):
    outer = {"memory.max": f"{1000 * MIB}", "memory.high": "max", "memory.current": f"{400 * MIB}"}
    inner = {"memory.max": f"{900 * MIB}", "memory.high": "max", "memory.current": f"{100 * MIB}"}
    files = {"proc/self/cgroup": "0::/job/a\n"}
    for folder, group in (("job", outer), ("job/a", inner)):
        files |= {f"sys/fs/cgroup/{folder}/{name}": text for name, text in group.items()}
        files[f"sys/fs/cgroup/{folder}/memory.stat"] = stat("", 0, 0)
    write(root, files)
    monkeypatch.setattr(memory, "own_memory", lambda pids: 40 * MIB * len(pids))
    machine, a, job = memory.memory_limits((7, 8))
    sizes = [(limit.size, limit.used) for limit in (machine, a, job)]
    assert sizes == [(8192 * MIB, 4096 * MIB), (900 * MIB, 100 * MIB), (1000 * MIB, 400 * MIB)]
    for limit in (machine, a, job):
        assert (limit.used_by_run, limit.ranks) == (120 * MIB, 3)


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="this system has no /proc")
def test_this_machine_and_this_process() -> None:
    found = read_memory()
    assert 0 < found.free <= found.total
    before = memory.own_memory([os.getpid()])
    held = b"x" * (64 * MIB)  # more than malloc has
    assert memory.own_memory([os.getpid()]) - before > 60 * MIB
    del held
    ours, others = largest_processes([os.getpid()], 10_000)
    assert [holder.pid for holder in ours] == [os.getpid()]
    assert os.getppid() in [holder.pid for holder in others]
