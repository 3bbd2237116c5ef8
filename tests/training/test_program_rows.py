"""Rows of a program: the same bits as from a file, resumed, and told apart when they change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

import tunesmith
from errors import refuses
from tunesmith.errors import DataError, RecipeError, UsageError
from tunesmith.metrics.record import read_records
from tunesmith.training.make_recipe import make_recipe
from tunesmith.training.program_rows import keep_rows

ROWS = [{"prompt": f"Say {n}", "completion": f"number {n}"} for n in range(24)]
CHATS = []
for n in range(24):
    answer: dict[str, Any] = {"role": "assistant", "content": f"It is number {n}."}
    if n % 2:
        answer["name"] = "clerk"  # a key that half of the messages lack
    CHATS.append({"messages": [{"role": "user", "content": f"What is {n}?"}, answer]})
TABLES = {"prompt-completion": ROWS, "messages": CHATS}
KEYS = {
    "model.dtype": "fp32",
    "train.duration": "3 steps",
    "train.global_batch": "4 examples",
    "log.tensorboard": False,
    "log.samples": 0,
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    return tmp_path


def weights(run: Path) -> bytes:
    return (run / "final" / "adapter_model.safetensors").read_bytes()


def losses(run: Path) -> list[tuple[float, float]]:
    records = read_records(run / "metrics.jsonl")
    return [(record.loss, record.grad_norm) for record in records]


@pytest.mark.slow
@pytest.mark.parametrize("table", TABLES)
def test_rows_of_a_program_train_to_the_same_bits_as_of_a_file(table, home, tiny):
    """Also where a table fills what a row lacks with null, as a name in a message."""
    rows = TABLES[table]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {**KEYS, "output_dir": "runs/file"}
    tunesmith.train(make_recipe(str(tiny), "rows.jsonl", keys).run, quiet=True)
    dataset = datasets.Dataset.from_list(rows)
    keys["output_dir"] = "runs/rows"
    assert tunesmith.train(model=str(tiny), rows=dataset, overrides=keys, quiet=True).steps == 3
    assert losses(Path("runs/rows")) == losses(Path("runs/file"))
    assert weights(Path("runs/rows")) == weights(Path("runs/file"))


@pytest.mark.slow
def test_a_run_of_given_rows_resumes_with_them_alone(home: Path, tiny: Path) -> None:
    model = str(tiny)
    keys = {**KEYS, "output_dir": "runs/rows"}
    tunesmith.train(model=model, rows=ROWS, overrides=keys, quiet=True)
    again = tunesmith.train(model=model, rows=ROWS, overrides=keys, quiet=True)
    assert again.finished_before
    keys["train.duration"] = "5 steps"
    longer = tunesmith.train(model=model, rows=datasets.Dataset.from_list(ROWS), overrides=keys)
    assert (longer.first_step, longer.steps) == (3, 5)
    others = [*ROWS[1:], {"prompt": "Say", "completion": "more"}]
    keys["train.duration"] = "6 steps"
    with pytest.raises((DataError, RecipeError)):
        tunesmith.train(model=model, rows=others, overrides=keys, quiet=True)
    kept = sorted(path.name for path in Path("runs/rows/data").iterdir())
    assert len(kept) == 2, "those of before are still there"
    words = [f"{key}={value}" for key, value in keys.items()]
    fresh = tunesmith.train(model=model, rows=others, overrides=words, fresh=True, quiet=True)
    assert (fresh.first_step, fresh.steps) == (0, 6)


@pytest.mark.slow
def test_frames_and_numbers_of_numpy_become_plain_rows(home: Path) -> None:
    pandas = pytest.importorskip("pandas")
    rows = [{"text": "a", "n": 1, "x": 0.5}, {"text": None, "n": 2, "x": None}]
    plain = [{"text": "a", "n": 1, "x": 0.5}, {"text": None, "n": 2, "x": None}]
    file = keep_rows(rows, home / "list")
    assert [json.loads(line) for line in file.read_text().splitlines()] == plain
    frame = pandas.DataFrame(rows)
    with refuses(DataError, fix=["frame.to_dict('records')", "frame.to_dicts()"]):
        keep_rows(frame, home / "frame")
    frame_rows = frame.to_dict("records")
    assert keep_rows(frame_rows, home / "frame").read_bytes() == file.read_bytes()
    polars_rows = pytest.importorskip("polars").DataFrame(rows).to_dicts()
    assert keep_rows(polars_rows, home / "polars").read_bytes() == file.read_bytes()
    arrays = [
        {"text": "a", "n": np.int64(1), "x": np.float32(0.5)},
        {**plain[1], "x": np.float64("nan")},
    ]
    assert keep_rows(arrays, home / "arrays").read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        ("rows.jsonl", ["str"]),
        ({"prompt": "a"}, ["dict"]),
        (3, ["int"]),
        ([], []),
        (["a"], ["rows[0]", "str"]),
        ([ROWS[0], {"prompt": object()}], ["rows[1]"]),
        ([{"prompt": "a", "x": float("inf")}], ["rows[0]"]),
    ],
)
def test_rows_that_cannot_be_kept_leave_nothing(rows: Any, names: list[str], home: Path) -> None:
    with refuses(DataError, where="train(rows=...)", names=names):
        keep_rows(rows, home / "run")
    assert not (home / "run").exists()


def test_a_bad_row_is_named_by_its_line_in_the_file_of_the_rows(home: Path, tiny: Path) -> None:
    rows = [*ROWS, {"prompt": "a", "completion": None}]
    keys = {**KEYS, "output_dir": "runs/rows"}
    with refuses(DataError, names=[25], fix=["data.bad_rows=skip"]):
        tunesmith.train(model=str(tiny), rows=rows, overrides=keys, quiet=True)


def test_a_call_without_a_recipe_needs_model_and_rows(home: Path) -> None:
    for options in ({}, {"model": "demo"}, {"rows": ROWS}):
        with refuses(UsageError, fix=["rows="]):
            tunesmith.train(**options)
    with refuses(UsageError, names=["rows"]):
        tunesmith.train(recipe="smollm2-135m-lora", rows=ROWS)
