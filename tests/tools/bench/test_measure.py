"""Figures of a real run on the CPU: they agree with each other, and with what the loop recorded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from errors import lines_with, refuses
from logged import logged_lines
from recipes import make_run
from tunesmith.errors import ModelError
from tunesmith.host.chips import Peak
from tunesmith.model.arch import spec
from tunesmith.model.layers.attention import ATTENTION_KERNELS
from tunesmith.planning import compare_eight_bit
from tunesmith.start.build import build as session_of
from tunesmith.start.request import Request
from tunesmith.start.run import train
from tunesmith.tools.bench.measure import BenchPlan, Measured, measure
from tunesmith.training.identity import write_identity
from tunesmith.training.session import Session
from tunesmith.units import Length

pytestmark = pytest.mark.slow
FIND_PEAK = "tunesmith.metrics.hardware.find_peak"


def run_plan(plan: BenchPlan, folder: Path, name: str = "measured") -> Measured:
    out = folder / name
    out.mkdir()
    return measure(plan, out)


def test_the_steps_are_those_of_train(tiny: Path, tmp_path: Path) -> None:
    """Losses, bit for bit, into the second epoch."""
    rows = {"data": {"pack": False}, "checkpoint": {"every": None}}
    run = make_run(tiny, tmp_path, train={"duration": "9 steps"}, held=False, **rows)
    records = train(run, quiet=True).records
    found = run_plan(BenchPlan(run, steps=7, warmup=2), tmp_path).figures
    assert found.tokens_per_second * found.seconds == pytest.approx(found.tokens, rel=1e-12)
    assert 0 < found.step_seconds_p50 <= found.step_seconds_p95
    assert (found.steps, found.first_loss, found.last_loss) == (7, records[2].loss, records[8].loss)
    assert found.tokens == sum(record.tokens for record in records[2:])
    supervised = sum(record.supervised_tokens for record in records[2:])
    assert found.supervised_tokens_per_second * found.seconds == pytest.approx(supervised)
    assert not (tmp_path / "measured" / "final").exists()
    assert (found.mfu, found.mfu_peak_tflops) == (None, None), "no peak of a CPU is published"


def test_a_step_of_grpo_is_measured_with_its_rollouts(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text("def f(a, row): return 'e' in a")
    method = {"name": "grpo", "reward": "r.py:f", "group": 4, "answer_tokens": 8}
    steps = {"duration": "3 steps", "global_batch": "2 examples"}
    run = make_run(tiny, tmp_path, method=method, train=steps, held=False)
    records = train(run, quiet=True).records
    found = run_plan(BenchPlan(run, steps=2, warmup=1), tmp_path).figures
    assert found.tokens == sum(record.tokens for record in records[1:])
    assert found.last_loss == records[2].loss
    assert found.rollout_seconds is not None
    assert 0 < found.rollout_seconds * 2 < found.seconds
    assert "rollouts, mean" in [name for name, _, _ in found.rows()]


def test_the_mfu_is_that_of_the_formula(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: `spec.flops` over the rows of the steps; recomputed layers do not count."""
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
    assert found.recomputed_layers == 2
    assert found.mfu is not None
    assert found.mfu * found.mfu_peak_tflops * found.seconds * 1e12 == pytest.approx(work)


@pytest.mark.usefixtures("eager_compiler")
def test_no_timed_step_is_short(tiny: Path, tmp_path: Path) -> None:
    """Of 11 full rows, the third step of an epoch has three, padded to the shape of the others."""
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


def test_a_measured_peak_is_named_and_no_utilization_above_one_is_recorded(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tiny, tmp_path, held=False, train={"duration": "2 steps"})
    monkeypatch.setattr(FIND_PEAK, lambda *_: Peak(1e-9, "of a data sheet"))
    record = train(run, quiet=True).records[0]
    assert (record.mfu, record.mfu_peak_tflops) == (None, 1e-9)
    measured = Peak(92.0, "measured on a DGX Spark, dense bf16")
    monkeypatch.setattr(FIND_PEAK, lambda *_: measured)
    with logged_lines() as told:
        write_identity(session_of(Request(run)), [])
    assert lines_with("\n".join(told), "MFU", "92 TFLOP/s", measured.source)
    identity = json.loads(Path(run.output_dir, "env.json").read_text())
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


def test_the_base_is_named_as_it_was_held(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The speed of bf16 must not stand under the name of fp8."""
    monkeypatch.setattr(compare_eight_bit, "MAX_LOSS_CHANGE", 1.0)
    run = make_run(tiny, tmp_path, model={"dtype": "bf16", "quantize": "fp8"})
    found = run_plan(BenchPlan(run, steps=1, warmup=0), tmp_path).figures
    assert found.attention == f"batched_matmul, {ATTENTION_KERNELS['batched_matmul']}"
    assert found.quantize.startswith("fp8")
    monkeypatch.setattr(compare_eight_bit, "MAX_LOSS_CHANGE", -1.0)
    with refuses(ModelError, where="model.quantize", fix=["model.quantize=none"]):
        run_plan(BenchPlan(run, steps=1, warmup=0), tmp_path, "other")
