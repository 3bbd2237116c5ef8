"""The loop: what it writes, when it validates, how it ends."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from errors import lines_with
from logged import logged_lines
from recipes import make_run
from tunesmith.checkpoint import manifest
from tunesmith.checkpoint.resume import Start
from tunesmith.config.schema import Log
from tunesmith.host.signals import StopRequest
from tunesmith.metrics.log_file import LogFile
from tunesmith.metrics.terminal import Terminal
from tunesmith.stages.request import Request
from tunesmith.training import trainer, validation
from tunesmith.training.answer_sampler import AnswerSampler
from tunesmith.training.async_metrics import AsyncMetrics
from tunesmith.training.build import build
from tunesmith.training.result import Result
from tunesmith.training.run import train
from tunesmith.training.run_sinks import sinks_of
from tunesmith.training.stop_control import StopControl
from tunesmith.training.trainer import Trainer
from tunesmith.training.validation_loss import ValidationResult

FIELDS = [
    "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "supervised_tokens", "examples", "step_seconds",
    "data_seconds", "tokens_per_second", "mfu", "memory_gib",
]  # fmt: skip
TIMES = (
    "step_seconds",
    "data_seconds",
    "tokens_per_second",
    "memory_gib",
    "host_memory_percent",
)


def go(tiny: Path, folder: Path, **changes: Any) -> Result:
    return train(make_run(tiny, folder, **changes), quiet=True)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]


def numbers(folder: Path) -> list[dict[str, Any]]:
    """The records without what a clock says."""
    return [{k: v for k, v in record.items() if k not in TIMES} for record in lines(folder)]


@pytest.mark.slow
def test_run_directory_and_record(trained: Path) -> None:
    records = lines(trained.parent)
    assert [r["step"] for r in records] == list(range(1, 9))
    assert all(list(r)[: len(FIELDS)] == FIELDS for r in records)
    assert [r["step"] for r in records if "val_loss" in r] == [4, 8]
    assert records[-1]["loss"] < records[0]["loss"]
    written = {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "generation_config.json"
    }  # fmt: skip
    for place in ("checkpoint-6", "checkpoint-8", "final"):
        assert manifest.find_damage(trained / place) is None
        assert written <= {p.name for p in (trained / place).iterdir()}
    assert not (trained / "checkpoint-2").exists(), "keep: 2"
    assert (trained / "checkpoint-8" / "state").is_dir()
    assert not (trained / "final" / "state").exists()
    assert json.loads((trained / "env.json").read_text())["data_hash"]
    best = min((r["val_loss"], r["step"]) for r in records if "val_loss" in r)
    assert json.loads((trained / "best.json").read_text())["step"] == best[1]
    assert not (trained / "failure.json").exists()


@pytest.mark.slow
def test_metrics_read_one_step_later_are_the_same(tiny, tmp_path, monkeypatch):
    """On CUDA a step's metrics are read while the next step runs; here the same is done on the CPU."""
    at_once, later = tmp_path / "a", tmp_path / "b"
    at_once.mkdir()
    later.mkdir()
    changes: dict[str, Any] = {
        "train": {"duration": "11 steps"},
        "checkpoint": {"every": "5 steps"},
    }
    go(tiny, at_once, **changes)
    run = make_run(tiny, later, **changes)
    Path(run.output_dir).mkdir()
    session = build(Request(run))
    terminal = Terminal(LogFile(tmp_path / "log.txt"), total_steps=11, steps_per_epoch=6)
    sinks = sinks_of(run, Path(run.output_dir), terminal)
    sinks.open(run, 0)
    flushed: list[tuple[int, int]] = []

    class Watched(AsyncMetrics):
        def flush(self, *, log: bool = True) -> None:
            if self.pending is not None:
                flushed.append((self.progress.step, self.pending.step))
            super().flush(log=log)

    monkeypatch.setattr("tunesmith.training.trainer.AsyncMetrics", Watched)
    trainer = Trainer(session, Start(), sinks, StopControl(StopRequest(), Path(run.output_dir)))
    trainer.metrics.reads_late = True
    trainer.fit()
    sinks.close()
    assert numbers(later) == numbers(at_once)
    assert [pending for _, pending in flushed] == list(range(1, 12))
    assert {p.name for p in (later / "run").glob("checkpoint-*")} == {
        "checkpoint-10",
        "checkpoint-11",
    }


