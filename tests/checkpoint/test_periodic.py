"""Checkpoints written in the background hold the state of their step and count once whole."""

from __future__ import annotations

import errno
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from errors import lines_with, refuses
from logged import logged_lines
from recipes import make_run
from tunesmith.checkpoint import contents, manifest, replicate
from tunesmith.checkpoint.writer import Writer
from tunesmith.errors import CheckpointError, NonFiniteError, RunError, StoppedError
from tunesmith.runtime.transfer import Snapshot
from tunesmith.training.async_metrics import StepOutput
from tunesmith.training.run import train
from tunesmith.training.trainer import Trainer
from waiting import wait_for


class Held:
    """Fills a checkpoint's folder once it is let go."""

    def __init__(self, error: OSError | None = None) -> None:
        self.begun, self.go, self.error = threading.Event(), threading.Event(), error

    def __call__(self, folder: Path) -> None:
        (folder / "weights").write_bytes(b"x" * 1000)
        self.begun.set()
        assert self.go.wait(30), "never let go"
        if self.error is not None:
            raise self.error


def quick(folder: Path) -> None:
    (folder / "weights").write_bytes(b"x")


@pytest.fixture
def synced() -> list[str]:
    return []


@pytest.fixture
def writer(tmp_path: Path, synced: list[str]) -> Iterator[Writer]:
    def sync() -> None:
        synced.append(",".join(sorted(p.name for p in tmp_path.iterdir())))

    writer = Writer(tmp_path, 2, None, sync=sync)
    yield writer
    writer.close()


def whole(run_dir: Path) -> list[int]:
    found = manifest.list_checkpoints(run_dir)
    return sorted(step for step in found if manifest.find_damage(found[step]) is None)


def test_it_counts_only_when_it_is_whole_and_older_ones_go_after_that(writer, tmp_path, synced):
    for step in (1, 2):
        writer.write(quick, step, keep_step=None)
    assert writer.saved_step == 2
    save = Held()
    writer.write_async(save, 3, keep_step=None)
    assert save.begun.wait(30)
    assert not writer.failed
    # The older ones are needed until it is whole.
    assert (writer.saved_step, whole(tmp_path)) == (2, [1, 2])
    save.go.set()
    writer.wait()
    assert (writer.saved_step, whole(tmp_path)) == (3, [2, 3])
    # The records are on the disk first.
    assert synced == ["", "checkpoint-1", "checkpoint-1,checkpoint-2"]


def test_the_next_one_waits_and_the_spared_one_stays(writer: Writer, tmp_path: Path) -> None:
    first, order = Held(), []
    writer.write_async(first, 1, keep_step=1)
    threading.Timer(0.1, lambda: (order.append("released"), first.go.set())).start()
    writer.write_async(quick, 2, keep_step=1)
    order.append("second")
    assert order == ["released", "second"]
    for step in (3, 4):
        writer.write_async(quick, step, keep_step=1)
    writer.wait()
    assert whole(tmp_path) == [1, 3, 4]


def test_a_full_disk_in_the_thread_is_raised_in_the_loop(writer: Writer, tmp_path: Path) -> None:
    """The error is the very one that a write in the loop raises, once; what was whole stays."""

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
    assert not writer.failed
    assert behind.value.text() == at_once.value.text()
    assert (writer.saved_step, whole(tmp_path)) == (1, [1])
    assert not list(tmp_path.glob(".*"))
    writer.wait()


def test_close_lets_it_end_and_keeps_its_fault_to_itself(writer: Writer, tmp_path: Path) -> None:
    save = Held()
    writer.write_async(save, 5, keep_step=None)
    threading.Timer(0.1, save.go.set).start()
    writer.close()
    assert (writer.saved_step, whole(tmp_path)) == (5, [5])
    other = Writer(tmp_path, 2, 5, sync=lambda: None)
    broken = Held(OSError(errno.ENOSPC, "No space left on device"))
    broken.go.set()
    other.write_async(broken, 6, keep_step=None)
    other.close()
    other.close()
    assert (other.saved_step, whole(tmp_path)) == (5, [5])
    assert not [t for t in threading.enumerate() if t.name.startswith("tunesmith-checkpoint")]


