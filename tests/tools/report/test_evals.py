"""What `eval --score` wrote into a run, in its report: the figures, and what is not believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from errors import holds
from report.written import eval_scores, falling, write_eval, write_run
from tunesmith.tools.report.figures import eval_figures
from tunesmith.tools.report.page import render_page
from tunesmith.tools.report.run_files import RunFiles


def test_scores_stand_beside_the_losses_with_their_intervals(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", falling(3.0))
    second = write_run(tmp_path / "second", falling(3.1))
    write_eval(first.folder, eval_scores())
    # The rows are the same by their hash
    write_eval(first.folder, eval_scores(data="/data/rows/held.jsonl"), "again")
    write_eval(second.folder, eval_scores(losses={"tuned": 2.0}), "same-rows")
    write_eval(second.folder, eval_scores(row_hash="b" * 64), "other-rows")
    seen = eval_scores(seen=7, data="seen.jsonl", row_hash="c" * 64, scores={})
    write_eval(first.folder, seen, "seen")
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


DAMAGED = [
    "{", "[]", "{}", {"rows": -1}, {"row_hash": None}, {"losses": []}, {"scores": {"exact": {"tuned": [1, 2], "verdict": ""}}},
    {"scores": {"exact": {"tuned": [0.1, 0.2, 0.3]}}}, json.dumps(eval_scores()).replace("0.62", "NaN"),
]  # fmt: skip


@pytest.mark.parametrize("values", DAMAGED, ids=str)
def test_a_damaged_eval_is_named_and_left_out(tmp_path: Path, values: Any) -> None:
    run = write_run(tmp_path / "run", falling(3.0), steps=1)
    write_eval(run.folder, values if isinstance(values, str) else eval_scores(**values))
    read = RunFiles(run.folder)
    assert read.evals == []
    assert [file.file for file in read.damaged] == ["evals/held.scores.json"]
