"""`tunesmith.train` as a program calls it: overrides, records, its own rows, and how it ends."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

import tunesmith
from errors import holds, refuses
from ranks import run_ranks
from recipes import recipe
from runs import write_rows
from tunesmith.config.dump import to_yaml
from tunesmith.errors import DataError, RecipeError, UsageError
from tunesmith.host.logger import PACKAGE
from tunesmith.metrics.record import StepRecord, read_records
from tunesmith.start.make_recipe import make_recipe
from tunesmith.training.program_rows import keep_rows

pytestmark = pytest.mark.slow


@pytest.fixture
def recipe_file(tiny: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(recipe(tiny, tmp_path)))
    return path


def test_each_record_is_handed_over_as_it_is_written(recipe_file: Path) -> None:
    seen: list[StepRecord] = []

    def note(record: StepRecord) -> None:
        written = read_records(recipe_file.parent / "run" / "metrics.jsonl")
        assert written[-1] == record, "a record is in metrics.jsonl before the function sees it"
        seen.append(record)

    result = tunesmith.train(
        recipe_file, {"train.duration": "5 steps", "train.seed": 7}, on_record=note, quiet=True
    )
    assert seen == result.records
    assert [record.step for record in seen] == [1, 2, 3, 4, 5]
    assert [record.step for record in seen if record.val_loss is not None] == [4, 5]
    assert "records" not in repr(result)


def test_what_on_record_raises_ends_the_run_unchanged(recipe_file: Path) -> None:
    """As sweeps need it: Optuna's TrialPruned, raised in a callback, must reach Optuna."""

    class Pruned(Exception):
        pass

    def prune(record: StepRecord) -> None:
        if record.step == 5:
            raise Pruned("not worth it")

    with pytest.raises(Pruned) as raised:
        tunesmith.train(recipe_file, on_record=prune, quiet=True)
    assert raised.value.__cause__ is None
    out = recipe_file.parent / "run"
    failure = json.loads((out / "failure.json").read_text())
    assert holds(failure["what"], "on_record", f"Pruned: {raised.value}")
    assert failure["where"] == "step 5"
    assert holds(failure["next"], "checkpoint-4")
    result = tunesmith.train(recipe_file, quiet=True)
    assert (result.first_step, result.steps) == (4, 8)
    assert not (out / "failure.json").exists()


def end_after_3(record: StepRecord) -> None:
    if record.step == 3:
        raise StopIteration


def test_on_record_finishes_a_run_early(recipe_file: Path) -> None:
    """A stop of the caller's own: the run has finished, and a longer one goes on from it."""
    result = tunesmith.train(recipe_file, on_record=end_after_3, quiet=True)
    assert (result.steps, len(result.records)) == (3, 3)
    assert result.final_step is not None
    again = tunesmith.train(recipe_file, quiet=True)
    assert again.finished_before
    assert [record.step for record in again.records] == [1, 2, 3]
    assert tunesmith.load_run(again).location == tunesmith.load_run(result.output_dir).location
    longer = tunesmith.train(recipe_file, {"train.duration": "9 steps"}, quiet=True)
    assert (longer.first_step, longer.steps) == (3, 9)


def ended_on_ranks(file: str) -> tuple[int, Path]:
    result = tunesmith.train(file, on_record=end_after_3, quiet=True)
    return result.steps, result.output_dir


@pytest.mark.nightly
def test_all_ranks_end_after_the_same_step(recipe_file: Path) -> None:
    (steps, folder), second = run_ranks(2, ended_on_ranks, str(recipe_file))
    assert (steps, folder) == second
    assert steps == 4
    # Rank 0 writes it, perhaps after the other has ended.
    assert (folder / "final" / "manifest.json").is_file()


@pytest.mark.parametrize("quiet", [False, True])
def test_what_is_shown_goes_to_stderr_and_the_log(recipe_file, capfd, quiet):
    tunesmith.train(recipe_file, {"train.duration": "2 steps"}, quiet=quiet)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert ("step 2/2" in shown.err) != quiet
    assert not quiet or shown.err == ""
    assert "step 2/2" in (recipe_file.parent / "run" / "log.txt").read_text()
    assert (PACKAGE.handlers, PACKAGE.level, PACKAGE.propagate) == ([], logging.NOTSET, True)


def test_an_error_reads_well_in_python_and_in_a_notebook(recipe_file: Path) -> None:
    with pytest.raises(tunesmith.TunesmithError) as raised:
        tunesmith.train(recipe_file, {"train.learning_rate": "fast"})
    lines = str(raised.value).splitlines()
    assert holds(lines[0], "train.learning_rate:", "fast")
    assert lines[1] == "  where: overrides: train.learning_rate"
    assert lines[2].startswith("  fix: ")
    # A notebook shows it without the name of its class.
    assert raised.value._render_traceback_() == [f"error: {lines[0]}", *lines[1:]]


# ---- rows of the program ----

ROWS = [{"prompt": f"Say {n}", "completion": f"number {n}"} for n in range(24)]
CHATS: list[dict[str, Any]] = []
for n in range(24):
    # A key that half of the messages lack
    name = {"name": "clerk"} if n % 2 else {}
    answer = {"role": "assistant", "content": f"It is number {n}.", **name}
    CHATS.append({"messages": [{"role": "user", "content": f"What is {n}?"}, answer]})
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


def test_rows_of_a_program_train_to_the_same_bits_as_of_a_file(home, tiny):
    """Also where a table fills what a row lacks with null, as a name in a message."""
    write_rows(home / "rows.jsonl", CHATS)
    keys = {**KEYS, "output_dir": "runs/file"}
    of_file = tunesmith.train(make_recipe(str(tiny), "rows.jsonl", keys).run, quiet=True)
    dataset = datasets.Dataset.from_list(CHATS)
    keys["output_dir"] = "runs/rows"
    of_rows = tunesmith.train(model=str(tiny), rows=dataset, overrides=keys, quiet=True)
    losses = [[(r.loss, r.grad_norm) for r in run.records] for run in (of_file, of_rows)]
    assert losses[0] == losses[1]
    final = [Path(f"runs/{name}/final/adapter_model.safetensors") for name in ("file", "rows")]
    assert final[0].read_bytes() == final[1].read_bytes()


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
    words = [f"{key}={value}" for key, value in keys.items()]
    fresh = tunesmith.train(model=model, rows=others, overrides=words, fresh=True, quiet=True)
    assert (fresh.first_step, fresh.steps) == (0, 6)


def test_frames_and_numbers_of_numpy_become_plain_rows(home: Path) -> None:
    pandas = pytest.importorskip("pandas")
    rows = [{"text": "a", "n": 1, "x": 0.5}, {"text": None, "n": 2, "x": None}]
    written = keep_rows(rows, home / "list").read_text()
    assert [json.loads(line) for line in written.splitlines()] == rows
    frame = pandas.DataFrame(rows)
    assert keep_rows(frame, home / "frame").read_text() == written
    arrays = [{"text": "a", "n": np.int64(1), "x": np.float32(0.5)}, rows[1] | {"x": np.nan}]
    assert keep_rows(arrays, home / "arrays").read_text() == written


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        ("rows.jsonl", ["str"]),
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
