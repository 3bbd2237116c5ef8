"""What the Python functions return, as text and in a notebook."""

from __future__ import annotations

import math
from pathlib import Path

from errors import holds, refuses
from records import record
from tunesmith.errors import UsageError
from tunesmith.metrics.intervals import Interval
from tunesmith.metrics.result_table import ResultTable, Tabular
from tunesmith.tools.evaluate.evaluate import EvalResult, Evaluation
from tunesmith.tools.evaluate.score_rows import RowScores, compare_rows
from tunesmith.tools.export.merge import Merged
from tunesmith.tools.export.merge_check import Difference, MergeCheck
from tunesmith.tools.export.record import ExportedFile
from tunesmith.tools.report.comparison import Comparison, compare
from tunesmith.training.result import Result

HOSTILE = "<script>alert('a')</script>&\"\n\x1b[31m"


def write_run(folder: Path, losses: list[float]) -> Path:
    folder.mkdir()
    records = [record(step, loss=loss) for step, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(r.to_json() + "\n" for r in records))
    return folder


def merged(name: str) -> Merged:
    near = Difference(0.01, 1e-6, 1.0, 1e-6)
    far = Difference(4.0, 0.25, 0.5, 0.25)
    check = MergeCheck("bf16", near, far, near, 9.0, 48, name, None, (("near enough", True),))
    return Merged(name, "org/base", name, "bf16", 3 << 20, name, check)


def evaluation(name: str) -> Evaluation:
    base = EvalResult(10, 50, 800.0, math.inf, 0.25)
    tuned = EvalResult(10, 50, 0.5, math.exp(0.5), 0.75)
    intervals = {"base": Interval(0.1, 0.0, 0.4), "tuned": Interval(0.9, 0.6, 1.0)}
    rows = {"base": [0.0, 0.2] * 5, "tuned": [0.8, 1.0] * 5}
    scores = RowScores(name, 10, intervals, rows, compare_rows(name, rows, "tuned"))
    both = {"base": base, "tuned": tuned}
    return Evaluation(both, name, 12, 2, 0, (scores,), unfinished={"tuned": 3})


def results(name: str) -> list[Tabular]:
    """Of several kinds, with a text of the user's own in each."""
    return [
        Result(Path(name), 2, records=[record(1), record(2)]),
        evaluation(name),
        merged(name),
        ExportedFile(name, name, "q8_0", 10**6, (name,), None),
        Comparison((name,), {name: [name]}),
    ]


def test_columns_stand_side_by_side_whatever_their_script() -> None:
    table = ResultTable([("loss", "1.0", "22"), ("精度", "3", "4")], ["base", "調整"], "T", ["N"])
    expected = ["T", "      base  調整", "loss  1.0   22", "精度  3     4", "N"]
    assert table.text().splitlines() == expected
    assert ResultTable([]).text() == ""


def test_what_comes_from_data_is_text_in_every_result() -> None:
    for result in results(HOSTILE):
        printed = str(result)
        assert "alert" in printed, type(result)
        assert "\x1b" not in printed, type(result)
        page = result._repr_html_()
        assert page.count("<") == 2, type(result)
        assert "alert" in page, type(result)
        assert repr(result).startswith(f"{type(result).__name__}("), "repr has the fields"


def test_a_training_result_says_what_came_of_it_and_what_is_next(tmp_path: Path) -> None:
    last = record(4, val_loss=0.75)
    text = str(Result(tmp_path / "my run", 4, seconds=125.0, records=[record(1), last]))
    for value in ("2.0000 -> 0.5000", "0.7500", "2:05 min", "400 tokens/s", "8 examples"):
        assert holds(text, value), value
    assert f"tunesmith.load_run({str(tmp_path / 'my run')!r})" in text
    assert text.endswith(f"tunesmith.evaluate({str(tmp_path / 'my run')!r})")


def test_a_run_that_was_finished_before_shows_the_figures_on_the_disk(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [3.0, 1.5])
    (folder / "best.json").write_text('{"step": 1, "val_loss": 0.5}')
    result = Result.from_finished_run(folder, 2)
    assert holds(str(result), "3.0000 -> 1.5000", "fresh=True")
    assert (result.first_loss, result.last_loss) == (3.0, 1.5)
    assert (result.best_step, result.best_loss) == (1, 0.5)
    assert result.seconds == sum(record.step_seconds for record in result.records) > 0
    assert result.tokens == result.values()["tokens"] > 0


def test_an_evaluation_has_a_column_for_each_model_and_says_what_to_know() -> None:
    found = evaluation("held-out.jsonl")
    text = found.table().text()
    _, names, *lines = text.splitlines()
    assert names.split() == ["base", "tuned"]
    (losses,) = (line for line in lines if line.startswith("loss"))
    assert losses.split()[-2:] == ["800.0000", "0.5000"]
    assert holds(text, "1e308", "1.649", "25.00%", "75.00%", "90.0% (60.0 to 100.0)")
    assert holds(text, "2 of 12", "3 of 10")
    (comparison,) = found.comparisons
    assert comparison.verdict in found.table().notes


def test_runs_are_compared_by_their_figures(tmp_path: Path) -> None:
    runs = []
    for name, rate in (("low", 1e-4), ("high", 1e-2)):
        folder = write_run(tmp_path / name, [2.0, rate * 100])
        (folder / "config.yaml").write_text(f"train: {{learning_rate: {rate}}}\n")
        runs.append(folder)
    comparison = compare(*runs)
    assert comparison.runs == ("low", "high")
    assert comparison.figures["train.learning_rate"] == ["0.0001", "0.01"]
    with refuses(UsageError, where=str(tmp_path / "none")):
        compare(runs[0], tmp_path / "none")
    # A folder of runs stands for them.
    assert compare(tmp_path).runs == ("high", "low")
