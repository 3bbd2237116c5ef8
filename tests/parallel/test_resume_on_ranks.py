"""Ranks that are stopped, and started again as more or fewer, go on as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.tensor import DTensor

import vision_models
from errors import holds
from logged import logged_lines
from ranks import run_ranks, world_of
from recipes import make_run
from tunesmith.checkpoint import replicate, sharded
from tunesmith.checkpoint.resume import decide_start
from tunesmith.distributed import heartbeat
from tunesmith.distributed.ranks import join_ranks
from tunesmith.errors import OtherRankError, StoppedError
from tunesmith.host.signals import LowMemory
from tunesmith.stages.request import Request
from tunesmith.training.async_metrics import StepOutput
from tunesmith.training.build import build
from tunesmith.training.run import train
from tunesmith.training.trainer import Trainer

pytestmark = [pytest.mark.slow, pytest.mark.long]

FULL, LORA = {"adapter": {"kind": "none"}}, {}
# With fp32 masters: of copies in the optimizer, of shards the shards.
BF16 = {**FULL, "model": {"dtype": "bf16"}}
EIGHT_BIT = {**FULL, "optimizer": "adamw-8bit"}
COPIES, SHARDS, HYBRID, ONE = {"replicate": 2}, {"shard": 2}, {"replicate": 2, "shard": 2}, {}
TENSOR = {"tensor": 2}
STEPS, STOP = 4, 2  # of a whole run; after which it is stopped
# Sums over ranks are taken in another order on another mesh: steps in fp32 move a loss by about
# 1e-6 of itself.
ROUNDING = 1e-5
NIGHTLY = pytest.mark.nightly
BY_FILE = -1  # in place of a rank: the file `stop` asks for it
SHORT = 100  # added to a rank: its host's memory is short
KILLED = 200  # added to a rank: it is killed


def start(
    model: Path,
    folder: Path,
    parallel: dict[str, Any],
    changes: dict[str, Any],
    stop: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """One start of a run of STEPS on this rank; `stop`: SIGTERM comes to one rank alone, (rank,
    step).
    """
    changes = dict(changes)
    settings = {
        "duration": f"{STEPS} steps",
        "micro_batch": "128 tokens",
        "optimizer": changes.pop("optimizer", "adamw"),
    }
    every = changes.pop("every", "3 steps")
    # `auto` takes shards only where a copy does not fit, so a mesh is named here.
    run = make_run(
        model,
        folder,
        train=settings,
        parallel=parallel,
        checkpoint={"every": every, "keep": 9},
        **changes,
    )
    step = Trainer.train_step

    def signalled(self: Trainer, batch: Any) -> StepOutput | None:
        if stop == (self.session.ranks.rank, batch.step + 1):
            os.kill(os.getpid(), signal.SIGTERM)
        elif stop == (BY_FILE, batch.step + 1):
            (self.out / "stop").touch()
        elif stop == (SHORT + self.session.ranks.rank, batch.step + 1):
            self.stop.request.ask(
                LowMemory("training, on spark-b: 0.10 GiB can be had", {"host": "spark-b"})
            )
        elif stop == (KILLED + self.session.ranks.rank, batch.step + 1):
            deadline = time.monotonic() + 5  # for the checkpoint that is written beside the steps
            while time.monotonic() < deadline and not [*self.out.glob("checkpoint-*")]:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, batch)

    heartbeat.HUNG_RANK_SECONDS = 0.5  # seconds that a rank has to end
    Trainer.train_step = signalled  # type: ignore[method-assign]
    try:
        result = train(run, quiet=True)
    except (StoppedError, OtherRankError) as error:
        return {"stopped": error.what, "code": error.exit_code}
    finally:
        Trainer.train_step = step  # type: ignore[method-assign]
    records = [(r.step, r.loss, r.grad_norm, r.val_loss) for r in result.records]
    return {"records": records, "first": result.first_step, "finished": result.finished_before}


def many(
    model: Path, folder: Path, mesh: dict[str, int], changes: dict[str, Any], stop: Any = None
) -> list[Any]:
    """The same on the ranks of a mesh; on one the process itself."""
    world = world_of(mesh)
    if world == 1:
        return [start(model, folder, mesh, changes, stop)]
    return run_ranks(world, start, model, folder, mesh, changes, stop)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[float]]:
    """Steps after STOP of ranks, or of one process, that never stopped; once for each recipe."""

    @cache
    def of(model: Path, what: str, mesh: str) -> list[float]:
        changes = {**json.loads(what), "output_dir": str(tmp_path_factory.mktemp("whole") / "run")}
        whole = many(model, tmp_path_factory.mktemp("rows"), json.loads(mesh), changes)[0]
        return plain({"records": whole["records"][STOP:]})

    return lambda model, what, mesh=ONE: of(model, json.dumps(what), json.dumps(mesh))


def plain(found: dict[str, Any]) -> list[float]:
    return [value or 0.0 for record in found["records"] for value in record]


@pytest.mark.parametrize(
    ("what", "mesh", "by"),
    [
        (FULL, SHARDS, 1),
        pytest.param(LORA, SHARDS, BY_FILE, marks=NIGHTLY),
        pytest.param(BF16, COPIES, 1, marks=NIGHTLY),
    ],
    ids=["full, signal", "LoRA, file", "full copies in bf16, signal"],
)
def test_a_stop_of_one_rank_saves_all_and_two_ranks_go_on_bit_for_bit(
    what, mesh, by, tiny, tmp_path, uninterrupted
):
    stopped = many(tiny, tmp_path, mesh, what, stop=(by, STOP))
    assert ("stop file" if by == BY_FILE else "SIGTERM") in stopped[0]["stopped"]
    assert [rank["code"] for rank in stopped] == [0, 0]  # torchrun would start them again
    out = tmp_path / "run"
    said = json.loads((out / "stopped.json").read_text())
    assert (said["signal"], said["step"]) == (None if by == BY_FILE else "SIGTERM", STOP)
    with logged_lines() as lines:
        found = replicate.newest_checkpoint(out)
    assert lines == []
    assert found is not None
    assert found[0] == STOP
    (out / "stop").touch()  # of an earlier start
    resumed = many(tiny, tmp_path, mesh, what)
    assert resumed[0]["first"] == STOP
    assert plain(resumed[0]) == uninterrupted(tiny, what, mesh)
    assert not (out / "stop").exists()
    assert not (out / "stopped.json").exists()
    if by == BY_FILE:  # once for all
        assert all(rank["finished"] for rank in many(tiny, tmp_path, mesh, what))


def test_memory_that_is_short_on_one_host_stops_all_ranks(tiny, tmp_path):
    stopped = many(tiny, tmp_path, COPIES, LORA, stop=(SHORT + 1, STOP))
    for rank in stopped:
        assert holds(rank["stopped"], f"step {STOP}")
    said = json.loads((tmp_path / "run" / "stopped.json").read_text())
    assert (said["reason"], said["signal"], said["step"]) == ("memory", None, STOP)
    assert said["figures"] == {"host": "spark-b"}


@pytest.mark.parametrize(
    ("what", "before", "after"),
    [
        pytest.param(FULL, ONE, SHARDS, id="full, 1 to shards"),
        pytest.param(FULL, COPIES, SHARDS, id="full, copies to shards", marks=NIGHTLY),
        pytest.param(FULL, HYBRID, SHARDS, id="full, 4 to shards", marks=NIGHTLY),
        pytest.param(LORA, SHARDS, ONE, id="lora, shards to 1", marks=NIGHTLY),
        pytest.param(LORA, HYBRID, ONE, id="lora, 4 to 1", marks=NIGHTLY),
    ],
)
def test_another_mesh_goes_on_where_the_first_stopped(
    what, before, after, tiny, tmp_path, uninterrupted
):
    many(tiny, tmp_path, before, what, stop=(0, STOP))
    resumed = many(tiny, tmp_path, after, what)[0]
    assert resumed["first"] == STOP
    assert plain(resumed) == pytest.approx(uninterrupted(tiny, what), rel=ROUNDING)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("what", "mesh"), [(LORA, SHARDS), (FULL, TENSOR)], ids=["shards", "full, tensor"]
)
def test_a_mixture_goes_on_bit_for_bit_and_on_one_process(
    what, mesh, mixture, tmp_path, uninterrupted
):
    many(mixture, tmp_path, mesh, what, stop=(1, STOP))
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert plain(many(mixture, tmp_path, mesh, what)[0]) == uninterrupted(mixture, what, mesh)
    alone = many(mixture, tmp_path, ONE, {**what, "output_dir": str(tmp_path / "copy")})[0]
    assert alone["first"] == STOP
    assert plain(alone) == pytest.approx(uninterrupted(mixture, what), rel=ROUNDING)


def resumed_state(
    model: Path, folder: Path, parallel: dict[str, Any], changes: dict[str, Any]
) -> dict[str, Any]:
    """Weights or their masters, and moments, that this rank's mesh resumes with: whole arrays, by
    their names in a checkpoint.
    """
    run = make_run(
        model,
        folder,
        train={"duration": f"{STEPS} steps", "micro_batch": "128 tokens"},
        parallel=parallel,
        **changes,
    )
    with join_ranks() as ranks:
        with logged_lines() as lines:
            found = decide_start(run, ranks)
        assert lines == []
        session = build(Request(run, found), ranks)
        tensors = sharded._tensors_by_name(session.model, session.optimizer.state_dict())
        whole = {
            name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()
        }
        return {name: tensor.detach().numpy().copy() for name, tensor in whole.items()}


def differing(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Names of the arrays that are not equal bit for bit."""
    return [name for name, array in expected.items() if not np.array_equal(array, found[name])]


