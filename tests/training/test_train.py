"""The loop: what it writes, when it validates, what a step's seconds are, how it ends."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ranks import run_ranks
from recipes import make_run, write_rows
from tunesmith.checkpoint import manifest
from tunesmith.checkpoint.resume import Start
from tunesmith.config.schema import Run
from tunesmith.host.signals import StopRequest
from tunesmith.metrics.log_file import LogFile
from tunesmith.metrics.sink import Sinks
from tunesmith.metrics.terminal import Terminal
from tunesmith.runtime import transfer
from tunesmith.start.build import build
from tunesmith.start.request import Request
from tunesmith.start.run import train
from tunesmith.train_model import ValidationResult
from tunesmith.training import session as session_module
from tunesmith.training.result import Result
from tunesmith.training.run_sinks import sinks_of
from tunesmith.training.stop_control import StopControl
from tunesmith.training.trainer import Trainer

pytestmark = pytest.mark.slow

TIMES = {
    "step_seconds",
    "data_seconds",
    "tokens_per_second",
    "memory_gib",
    "host_memory_percent",
}


def go(tiny: Path, folder: Path, **changes: Any) -> Result:
    return train(make_run(tiny, folder, **changes), quiet=True)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]


def numbers(folder: Path) -> list[dict[str, Any]]:
    """The records without what a clock says."""
    return [{k: v for k, v in record.items() if k not in TIMES} for record in lines(folder)]


def trainer_of(run: Run, sinks: Sinks) -> Trainer:
    session = build(Request(run))
    session.model.train()
    return Trainer(session, Start(), sinks, StopControl(StopRequest(), Path(run.output_dir)))


def test_run_directory_and_record(trained: Path) -> None:
    records = lines(trained.parent)
    assert [r["step"] for r in records] == list(range(1, 9))
    assert [r["step"] for r in records if "val_loss" in r] == [4, 8]
    assert records[-1]["loss"] < records[0]["loss"]
    written = {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "generation_config.json"
    }  # fmt: skip
    for place in ("checkpoint-6", "checkpoint-8", "final"):
        assert manifest.find_damage(trained / place) is None
        assert written <= {p.name for p in (trained / place).iterdir()}
    assert not (trained / "checkpoint-2").exists(), "keep: 2"
    assert not (trained / "final" / "state").exists()
    assert json.loads((trained / "env.json").read_text())["data_hash"]
    best = min((r["val_loss"], r["step"]) for r in records if "val_loss" in r)
    assert json.loads((trained / "best.json").read_text())["step"] == best[1]


def test_metrics_read_one_step_later_are_the_same(tiny, tmp_path):
    """On CUDA a step's metrics are read while the next step runs; here the same is done on the CPU."""
    at_once, later = tmp_path / "a", tmp_path / "b"
    at_once.mkdir()
    later.mkdir()
    changes = {"train": {"duration": "11 steps"}, "checkpoint": {"every": "5 steps"}}
    go(tiny, at_once, **changes)
    run = make_run(tiny, later, **changes)
    out = Path(run.output_dir)
    out.mkdir()
    sinks = sinks_of(
        run, out, Terminal(LogFile(tmp_path / "log.txt"), total_steps=11, steps_per_epoch=6)
    )
    sinks.open(run, 0)
    trainer = trainer_of(run, sinks)
    trainer.metrics.reads_late = True
    trainer.fit()
    sinks.close()
    assert numbers(later) == numbers(at_once)
    assert {p.name for p in out.glob("checkpoint-*")} == {"checkpoint-10", "checkpoint-11"}


def test_a_run_by_the_clock_ends_with_everything_written(tiny: Path, tmp_path: Path) -> None:
    result = go(tiny, tmp_path, train={"duration": "1 s"}, validate={"every": "5 steps"})
    assert 1.0 <= result.seconds < 10.0
    assert result.steps >= 2
    assert manifest.last_step_of(tmp_path / "run" / "final") == result.steps
    assert lines(tmp_path)[-1]["step"] == result.steps


@pytest.mark.parametrize("loss", [1.0, math.nan])
def test_a_run_that_patience_ended_continues_with_a_longer_duration(
    loss, tiny, tmp_path, monkeypatch
):
    """The count of validations without improvement begins anew, also if validations are rarer."""
    measured = ValidationResult(loss, 1, {})
    monkeypatch.setattr(session_module, "validation_loss", lambda *args, **options: measured)
    rule = {"every": "1 steps", "patience": 2}
    assert go(tiny, tmp_path, train={"duration": "8 steps"}, validate=rule).steps == 3
    rule["every"] = "3 steps"
    assert go(tiny, tmp_path, train={"duration": "12 steps"}, validate=rule).steps == 9


def test_step_seconds_leave_validations_and_checkpoints_out(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock of its own: a step takes 2 s, a validation 100 s, and a save 1000 s."""
    write_rows(tmp_path / "train.jsonl", 48)
    write_rows(tmp_path / "held.jsonl", 8)
    rules = {"validate": {"every": "10 steps"}, "checkpoint": {"every": "8 steps"}}
    run = make_run(tiny, tmp_path, train={"duration": "30 steps"}, **rules)
    Path(run.output_dir).mkdir()
    trainer = trainer_of(run, Sinks([]))
    now = 0.0
    monkeypatch.setattr(transfer, "time", SimpleNamespace(perf_counter=lambda: now))

    def taking(seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal now
            now += seconds / 2
            result = function(*args, **options)
            now += seconds / 2
            return result

        return call

    # `train_step` makes the mark of its end itself, so its seconds pass before it.
    step = trainer.train_step
    trainer.train_step = lambda batch: taking(2.0, lambda: None)() or step(batch)
    trainer.validate = taking(100.0, trainer.validate)
    trainer.checkpoints.save = taking(1000.0, trainer.checkpoints.save)
    with trainer.session.loader(0) as batches:
        assert len(list(trainer.steps(batches))) == 30
    trainer.checkpoints.writer.close()
    # Saves are due after 8, 16 and 24 steps, and after the best validations, of 10 and 20 steps.
    assert now == 30 * 2.0 + 3 * 100.0 + 5 * 1000.0
    assert [record.step_seconds for record in trainer.metrics.records] == [2.0] * 30


def by_the_clock(tiny: Path, folder: Path) -> tuple[int, float]:
    changes = {"train": {"duration": "1 s"}, "parallel": {"replicate": 2}}
    result = go(tiny, folder, held=False, **changes)
    return result.steps, result.seconds


@pytest.mark.nightly
def test_ranks_end_a_run_by_the_clock_after_the_same_step(tiny: Path, tmp_path: Path) -> None:
    """By rank 0's seconds, as no two ranks measure the same."""
    write_rows(tmp_path / "train.jsonl", 48)
    first, second = run_ranks(2, by_the_clock, tiny, tmp_path)
    assert first == second
    assert first[1] >= 1.0
