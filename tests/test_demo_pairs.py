"""The made pairs differ in their length alone, are the same every time, and what is held out is
new.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

DEMO = Path(__file__).parents[1] / "demo"
sys.path.insert(0, str(DEMO))

import pairs  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    pairs.write(folder)
    return folder


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def text(message: list[dict[str, str]]) -> str:
    return message[0]["content"]


def test_writing_is_deterministic(folder: Path, tmp_path: Path) -> None:
    pairs.write(tmp_path)
    for file in folder.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_the_long_answer_is_the_short_one_and_two_sentences_of_the_list(folder: Path) -> None:
    rows = [*read(folder / "pairs.jsonl"), *read(folder / "held-out-pairs.jsonl")]
    assert len(rows) == 300 + 60
    for row in rows:
        short, long = text(row["chosen"]), text(row["rejected"])
        assert long.startswith(f"{short} ")
        more = long.removeprefix(f"{short} ")
        used = [sentence for sentence in pairs.COMMONPLACE if sentence in more]
        assert len(more) == sum(map(len, used)) + 1
        assert len(used) == 2


def test_held_out_questions_are_about_other_things(folder: Path) -> None:
    trained = {text(row["prompt"]) for row in read(folder / "pairs.jsonl")}
    held_out = [text(row["prompt"]) for row in read(folder / "held-out-pairs.jsonl")]
    assert not trained & {*held_out}
    asked = [text(row["messages"]) for row in read(folder / "questions.jsonl")]
    assert asked == held_out


def test_labeled_answers_are_those_of_the_pairs(folder: Path) -> None:
    labeled = read(folder / "answers.jsonl")
    expected = set()
    for row in read(folder / "pairs.jsonl"):
        for column in ("chosen", "rejected"):
            expected.add((text(row["prompt"]), text(row[column]), column == "chosen"))
    assert expected == {
        (text(row["prompt"]), text(row["completion"]), row["label"]) for row in labeled
    }
    assert len(labeled) == 600
