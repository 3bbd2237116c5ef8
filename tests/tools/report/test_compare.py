"""Which run is better: said only from what `eval` measured, row by row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from errors import holds
from invoke import invoke
from report.written import falling, pairs_eval, row_eval, write_eval, write_run
from tunesmith.tools.report.compare import Verdict, differing_keys, judge
from tunesmith.tools.report.figures import eval_figures, figure_rows
from tunesmith.tools.report.run_files import RunFiles


def verdict(*runs) -> Verdict:
    return judge(runs)


def sentence(found: Verdict, *values: object) -> list[str]:
    """Its reasons that have all these values."""
    return [reason for reason in found.reasons if holds(reason, *values)]


def rate(value: float, seed: int = 42) -> dict:
    return {"train": {"learning_rate": value, "seed": seed}}


def rows_around(mean: float, count: int = 40) -> list[float]:
    """Losses of rows that are easy or hard for all models, with a little of their own."""
    return [mean + 0.2 * (i % 7) + 0.01 * ((i * i) % 5) * mean for i in range(count)]


def evaluated(folder: Path, mean: float, learning_rate: float, **changes) -> RunFiles:
    """A run with one validation, and with what `eval` measured of each row."""
    options = {name: changes.pop(name) for name in ("finished", "env") if name in changes}
    run = write_run(folder, {40: mean}, recipe=rate(learning_rate), **options)
    write_eval(run.folder, row_eval(rows_around(mean), **changes))
    return RunFiles(run.folder)


def test_without_eval_there_are_figures_and_no_verdict(tmp_path: Path) -> None:
    """However far apart val_loss and training loss are."""
    good = write_run(tmp_path / "good", falling(2.0), recipe=rate(1e-3), loss=0.1)
    bad = write_run(tmp_path / "bad", falling(9.0), recipe=rate(1e-4), loss=3.0)
    found = verdict(good, bad)
    assert (found.kind, found.best) == ("none", ())
    assert holds(found.headline, "No verdict")
    assert sentence(found, f"`tunesmith eval {good.folder} {bad.folder}`")
    lowest = dict(figure_rows([good, bad]))["lowest val_loss"]
    assert holds(lowest[0], "1.0100", "step 40")
    assert holds(lowest[1], "8.0100", "step 40")
    # Only one of them was evaluated; then both, on too few rows.
    write_eval(good.folder, row_eval(rows_around(2.0, 3)))
    good.refresh()
    assert verdict(good, bad).kind == "none"
    write_eval(bad.folder, row_eval(rows_around(9.0, 3)))
    bad.refresh()
    assert sentence(verdict(good, bad), "3 rows", "6")
    alone = verdict(good)
    assert alone.kind == "alone"
    assert holds(alone.headline, "good", "step 40", "val_loss 1.0100")


@pytest.mark.slow
def test_what_eval_measured_row_by_row_decides(tmp_path: Path) -> None:
    """Rows that are hard for both runs do not blur their difference."""
    good = evaluated(tmp_path / "good", 2.0, 1e-3)
    bad = evaluated(tmp_path / "bad", 2.1, 1e-4)
    found = verdict(good, bad)
    assert (found.kind, found.best) == ("better", (0,))
    assert sentence(found, "good", "better", "bad", "40 rows", "held.jsonl")
    # A third run, as of a sweep, that was not evaluated; one that is unfinished leads only so far.
    third = write_run(tmp_path / "third", {20: 3.0}, recipe=rate(1e-5))
    assert verdict(third, good, bad).best == (1,)
    unfinished = evaluated(tmp_path / "unfinished", 1.5, 1e-3, finished=False)
    assert verdict(unfinished, bad).kind == "none"
    same = evaluated(tmp_path / "same", 2.0001, 1e-5)
    mixed = [loss + 0.01 * (-1) ** i for i, loss in enumerate(rows_around(2.0001))]
    write_eval(same.folder, row_eval(mixed))
    same.refresh()
    found = verdict(good, same)
    assert (found.kind, found.best) == ("equal", ())
    assert sentence(found, "same", "good", "40 rows", "95 % interval")


def test_a_best_that_another_run_may_equal_is_called_no_better(tmp_path: Path) -> None:
    """The nearest run is beaten; one further off varies more from row to row."""
    best = evaluated(tmp_path / "best", 2.0, 1e-3)
    beaten = evaluated(tmp_path / "beaten", 2.1, 1e-4)
    varying = evaluated(tmp_path / "varying", 2.2, 1e-5)
    losses = [loss + 3 * (-1) ** i for i, loss in enumerate(rows_around(2.2))]
    write_eval(varying.folder, row_eval(losses))
    varying.refresh()
    found = verdict(best, beaten, varying)
    assert (found.kind, found.best) == ("equal", ())
    assert holds(found.headline, "best", "varying")
    assert sentence(found, "varying", "best", "95 % interval")


def test_the_eval_of_the_final_weights_counts(tmp_path: Path) -> None:
    """And of several evals of the same weights the newest."""
    good = evaluated(tmp_path / "good", 2.0, 1e-3)
    bad = evaluated(tmp_path / "bad", 2.1, 1e-4)
    write_eval(bad.folder, row_eval(rows_around(1.0), step=20), "checkpoint")
    bad.refresh()
    assert verdict(good, bad).best == (0,)
    write_eval(bad.folder, row_eval(rows_around(1.5)), "again")
    bad.refresh()
    assert verdict(good, bad).best == (1,)


@pytest.mark.slow
def test_rows_that_were_trained_on_or_other_rows_do_not_decide(tmp_path: Path) -> None:
    good = evaluated(tmp_path / "good", 2.0, 1e-3)
    for name, changes in (("seen", {"seen": 3}), ("other", {"row_hash": "o" * 64})):
        bad = evaluated(tmp_path / name, 2.1, 1e-4, **changes)
        assert verdict(good, bad).kind == "none"
    # The run's own held-out rows count, although evals of them are marked as seen.
    held_out = {"seen": 3, "row_hash": "v" * 64}
    runs = [evaluated(tmp_path / f"held-{mean}", mean, mean, **held_out) for mean in (2.0, 2.1)]
    assert verdict(*runs).best == (0,)


def preferring(folder: Path, method: str, by_row: list[int] | None = None) -> RunFiles:
    """A run that learned from pairs; `by_row`: which pairs `eval` found in order."""
    extra = {"val_reward_accuracy": 0.9}
    options = {"recipe": {"method": {"name": method}}, "env": {"validation_examples": 100}}
    run = write_run(folder, {40: 0.5}, **options, extra=lambda step: extra if step == 40 else {})
    if by_row is not None:
        write_eval(run.folder, pairs_eval(by_row))
    return RunFiles(run.folder)


@pytest.mark.slow
def test_preferences_are_compared_by_the_pairs_of_eval(tmp_path: Path) -> None:
    """Whatever the methods. 30 of 100 pairs are in order for one run only, or 4 and 2."""
    dpo = preferring(tmp_path / "dpo", "dpo", [1] * 95 + [0] * 5)
    simpo = preferring(tmp_path / "simpo", "simpo", [1] * 65 + [0] * 35)
    found = verdict(simpo, dpo)
    assert (found.kind, found.best) == ("better", (1,))
    assert holds(found.headline, "dpo", "95.0 %", "65.0 %", "simpo")
    assert sentence(found, "+30.0 points", "95 % interval")
    near = preferring(tmp_path / "near", "orpo", [0] * 4 + [1] * 93 + [0] * 3)
    assert verdict(dpo, near).kind == "equal"
    without = preferring(tmp_path / "without", "dpo")
    assert verdict(dpo, without).kind == "none"
    rows = dict(figure_rows([dpo, without]))
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
    evaluated(tmp_path / "sweep" / "01-good", 2.0, 1e-3)
    evaluated(tmp_path / "sweep" / "02-bad", 2.1, 1e-4)
    found = json.loads(invoke("report", "sweep", "--json").out)
    assert [run["run"] for run in found["runs"]] == ["01-good", "02-bad"]
    assert found["verdict"]["kind"] == "better"
    assert found["verdict"]["best"] == ["01-good"]
    assert found["runs"][0]["best"]["step"] == 40
    assert found["runs"][1]["val_losses"] == [{"step": 40, "value": 2.1}]
    assert found["differing_keys"] == {"train.learning_rate": [1e-3, 1e-4]}
    assert not Path("report.html").exists()
    evaluated(tmp_path / "again" / "01-good", 2.0, 1e-3)
    twice = json.loads(invoke("report", "sweep/01-good", "again/01-good", "--json").out)
    assert [run["run"] for run in twice["runs"]] == ["sweep/01-good", "again/01-good"]
    jobs = json.loads(invoke("status", "sweep", "--json").out)
    assert [job["state"] for job in jobs] == ["finished"] * 2
