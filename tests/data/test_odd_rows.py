"""One odd row among good ones is an error that names it, and never a reason for a poorer layout."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from errors import holds, refuses
from tunesmith.config.row_settings import rows_set_by
from tunesmith.config.schema import Source
from tunesmith.data.rows.detect import Detected, detect
from tunesmith.data.rows.formats import convert_row
from tunesmith.data.rows.labels import read_label
from tunesmith.data.source.open_source import from_list, read_rows
from tunesmith.errors import DataError

Row = dict[str, Any]
U, A = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
OTHER = {"role": "assistant", "content": "no"}
ALPACA = {"instruction": "Translate", "input": "word", "output": "mot"}
PAIR = {"prompt": "hi", "completion": "ho"}
CHAT = {"messages": [U, A]}
FROMS = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]


@pytest.fixture(autouse=True)
def rows_by_option() -> Iterator[None]:
    with rows_set_by(option=True):
        yield


def place(number: int) -> str:
    return f"rows row {number}"


def found(rows: list[Row], **keys: Any) -> Detected:
    return detect(from_list(rows, "rows"), Source(source="rows"), **keys)


# A good row, an odd one, and what the error names.
ODD: dict[str, tuple[Row, Row, list[str]]] = {
    "a null instruction": (ALPACA, {**ALPACA, "instruction": None}, ["instruction"]),
    "no instruction": (ALPACA, {"input": "word", "output": "mot"}, ["instruction"]),
    "a number as input": (ALPACA, {**ALPACA, "input": 3}, ["input"]),
    "a number as system": ({**ALPACA, "system": "S"}, {**ALPACA, "system": 3}, ["system"]),
    "a number as system of a chat": ({**CHAT, "system": "S"}, {**CHAT, "system": 3}, ["system"]),
    "broken JSON text": ({"messages": json.dumps([U, A])}, {"messages": "[{broken"}, ["messages"]),
    "no JSON text": ({**CHAT, "text": "x"}, {"messages": "oops", "text": "x"}, ["messages"]),
    "Python's repr": ({"messages": json.dumps([U, A])}, {"messages": str([U, A])}, ["messages"]),
    "an empty chat": ({**CHAT, "text": "x"}, {"messages": [], "text": "x"}, ["messages"]),
    "a null label": ({**PAIR, "label": True}, {**PAIR, "label": None}, ["label"]),
    "no label": ({**PAIR, "label": True}, PAIR, ["label"]),
    "a null label of a chat": ({**CHAT, "label": False}, {**CHAT, "label": None}, ["label"]),
    "a label of another kind": ({**PAIR, "label": 1}, {**PAIR, "label": 2}, ["2"]),
    "a null chosen": (
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": None, "rejected": "b"},
        ["chosen"],
    ),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("count", [1, 3])
def test_odd_rows_are_named_and_can_be_left_out(name: str, count: int) -> None:
    good, odd, named = ODD[name]
    rows = [good] * 3 + [odd] * count
    with refuses(DataError, fix=["data.bad_rows=skip"]) as refused:
        found(rows)
    error = refused.value
    assert error.where.startswith(place(4))
    assert holds(f"{error.what} {error.why}", *named)
    if count > 1:
        assert holds(error.what, 3, 6)
        assert all(f"{place(n)}: " in error.why for n in (4, 5, 6))
    assert set(found(rows, skips_bad_rows=True).columns.values()) >= found([good]).columns.keys()


def test_odd_rows_outside_of_the_sample_are_listed_too() -> None:
    rows = [dict(ALPACA) for _ in range(1001)]
    for i in (0, 3, 501, 1000):
        rows[i]["instruction"] = None
    with refuses(DataError, names=[4, "1,001"]) as refused:
        found(rows)
    assert refused.value.where == place(1)
    listed = [cause.split(":")[0] for cause in refused.value.why.split("; ")]
    assert listed[:-1] == [place(n) for n in (1, 4, 502, 1001)]


def test_a_long_list_ends_with_how_many_more() -> None:
    with refuses(DataError, names=[30, 60]) as refused:
        found([ALPACA, {**ALPACA, "output": None}] * 30)
    *listed, more, _ = refused.value.why.split("; ")
    assert len(listed) == 20
    assert holds(more, 10)
    assert len(refused.value.why) < 2000, "the end of a longer text is not shown"


@pytest.mark.parametrize(
    "row",
    [{**PAIR, "label": None}, {**CHAT, "label": None}, {**PAIR, "kto_tag": "sports"}],
)
def test_answers_with_a_label_are_never_read_without_it(row: Row) -> None:
    with refuses(DataError, fix=["rename"]):
        found([row] * 3)


# --- labels as people write them


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (True, False),
        (1, 0),
        (1.0, 0.0),
        ("true", "False"),
        (" TRUE ", "false"),
        ("1", "0"),
        ("1.0", "0.0"),
        ("yes", "No"),
        ("good", "bad"),
        ("desirable", "undesirable"),
        ("chosen", "rejected"),
        ("thumbs_up", "Thumbs Down"),
        ("👍", "👎"),
        ("👍🏽", "👎🏿"),
    ],
)
def test_labels_are_read_as_people_write_them(good: Any, bad: Any) -> None:
    layout = found([{**PAIR, "label": good}, {**PAIR, "label": bad}])
    assert layout.format == "feedback"
    assert (read_label(good), read_label(bad)) == (True, False)


@pytest.mark.parametrize("label", [None, 2, -1, 0.5, "", "positive", "neutral", "5", [], {"a": 1}])
def test_other_labels_are_refused(label: Any) -> None:
    assert read_label(label) is None


def test_labels_of_a_csv_file(write: Callable[[str, str], str]) -> None:
    source = Source(source=write("a.csv", "prompt,completion,label\nhi,hello,true\nyo,bad,False\n"))
    rows = read_rows(source)
    assert detect(rows, source).format == "feedback"
    source = Source(source=source.source, format="feedback")
    samples = [convert_row(rows[i], source, where=rows.where(i)) for i in range(2)]
    assert [sample.is_good for sample in samples] == [True, False]


@pytest.mark.parametrize("row", [{**PAIR, "label": 0}, {**CHAT, "kto_tag": "bad"}])
def test_an_answer_that_is_labeled_bad_is_no_answer_to_learn(row: Row) -> None:
    name: Any = "messages" if "messages" in row else "prompt-completion"
    source = Source(source="rows", format=name)
    with refuses(DataError, where="r", fix=["method=kto"]):
        convert_row(row, source, where="r")
    good = {**row, next(key for key in row if key in ("label", "kto_tag")): True}
    assert convert_row(good, source, where="r")


# --- columns


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Q", "A"),
        ("Question", "Answer"),
        ("Frage", "Antwort"),
        ("question", "réponse"),
        ("Pregunta", "Respuesta"),
        ("domanda", "risposta"),
        ("вопрос", "ответ"),
        ("问题", "答案"),
        ("userInput", "modelResponse"),
    ],
)
def test_questions_and_answers_of_several_languages(question: str, answer: str) -> None:
    layout = found([{"id": 1, question: "x", answer: "y"}] * 2)
    assert layout.columns == {"prompt": question, "completion": answer}


@pytest.mark.parametrize(
    ("row", "flags"),
    [
        ({"nr": 1, "left": "some words", "right": "other words"}, "prompt=left,completion=right"),
        ({"nr": 1, "body": "some words"}, "text=body"),
        (
            {"chosen_messages": [U, A], "rejected_messages": [U, OTHER]},
            "chosen=chosen_messages,rejected=rejected_messages",
        ),
        (
            {"prompt": "q", "answer_chosen": "a", "answer_rejected": "b"},
            "chosen=answer_chosen,rejected=answer_rejected",
        ),
    ],
)
def test_what_is_proposed_is_read(row: Row, flags: str) -> None:
    with refuses(DataError) as refused:
        found([row] * 3)
    assert f"--columns {flags}" in refused.value.fix
    columns = dict(pair.split("=") for pair in flags.split(","))
    layout = detect(from_list([row] * 3), Source(source="rows", columns=columns))
    assert layout.columns.items() >= columns.items()


def test_a_rejected_answer_alone_is_asked_for() -> None:
    with refuses(DataError, names=["rejected_response"], fix=["--format messages"]):
        found([{**CHAT, "rejected_response": "no"}] * 2)


@pytest.mark.parametrize("other", [{"tags": []}, {"metadata": [{"a": 1}]}, {"text2": None}])
def test_a_list_that_is_no_chat_leaves_text_alone(other: Row) -> None:
    assert found([{"text": "x", **other}] * 2).format == "text"


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "x", "input": "more", "chosen": "a", "rejected": "b"},
        {"instruction": "x", "input": "more", "output": "a", "kto_tag": True},
    ],
)
def test_the_input_of_pairs_and_labeled_answers_is_read(row: Row) -> None:
    layout = found([row] * 2)
    assert set(layout.columns.values()) == row.keys()
    source = Source(source="rows", format=layout.format, columns=layout.columns)  # type: ignore[arg-type]
    answer: Any = convert_row(row, source, where="r").samples[0]
    assert answer.prompt == "x\nmore"


# --- files


def test_files_of_several_formats_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "my rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (PAIR, CHAT, PAIR, CHAT, CHAT)))
    source = Source(source=str(path))
    with refuses(DataError, where=str(path), fix=["file"]) as refused:
        detect(read_rows(source), source)
    assert holds(refused.value.why, "3 as messages", "2 as prompt-completion")


def test_a_chat_that_pandas_wrote_as_python_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["messages"], [str([U, A])]])
    source = Source(source=str(path))
    with refuses(DataError, where="a.csv:2", names=["Python"]) as refused:
        detect(read_rows(source), source)
    assert "to_json" in refused.value.fix


# --- nulls of Arrow


def _call(name: str, **arguments: Any) -> Row:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    turns = [U, {"role": "assistant", "content": "", "tool_calls": [call]}]
    schema = {"name": name, "parameters": {"type": "object", "enum": None}}
    return {"messages": turns, "tools": [schema]}


def _arguments(tmp_path: Path, *rows: Row) -> list[Any]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(source=str(path))
    read = read_rows(source)
    arguments = []
    for i in range(len(read)):
        sample: Any = convert_row(read[i], source, where=read.where(i)).samples[0]
        arguments.append(sample.messages[-1]["tool_calls"][0]["function"]["arguments"])
        assert sample.tools[0]["function"]["parameters"] == {"type": "object"}
    return arguments


def test_nulls_of_an_export_from_arrow_are_no_arguments(tmp_path: Path) -> None:
    rows = [_call("weather", city="Oslo", days=None), _call("wait", city=None, days=2)]
    assert _arguments(tmp_path, *rows) == [{"city": "Oslo"}, {"days": 2}]
    assert "Arrow" in read_rows(Source(source=str(tmp_path / "rows.jsonl"))).layout


def test_a_null_that_is_meant_stays_an_argument(tmp_path: Path) -> None:
    rows = [_call("weather", city="Oslo", days=None), _call("wait", days=2)]
    assert _arguments(tmp_path, *rows) == [{"city": "Oslo", "days": None}, {"days": 2}]
    assert _arguments(tmp_path, rows[0]) == [{"city": "Oslo", "days": None}], (
        "one call shows nothing"
    )


# --- chats that are no lists of messages


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": ["hi", "ho"], "source": "web"},
        {"messages": [{"speaker": "a", "text": "x"}], "text": "x"},
        {"dialog": [], "text": "x"},
        {"prompt": str([U]), "completion": str([A])},
        {"instruction": json.dumps([U]), "output": "ho"},
        {"text": str([U, A])},
        {"text": "[{broken", "messages": "[{broken"},
    ],
    ids=str,
)
def test_what_looks_like_a_chat_is_never_plain_text(row: Row) -> None:
    with refuses(DataError) as refused:
        found([row] * 3)
    assert refused.value.where.startswith(place(1))


def test_roles_may_be_written_with_capitals() -> None:
    chat = [{**U, "role": "User"}, {**A, "role": "ASSISTANT"}]
    sample: Any = convert_row({"messages": chat}, Source(source="rows"), where="r").samples[0]
    assert sample.messages == [U, A]


def test_both_forms_of_a_chat_in_one_column() -> None:
    with refuses(DataError, where="rows row 2, message 1"):
        found([CHAT, {"messages": FROMS}, CHAT])
    with refuses(DataError, where="rows row 1, turn 1"):
        found([CHAT, {"messages": FROMS}, {"messages": FROMS}])


def test_some_rows_with_pictures_among_others() -> None:
    layout = found([{**CHAT, "images": []}] * 2)
    assert (layout.format, layout.has_pictures) == ("messages", False)
    layout = found([{**CHAT, "images": []}, {**CHAT, "images": ["a.png"]}])
    assert (layout.format, layout.has_pictures) == ("messages", True)


@pytest.mark.parametrize("chat", [[U, A], FROMS])
def test_json_text_of_json_text_of_a_chat_is_read(chat: list[Row]) -> None:
    row = {"conversations": json.dumps(json.dumps(chat)), "text": "x"}
    layout = found([row] * 3)
    assert layout.format == ("messages" if "role" in chat[0] else "sharegpt")
    source = Source(source="rows", format=layout.format, columns=layout.columns)  # type: ignore[arg-type]
    sample: Any = convert_row(row, source, where="r").samples[0]
    assert sample.messages == [U, A]
    twice = {"prompt": json.dumps(json.dumps([U])), "completion": json.dumps([A])}
    source = Source(source="rows", format="prompt-completion")
    sample = convert_row(twice, source, where="r").samples[0]
    assert sample.messages == [U, A]
