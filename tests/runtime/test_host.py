"""Threads take the free cores, and a resumed run keeps their number."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from errors import holds
from tunesmith.runtime import host
from tunesmith.runtime.host import (
    WAIT_VARIABLES,
    Cores,
    keep_threads,
    measure_cores,
    prepare_threads,
)


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has not imported torch, without variables of threads."""
    if sys.platform != "linux":
        pytest.skip("libgomp is torch's on Linux")
    for name in WAIT_VARIABLES | {"OMP_NUM_THREADS", "MKL_NUM_THREADS"}:
        monkeypatch.setenv(name, "")  # so that it is restored, whatever the test leaves
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "torch")
    prepare_threads.cache_clear()
    yield
    prepare_threads.cache_clear()


@pytest.mark.parametrize(
    ("cores", "given", "policy", "threads"),
    [
        (Cores(total=8, busy=3, allowed=8), {}, "PASSIVE", "5"),
        (Cores(total=8, busy=0, allowed=8), {}, None, "8"),
        (Cores(total=2, busy=1, allowed=2), {"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE", "2"),
        (Cores(total=2, busy=1, allowed=2), {"OMP_NUM_THREADS": "1"}, "PASSIVE", "1"),
    ],
)
def test_threads_sleep_at_once_beside_a_busy_neighbour_unless_the_user_says_otherwise(
    cores, given, policy, threads, no_torch, monkeypatch
):
    monkeypatch.setattr(host, "measure_cores", lambda *_: cores)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    why = prepare_threads()
    assert (why == host.BY_ENVIRONMENT) == ("OMP_NUM_THREADS" in given)
    assert os.environ.get("OMP_WAIT_POLICY") == policy
    assert os.environ["OMP_NUM_THREADS"] == threads


STARTED = """
import os
from tunesmith.cli.main import main
main(['bench', 'no-such-recipe.yaml'])
import torch
print(os.environ.get("OMP_NUM_THREADS"), torch.get_num_threads())
print(os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"], os.environ["TORCH_CUDNN_SDPA_DEPRIORITIZED"])
"""


@pytest.mark.slow
def test_threads_and_kernels_are_prepared_before_torch_is_imported() -> None:
    ours = ("OMP_", "GOMP_", "MKL_", "ONEDNN_", "TORCH_CUDNN_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    command = [sys.executable, "-c", STARTED]
    shown = subprocess.check_output(command, env=env, text=True).split()
    variable, threads, cached_shapes, without_cudnn_plans = shown
    assert variable == threads
    assert (cached_shapes, without_cudnn_plans) == ("128", "1")


@pytest.mark.parametrize(
    ("named", "kept"), [({}, [4, 3, 7, 4, 4]), ({"OMP_NUM_THREADS": "4"}, [4, 4, 4, 4, 4])]
)
def test_a_resumed_run_keeps_its_threads_unless_the_machine_is_another(named, kept, monkeypatch):
    """Another number of threads rounds a sum otherwise."""
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


def stat(cpus: int, busy: int, at: int) -> str:
    """/proc/stat at a tick of a machine whose first `busy` processors compute all the time."""
    rows = [
        f"cpu{n} {at if n < busy else 0} 0 0 {0 if n < busy else at} 0 0 0 0 0 0"
        for n in range(cpus)
    ]
    return "\n".join(["cpu 1 2 3 4 5 6 7 8 9 10", *rows, "intr 5 0"])


@pytest.mark.parametrize(("busy", "threads"), [(3, 5), (4, 8)])
def test_busy_cores_are_left_out_while_more_than_half_are_free(
    busy, threads, tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    cores = measure_cores(stat(8, busy, 100), stat(8, busy, 106), tmp_path)
    assert cores == Cores(8, busy, 8)
    count, why = cores.threads()
    assert count == threads
    assert holds(why, busy, 8) == (threads < 8)
