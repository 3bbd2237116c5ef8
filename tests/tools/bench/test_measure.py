"""Figures of a real run on the CPU: they agree with each other, and with what the loop recorded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from errors import lines_with, refuses
from logged import logged_lines
from recipes import make_run
from tunesmith.errors import ModelError, RunError
from tunesmith.host.chips import Peak
from tunesmith.model import spec
from tunesmith.model.attention import ATTENTION_KERNELS
from tunesmith.planning import compare_eight_bit
from tunesmith.stages.request import Request
from tunesmith.tools.bench.measure import BenchPlan, BenchReport, Measured, measure
from tunesmith.training.build import build as session_of
from tunesmith.training.run import train
from tunesmith.training.session import Session, write_identity
from tunesmith.training.trainer import Trainer
from tunesmith.units import Length

pytestmark = pytest.mark.slow
FIND_PEAK = "tunesmith.metrics.hardware.find_peak"


def run_plan(plan: BenchPlan, folder: Path, name: str = "measured") -> Measured:
    out = folder / name
    out.mkdir()
    return measure(plan, out)


def consistent(found: BenchReport) -> None:
    """Check counts over seconds, the share of waiting, and the order of percentiles."""
    assert found.tokens_per_second * found.seconds == pytest.approx(found.tokens, rel=1e-12)
    assert 0 < found.supervised_tokens_per_second < found.tokens_per_second
    assert 0 <= found.data_wait_share <= 1
    assert 0 < found.step_seconds_p50 <= found.step_seconds_p95
    assert found.steps * found.step_seconds_p50 < 3 * found.seconds


def test_the_steps_are_those_of_train(tiny: Path, tmp_path: Path) -> None:
    """Losses, bit for bit: the same schedule, the same warm-up of the rate, the same order of rows,
    into the second epoch.
    """
    rows = {"data": {"pack": False}, "checkpoint": {"every": None}}
    run = make_run(tiny, tmp_path, train={"duration": "9 steps"}, held=False, **rows)
    records = train(run, quiet=True).records
    found = run_plan(BenchPlan(run, steps=7, warmup=2), tmp_path).figures
    consistent(found)
    assert (found.steps, found.first_loss, found.last_loss) == (7, records[2].loss, records[8].loss)
    assert found.tokens == sum(record.tokens for record in records[2:])
    supervised = sum(record.supervised_tokens for record in records[2:])
    assert found.supervised_tokens_per_second * found.seconds == pytest.approx(supervised)
    assert not (tmp_path / "measured" / "final").exists()
    assert (found.mfu, found.mfu_peak_tflops) == (None, None), "no peak of a CPU is published"
    assert found.peak_memory_gib > 0.05
    assert found.first_step_seconds > 0


def test_numbers_that_are_read_late_are_the_same(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: a step's numbers are read while the next one runs."""

    class Late(Trainer):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.metrics.reads_late = True

    run = make_run(tiny, tmp_path, held=False, profile={"wait": 0, "warmup": 1, "active": 1})
    plan = BenchPlan(run, steps=3, warmup=2, traces=tmp_path / "traces")
    at_once = run_plan(plan, tmp_path).figures
    monkeypatch.setattr("tunesmith.tools.bench.measure.Trainer", Late)
    late = run_plan(plan, tmp_path, "late").figures
    consistent(late)
    same = ("steps", "tokens", "first_loss", "last_loss")
    assert [vars(late)[name] for name in same] == [vars(at_once)[name] for name in same]


