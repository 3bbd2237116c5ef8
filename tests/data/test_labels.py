"""Columns that rate an answer: labels and grades beside an answer that is learned, scores of pairs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_table import answer

from conftest import byte_tokenizer
from errors import holds, refuses, warnings_with
from recipes import make_run
from tunesmith.config.row_formats import FormatName
from tunesmith.config.row_settings import record_overrides, rows_set_by
from tunesmith.config.schema import Source
from tunesmith.data.prepare import prepare_data
from tunesmith.data.rows.formats import convert_row
from tunesmith.errors import DataError
from tunesmith.presentation.data import data_warnings

Row = dict[str, Any]
PAIR = {"question": "2 + 2?", "answer": "4"}
COLUMNS = {"prompt": "question", "completion": "answer"}


@pytest.fixture(autouse=True)
def rows_by_override() -> Iterator[None]:
    with rows_set_by():
        record_overrides({"rows.jsonl": "data.train"})
        yield


def convert(row: Row, format_name: FormatName = "prompt-completion", **options: Any) -> Any:
    columns = COLUMNS if "question" in row else {}
    source = Source(source="rows.jsonl", format=format_name, columns=columns)
    return convert_row(row, source, where="rows.jsonl:1", **options)


def told(tiny: Path, tmp_path: Path, rows: list[Row], format_name: FormatName = "prompt-completion") -> str:  # fmt: skip
    """The warnings of `data` about these rows."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    columns = COLUMNS if "question" in rows[0] else {}
    source = {"source": str(path), "format": format_name, "columns": columns}
    method = {"preference": "dpo", "feedback": "kto"}.get(format_name, "sft")
    train = {"global_batch": "64 examples", "duration": "0.5 epochs"}
    run = make_run(tiny, tmp_path, held=False, method=method, data={"train": source}, train=train)
    tokenizer = byte_tokenizer()
    ends = {tokenizer.eos_token_id}
    return "\n".join(
        data_warnings(
            prepare_data(run, tokenizer, ends, 272, cache=tmp_path / "cache", strict=False)
        )
    )


# A column, and a value of it that calls the answer good, and one that calls it bad.
LABELS: list[tuple[str, Any, Any]] = [
    ("is_correct", True, False), ("isCorrect", "true", "False"), ("correct", 1, 0), ("Answer is correct", "yes", "no"),
    ("accepted", 1, -1), ("is_accepted", "accepted", "rejected"), ("passed", "1", "0"), ("user_feedback", "👍", "👎🏽"),
    ("feedback", "thumbs_up", "thumbs_down"), ("thumbs_down", False, True), ("incorrect", "no", "yes"),
    ("verdict", "correct", "incorrect"), ("reward", True, False), ("quality", "high", "low"), ("is_valid", "Yes", "No"),
    ("was_this_helpful", "yes", "no"), ("contains_hallucination", "no", "yes"), ("decision", "accept", "reject"),
    ("stars", "5 stars", "1 star"), ("feedback", "positive", "negative"),
]  # fmt: skip


def test_a_bad_label_under_any_name() -> None:
    for column, good, bad in LABELS:
        assert convert({**PAIR, column: good})
        columns = f"'data.train.columns={{prompt: question, completion: answer, label: {column}}}'"
        fix = f"method=kto data.train.format=feedback {columns}"
        with refuses(DataError, where="rows.jsonl:1", names=[column], fix=[fix]):
            convert({**PAIR, column: bad})
        assert convert({**PAIR, column: bad}, is_trained=False), "a scored row is not learned"


def test_a_value_that_calls_no_answer_bad() -> None:
    for harmless in (
        {"is_human": False}, {"toxic": False}, {"test": False}, {"correct_answer": "no"}, {"correct_label": 0},
        {"rank": 0}, {"result": "no"}, {"status": 0}, {"feedback": "The answer is too short."}, {"thumbs_down": False},
        {"reward": 0}, {"score": "0"}, {"quality": None}, {"selected": False}, {"passages": {"is_selected": [0, 1]}},
        {"meta": {"label": "no", "rating": 1, "correct": 0, "topic": "bad"}},
    ):  # fmt: skip
        assert convert({**PAIR, **harmless})


def test_a_bad_label_in_an_object_or_a_turn() -> None:
    label = {"metadata": {"id": 7, "is_correct": False}}
    fix = ["copy metadata.is_correct into a separate column", "rename metadata.is_correct"]
    with refuses(DataError, where="rows.jsonl:1", names=["metadata.is_correct"], fix=fix):
        convert({**PAIR, **label})
    with refuses(DataError, fix=["label: metadata.is_correct"]):
        convert({**PAIR, "metadata.is_correct": "false"})
    question = {"role": "user", "content": "2 + 2?", "feedback": "bad"}
    for bad in (label, {"feedback": "thumbs_down"}):
        with refuses(DataError, where="rows.jsonl:1, message 2", fix=['"train": false']):
            convert({"messages": [question, answer("5", **bad)]}, "messages")
    rows = [answer("5", feedback="bad", train=False), question, answer("4", feedback="good")]
    assert convert({"messages": [question, *rows]}, "messages")


def test_numbers_that_are_labels(tiny: Path, tmp_path: Path) -> None:
    for column, values, bad in (("reward", ["1", "0", "1"], 0), ("vote", ["+1", "-1", "+1"], -1)):
        rows = [{**PAIR, column: value} for value in values]
        names, fix = [column, bad, "1 of 3"], [f"label: {column}"]
        with refuses(DataError, where="rows.jsonl:2", names=names, fix=fix):
            told(tiny, tmp_path, rows)
    for values in ([5, -5, -3, 0], [0, 0, 0], [0, 0.5, 1], [0, math.nan, 1]):
        rows = [{**PAIR, "rating": value} for value in values]
        assert warnings_with(told(tiny, tmp_path, rows), "rating"), "no labels"


def test_scores_that_contradict_a_preference(tiny: Path, tmp_path: Path) -> None:
    pair = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    scores = [
        {"score_chosen": 9.0, "score_rejected": 2.0},
        {"score_chosen": 2.0, "score_rejected": 9.0},
        {"chosen-rating": 5, "rejected-rating": 5},
        {"rewardChosen": "1", "rewardRejected": "3"},
        {"chosen_mood": 2, "rejected_mood": 3},
    ]
    lines = told(tiny, tmp_path, [{**pair, **row} for row in scores], "preference")
    assert warnings_with(lines, "preference", "3 of 5", f"{tmp_path}/rows.jsonl:2")
    (unread,) = warnings_with(lines, "chosen_mood")
    assert not holds(unread, "score_chosen")
