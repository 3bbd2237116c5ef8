"""Freed memory stays with the process: seen in the resident memory of a process of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from errors import holds
from tunesmith.runtime import host
from tunesmith.runtime.host import (
    CACHED_SHAPES,
    WAIT_VARIABLES,
    Cores,
    bound_shape_caches,
    keep_threads,
    measure_cores,
    prepare_threads,
)

pytestmark = pytest.mark.slow

PROBE = """
import torch
from tunesmith.runtime.host import keep_freed_pages
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20
def left():
    before = resident()
    blocks = [torch.ones(10 << 20, dtype=torch.uint8) for _ in range(20)]
    assert resident() - before > 150
    del blocks
    return resident() - before
print(left(), keep_freed_pages(), left())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_two_hundred_mib_that_were_freed_are_kept():
    done = subprocess.run([sys.executable, "-c", PROBE], check=True, capture_output=True, text=True)
    given, works, kept = done.stdout.split()
    assert works == "True"
    assert int(given) < 50 < 150 < int(kept)


CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY", "TORCH_CUDNN_SDPA_DEPRIORITIZED")


def test_caches_of_shapes_are_bounded_unless_the_user_said_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it brings is told in the docstring: a process's resident memory is too unsteady to be
    asserted.
    """
    for name in CACHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(CACHES[1], "7")
    bound_shape_caches()
    assert [os.environ[name] for name in CACHES] == [CACHED_SHAPES, "7", "1"]
    assert int(CACHED_SHAPES) < 1024, "what oneDNN keeps by itself"


STARTED = """
import os, sys
{first}
import tunesmith
{then}
import torch
print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"), torch.get_num_threads())
"""
PUBLIC_NAME = "tunesmith.StepRecord"
COMMAND_LINE = "from tunesmith.cli.main import main; main(['bench', 'no-such-recipe.yaml'])"


def started(*, first: str = "", then: str = PUBLIC_NAME, **variables: str) -> list[str]:
    """How threads wait, and how many there are, in a process of its own: [policy, spins, threads].

    Each public name prepares them before it is imported; a record's class needs nothing else.
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "MKL_"))}
    code = STARTED.format(first=first, then=then)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env | variables, check=True, capture_output=True, text=True)
    return done.stdout.split()


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is torch's on Linux")
@pytest.mark.parametrize(
    ("name", "value"), [("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "7")]
)
def test_variables_of_the_user_stay_as_they_are_beside_a_busy_neighbour(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in WAIT_VARIABLES:
        monkeypatch.setenv(each, "")  # so that it is restored, whatever the test leaves
        monkeypatch.delenv(each)
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(host, "measure_cores", lambda *_: Cores(total=2, busy=1, allowed=2))
    monkeypatch.delitem(sys.modules, "torch")
    prepare_threads.cache_clear()
    try:
        assert prepare_threads() == host.BY_ENVIRONMENT
    finally:
        prepare_threads.cache_clear()
    assert {each: os.environ[each] for each in WAIT_VARIABLES & os.environ.keys()} == {name: value}
    assert os.environ["OMP_NUM_THREADS"] == "1"


def test_a_torch_of_the_user_stays_as_it_is() -> None:
    assert started(first="import torch; torch.set_num_threads(5)") == ["None", "None", "5"]


@pytest.mark.parametrize(
    ("named", "kept"), [({}, [4, 3, 7, 4, 4]), ({"OMP_NUM_THREADS": "4"}, [4, 4, 4, 4, 4])]
)
def test_a_resumed_run_keeps_its_threads_unless_the_machine_is_another(
    named: dict[str, str], kept: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sum of a million numbers is rounded otherwise by another number of threads, so a clipped
    step is too.
    """
    own, found = torch.get_num_threads(), []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in named.items():
        monkeypatch.setenv(name, value)
    prepare_threads.cache_clear()
    try:
        for before in (None, 3, 7, 2, 8):
            torch.set_num_threads(4)
            keep_threads(before)
            found.append(torch.get_num_threads())
    finally:
        torch.set_num_threads(own)
        prepare_threads.cache_clear()
    assert found == kept


# Of low priority, so that the test itself does not wait for them.
BUSY_LOOP = ["nice", "-n", "19", sys.executable, "-c", "print('on', flush=True)\nwhile True: pass"]


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is torch's on Linux")
def test_threads_sleep_at_once_beside_a_busy_neighbour() -> None:
    """As soon as Python asks for a public name, and in the command line."""
    cores = os.sched_getaffinity(0)
    neighbours = [subprocess.Popen(BUSY_LOOP, stdout=subprocess.PIPE) for _ in cores]
    try:
        for neighbour in neighbours:
            assert neighbour.stdout is not None
            neighbour.stdout.readline()
        with ThreadPoolExecutor() as pool:
            for found in pool.map(lambda then: started(then=then), (PUBLIC_NAME, COMMAND_LINE)):
                policy, spins, threads = found
                assert (policy, spins) == ("PASSIVE", "None")
                assert 1 <= int(threads) <= len(cores)
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.communicate()


def stat(cpus: int, busy: int, at: int) -> str:
    """/proc/stat at tick `at` of a machine whose first `busy` processors compute all the time."""
    rows = [
        f"cpu{n} {at if n < busy else 0} 0 0 {0 if n < busy else at} 0 0 0 0 0 0"
        for n in range(cpus)
    ]
    return "\n".join(["cpu 1 2 3 4 5 6 7 8 9 10", *rows, "intr 5 0"])


@pytest.mark.parametrize(
    ("busy", "threads", "why"),
    [
        (0, 8, "one per core"),
        (3, 5, "busy cores: 3 of 8"),
        (4, 8, "one per core"),
        (8, 8, "one per core"),
    ],
)
def test_busy_cores_are_left_out_while_more_than_half_are_free(
    busy: int, threads: int, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    cores = measure_cores(stat(8, busy, 100), stat(8, busy, 106), tmp_path)
    assert cores == Cores(8, busy, 8)
    assert (cores.threads()[0], cores.threads()[1].split(";")[0]) == (threads, why)


def test_two_processors_of_one_core_take_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    for cpu in range(4):
        file = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        file.parent.mkdir(parents=True)
        file.write_text(f"{cpu % 2},{cpu % 2 + 2}\n", encoding="ascii")
    assert measure_cores(stat(4, 2, 100), stat(4, 2, 106), tmp_path) == Cores(2, 1, 2)


def test_a_share_of_the_cores_time_bounds_the_threads() -> None:
    count, why = Cores(total=16, busy=2, allowed=4).threads()
    assert count == 4
    assert holds(why, 16)
