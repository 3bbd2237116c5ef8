"""A rank that is killed, stopped, stuck or fails ends the others, and one report names it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ranks import environment_of, forkserver, free_port
from tunesmith.distributed import activity
from tunesmith.distributed.ranks import HEARTBEAT_VARIABLE, heartbeat_limit, join_ranks, meet
from tunesmith.errors import CheckpointError, MachineError, OtherRankError, TunesmithError
from tunesmith.host.signals import Interrupted
from tunesmith.training.result import write_failure

pytestmark = pytest.mark.slow

HOST = socket.gethostname()
LIMIT = 3  # seconds without a heartbeat


ERRORS = {
    "disk": CheckpointError("the disk is full", where="checkpoint-20"),
    "signal": Interrupted(),
}


def write_fault(folder: Path, error: TunesmithError, step: int) -> None:
    folder.mkdir()
    write_failure(folder, error, last_step=step, next_command="")


def failures(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in folder.glob("failure-*/failure.json")]


def take_steps(fault: str, env: dict[str, str], folder: Path) -> None:
    """A rank whose steps are all-reduces; rank 1 is struck at step 20."""
    os.environ.update(env)
    import torch
    import torch.distributed as dist

    from tunesmith.distributed.torch_private import collective

    torch.set_num_threads(1)
    activity.ENDLESS_AFTER_S = 2.0
    sys.stderr = (folder / f"stderr-{env['RANK']}").open("w")
    code = 0
    try:
        with join_ranks() as ranks:
            heartbeat, value = ranks.heartbeat, torch.ones(10)
            heartbeat.report.on_fault = partial(write_fault, folder / f"failure-{ranks.rank}")
            other_group = dist.new_group()
            heartbeat.phase("training", {"hang": 2.0, "slow": 60.0, "endless": 60.0}.get(fault))
            if fault == "slow" and ranks.rank == 1:
                time.sleep(2.5 * LIMIT)  # a load, a compile or a save, which the others wait for
            if fault == "nccl" and ranks.rank == 0:
                heartbeat.probes.find_error = lambda: (
                    "NCCL: REMOTE_ERROR" if heartbeat.activity.step == 20 else ""
                )
            for step in range(40 if fault == "slow" else 1_000_000):
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
                    elif fault == "endless":  # each waits for the other
                        dist.all_reduce(value, group=other_group)
                    elif fault in ("hang", "nccl"):
                        time.sleep(1000)
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


def test_ranks_that_are_slow_or_end_one_after_the_other_are_not_missed(tmp_path: Path):
    codes, printed = strike("slow", tmp_path)
    assert codes == [0, 0, 0]
    assert "error" not in printed
    assert not [*tmp_path.glob("failure-*")]


WHO = f"rank 1 on {HOST}"
KILLED = -signal.SIGKILL


@pytest.mark.parametrize(
    ("fault", "code", "what", "cause"),
    [
        ("kill", KILLED, f"{WHO} was killed", "killed"),
        ("stop", KILLED, f"{WHO} sent no heartbeat for 3 s", "stopped"),
        ("hang", 1, f"{WHO} made no progress for 2 s", "hang"),
        ("nccl", 1, "a connection between the ranks broke, but all ranks are alive", "link"),
    ],
)
def test_a_rank_that_is_gone_ends_the_others_which_name_it_once(tmp_path, fault, code, what, cause):
    codes, printed = strike(fault, tmp_path)
    assert codes == [1, code, 1]
    assert printed.count("error: ") == 1, printed
    assert f"error: {what}\n" in printed
    where = printed.partition("  where: ")[2].partition("\n")[0]
    waiting = [place for place in where.split("; ") if "training, step 20, all_reduce" in place]
    ranks = ", ".join(re.findall(r"ranks? ([\d, ]+):", "; ".join(waiting)))
    assert sorted(ranks.split(", ")) == ["0", "2"], where
    [failure] = failures(tmp_path)
    assert (failure["what"], failure["cause"]) == (what, cause)
    assert f"  cause: {cause}: " in printed
    blamed = (1, HOST, "training") if fault != "nccl" else (None, None, None)
    assert (failure["rank"], failure["host"], failure["phase"]) == blamed
    assert ("why: NCCL: REMOTE_ERROR" in printed) == (fault == "nccl")


def test_ranks_that_wait_for_each_other_end_and_are_named_with_the_collective(tmp_path: Path):
    codes, printed = strike("endless", tmp_path)
    assert codes == [1, 1, 1]
    assert printed.count("error: ") == 1, printed
    [failure] = failures(tmp_path)
    place = {name: failure[name] for name in ("cause", "phase", "collective")}
    assert place == {"cause": "hang", "phase": "training", "collective": "all_reduce"}
    assert [f"rank {rank} on {HOST}" in failure["what"] for rank in range(3)] == [True] * 3


@pytest.mark.parametrize(
    ("fault", "code", "others"),
    [
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
    failure, *copies = failures(tmp_path)
    assert copies == [failure] * 2 * (fault == "signal")  # each rank notes a stop for itself
    assert failure["rank"] == 1
    assert failure["what"].startswith(WHO)
    assert getattr(error, "what", "") in failure["what"]
    for rank in (0, 2):  # unless it waited in the collective until the end of its grace
        raised = tmp_path / f"raised-{rank}"
        told = f"{OtherRankError.__name__}: {failure['what']}"
        assert not raised.exists() or raised.read_text() == told


def test_a_rank_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch):
    import torch.distributed as dist

    monkeypatch.setenv(HEARTBEAT_VARIABLE, "1")
    monkeypatch.setattr("tunesmith.distributed.ranks.JOIN", 0.2)
    monkeypatch.setenv("MASTER_ADDR", "node-a")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(MachineError, match="rank 1"):
        meet(dist.HashStore(), 0, 2)


@pytest.mark.parametrize("text", ["soon", "0", "nan"])
def test_a_limit_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch, text: str):
    monkeypatch.setenv(HEARTBEAT_VARIABLE, text)
    with pytest.raises(MachineError, match="seconds"):
        heartbeat_limit()
