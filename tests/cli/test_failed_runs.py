"""Runs that fail after they began: numbers that are not finite, full disks; what was saved stays,
and they go on.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from cli.bad_table import line
from cli.bad_world import Capture, World, records, snapshot, started, told
from errors import holds, warnings_with
from tunesmith.config.load import load_recipe
from tunesmith.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE
from tunesmith.optim.adamw import checkpoint_bytes_per_parameter
from tunesmith.planning.resolve import probe_machine
from tunesmith.planning.run_plan import Machine, RunPlan, Saving
from tunesmith.stages import plan as plan_stage
from tunesmith.training import session
from tunesmith.training.result import failure_of
from warm import run_warm

pytestmark = pytest.mark.slow

SHORT = ["--max-new-tokens", "4", "--device", "cpu"]


def failure(run: Path) -> dict[str, Any]:
    """failure.json, which has all that it should."""
    found = json.loads((run / "failure.json").read_text())
    assert set(found) == {
        "what",
        "where",
        "why",
        "last_step",
        "next",
        "cause",
        "rank",
        "host",
        "phase",
        "collective",
    }
    assert found["rank"] == 0
    assert found["phase"] in ("first step", "training", "validation", "saving")
    assert found["what"]
    assert found["next"]
    return found


def infinite(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("inf")
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")


def test_weights_that_are_not_finite(world: World, capsys: Capture) -> None:
    """They are named when they are read, before a step blames rows or the rate."""
    code, parts, err = started(world.spoilt(infinite), capsys)
    assert code == EXIT_USAGE, err
    assert holds(parts["error"], "model.norm.weight")
    assert parts["where"].endswith("model.safetensors")
    assert not (world.out / "failure.json").exists()
    assert not list(world.out.glob("checkpoint-*"))


def test_a_learning_rate_that_blows_up_keeps_the_last_good_checkpoint(
    world: World, capsys: Capture
) -> None:
    words = world.train(
        "checkpoint.every=1 steps", train={"learning_rate": 1e30, "warmup": "0 steps"}
    )
    code, parts, err = started(words, capsys)
    assert code == EXIT_FAILED, err
    assert parts["cause"].startswith("not-finite: ")
    assert holds(parts["fix"], "train.learning_rate")
    found = failure(world.out)
    kept = sorted(p.name for p in world.out.glob("checkpoint-*"))
    assert kept
    assert kept[-1] in found["why"]
    assert len(list(records(world.out))) == found["last_step"] - 1


@pytest.mark.parametrize("held", [250, 300, 330])
def test_a_full_disk(
    world: World, small_disk: Path, held: int, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first checkpoint or a later one: exit 1, whole ones stay, and with room the run ends
    as it should.
    """
    # It would refuse to begin
    monkeypatch.setattr(plan_stage, "check_disk", lambda *given: None)
    ballast = small_disk / "ballast"
    words = world.train(output_dir=str(small_disk / "run"), train={"duration": "6 steps"})
    ballast.write_bytes(bytes((1024 - held) << 10))
    code, parts, err = started(words, capsys)
    assert code == EXIT_FAILED, err
    assert parts["cause"].startswith("disk: "), err
    run = small_disk / "run"
    assert (run / "failure.json").exists() or warnings_with(err, "failure.json")
    assert not list(run.glob(".*partial*"))
    if (run / "failure.json").exists():
        assert failure(run)["cause"] == "disk"
    ballast.unlink()
    code, _, err = started(words, capsys)
    assert code == EXIT_OK, err
    assert not (run / "failure.json").exists()
    assert [r["step"] for r in records(run)] == list(range(1, 7))


def test_no_room_is_told_before_the_first_step(
    world: World, small_disk: Path, capsys: Capture
) -> None:
    (small_disk / "ballast").write_bytes(bytes(900 << 10))
    code, parts, err = started(world.train(output_dir=str(small_disk / "run")), capsys)
    assert code == EXIT_USAGE, err
    assert parts["where"] == str(small_disk / "run")
    assert holds(parts["error"], "needed")
    assert os.listdir(small_disk) == ["ballast"]


@pytest.mark.parametrize(
    ("room", "keep", "fix"),
    [(4, 2, "set checkpoint.keep=1, or"), (5, 9, "set checkpoint.keep=2, or"), (3, 1, "")],
)
def test_a_fix_for_a_full_disk_is_one_that_helps(
    room: int, keep: int, fix: str, world: World, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """So many checkpoints have room; three more than are kept may be there at once."""
    run = load_recipe(world.train()[1])
    size = 1000 * (4 + checkpoint_bytes_per_parameter(run.train, 4))
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 0, int(size * room))
    )
    monkeypatch.setattr(plan_stage, "count_trained", lambda run, model: 1000)
    code, parts, err = started(world.train(f"checkpoint.keep={keep}"), capsys)
    assert code == EXIT_USAGE, err
    assert parts["fix"].startswith(fix)
    assert ("checkpoint.keep" in parts["fix"]) == bool(fix), (
        "where one is kept already, fewer cannot be"
    )
    assert f"{size * (keep + 3) / 1000:.1f} kB needed" in parts["error"], "and never 0.00 GiB"


