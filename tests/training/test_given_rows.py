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
from tunesmith.training.given_rows import keep_rows
from tunesmith.training.make_recipe import make_recipe

ROWS = [{"prompt": f"Say {n}", "completion": f"number {n}"} for n in range(24)]
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


def weights(folder: str) -> bytes:
    return Path(folder, "final", "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
def test_rows_of_a_program_train_to_the_same_bits_as_of_a_file(home: Path, tiny: Path) -> None:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    model = str(tiny)
    from_file = make_recipe(model, "rows.jsonl", {**KEYS, "output_dir": "runs/file"}).run
    tunesmith.train(from_file, quiet=True)
    keys = {**KEYS, "output_dir": "runs/rows"}
    result = tunesmith.train(model=model, rows=ROWS, overrides=keys, quiet=True)
    assert result.steps == 3
    assert weights("runs/rows") == weights("runs/file")
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


def test_frames_and_numbers_of_numpy_become_plain_rows(home: Path) -> None:
    pandas = pytest.importorskip("pandas")
    rows = [{"text": "a", "n": 1, "x": 0.5}, {"text": None, "n": 2, "x": None}]
    plain = [{"text": "a", "n": 1, "x": 0.5}, {"text": None, "n": 2, "x": None}]
    file = keep_rows(rows, home / "list")
    assert [json.loads(line) for line in file.read_text().splitlines()] == plain
    assert keep_rows(pandas.DataFrame(rows), home / "frame").read_bytes() == file.read_bytes()
    arrays = [{"text": "a", "n": np.int64(1), "x": np.float32(0.5)}, plain[1]]
    assert keep_rows(arrays, home / "arrays").read_bytes() == file.read_bytes()


def test_what_polars_gives_is_read_as_mappings(home: Path) -> None:
    polars = pytest.importorskip("polars")
    frame = keep_rows(polars.DataFrame(ROWS), home / "frame")
    assert frame.read_bytes() == keep_rows(ROWS, home / "list").read_bytes()


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        ("rows.jsonl", ["str"]),
        ({"prompt": "a"}, ["dict"]),
        (3, ["int"]),
        ([], []),
        (["a"], ["row 1", "str"]),
        ([ROWS[0], {"prompt": object()}], ["row 2"]),
        ([{"prompt": "a", "x": float("inf")}], ["row 1"]),
    ],
)
def test_rows_that_cannot_be_kept_leave_nothing(rows: Any, names: list[str], home: Path) -> None:
    with refuses(DataError, where="train(rows=...)", names=names):
        keep_rows(rows, home / "run")
    assert not (home / "run").exists()


def test_a_call_without_a_recipe_needs_model_and_rows(home: Path) -> None:
    for options in ({}, {"model": "demo"}, {"rows": ROWS}):
        with refuses(UsageError, fix=["rows="]):
            tunesmith.train(**options)
    with refuses(UsageError, names=["rows"]):
        tunesmith.train("smollm2-135m-lora", rows=ROWS)
