"""Columns that label an answer that is learned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from chat_table import answer
from errors import refuses
from tunesmith.config.row_formats import FormatName
from tunesmith.config.row_settings import record_overrides, rows_set_by
from tunesmith.config.schema import Source
from tunesmith.errors import DataError
from tunesmith.rows.formats import convert_row

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


# A column, and a value of it that calls the answer good, and one that calls it bad.
LABELS: list[tuple[str, Any, Any]] = [
    ("is_correct", True, False), ("isCorrect", "true", "False"), ("correct", 1, 0),
    ("accepted", 1, -1), ("is_accepted", "accepted", "rejected"), ("passed", "1", "0"), ("feedback", "👍", "👎🏽"),
    ("feedback", "thumbs_up", "thumbs_down"), ("thumbs_down", False, True), ("incorrect", "no", "yes"),
    ("verdict", "correct", "incorrect"), ("is_valid", "Yes", "No"),
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


def test_a_bad_label_in_a_turn() -> None:
    question = {"role": "user", "content": "2 + 2?", "feedback": "bad"}
    for bad in ({"is_correct": False}, {"feedback": "thumbs_down"}):
        with refuses(DataError, where="rows.jsonl:1, message 2", fix=['"train": false']):
            convert({"messages": [question, answer("5", **bad)]}, "messages")
    rows = [answer("5", feedback="bad", train=False), question, answer("4", feedback="good")]
    assert convert({"messages": [question, *rows]}, "messages")
