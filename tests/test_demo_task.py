"""The demo: its rows are the same every time, and what is held out was not trained on."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

DEMO = Path(__file__).parents[1] / "demo"
sys.path.insert(0, str(DEMO))

import pairs as demo_pairs  # noqa: E402
import run as demo  # noqa: E402
import task  # noqa: E402


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return task.write(tmp_path_factory.mktemp("demo"))


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def read_pairs(path: Path) -> list[tuple[str, str]]:
    rows = [row["messages"] for row in read(path)]
    assert all([m["role"] for m in row] == ["user", "assistant"] for row in rows)
    return [(row[0]["content"], row[1]["content"]) for row in rows]


def test_rows_are_the_same_every_time_and_none_is_there_twice(files, tmp_path: Path) -> None:
    assert [p.read_bytes() for p in task.write(tmp_path)] == [p.read_bytes() for p in files]
    train, held_out = map(read_pairs, files)
    assert (len(train), len(held_out)) == (300, 40)
    assert len({asked for asked, _ in train + held_out}) == 340


def test_open_values_of_held_out_rows_were_never_seen(files: tuple[Path, Path]) -> None:
    train, held_out = map(read_pairs, files)
    seen = " ".join(text for pair in train for text in pair).lower()
    words = {*re.findall(r"[^\s.,?]+", seen)}
    checked = 0
    for _, answer in held_out:
        for part in answer.split(" | "):
            key, value = part.split(": ", 1)
            if key in ("name", "item", "colour", "city"):
                assert not words & {*value.lower().split()}
                checked += len(value.split())
    assert checked == 40 * 6


def test_held_out_questions_are_about_other_things(tmp_path: Path) -> None:
    demo_pairs.write(tmp_path)
    trained, held_out = (read(tmp_path / f"{name}.jsonl") for name in ("pairs", "held-out-pairs"))
    assert (len(trained), len(held_out)) == (300, 60)
    asked = [row["prompt"][0]["content"] for row in held_out]
    assert not {row["prompt"][0]["content"] for row in trained} & {*asked}
    questions = read(tmp_path / "questions.jsonl")
    assert [row["messages"][0]["content"] for row in questions] == asked


def test_the_score_counts_whole_answers_and_fields() -> None:
    right = "name: A | item: b | day: Friday"
    row = {"asked": "", "wanted": right, "got": right.replace("b", "c")}
    assert demo.fields_right(row) == 2
    assert demo.fields_right(row | {"got": "I'm sorry"}) == 0


def test_the_recipe_is_a_recipe() -> None:
    from tunesmith.config.load import load_recipe

    run = load_recipe(DEMO / "recipe.yaml")
    assert run.data.train[0].source == str(DEMO / "data" / "train.jsonl")
    examples = run.train.duration.amount * run.train.global_batch.amount
    assert examples == task.TRAIN_ROWS, "one pass over the rows"
