"""Columns that rate an answer: labels and grades beside an answer that is learned, scores of pairs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_table import answer, turns

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
    ("is_correct", True, False), ("isCorrect", "true", "False"), ("correct", 1, 0),
    ("Answer is correct", "yes", "no"), ("accepted", 1, -1), ("is_accepted", "accepted", "rejected"),
    ("passed", "1", "0"), ("success", True, False), ("user_feedback", "👍", "👎🏽"),
    ("feedback", "thumbs_up", "thumbs_down"), ("thumbs_feedback", "up", "down"),
    ("evaluation", "good", "bad"), ("reaction", "👍", "👎"), ("thumbs_down", False, True),
    ("incorrect", "no", "yes"), ("verdict", "correct", "incorrect"), ("judgment", "pass", "fail"),
    ("reward", True, False), ("quality", "high", "low"), ("answer_quality", "good", "very poor"),
    ("score", "helpful", "unhelpful"), ("is_valid", "Yes", "No"), ("is_chosen", 1, 0),
    ("Correct?", "TRUE", "FALSE"), ("was_this_helpful", "yes", "no"), ("tests_passed", True, False),
    ("contains_hallucination", "no", "yes"), ("decision", "accept", "reject"),
    ("status", "submitted", "discarded"), ("verdict", "Accepted", "WRONG_ANSWER"),
    ("stars", "5 stars", "1 star"), ("feedback", "positive", "negative"),
    ("desirable", True, False), ("thumbs", True, False),
]  # fmt: skip


@pytest.mark.parametrize(("column", "good", "bad"), LABELS)
def test_a_bad_label_under_any_name(column: str, good: Any, bad: Any) -> None:
    assert convert({**PAIR, column: good})
    columns = f"'data.train.columns={{prompt: question, completion: answer, label: {column}}}'"
    fix = f"method=kto data.train.format=feedback {columns}"
    with refuses(DataError, where="rows.jsonl:1", names=[column], fix=[fix]):
        convert({**PAIR, column: bad})
    assert convert({**PAIR, column: bad}, is_trained=False), "a row that is scored is not learned"


@pytest.mark.parametrize(
    ("format_name", "row", "columns"),
    [
        ("alpaca", {"instruction": "q", "output": "a"}, "prompt: instruction, completion: output"),
        ("messages", {"messages": turns("q", "a")}, "messages: messages"),
    ],
)
def test_the_way_on_names_the_columns_of_feedback(
    format_name: FormatName, row: Row, columns: str
) -> None:
    with refuses(DataError, fix=[f"'data.train.columns={{{columns}, label: is_correct}}'"]):
        convert({**row, "is_correct": False}, format_name)
    # A label that feedback does not read is to be written anew.
    with refuses(DataError, fix=["label: stars}'", "true"]):
        convert({**PAIR, "stars": "1 star"})


HARMLESS: list[Row] = [
    {"is_human": False}, {"toxic": False}, {"test": False}, {"correct_answer": "no"},
    {"correct_label": 0}, {"input_quality": "poor"}, {"difficulty_score": 0}, {"rank": 0},
    {"result": "no"}, {"status": 0}, {"feedback": "The answer is too short."}, {"thumbs_down": False},
    {"reward": 0}, {"reward": 0.0}, {"score": "0"}, {"quality": None}, {"problem_is_valid": "No"},
    {"meta": {"label": "no", "rating": 1, "correct": 0, "topic": "bad"}}, {"selected": False},
    {"passages": {"is_selected": [0, 1]}}, {"openai_moderation": {"flagged": True}},
]  # fmt: skip


@pytest.mark.parametrize("harmless", HARMLESS, ids=str)
def test_a_value_that_calls_no_answer_bad(harmless: Row) -> None:
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


@pytest.mark.parametrize(
    ("column", "values", "bad"),
    [
        ("reward", ["1", "0", "1"], 0),
        ("score", [1.0, -1.0, 1.0], -1),
        ("feedback", [0, -1, 1], -1),
        ("vote", ["+1", "-1", "+1"], -1),
    ],
)
def test_numbers_that_are_labels(
    tiny: Path, tmp_path: Path, column: str, values: list[Any], bad: int
) -> None:
    names, fix = [column, bad, "1 of 3"], [f"label: {column}"]
    with refuses(DataError, where="rows.jsonl:2", names=names, fix=fix):
        told(tiny, tmp_path, [{**PAIR, column: value} for value in values])


@pytest.mark.parametrize(
    "values", [[5, -5, -3, 0], [1, 1, 1, 1], [0, 0, 0], [0, 0.5, 1], [0, math.nan, 1]]
)
def test_other_grades_are_no_labels(tiny: Path, tmp_path: Path, values: list[Any]) -> None:
    rows = [{**PAIR, "rating": value} for value in values]
    assert warnings_with(told(tiny, tmp_path, rows), "train", "rating")


def test_columns_that_rate_answers_come_first(tiny: Path, tmp_path: Path) -> None:
    others = {"answer_id": 3, "notes": "x", "scraped_at_date": "y", "page_url": "z"}
    rows = [{**others, **PAIR, "rating": rating} for rating in (4.5, 3.5)]
    (unread,) = warnings_with(told(tiny, tmp_path, rows), "rating")
    assert holds(unread, "rating, notes")
    assert not any(holds(unread, name) for name in others if name != "notes")
    # A text is no answer.
    rows = [{"text": "A long film.", "stars": stars, "verdict": "bad"} for stars in (0, 1)]
    (unread,) = warnings_with(told(tiny, tmp_path, rows, "text"), "stars")
    assert holds(unread, "verdict")
    assert "rows.jsonl" not in unread, "no place of columns that all rows have"


def test_scores_that_contradict_a_preference(tiny: Path, tmp_path: Path) -> None:
    pair = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    scores = [
        {"score_chosen": 9.0, "score_rejected": 2.0},
        {"score_chosen": 2.0, "score_rejected": 9.0},
        {"chosen-rating": 5, "rejected-rating": 5},
        {"rewardChosen": "1", "rewardRejected": "3"},
        {"chosen_mood": 2, "rejected_mood": 3},
        {"chosen_score": None, "rejected_score": 3},
    ]
    lines = told(tiny, tmp_path, [{**pair, **row} for row in scores], "preference")
    assert warnings_with(lines, "preference", "3 of 6", f"{tmp_path}/rows.jsonl:2")
    (unread,) = warnings_with(lines, "chosen_mood")
    assert not holds(unread, "score_chosen")
