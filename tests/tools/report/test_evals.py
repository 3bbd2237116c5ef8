"""What `eval --score` wrote into a run, in its report: the figures, and what is not believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from errors import holds
from report.written import falling, write_eval, write_run
from tunesmith.reader.figures import eval_figures
from tunesmith.reader.page import render_page
from tunesmith.reader.run_files import RunFiles


def eval_scores(**changes: Any) -> dict[str, Any]:
    exact = {
        "base": [0.5, 0.4, 0.6],
        "tuned": [0.62, 0.521, 0.713],
        "difference": [0.12, 0.04, 0.201],
        "verdict": "exact: tuned is better",
        "by_row": {"base": [0, 1], "tuned": [1, 1]},
    }
    return {
        "tunesmith": "eval scores",
        "data": "held.jsonl",
        "rows": 100,
        "row_hash": "a" * 64,
        "step": 40,
        "losses": {"base": 2.5, "tuned": 2.25},
        "scores": {"exact": exact},
        **changes,
    }


def test_scores_stand_beside_the_losses_with_their_intervals(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", falling(3.0))
    second = write_run(tmp_path / "second", falling(3.1))
    write_eval(first.folder, eval_scores())
    write_eval(second.folder, eval_scores(losses={"tuned": 2.0}), "same-rows")
    write_eval(second.folder, eval_scores(row_hash="b" * 64), "other-rows")
    write_eval(
        first.folder, eval_scores(seen=7, data="seen.jsonl", row_hash="c" * 64, scores={}), "seen"
    )
    first.refresh()
    second.refresh()
    exact = (
        "62.0 % (52.1 to 71.3), base 50.0 % (40.0 to 60.0): +12.0 points (+4.0 to +20.1) at step 40"
    )
    label = "eval: exact (held.jsonl, 100 rows)"
    lines = eval_figures([first, second])
    of_exact = {name: cells for name, cells in lines if name.startswith(label)}
    assert of_exact == {label: [exact, exact], f"{label}, bbbbbbbb": [None, exact]}
    losses = dict(line for line in lines if "loss" in line[0] and line[1][0])
    one, other = losses["eval: loss (held.jsonl, 100 rows)"]
    assert holds(one, "2.2500", "2.5000", "step 40")
    assert holds(other, "2.0000", "step 40")
    seen = "2.2500, base 2.5000 at step 40 (7 of the rows were trained on)"
    assert seen in [cells[0] for _, cells in lines]
    assert exact in render_page([first, second])


def test_equal_rows_that_were_saved_twice_are_one_line(tmp_path: Path) -> None:
    """Under a name and a path; the rows are the same by their hash."""
    run = write_run(tmp_path / "run", falling(3.0))
    write_eval(run.folder, eval_scores())
    write_eval(run.folder, eval_scores(data="/data/rows/held.jsonl"), "again")
    run.refresh()
    lines = dict(eval_figures([run]))
    assert sum("exact" in name for name in lines) == sum("loss" in name for name in lines) == 1


def test_an_eval_is_read_again_when_it_changes_and_gone_when_it_is(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", falling(3.0))
    path = write_eval(run.folder, eval_scores())
    run.refresh()
    assert [result["losses"]["tuned"] for result in run.evals] == [2.25]
    write_eval(run.folder, eval_scores(losses={"tuned": 1.12345}))
    run.refresh()
    assert [result["losses"]["tuned"] for result in run.evals] == [1.12345]
    path.unlink()
    run.refresh()
    assert run.evals == []


DAMAGED = [
    "", "{", "[]", "{}", {"data": 3}, {"rows": -1}, {"rows": "many"}, {"row_hash": None}, {"step": "last"}, {"seen": -1}, {"losses": []},
    {"scores": []}, {"scores": {"exact": 3}}, {"scores": {"exact": {"tuned": [1, 2], "verdict": ""}}},
    {"scores": {"exact": {"tuned": [1, 2, None], "verdict": ""}}}, {"scores": {"exact": {"tuned": [0.1, 0.2, 0.3]}}},
    json.dumps(eval_scores()).replace("0.62", "NaN"),
]  # fmt: skip


@pytest.mark.parametrize("values", DAMAGED, ids=str)
def test_a_damaged_eval_is_named_and_left_out(tmp_path: Path, values: Any) -> None:
    run = write_run(tmp_path / "run", falling(3.0), steps=1)
    write_eval(run.folder, values if isinstance(values, str) else eval_scores(**values))
    read = RunFiles(run.folder)
    assert read.evals == []
    assert [file.file for file in read.damaged] == ["evals/held.scores.json"]


def test_texts_of_an_eval_are_no_markup(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", falling(3.0))
    write_eval(run.folder, eval_scores(data="<script>alert(1)</script>|x"))
    write_eval(run.folder, "{", "torn")
    run.refresh()
    page = render_page([run])
    assert "<script>alert" not in page
    assert "evals/torn.scores.json" in page


def test_a_benchmark_has_scores_and_no_line_of_losses(tmp_path: Path) -> None:
    """Versions before the first release wrote scores of lm-evaluation-harness."""
    run = write_run(tmp_path / "run", falling(3.0))
    metric = {"rows": 100, "higher_is_better": True, "tuned": {"value": 0.6, "stderr": None}}
    values = eval_scores(data="gsm8k", lm_eval="0.4.13", limit=None, metrics={"exact": metric})
    del values["losses"]
    write_eval(run.folder, values, "tasks-gsm8k")
    write_eval(run.folder, values | {"data": "bleu", "scores": {}}, "tasks-bleu")
    run.refresh()
    assert "gsm8k" in render_page([run])
    labels = [label for label, _ in eval_figures([run])]
    assert labels == ["eval: exact (gsm8k, 100 rows)"]
