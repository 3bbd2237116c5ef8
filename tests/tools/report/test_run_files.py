"""A run directory as readers see it: while it grows, after each kind of end, with damaged lines."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import refuses
from records import RUN, record
from tunesmith.checkpoint.claim import claim_run_dir
from tunesmith.config.dump import to_mapping
from tunesmith.config.load import load_recipe
from tunesmith.errors import UsageError
from tunesmith.launch.job import Job
from tunesmith.metrics.record import cut_back
from tunesmith.metrics.sink import SampleAnswer, SamplesSink
from tunesmith.run_dir import RunState
from tunesmith.tools.report.curves import downsample, smooth
from tunesmith.tools.report.run_files import RunFiles, read_figures


def test_a_finished_run(trained: Path) -> None:
    run = RunFiles(trained)
    assert (run.name, run.state, run.failure, run.stopped, run.ranks) == ("run", "finished", None, None, {})  # fmt: skip
    records = [json.loads(line) for line in (trained / "metrics.jsonl").open()]
    columns = run.figures.columns
    assert (columns["step"], columns["loss"]) == ([*range(1, 9)], [row["loss"] for row in records])
    assert [step for step in range(8) if columns["val_loss"][step] is not None] == [3, 7]
    assert run.recipe == to_mapping(load_recipe(trained / "config.yaml"))
    assert run.env["data_hash"]
    assert any("loss" in line for line in run.log_tail)
    # Samples begin before training.
    held = trained.parent / "held.jsonl"
    samples = [(row["step"], row["expected"]) for row in run.samples if row["row"] == f"{held}:1"]
    expected = json.loads(held.read_text().splitlines()[0])["completion"]
    assert samples == [(step, expected) for step in (0, 4, 8)]


@pytest.mark.slow
def test_each_state(trained_copy: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As `watch`, `report` and `status` say it; also of a run that trained on past its final/."""
    copied = trained_copy()
    monkeypatch.setenv("XDG_STATE_HOME", str(copied.parent / "state"))
    run = RunFiles(copied)

    def state() -> RunState:
        run.refresh()
        assert Job("", str(copied)).state().state is run.state
        return run.state

    with claim_run_dir(copied):
        assert state() is RunState.RUNNING
    assert state() is RunState.FINISHED
    manifest = (copied / "final/manifest.json").read_text()
    (copied / "final/manifest.json").write_text("{")
    assert state() is RunState.KILLED
    (copied / "final/manifest.json").write_text(manifest)
    with (copied / "metrics.jsonl").open("a") as file:
        file.write(record(9).to_json() + "\n")
    assert state() is RunState.KILLED
    (copied / "stopped.json").write_text('{"signal": null, "reason": "memory", "step": 9}')
    assert state() is RunState.STOPPED
    (copied / "failure.json").write_text('{"what": "it broke"}')
    assert state() is RunState.FAILED
    assert run.failure == {"what": "it broke"}


def test_what_is_no_run_is_refused_and_a_near_folder_proposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with refuses(UsageError, where=str(tmp_path), names=["metrics.jsonl"]):
        RunFiles(tmp_path)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    cases = dict.fromkeys(("runs/notse.txt", "runs/note"), "output_dir")
    meant = ("runs/frist", "runs/FIRST", "rnus/first")
    for missing, fix in (cases | dict.fromkeys(meant, "runs/first?")).items():
        with refuses(UsageError, where=missing, fix=[fix]):
            RunFiles(missing)


def test_half_a_line_and_foreign_lines_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_figures(path).value.columns == {}
    path.write_text("".join(record(step).to_json() + "\n" for step in (1, 2)) + '{"step": 3, "lo')
    assert read_figures(path).value.columns["step"] == [1, 2]
    with path.open("a") as file:
        file.write('ss": 1.5, "val_loss": 0.5}\n')
    figures = read_figures(path).value
    assert (figures.columns["step"], figures.columns["val_loss"]) == ([1, 2, 3], [None, None, 0.5])
    assert figures.columns["tokens"] == [100, 100, None]
    cut_back(path, 1)
    figures = read_figures(path).value
    assert (figures.columns["step"], "val_loss" in figures.columns) == ([1], False)
    path.write_text(
        '{"step": 1, "loss": "NaN", "who": "me"}\n{broken\n7\n{"step": 2, "loss": 1.5}\n'
    )
    columns = read_figures(path).value.columns
    assert columns["loss"] == [pytest.approx(math.nan, nan_ok=True), 1.5]
    assert (columns["step"], columns["who"]) == ([1, 2], [None] * 2)


def test_samples_are_cut_back_with_the_records(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    sink = SamplesSink(path)
    sink.open(RUN, 0)
    for step in (0, 4, 8):
        sink.samples(step, [SampleAnswer("ask\nthis", f"answer {step}", "expected")])
    with path.open("a") as file:
        file.write('{"step": 9, "pro')
    sink.open(RUN, 4)
    sink.samples(8, [SampleAnswer("ask\nthis", "again", "expected")])
    rows = [json.loads(line) for line in path.open()]
    answers = [(row["step"], row["answer"]) for row in rows]
    assert answers == [(0, "answer 0"), (4, "answer 4"), (8, "again")]
    sink.open(RUN, 0)
    assert not path.exists(), "a new start has no answers of the run before"


@given(st.lists(st.none() | st.floats(-1e9, 1e9), max_size=100), st.integers(2, 50))
@settings(max_examples=30)
def test_downsampling_keeps_ends_and_extremes(y: list[float | None], points: int) -> None:
    x: list[float | None] = [float(i) for i in range(len(y))]
    steps, values = downsample([*x, 1000.0], [*y, math.nan], points)
    known = [value for value in y if value is not None]
    assert len(steps) <= points + 2
    assert steps == sorted(set(steps))
    assert all(y[int(step)] == value for step, value in zip(steps, values, strict=True))
    if known:
        found = (values[0], values[-1], min(values), max(values))
        assert found == (known[0], known[-1], min(known), max(known))


def test_smoothing_is_the_mean_with_falling_weights() -> None:
    """Weights (1 - a)^age, summing to 1, of the values so far; a = 2 / (span + 1)."""
    for span in (1, 3, 10):
        keep = 1 - 2 / (span + 1)
        expected = []
        for known in ([3.0], [3.0, 1.0], [3.0, 1.0, 4.0]):
            weights = [keep**age for age in reversed(range(len(known)))]
            expected.append(sum(w * v for w, v in zip(weights, known, strict=True)) / sum(weights))
        found = smooth([3.0, None, 1.0, math.nan, 4.0], span)
        assert found[1] is found[3] is None
        assert found[::2] == pytest.approx(expected, rel=1e-12)