@pytest.mark.slow
def test_a_run_by_the_clock_ends_with_everything_written(tiny: Path, tmp_path: Path) -> None:
    result = go(tiny, tmp_path, train={"duration": "1 s"}, validate={"every": "5 steps"})
    assert 1.0 <= result.seconds < 10.0
    assert result.steps >= 2
    assert manifest.last_step_of(tmp_path / "run" / "final") == result.steps
    assert lines(tmp_path)[-1]["step"] == result.steps


@pytest.mark.slow
def test_a_run_that_patience_ended_continues_with_a_longer_duration(tiny, tmp_path, monkeypatch):
    """The count of validations without improvement begins anew, also if validations are rarer."""
    monkeypatch.setattr(
        validation, "validation_loss", lambda *args, **options: ValidationResult(1.0, 1, {})
    )
    rule = {"every": "1 steps", "patience": 2}
    assert go(tiny, tmp_path, train={"duration": "8 steps"}, validate=rule).steps == 3
    rule["every"] = "3 steps"
    assert go(tiny, tmp_path, train={"duration": "12 steps"}, validate=rule).steps == 9


@pytest.mark.slow
def test_a_run_whose_held_out_loss_is_nan_ends_by_patience(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(
        validation, "validation_loss", lambda *_, **__: ValidationResult(math.nan, 1, {})
    )
    rule = {"every": "1 steps", "patience": 3}
    assert go(tiny, tmp_path, train={"duration": "8 steps"}, validate=rule).steps == 4


@pytest.mark.slow
def test_samples_and_tensorboard(tiny: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    go(tiny, tmp_path, log={"tensorboard": True, "samples": 1})
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    expected = {"train/learning_rate", "train/tokens_per_second"}
    assert expected <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("validation/loss")] == [4, 8]
    losses = [record["loss"] for record in lines(tmp_path)]
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(losses, rel=1e-6)
    assert any("sample" in tag for tag in events.Tags()["tensors"])


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "steps"), [(600.0, [0, 2, 4, 6, 8]), (1e-9, [])])
def test_slow_sample_answers_are_left_out_and_that_is_said_once(seconds, steps, tiny, tmp_path):
    log = {"samples": 1, "sample_seconds": seconds}
    go(tiny, tmp_path, validate={"every": "2 steps"}, log=log)
    samples = tmp_path / "run" / "samples.jsonl"
    answered = (
        [json.loads(line)["step"] for line in samples.read_text().splitlines()]
        if samples.exists()
        else []
    )
    assert answered == steps
    said = lines_with((tmp_path / "run" / "log.txt").read_text(), "log.samples=0")
    assert len(said) == (not steps)
    assert all("log.sample_seconds" in line for line in said)


@pytest.mark.slow
def test_the_last_answers_need_not_wait_for_what_others_took(tiny, tmp_path, monkeypatch):
    took: list[float] = []

    def note(self: AnswerSampler, *, is_final: bool = False) -> float:
        self.seconds += 15.0
        took.append(allowed_seconds(self, is_final=is_final))
        return 0.0  # no answers before training

    allowed_seconds = AnswerSampler.allowed_seconds
    monkeypatch.setattr(AnswerSampler, "allowed_seconds", note)
    go(tiny, tmp_path, validate={"every": "4 steps"}, log={"samples": 1})
    first, second, last = took
    assert 0 <= second < first <= Log().sample_seconds - 15.0
    assert last == Log().sample_seconds


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("masters", ["fp32", "stochastic"])
def test_full_fine_tuning_in_bf16_learns_and_opens_in_transformers(masters, tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    result = go(
        tiny,
        tmp_path,
        model={"dtype": "bf16"},
        adapter={"kind": "none"},
        train={"duration": "30 steps", "master_weights": masters},
    )
    assert result.first_loss is not None
    assert result.last_loss is not None
    assert result.last_loss < result.first_loss - 0.3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.slow
def test_a_slow_first_step_is_told_of(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "SLOW_STEP_SECONDS", 0.0)
    with logged_lines() as lines:
        train(make_run(tiny, tmp_path, held=False, train={"duration": "2 steps"}))
    assert lines.count(trainer.SLOW_FIRST_STEP) == 1