CLOCKS = "step_seconds data_seconds tokens_per_second memory_gib host_memory_percent".split()


@dataclass
class Watched:
    """A run seen from outside; of each write: thread, step written, last step recorded by then."""

    trainer: Trainer | None = None
    wrote: list[tuple[str, int, int]] = field(default_factory=list)

    def step(self) -> int:
        assert self.trainer is not None
        return self.trainer.progress.record.step if self.trainer.progress.record else 0


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    seen, init = Watched(), Trainer.__init__

    def made(self: Trainer, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        seen.trainer = self

    monkeypatch.setattr(Trainer, "__init__", made)
    return seen


def slow_down(monkeypatch: pytest.MonkeyPatch, seen: Watched, steps: int = 2) -> None:
    """A write in the thread begins only after `steps` more steps were taken."""
    write = Writer._write

    def late(self: Writer, save: Callable[[Path], None], step: int, keep_step: int | None) -> None:
        name = threading.current_thread().name
        if name != "MainThread":
            until = time.monotonic() + 30
            while seen.step() < step + steps:
                assert time.monotonic() < until, "the training waits for the writer"
                time.sleep(0.001)
        seen.wrote.append((name.partition("_")[0], step, seen.step()))
        write(self, save, step, keep_step)

    monkeypatch.setattr(Writer, "_write", late)


def saved_files(folder: Path) -> dict[str, Any]:
    """Every file of a checkpoint but its manifest; of the last record what no clock says."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != manifest.MANIFEST):
        found[path.relative_to(folder).as_posix()] = path.read_bytes()
    progress = json.loads(found["state/progress.json"])
    record = {k: v for k, v in progress.pop("record").items() if k not in CLOCKS}
    return found | {"state/progress.json": progress | {"record": record, "seconds": None}}


# LoRA's weights are in fp32 over any base, modules beside it in its dtype.
BESIDE = {"modules_to_save": ["embed_tokens", "norm"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapter", "dtype"),
    [({}, "fp32"), pytest.param(BESIDE, "bf16", marks=pytest.mark.nightly)],
    ids=["LoRA", "modules in bf16 too"],
)
def test_it_holds_what_a_run_that_waits_writes(
    adapter, dtype, tiny, tmp_path, watched, monkeypatch
):
    changes = {"adapter": adapter, "model": {"dtype": dtype}, "held": False}
    changes["checkpoint"] = {"every": "3 steps", "keep": 9}
    for name in ("waits", "runs on"):
        (tmp_path / name).mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write_async", Writer.write)
        train(make_run(tiny, tmp_path / "waits", **changes), quiet=True)
    with monkeypatch.context() as patch:
        slow_down(patch, watched)
        train(make_run(tiny, tmp_path / "runs on", **changes), quiet=True)
    assert [(thread, step) for thread, step, _ in watched.wrote] == [
        ("tunesmith-checkpoint", 3),
        ("tunesmith-checkpoint", 6),
        ("MainThread", 8),
    ]
    assert [recorded - step for _, step, recorded in watched.wrote] == [2, 2, 0]
    assert watched.trainer is not None
    for step in (3, 6, 8):
        here, there = (
            tmp_path / name / "run" / f"checkpoint-{step}" for name in ("waits", "runs on")
        )
        assert manifest.find_damage(there) is None
        assert saved_files(here) == saved_files(there)


@pytest.mark.slow
def test_a_model_trained_in_full_is_written_while_the_loop_waits(tiny, tmp_path, monkeypatch):
    """A second copy would not fit."""
    monkeypatch.setattr(Writer, "write_async", lambda *args, **how: pytest.fail("a second copy"))
    written, write = [], Writer.write

    def noted(self: Writer, save: Callable[[Path], None], step: int, **how: Any) -> None:
        written.append(step)
        write(self, save, step, **how)

    monkeypatch.setattr(Writer, "write", noted)
    duration = {"duration": "4 steps"}
    train(
        make_run(tiny, tmp_path, held=False, adapter={"kind": "none"}, train=duration), quiet=True
    )
    assert written == [2, 4]
    with logged_lines() as lines:
        assert replicate.newest_checkpoint(tmp_path / "run") == (4, 0)
    assert lines == []


@pytest.mark.slow
def test_without_room_for_a_copy_the_loop_waits(tiny, tmp_path, watched, monkeypatch):
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


def spoil(monkeypatch: pytest.MonkeyPatch, step: int, then: Callable[[], None]) -> None:
    """Writing the checkpoint of `step` runs into a full disk."""
    write = contents.write_optimizer

    def full(folder: Path, tensors: Mapping[str, Tensor]) -> None:
        if folder.name == f".checkpoint-{step}.partial":
            then()
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder, tensors)

    monkeypatch.setattr(contents, "write_optimizer", full)


@pytest.mark.slow
def test_a_full_disk_behind_the_steps_ends_the_run_and_it_resumes(tiny, tmp_path, monkeypatch):
    """The disk is full only once the step after the save is recorded."""
    out, every = tmp_path / "run", 20
    changes = {"train": {"duration": "60 steps"}, "checkpoint": {"every": f"{every} steps"}}

    def recorded() -> bool:
        return (out / "metrics.jsonl").read_bytes().count(b"\n") > 2 * every

    with monkeypatch.context() as patch:
        spoil(patch, 2 * every, then=lambda: wait_for(recorded))
        with refuses(CheckpointError, cause="disk", names=[f"checkpoint-{every}"]):
            train(make_run(tiny, tmp_path, held=False, **changes), quiet=True)
    failure = json.loads((out / "failure.json").read_text())
    # The next save would have waited for it.
    assert 2 * every < failure["last_step"] < 3 * every
    assert (failure["phase"], failure["cause"]) == ("saving", "disk")
    with logged_lines() as lines:
        assert replicate.newest_checkpoint(out) == (every, 0)
    assert lines == []
    assert not list(out.glob(".*.partial"))
    result = train(make_run(tiny, tmp_path, held=False, **changes), quiet=True)
    assert (result.first_step, result.steps) == (every, 60)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["numbers", pytest.param("code", marks=pytest.mark.nightly)])
def test_a_failing_run_waits_and_names_the_checkpoint_that_came_to_be_whole(
    fault, tiny, tmp_path, monkeypatch
):
    """Step 6 fails while checkpoint-4 is still written."""
    begun, write, step = threading.Event(), Writer._write, Trainer.train_step

    def late(self: Writer, *args: Any) -> None:
        assert begun.wait(30)
        time.sleep(0.2)
        write(self, *args)

    def broken(self: Trainer, batch: Any) -> StepOutput | None:
        if batch.step == 5:
            begun.set()
            if fault == "code":
                raise ZeroDivisionError("never meant to be")
            weights = [p for p in self.session.model.parameters() if p.requires_grad]
            weights[0].data.fill_(float("nan"))
        return step(self, batch)

    monkeypatch.setattr(Writer, "_write", late)
    monkeypatch.setattr(Trainer, "train_step", broken)
    with pytest.raises(RunError) as caught:
        train(make_run(tiny, tmp_path, held=False, checkpoint={"every": "4 steps"}), quiet=True)
    assert isinstance(caught.value, NonFiniteError) == (fault == "numbers")
    found = json.loads((tmp_path / "run" / "failure.json").read_text())
    assert "checkpoint-4" in found["why" if fault == "numbers" else "next"]
    assert manifest.find_damage(tmp_path / "run" / "checkpoint-4") is None


@pytest.mark.slow
def test_a_stop_waits_for_the_write_and_saves_its_own_step(tiny, tmp_path, watched, monkeypatch):
    slow_down(monkeypatch, watched, steps=1)
    step = Trainer.train_step

    def stopped(self: Trainer, batch: Any) -> StepOutput | None:
        if batch.step == 4:
            self.stop.request.signal = "SIGTERM"
        return step(self, batch)

    monkeypatch.setattr(Trainer, "train_step", stopped)
    with pytest.raises(StoppedError):
        train(make_run(tiny, tmp_path, checkpoint={"every": "4 steps"}), quiet=True)
    assert [(thread, step) for thread, step, _ in watched.wrote] == [
        ("tunesmith-checkpoint", 4),
        ("MainThread", 5),
    ]
    assert whole(tmp_path / "run") == [4, 5]
    assert not [t for t in threading.enumerate() if t.name.startswith("tunesmith-")]
