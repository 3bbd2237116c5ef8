"""A periodic checkpoint of an adapter holds the state of its step, though it is written while later
steps run.
"""

from __future__ import annotations

import errno
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from errors import holds, lines_with
from logged import logged_lines
from recipes import make_run
from tunesmith.checkpoint import contents, manifest, replicate
from tunesmith.checkpoint.writer import Writer
from tunesmith.errors import NonFiniteError, RunError, StoppedError
from tunesmith.runtime.transfer import Snapshot
from tunesmith.training.async_metrics import StepOutput
from tunesmith.training.run import train
from tunesmith.training.trainer import Trainer
from waiting import wait_for

pytestmark = pytest.mark.slow

CLOCKS = "step_seconds data_seconds tokens_per_second memory_gib host_memory_percent".split()


@dataclass
class Watched:
    """A run seen from outside: its Trainer, and the steps at which each thread's write of optimizer
    state began: thread, step written, last step recorded by then.
    """

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
    """A write in the thread begins only after `steps` more steps were taken, where as many are to
    come.
    """
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
@pytest.mark.parametrize(
    ("adapter", "dtype"),
    [
        ({}, "fp32"),
        pytest.param(
            {"modules_to_save": ["embed_tokens", "norm"]}, "bf16", marks=pytest.mark.nightly
        ),
    ],
    ids=["LoRA", "modules in bf16 too"],
)
def test_it_holds_what_a_run_that_waits_writes(
    adapter, dtype, tiny, tmp_path, watched, monkeypatch
):
    changes = {
        "adapter": adapter,
        "model": {"dtype": dtype},
        # Without one more at a new best validation.
        "checkpoint": {"every": "3 steps", "keep": 9, "final": "last"},
    }
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


def spoil(
    monkeypatch: pytest.MonkeyPatch, step: int, then: Callable[[], None] = lambda: None
) -> None:
    """Writing the checkpoint of `step` runs into a full disk."""
    write, calls = contents.write_optimizer, []

    def full(folder: Path, tensors: Mapping[str, Tensor]) -> None:
        calls.append(folder.name)
        if folder.name == f".checkpoint-{step}.partial":
            then()
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder, tensors)

    monkeypatch.setattr(contents, "write_optimizer", full)


def failed(run_dir: Path) -> dict[str, Any]:
    found = json.loads((run_dir / "failure.json").read_text())
    assert found.pop("last_step") in (4, 5, 6, 7, 8)
    return {k: str(v).replace(str(run_dir), "RUN") for k, v in found.items()}


def test_a_save_that_fails_while_steps_go_on_is_told_as_saving(tiny, tmp_path, monkeypatch):
    """The loop learns of it between two saves: the disk is full only once the step after the save
    is recorded.
    """
    records = tmp_path / "run" / "metrics.jsonl"
    spoil(monkeypatch, 10, then=lambda: wait_for(lambda: records.read_bytes().count(b"\n") >= 11))
    changes = {"train": {"duration": "30 steps"}, "checkpoint": {"every": "10 steps"}}
    with pytest.raises(RunError):
        train(make_run(tiny, tmp_path, held=False, **changes), quiet=True)
    failure = json.loads((tmp_path / "run" / "failure.json").read_text())
    assert 10 < failure["last_step"] < 20, "before the next save would have waited for it"
    assert failure["phase"] == "saving"


def test_a_full_disk_behind_the_steps_ends_the_run_as_one_in_the_loop_does(
    tiny, tmp_path, monkeypatch
):
    told = []
    for name in ("waits", "runs on"):
        (tmp_path / name).mkdir()
        with monkeypatch.context() as patch:
            spoil(patch, 4)
            if name == "waits":
                patch.setattr(Writer, "write_async", Writer.write)
            with pytest.raises(RunError) as caught:
                train(make_run(tiny, tmp_path / name), quiet=True)
        out = tmp_path / name / "run"
        with logged_lines() as lines:
            assert replicate.newest_checkpoint(out) == (2, 0)
        assert lines == []
        assert not list(out.glob(".*.partial"))
        told.append(
            (caught.value.text().replace(str(out), "RUN"), caught.value.exit_code, failed(out))
        )
    assert told[0] == told[1]
    assert holds(told[0][0], "checkpoint-2")
    result = train(make_run(tiny, tmp_path / "runs on"), quiet=True)
    assert (result.first_step, result.steps) == (2, 8)


@pytest.mark.parametrize("fault", ["numbers", pytest.param("code", marks=pytest.mark.nightly)])
def test_a_failing_run_waits_and_names_the_checkpoint_that_came_to_be_whole(
    fault, tiny, tmp_path, monkeypatch
):
    """Step 6 fails while checkpoint-4 is still written: it is whole in the end, and it is the one
    named.
    """
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
    found = manifest.list_checkpoints(tmp_path / "run")
    assert [step for step in found if manifest.find_damage(found[step]) is None] == [5, 4]
    assert not [t for t in threading.enumerate() if t.name.startswith("tunesmith-")]