@pytest.mark.nightly
def test_masters_and_moments_of_bf16_copies_are_read_by_every_mesh(tiny, tmp_path):
    many(tiny, tmp_path, COPIES, BF16, stop=(0, STOP))
    checkpoint = tmp_path / "run" / f"checkpoint-{STOP}"
    stored = FileSystemReader(checkpoint / "state").read_metadata().state_dict_metadata
    assert {
        entry.properties.dtype for name, entry in stored.items() if name.startswith("model.")
    } == {torch.float32}
    assert not any(name.endswith(".master") for name in stored)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
    }
    sharded._read(checkpoint, tensors)
    assert any((weight != weight.bfloat16().float()).any() for weight in tensors.values())
    expected = {name: tensor.numpy() for name, tensor in tensors.items()}
    for rank in run_ranks(2, resumed_state, tiny, tmp_path, TENSOR, BF16):
        assert differing(expected, rank) == []
    assert differing(expected, resumed_state(tiny, tmp_path, ONE, BF16)) == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(SHARDS, SHARDS, id="2 to 2", marks=NIGHTLY),
        pytest.param(ONE, TENSOR, id="1 to tensor", marks=NIGHTLY),
        pytest.param(TENSOR, ONE, id="tensor to 1", marks=NIGHTLY),
    ],
)
def test_moments_in_8_bits_go_on_on_another_mesh(before, after, wide, tmp_path, uninterrupted):
    """Blocks are whole on every rank, so another mesh reads the very codes and scales.

    On another mesh norms of 1.7 million gradients are summed in another order: 1.4e-5 was seen.
    """
    pytest.importorskip("bitsandbytes")
    is_same = before == after
    many(wide, tmp_path, before, EIGHT_BIT, stop=(0, STOP))
    resumed = many(wide, tmp_path, after, EIGHT_BIT)[0]
    assert resumed["first"] == STOP
    expected = uninterrupted(wide, EIGHT_BIT, before if is_same else ONE)
    assert plain(resumed) == pytest.approx(expected, rel=0.0 if is_same else 1e-4, abs=0.0)


@pytest.mark.parametrize(
    "family", ["llama", pytest.param("qwen3_5", marks=NIGHTLY, id="recurrent layers")]
)
def test_a_killed_rank_ends_the_other_and_a_second_start_goes_on_bit_for_bit(
    family, tiny, tmp_path, uninterrupted
):
    model = tiny if family == "llama" else vision_models.build(family, tmp_path / "model", tiny)
    what = {**FULL, "every": f"{STOP} steps"}
    with pytest.raises(AssertionError, match="was ended by SIGKILL"):
        many(model, tmp_path, SHARDS, what, stop=(KILLED + 1, STEPS))
    failure = json.loads((tmp_path / "run" / "failure.json").read_text())
    assert (failure["cause"], failure["rank"]) == ("killed", 1)
    assert not (tmp_path / "run" / "final").exists()
    resumed = many(model, tmp_path, SHARDS, what)[0]
    assert resumed["first"] in (0, STOP)  # on a slow disk the checkpoint is not whole yet
    last = {"records": resumed["records"][STOP - STEPS :]}
    assert plain(last) == uninterrupted(model, FULL, SHARDS)
