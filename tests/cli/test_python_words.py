"""Errors of the Python functions name arguments, and functions are named by their file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas
import polars
import pytest

import tunesmith
from errors import refuses
from tunesmith.errors import DataError, RecipeError, UsageError
from tunesmith.training.program_rows import mappings

ROWS = [{"prompt": f"What is {i} + 1?", "completion": f"{i + 1}"} for i in range(20)]


def score(answer: str, row: dict[str, Any]) -> float:
    return float(answer == row["reference"])


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        ({"scorers": "exat"}, "scorers='exact'"),
        ({"columns": {"prompt": "promt"}}, "columns={'prompt': 'prompt'"),
        ({"scorers": lambda answer, row: 1.0}, "top level"),
    ],
)
def test_fixes_name_arguments(arguments: dict[str, Any], fix: str, tiny: Path) -> None:
    with pytest.raises(UsageError) as caught:
        tunesmith.evaluate(tiny, ROWS, **arguments)
    assert fix in caught.value.fix
    assert "--" not in caught.value.text()


def test_a_function_of_a_file_is_named_by_it(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = tunesmith.evaluate(tiny, ROWS[:2], scorers=score, base=False, max_new_tokens=2)
    assert [scores.name for scores in done.by_scorer] == [f"{__file__}:score"]
    keys = {"method": "grpo", "method.reward": score, "train.learning_rate": "3e-4"}
    with refuses(RecipeError, fix=["'train.learning_rate': 0.0003"]):
        tunesmith.train("smollm2-135m-lora", keys)


def test_rows_are_frames_of_pandas_and_polars() -> None:
    for frame in (pandas.DataFrame(ROWS), polars.DataFrame(ROWS)):
        assert list(mappings(frame, "rows")) == ROWS


def test_rows_that_are_texts(tiny: Path) -> None:
    with refuses(DataError, names=["rows[0]"], fix=["[{'prompt': 'Hello'}]"]):
        tunesmith.generate(tunesmith.load_run(tiny, device="cpu"), ["Hello"])