def test_a_run_that_does_not_fit_is_refused_before_its_weights_are_read(
    world: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine of a megabyte; the model in full takes 18 bytes a parameter, and without masters
    and in 8 bits six.
    """

    def small(*args: Any) -> Machine:
        return replace(probe_machine(*args), card_bytes=1 << 20, free_bytes=1 << 20)

    monkeypatch.setattr(plan_stage, "probe_machine", small)
    monkeypatch.setattr(session, "build_model", lambda *args, **options: pytest.fail("built"))
    code, parts, err = started(world.train("adapter.kind=none", "model.dtype=bf16"), capsys)
    assert code == EXIT_USAGE, err
    assert parts["where"] == "cpu"
    assert "GiB" in parts["error"]
    assert "weights" in parts["why"]
    assert parts["fix"]
    assert not (world.out / "metrics.jsonl").exists()


SMALLER = (
    Saving("train.micro_batch='4 examples'", 3 << 30, True), Saving("train.recompute=full", 2 << 30, True),
    Saving("data.seq_len=1024", 2 << 30, False),
)  # fmt: skip


@pytest.mark.parametrize(
    ("savings", "saved_step", "fix"),
    [
        (SMALLER, None, "set train.micro_batch='4 examples' (3.0 GiB); or train.recompute=full (2.0 GiB); or data.seq_len=1024 (2.0 GiB)"),
        (SMALLER, 2, "set train.micro_batch='4 examples' (3.0 GiB); or train.recompute=full (2.0 GiB)"),
        (SMALLER[2:], 2, "set data.seq_len=1024 (2.0 GiB) with --fresh"),
        ((), None, "use a smaller model, more GPUs, or a device with more memory"),
    ],
    ids=["at the start", "what a resumed run may change", "what it may not", "nothing helps"],
)  # fmt: skip
def test_a_fix_for_a_full_memory_is_one_that_helps(
    world: World, savings: tuple[Saving, ...], saved_step: int | None, fix: str
) -> None:
    plan = RunPlan("cuda:0", "varlen", "bf16", 2, savings=lambda: savings)
    failed = failure_of(
        MemoryError(), load_recipe(world.train()[1]), plan, step=1, saved_step=saved_step
    )
    assert failed.fix.startswith(fix)
    resumes = saved_step is not None and not fix.endswith("--fresh")
    assert holds(failed.fix, "checkpoint-2") == resumes


def small_files() -> None:
    """No file may grow beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))


def test_a_limit_on_the_size_of_files(world: World, capsys: Capture) -> None:
    """Needs no root: what is written grows too large inside a checkpoint, of a run that has an
    earlier one.
    """
    run = world.begun()
    kept = snapshot(run / "checkpoint-4")
    done = run_warm(world.again(), prepare=small_files)
    assert done.returncode == EXIT_FAILED, done.stderr
    assert "Traceback" not in done.stderr
    assert "ulimit -f" in told(done.stderr)["error"]
    assert 6 <= failure(run)["last_step"] <= 8, "it was written behind the steps"
    assert snapshot(run / "checkpoint-4") == kept
    assert not list(run.glob(".*partial*"))
    code, _, err = started(world.again(), capsys)
    assert code == EXIT_OK, err
    assert [r["step"] for r in records(run)] == list(range(1, 9))


def test_generate_into_a_full_disk_keeps_whole_rows_and_goes_on(
    world: World, small_disk: Path, capsys: Capture
) -> None:
    run, out = world.begun(), small_disk / "out.jsonl"
    rows = world.write("in.jsonl", line(prompt="ab", note="x" * 2000) * 40)
    words = ["generate", str(run), "--input", str(rows), "--output", str(out), *SHORT]
    (small_disk / "ballast").write_bytes(bytes(990 << 10))
    code, parts, err = started(words, capsys)
    assert code != EXIT_OK
    assert parts["where"] == str(out), err
    assert parts["cause"].startswith("disk: "), err
    (small_disk / "ballast").unlink()
    code, _, err = started([*words, "--resume"], capsys)
    assert code == EXIT_OK, err
    assert len(out.read_text().splitlines()) == 40
