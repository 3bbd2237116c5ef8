"""A rank that is killed, stopped, stuck or fails ends the others, and one report names it.

`benchmarks/faults/faults.py` does the same with torchrun on two nodes, and cuts the cable between
them.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from ranks import environment_of, forkserver, free_port, run_ranks
from tunesmith.distributed.heartbeat import Heartbeat
from tunesmith.distributed.ranks import HEARTBEAT_VARIABLE, heartbeat_limit, join_ranks, meet
from tunesmith.distributed.torch_private import collective, current_collective
from tunesmith.errors import (
    CheckpointError,
    DataError,
    MachineError,
    OtherRankError,
    TunesmithError,
)
from tunesmith.host.signals import Interrupted
from tunesmith.training.result import write_failure

pytestmark = pytest.mark.slow

HOST = socket.gethostname()
LIMIT = 3  # seconds without a heartbeat


ERRORS = {
    "data": DataError("row 7 is broken", where="rows.jsonl:7"),
    "disk": CheckpointError("the disk is full", where="checkpoint-20"),
    "signal": Interrupted(),
}


def make_folder(folder: Path) -> Path:
    folder.mkdir()
    return folder


def failures(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in folder.glob("failure-*/failure.json")]


def take_steps(fault: str, env: dict[str, str], folder: Path) -> None:
    """A rank whose steps are all-reduces; rank 1 is struck at step 20.

    What it prints goes to a file.
    """
    os.environ.update(env)
    import torch
    import torch.distributed as dist

    from tunesmith.distributed.torch_private import collective

    torch.set_num_threads(1)
    sys.stderr = (folder / f"stderr-{env['RANK']}").open("w")
    code = 0
    try:
        with join_ranks() as ranks:
            heartbeat, value = ranks.heartbeat, torch.ones(10)
            heartbeat.report.on_fault = lambda error, step: write_failure(
                make_folder(folder / f"failure-{ranks.rank}"),
                error,
                last_step=step,
                next_command="",
            )
            if fault == "slow" and ranks.rank == 1:
                time.sleep(2.5 * LIMIT)  # a load, a compile or a save, which the others wait for
            heartbeat.phase("training", 2.0 if fault in ("hang", "gpu") else None)
            if fault == "gpu":
                heartbeat.probes.gpu_is_busy = lambda: ranks.rank != 1
            if fault == "nccl" and ranks.rank == 0:
                heartbeat.probes.find_error = lambda: (
                    "NCCL: REMOTE_ERROR" if heartbeat.activity.step == 20 else ""
                )
            for step in range(40 if fault in ("none", "slow") else 1_000_000):
                if fault == "stop":  # that of the operators in compiled and tensor-parallel layers
                    value = collective("all_reduce", value, "sum", dist.group.WORLD.group_name)
                else:
                    dist.all_reduce(value)
                value = value / ranks.world
                heartbeat.progress(step)
                time.sleep(0.01)
                if step == 20 and ranks.rank == 1:
                    if fault in ("kill", "stop"):
                        os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
                    elif fault in ERRORS:
                        # As the trainer's are that need no other words
                        raise ERRORS[fault] from ERRORS[fault]
                    elif fault in ("hang", "nccl"):
                        time.sleep(1000)
                if step == 20 and fault == "gpu":
                    # Of ranks 0 and 2: on a GPU a collective is waited for in any line
                    time.sleep(1000)
                if step == 20 and fault == "known to all":
                    with ranks.raise_on_all_ranks():
                        if ranks.rank == 1:
                            raise ERRORS["disk"]
            # One that ends early is not missed, and the store waits for the last
            time.sleep(ranks.rank)
    except (TunesmithError, Interrupted) as error:
        code = error.exit_code if isinstance(error, TunesmithError) else 75
        (folder / f"raised-{env['RANK']}").write_text(f"{type(error).__name__}: {error}")
    sys.stderr.flush()
    sys.exit(code)


def strike(fault: str, folder: Path) -> tuple[list[int | None], str]:
    """Three ranks that are struck by a fault: their exit codes, and all that they printed."""
    context, port = forkserver(), free_port()
    envs = [environment_of(rank, 3, port) | {HEARTBEAT_VARIABLE: str(LIMIT)} for rank in range(3)]
    processes = [context.Process(target=take_steps, args=(fault, env, folder)) for env in envs]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(60)
        return [p.exitcode for p in processes], "".join(
            p.read_text() for p in sorted(folder.glob("stderr-*"))
        )
    finally:
        for process in processes:
            process.kill()


def test_the_last_beat_is_written_at_once():
    """A short run would else wait for the beats to come round once more."""
    from torch.distributed import HashStore

    store = HashStore()
    store.set_timeout(timedelta(seconds=600))
    for key, value in {"fault": "-", "beat/0": "{}"}.items():
        store.set(key, value)
    heartbeat = Heartbeat(0, [HOST], [0], store)
    heartbeat.peers.clock.interval = 20.0
    with heartbeat:
        while not heartbeat.peers.own_beat.count:
            time.sleep(0.01)
        ended = time.monotonic()
    assert time.monotonic() - ended < 4
    assert b'"is_done": true' in store.get("beat/0")


NIGHTLY = pytest.mark.nightly


@pytest.mark.parametrize("fault", [pytest.param("none", marks=NIGHTLY), "slow"])
def test_ranks_that_are_slow_or_end_one_after_the_other_are_not_missed(tmp_path: Path, fault: str):
    codes, printed = strike(fault, tmp_path)
    assert codes == [0, 0, 0]
    assert "error" not in printed
    assert not [*tmp_path.glob("failure-*")]


WHO = f"rank 1 on {HOST}"
KILLED, IN_COLLECTIVE = -signal.SIGKILL, "all_reduce"
BROKEN_LINK = "a connection between the ranks broke, but all ranks are alive"


@pytest.mark.parametrize(
    ("fault", "code", "what", "waits_in", "cause"),
    [
        ("kill", KILLED, f"{WHO} was killed", IN_COLLECTIVE, "killed"),
        ("stop", KILLED, f"{WHO} sent no heartbeat for 3 s", IN_COLLECTIVE, "stopped"),
        ("hang", 1, f"{WHO} made no progress for 2 s", IN_COLLECTIVE, "hang"),
        pytest.param(
            "gpu", 1, f"{WHO} made no progress for 2 s", "a wait for the GPU", "hang", marks=NIGHTLY
        ),
        ("nccl", 1, BROKEN_LINK, IN_COLLECTIVE, "link"),
    ],
)
def test_a_rank_that_is_gone_ends_the_others_which_name_it_once(
    tmp_path, fault, code, what, waits_in, cause
):
    codes, printed = strike(fault, tmp_path)
    assert codes == [1, code, 1]
    assert printed.count("error: ") == 1, printed
    assert f"error: {what}\n" in printed
    where = printed.partition("  where: ")[2].partition("\n")[0]
    waiting = [place for place in where.split("; ") if f"training, step 20, {waits_in}" in place]
    ranks = ", ".join(re.findall(r"ranks? ([\d, ]+):", "; ".join(waiting)))
    assert sorted(ranks.split(", ")) == ["0", "2"], where
    [failure] = failures(tmp_path)
    assert (failure["what"], failure["cause"]) == (what, cause)
    assert f"  cause: {cause}: " in printed
    blamed = (1, HOST, "training") if fault != "nccl" else (None, None, None)
    assert (failure["rank"], failure["host"], failure["phase"]) == blamed
    assert ("why: NCCL: REMOTE_ERROR" in printed) == (fault == "nccl")


@pytest.mark.parametrize(
    ("fault", "code", "others"),
    [
        pytest.param("data", DataError.exit_code, 1, marks=NIGHTLY),
        ("disk", CheckpointError.exit_code, 1),
        ("signal", 75, 0),  # a launcher would start the others again at any other code
    ],
)
def test_an_error_of_one_rank_ends_the_others_and_is_told_by_itself(tmp_path, fault, code, others):
    codes, printed = strike(fault, tmp_path)
    assert codes == [others, code, others]
    assert "error" not in printed  # the command line prints what rank 1 has raised
    error = ERRORS[fault]
    assert (tmp_path / "raised-1").read_text() == f"{type(error).__name__}: {error}"
    [failure] = failures(tmp_path)
    assert failure["rank"] == 1
    assert failure["what"].startswith(WHO)
    assert getattr(error, "what", "") in failure["what"]
    for rank in (0, 2):  # unless it waited in the collective until the end of its grace
        raised = tmp_path / f"raised-{rank}"
        told = f"{OtherRankError.__name__}: {failure['what']}"
        assert not raised.exists() or raised.read_text() == told


def test_an_error_that_all_ranks_know_is_told_once_without_the_heartbeat(tmp_path: Path):
    codes, printed = strike("known to all", tmp_path)
    assert codes == [1, 1, 1]
    assert "error" not in printed
    assert not [*tmp_path.glob("failure-*")]
    raised = [(tmp_path / f"raised-{rank}").read_text().partition(":")[0] for rank in range(3)]
    assert raised == ["OtherRankError", "CheckpointError", "OtherRankError"]


def test_a_group_that_is_started_again_does_not_meet_its_predecessors():
    import torch.distributed as dist

    store, names = dist.HashStore(), []
    store.set_timeout(timedelta(seconds=20))

    def start(rank: int, found: list[tuple[str, list[str]]]) -> None:
        time.sleep(0.3 * rank)  # the earlier rank 1 is still in the store when rank 0 starts
        found.append(meet(store, rank, 2))

    for _ in range(3):
        found: list[tuple[str, list[str]]] = []
        threads = [threading.Thread(target=start, args=(rank, found)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found[0] == found[1]
        assert found[0][1] == [HOST, HOST]
        assert store.get(f"{found[0][0]}/fault") == b"-"
        names.append(found[0][0])
    assert len({*names}) == 3


def crash_on_rank_1() -> None:
    with join_ranks() as ranks:
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        ranks.all_gather_object(None)


def test_a_crash_in_a_test_is_named_by_its_signal() -> None:
    both = r"rank 1 on \S+ was killed(.|\n)*rank 1 was ended by SIGSEGV"
    with pytest.raises(AssertionError, match=both):
        run_ranks(2, crash_on_rank_1)


def test_a_rank_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch):
    import torch.distributed as dist

    monkeypatch.setenv(HEARTBEAT_VARIABLE, "1")
    monkeypatch.setattr("tunesmith.distributed.ranks.JOIN", 0.2)
    monkeypatch.setenv("MASTER_ADDR", "node-a")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(MachineError, match="rank 1"):
        meet(dist.HashStore(), 0, 2)


def test_one_process_has_nobody_to_watch():
    with Heartbeat() as heartbeat:
        heartbeat.phase("training", 1.0)
        heartbeat.progress(3)
        error = ValueError("own")
        assert heartbeat.share_error(error) is error
    assert heartbeat.report.fault is None


@pytest.mark.parametrize("text", ["soon", "0", "nan", "inf", "-3", ""])
def test_a_limit_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch, text: str):
    monkeypatch.setenv(HEARTBEAT_VARIABLE, text)
    with pytest.raises(MachineError, match="seconds"):
        heartbeat_limit()


def test_a_collective_is_named_while_the_process_is_in_it() -> None:
    names: list[str] = []

    class Rows:
        def contiguous(self) -> None:
            names.append(current_collective())
            raise ConnectionError("the network is gone")

    with pytest.raises(ConnectionError):
        collective("all_reduce", Rows(), "sum", "0")  # type: ignore[arg-type]
    assert names == ["all_reduce"]
    assert current_collective() == ""
