"""Checkpoints written in the background hold the state of their step and count once whole."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from errors import lines_with, refuses
from recipes import make_run
from tunesmith.checkpoint import contents, manifest
from tunesmith.checkpoint.writer import Writer
from tunesmith.errors import CheckpointError
from tunesmith.runtime.transfer import Snapshot
from tunesmith.start.run import train
from waiting import wait_for


def quick(folder: Path) -> None:
    (folder / "weights").write_bytes(b"x")


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    writer = Writer(tmp_path, 2, None, sync=lambda: None)
    yield writer
    writer.close()


def whole(run_dir: Path) -> list[int]:
    found = manifest.list_checkpoints(run_dir)
    return sorted(step for step in found if manifest.find_damage(found[step]) is None)


def test_it_counts_only_when_it_is_whole_and_older_ones_go_after_that(writer, tmp_path):
    for step in (1, 2):
        writer.write(quick, step, keep_step=None)
    begun, go = threading.Event(), threading.Event()

    def held(folder: Path) -> None:
        quick(folder)
        begun.set()
        assert go.wait(30), "never let go"

    writer.write_async(held, 3, keep_step=None)
    assert begun.wait(30)
    assert (writer.saved_step, whole(tmp_path)) == (2, [1, 2])
    go.set()
    writer.wait()
    assert (writer.saved_step, whole(tmp_path)) == (3, [2, 3])


def test_a_full_disk_in_the_thread_is_raised_in_the_loop(writer: Writer, tmp_path: Path) -> None:

    def save(folder: Path) -> None:
        quick(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    writer.write(quick, 1, keep_step=None)
    with pytest.raises(CheckpointError) as at_once:
        writer.write(save, 2, keep_step=None)
    writer.write_async(save, 2, keep_step=None)
    wait_for(lambda: writer.failed)
    with pytest.raises(CheckpointError) as behind:
        writer.wait()
    assert behind.value.text() == at_once.value.text()
    assert (writer.saved_step, whole(tmp_path)) == (1, [1])
    assert not list(tmp_path.glob(".*"))


CLOCKS = "step_seconds data_seconds tokens_per_second memory_gib host_memory_percent".split()


def steps_in(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def saved_files(folder: Path) -> dict[str, Any]:
    """Every file of a checkpoint but its manifest; of the last record what no clock says."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != manifest.MANIFEST):
        found[path.relative_to(folder).as_posix()] = path.read_bytes()
    progress = json.loads(found["state/progress.json"])
    record = {k: v for k, v in progress.pop("record").items() if k not in CLOCKS}
    return found | {"state/progress.json": progress | {"record": record, "seconds": None}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapter", "dtype"),
    [({}, "fp32"), pytest.param({"modules_to_save": ["norm"]}, "bf16", marks=pytest.mark.nightly)],
    ids=["LoRA", "modules in bf16 too"],
)
def test_it_holds_what_a_run_that_waits_writes(adapter, dtype, tiny, tmp_path, monkeypatch):
    changes = {"adapter": adapter, "model": {"dtype": dtype}, "held": False}
    changes["checkpoint"] = {"every": "3 steps", "keep": 9}
    for name in ("waits", "runs on"):
        (tmp_path / name).mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write_async", Writer.write)
        train(make_run(tiny, tmp_path / "waits", **changes), quiet=True)
    write, late = Writer._write, []

    def wait_two_steps(self: Writer, save: Any, step: int, keep_step: int | None) -> None:
        if threading.current_thread().name != "MainThread":
            wait_for(lambda: steps_in(tmp_path / "runs on" / "run") >= step + 2)
            late.append(step)
        write(self, save, step, keep_step)

    monkeypatch.setattr(Writer, "_write", wait_two_steps)
    train(make_run(tiny, tmp_path / "runs on", **changes), quiet=True)
    assert late == [3, 6]
    for step in (3, 6, 8):
        here, there = (
            tmp_path / name / "run" / f"checkpoint-{step}" for name in ("waits", "runs on")
        )
        assert manifest.find_damage(there) is None
        assert saved_files(here) == saved_files(there)


@pytest.mark.slow
def test_without_room_for_a_copy_the_loop_waits(tiny, tmp_path, monkeypatch):
    init = Snapshot.__init__

    def full(self: Snapshot, tensors: Mapping[str, Tensor]) -> None:
        if any(name.endswith("exp_avg") for name in tensors):
            raise torch.OutOfMemoryError("CUDA out of memory")
        init(self, tensors)

    monkeypatch.setattr(Snapshot, "__init__", full)
    monkeypatch.setattr(Writer, "write_async", lambda *args, **how: pytest.fail("no copy to write"))
    result = train(make_run(tiny, tmp_path, held=False, checkpoint={"keep": 9}), quiet=True)
    assert result.steps == 8
    assert sorted(manifest.list_checkpoints(tmp_path / "run")) == [2, 4, 6, 8]
    assert lines_with((tmp_path / "run" / "log.txt").read_text(), "memory", "copy")


@pytest.mark.slow
def test_a_full_disk_behind_the_steps_ends_the_run_and_it_resumes(tiny, tmp_path, monkeypatch):
    out, every = tmp_path / "run", 20
    changes = {"train": {"duration": "60 steps"}, "checkpoint": {"every": f"{every} steps"}}
    write = contents.write_optimizer

    def full(folder: Path, tensors: Mapping[str, Tensor]) -> None:
        if folder.name == f".checkpoint-{2 * every}.partial":
            wait_for(lambda: steps_in(out) > 2 * every)
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(contents, "write_optimizer", full)
        with refuses(CheckpointError, cause="disk", names=[f"checkpoint-{every}"]):
            train(make_run(tiny, tmp_path, held=False, **changes), quiet=True)
    failure = json.loads((out / "failure.json").read_text())
    # The next save would have waited for it.
    assert 2 * every < failure["last_step"] < 3 * every
    assert (failure["phase"], failure["cause"]) == ("saving", "disk")
    assert whole(out) == [every]
    assert not list(out.glob(".*.partial"))
    result = train(make_run(tiny, tmp_path, held=False, **changes), quiet=True)
    assert (result.first_step, result.steps) == (every, 60)
