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

import pytest

from ranks import run_ranks, world_of
from recipes import make_run, merge
from tunesmith.distributed import heartbeat
from tunesmith.errors import OtherRankError, StoppedError
from tunesmith.start.run import train
from tunesmith.training.async_metrics import StepOutput
from tunesmith.training.trainer import Trainer

pytestmark = [pytest.mark.slow, pytest.mark.long]

FULL, LORA = {"adapter": {"kind": "none"}}, {}
# With fp32 masters of copies in the optimizer
BF16 = {**FULL, "model": {"dtype": "bf16"}}
EIGHT_BIT = {**FULL, "train": {"optimizer": "adamw-8bit"}}
COPIES, SHARDS, TENSOR, ONE = {"replicate": 2}, {"shard": 2}, {"tensor": 2}, {}
STEPS, STOP = 4, 2  # of a whole run; after which it is stopped
# Sums over ranks are taken in another order on another mesh: steps in fp32 move a loss by about
# 1e-6 of itself.
ROUNDING = 1e-5
NIGHTLY = pytest.mark.nightly
KILLED = 200  # added to a rank: it is killed


def start(
    model: Path,
    folder: Path,
    parallel: dict[str, Any],
    changes: dict[str, Any],
    stop: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """One start of a run of STEPS on this rank; `stop`: SIGTERM comes to one rank, (rank, step)."""
    base = {
        "train": {"duration": f"{STEPS} steps", "micro_batch": "128 tokens"},
        "checkpoint": {"every": "3 steps", "keep": 9},
        "parallel": parallel,
    }
    run = make_run(model, folder, **merge(base, changes))
    step = Trainer.train_step

    def signalled(self: Trainer, batch: Any) -> StepOutput | None:
        if stop == (self.session.ranks.rank, batch.step + 1):
            os.kill(os.getpid(), signal.SIGTERM)
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
    return {"records": records, "first": result.first_step}


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
    ("what", "mesh"),
    [
        (FULL, SHARDS),
        pytest.param(LORA, SHARDS, marks=NIGHTLY),
        pytest.param(BF16, COPIES, marks=NIGHTLY),
    ],
    ids=["full", "LoRA", "full copies in bf16"],
)
def test_a_stop_of_one_rank_saves_all_and_two_ranks_go_on_bit_for_bit(
    what, mesh, tiny, tmp_path, uninterrupted
):
    stopped = many(tiny, tmp_path, mesh, what, stop=(1, STOP))
    assert "SIGTERM" in stopped[0]["stopped"]
    assert [rank["code"] for rank in stopped] == [0, 0]  # torchrun would start them again
    out = tmp_path / "run"
    said = json.loads((out / "stopped.json").read_text())
    assert (said["signal"], said["step"]) == ("SIGTERM", STOP)
    resumed = many(tiny, tmp_path, mesh, what)
    assert resumed[0]["first"] == STOP
    assert plain(resumed[0]) == uninterrupted(tiny, what, mesh)
    assert not (out / "stopped.json").exists()


@pytest.mark.parametrize(
    ("what", "before", "after"),
    [
        pytest.param(FULL, ONE, SHARDS, id="full, 1 to shards"),
        pytest.param(FULL, COPIES, SHARDS, id="full, copies to shards", marks=NIGHTLY),
        pytest.param(LORA, {**COPIES, **SHARDS}, ONE, id="lora, 4 to 1", marks=NIGHTLY),
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
def test_a_mixture_goes_on_bit_for_bit_and_on_one_process(mixture, tmp_path, uninterrupted):
    what, mesh = FULL, TENSOR
    many(mixture, tmp_path, mesh, what, stop=(1, STOP))
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert plain(many(mixture, tmp_path, mesh, what)[0]) == uninterrupted(mixture, what, mesh)
    alone = many(mixture, tmp_path, ONE, {**what, "output_dir": str(tmp_path / "copy")})[0]
    assert alone["first"] == STOP
    assert plain(alone) == pytest.approx(uninterrupted(mixture, what), rel=ROUNDING)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("before", "after"), [(SHARDS, SHARDS), (TENSOR, ONE)], ids=["2 to 2", "tensor to 1"]
)
def test_moments_in_8_bits_go_on_on_another_mesh(before, after, wide, tmp_path, uninterrupted):
    """On another mesh norms are summed in another order: a difference of 1.4e-5 was seen."""
    pytest.importorskip("bitsandbytes")
    is_same = before == after
    many(wide, tmp_path, before, EIGHT_BIT, stop=(0, STOP))
    resumed = many(wide, tmp_path, after, EIGHT_BIT)[0]
    assert resumed["first"] == STOP
    expected = uninterrupted(wide, EIGHT_BIT, before if is_same else ONE)
    assert plain(resumed) == pytest.approx(expected, rel=0.0 if is_same else 1e-4, abs=0.0)


def test_a_killed_rank_ends_the_other_and_a_second_start_goes_on_bit_for_bit(
    tiny, tmp_path, uninterrupted
):
    what = {**FULL, "checkpoint": {"every": f"{STOP} steps"}}
    with pytest.raises(AssertionError, match="was ended by SIGKILL"):
        many(tiny, tmp_path, SHARDS, what, stop=(KILLED + 1, STEPS))
    failure = json.loads((tmp_path / "run" / "failure.json").read_text())
    assert (failure["cause"], failure["rank"]) == ("killed", 1)
    assert not (tmp_path / "run" / "final").exists()
    resumed = many(tiny, tmp_path, SHARDS, what)[0]
    assert resumed["first"] in (0, STOP)  # on a slow disk the checkpoint is not whole yet
    last = {"records": resumed["records"][STOP - STEPS :]}
    assert plain(last) == uninterrupted(tiny, FULL, SHARDS)