def test_the_mfu_is_that_of_the_formula(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: `spec.flops` over the rows that the steps took; layers that are recomputed do not
    count.
    """
    monkeypatch.setattr(FIND_PEAK, lambda *_: Peak(100.0, "a sheet"))
    run = make_run(tiny, tmp_path, train={"recompute": "full"}, held=False)
    session = session_of(Request(BenchPlan(run, steps=3, warmup=1).measured_run(tmp_path)))
    schedule, examples = session.data.schedule, session.data.train
    work = sum(
        spec.flops(
            session.files.spec,
            [len(examples[i].ids) for i in schedule.examples(step)],
            sum(int(examples[i].trained.sum()) for i in schedule.examples(step)),
            trained="lora",
            adapter_parameters=sum(p.numel() for _, p in session.model.trained_parameters()),
        )
        for step in (1, 2, 3)
    )
    found = run_plan(BenchPlan(run, steps=3, warmup=1), tmp_path).figures
    consistent(found)
    assert found.recomputed_layers == 2
    assert found.mfu is not None
    assert found.mfu * found.mfu_peak_tflops * found.seconds * 1e12 == pytest.approx(work)
    assert f"{found.mfu:.1%}" in {value for _, value, _ in found.rows()}


@pytest.mark.usefixtures("eager_compiler")
def test_no_timed_step_is_short(tiny: Path, tmp_path: Path) -> None:
    """Four rows a step of 11 full rows: the third of an epoch has three, and its micro batch is
    padded to the shape of the others.
    """
    lines = [json.dumps({"prompt": f"{i:016}", "completion": "y" * 15}) for i in range(22)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    (tmp_path / "held.jsonl").touch()
    keys: dict[str, Any] = {
        "model": {"attention": "eager"},  # by documents, each layer is cut in two graphs
        "data": {"seq_len": 64, "template": "raw"},
        "train": {"global_batch": "256 tokens", "micro_batch": "256 tokens", "compile": "on"},
    }
    run = make_run(tiny, tmp_path, held=False, **keys)
    plan = BenchPlan(run, steps=6, warmup=1)
    schedule = session_of(Request(plan.measured_run(tmp_path))).data.schedule
    assert [len(schedule.rows(step)) for step in range(7)] == [4, 4, 3, 4, 4, 3, 4]
    with logged_lines() as told:
        assert run_plan(plan, tmp_path).figures.tokens == 6 * 256
    assert lines_with("\n".join(told), 3)


@pytest.mark.parametrize(("tflops", "known"), [(1e3, True), (1e-9, False)])
def test_a_record_has_no_utilization_above_one(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tflops: float, known: bool
) -> None:
    monkeypatch.setattr(FIND_PEAK, lambda *_: Peak(tflops, "of a data sheet"))
    short = {"duration": "2 steps"}
    for record in train(make_run(tiny, tmp_path, held=False, train=short), quiet=True).records:
        assert (record.mfu is not None) == known
        assert record.mfu_peak_tflops == tflops


def test_a_measured_peak_is_named_before_the_first_step(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Peak(92.0, "measured on a DGX Spark, dense bf16")
    monkeypatch.setattr(FIND_PEAK, lambda device, dtype: measured)
    with logged_lines() as told:
        session = session_of(Request(make_run(tiny, tmp_path, held=False)))
    assert lines_with("\n".join(told), "MFU", "92 TFLOP/s", measured.source)
    (out := Path(session.run.output_dir)).mkdir(exist_ok=True)
    write_identity(session, [])
    identity = json.loads((out / "env.json").read_text())
    assert identity["mfu_peak"] == {"tflops": 92.0, "source": measured.source}


def test_traces_are_of_steps_after_the_timed_ones_and_the_peak_of_the_trial_counts(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial of a GPU begins the allocator's statistics anew."""

    def build(*args: Any, **options: Any) -> Session:
        session = session_of(*args, **options)
        session.plan = replace(session.plan, trial_peak=200 * 2**30)
        return session

    monkeypatch.setattr("tunesmith.tools.bench.measure.build", build)
    profile = {"wait": 1, "warmup": 1, "active": 2, "cycles": 2}
    run = make_run(tiny, tmp_path, profile=profile, held=False)
    plan = BenchPlan(run, steps=2, warmup=1, traces=tmp_path / "traces")
    assert plan.measured_run(tmp_path).train.duration == Length(2 + 1 + 8, "steps")
    found = run_plan(plan, tmp_path)
    assert (found.figures.steps, found.figures.peak_memory_gib) == (2, 200)
    assert [file.parent for file in found.traces] == [tmp_path / "traces"] * 2


def test_a_step_that_fails_says_where(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Trainer, batch: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "train_step", full)
    with refuses(RunError, cause="out-of-memory"):
        run_plan(BenchPlan(make_run(tiny, tmp_path), steps=1, warmup=0), tmp_path)


def test_the_base_is_named_as_it_was_held(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The speed of bf16 must not stand under the name of fp8."""
    monkeypatch.setattr(compare_eight_bit, "MAX_LOSS_CHANGE", 1.0)
    run = make_run(tiny, tmp_path, model={"dtype": "bf16", "quantize": "fp8"})
    found = run_plan(BenchPlan(run, steps=1, warmup=0), tmp_path).figures
    assert found.attention == f"products, {ATTENTION_KERNELS['products']}"
    assert found.quantize.startswith("fp8")
    monkeypatch.setattr(compare_eight_bit, "MAX_LOSS_CHANGE", -1.0)
    with refuses(ModelError, where="model.quantize", fix=["model.quantize=none"]):
        run_plan(BenchPlan(run, steps=1, warmup=0), tmp_path, "other")
