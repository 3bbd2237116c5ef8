"""The figures and the recipe keys that a comparison of runs shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from errors import holds, lines_with
from invoke import invoke
from report.written import falling, row_eval, write_eval, write_run
from tunesmith.tools.report.figures import differing_keys, eval_figures, figure_rows


def test_figures_of_runs_stand_side_by_side(tmp_path: Path) -> None:
    extra = {"val_reward_accuracy": 0.9}
    runs = [
        write_run(
            tmp_path / name, {40: val_loss}, env={"validation_examples": 100},
            extra=lambda step: extra if step == 40 else {},
        )
        for name, val_loss in (("good", 1.01), ("bad", 8.01))
    ]  # fmt: skip
    rows = dict(figure_rows(runs))
    lowest = rows["lowest val_loss"]
    assert holds(lowest[0], "1.0100", "40")
    assert holds(lowest[1], "8.0100", "40")
    text = "90.0 % (82.9 to 94.8) at step 40"
    assert rows["highest accuracy on held-out pairs"] == [text, text]


def test_the_loss_that_eval_measured_has_its_interval(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", falling(2.0))
    tuned = [1.0, 1.2, 0.8, 1.1, 0.9, 1.0]
    values = row_eval(tuned)
    values["losses"]["base"] = 1.5
    values["row_losses"]["base"] = [loss + 0.5 for loss in tuned]
    write_eval(run.folder, values)
    run.refresh()
    cells = dict(eval_figures([run]))
    # Student's factor of five degrees of freedom, 2.571, times 0.1414 / sqrt(6)
    shown = "1.0000 (0.8516 to 1.1484), base 1.5000: -0.5000 (-0.5000 to -0.5000) at step 40"
    assert cells["eval: loss (held.jsonl, 6 rows)"] == [shown]


def test_differing_keys_tell_what_changes_nothing(tmp_path: Path) -> None:
    """Rows whose hash is the same are no difference in a file of another name."""
    rate, micro = {"learning_rate": 3e-4}, {"micro_batch": "1 examples"}
    recipe = {"train": rate | micro, "method": {"name": "dpo", "beta": 0.1}}
    recipe["data"] = {"train": {"source": "b.jsonl"}}
    runs = [write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run", recipe=recipe)]
    found = {one.key: (one.values, one.learns) for one in differing_keys(runs)}
    assert found == {
        "method.name": (["sft", "dpo"], True),
        "method.beta": ([None, 0.1], True),
        "train.learning_rate": ([1e-4, 3e-4], True),
        "train.micro_batch": (["auto", "1 examples"], False),
        "data.train.source": (["rows.jsonl", "b.jsonl"], False),
    }
    runs[1].env["data_hash"] = None
    assert "data.train.source" in {one.key for one in differing_keys(runs) if one.learns}


def test_what_ends_a_run_or_chooses_its_weights_changes_what_is_learned(tmp_path: Path) -> None:
    changed = {"validate": {"patience": 3, "every": "5 steps"}, "log": {"every": "7 steps"},
               "checkpoint": {"final": "last", "every": "9 steps", "keep": 2}}  # fmt: skip
    chosen = {"validate.patience", "validate.every", "checkpoint.final"}
    for kind, more in (("lora", set()), ("none", {"checkpoint.every"})):
        recipe = {"adapter": {"kind": kind}}
        runs = [write_run(tmp_path / kind / "a", recipe=recipe)]
        runs.append(write_run(tmp_path / kind / "b", recipe=recipe | changed))
        found = differing_keys(runs)
        assert {one.key for one in found if one.learns} == chosen | more
        assert {"log.every", "checkpoint.keep"} <= {one.key for one in found if not one.learns}


def test_figures_leave_out_the_first_step_of_the_speed(tmp_path: Path) -> None:
    """The mean is weighted by time."""
    pace = {1: 2.0, 2: 300.0, 3: 100.0, 4: 300.0, 5: 100.0}
    found = write_run(
        tmp_path / "a", steps=5, tokens_per_second=pace.get, step_seconds=lambda s: 100 / pace[s],
        data_seconds=lambda s: 25 / pace[s], mfu=lambda s: pace[s] / 1000, memory_gib=float,
    ).figures  # fmt: skip
    assert found.speed == pytest.approx(400 / (2 / 3 + 2))
    assert found.waiting == pytest.approx(0.25)
    assert found.mfu == pytest.approx(0.15)
    assert (found.memory_gib, found.tokens) == (5.0, 500)
    assert found.seconds == pytest.approx(50 + 2 + 2 / 3)


@pytest.mark.slow
def test_the_report_as_json_and_of_a_folder_of_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, rate in (("sweep/01-good", 1e-3), ("sweep/02-bad", 1e-4), ("again/01-good", 1e-3)):
        write_run(tmp_path / name, {40: 2.0}, recipe={"train": {"learning_rate": rate}})
    found = json.loads(invoke("report", "sweep", "--json").out)
    assert found.keys() == {"runs", "differing_keys"}
    assert [run["run"] for run in found["runs"]] == ["01-good", "02-bad"]
    assert found["runs"][0]["best"]["step"] == 40
    assert found["runs"][1]["val_losses"] == [{"step": 40, "value": 2.0}]
    assert found["differing_keys"] == {"train.learning_rate": [1e-3, 1e-4]}
    assert not Path("report.html").exists()
    twice = json.loads(invoke("report", "sweep/01-good", "again/01-good", "--json").out)
    assert [run["run"] for run in twice["runs"]] == ["sweep/01-good", "again/01-good"]
    jobs = json.loads(invoke("status", "sweep", "--json").out)
    assert [job["state"] for job in jobs] == ["finished"] * 2
    shown = invoke("report", "sweep").out
    assert lines_with(shown, "01-good", "40", "2.0000")
    command = "tunesmith eval sweep/01-good sweep/02-bad"
    assert lines_with(shown, command)
    assert command in Path("report.html").read_text()
