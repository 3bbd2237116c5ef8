"""Pairs and labeled answers that cannot be learned from, in files that a run is started on: each
error names the file and the row, what is wrong, and how to mend it, and nothing is written.

What a row becomes is held by tests/data/test_preference_rows.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from errors import check_error, holds, refuses
from recipes import make_run, write_pairs
from tunesmith.config.schema import Source
from tunesmith.data.rows.formats import convert_row
from tunesmith.errors import DataError, TunesmithError, UsageError

U = {"role": "user", "content": "1 + 2?"}
GOOD = {"role": "assistant", "content": "3"}
BAD = {"role": "assistant", "content": "It is three."}
PAIR = {"prompt": "Add 1 and 2.", "chosen": "3", "rejected": "It is three."}
CHAT = {"prompt": [U], "chosen": [GOOD], "rejected": [BAD]}
ANSWER = {"prompt": "Add 1 and 2.", "completion": "3", "label": True}
TOOL = {"name": "add", "description": "adds", "parameters": {"type": "object"}}
LONG = "1 + 2? " * 40


def without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


# name: a row, and values that its error has
PAIRS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "no chosen": (without(PAIR, "chosen"), ("chosen",)),
    "no rejected": (without(PAIR, "rejected"), ("rejected",)),
    "no prompt": (without(CHAT, "prompt"), ("prompt",)),
    "columns of another format": ({"instruction": "Add.", "output": "3"}, ("chosen",)),
    "labeled answers": (ANSWER, ("chosen",)),
    "chosen is null": (PAIR | {"chosen": None}, ("chosen",)),
    "rejected is null": (PAIR | {"rejected": None}, ("rejected",)),
    "an empty chosen": (PAIR | {"chosen": " \n"}, ("chosen",)),
    "an empty rejected": (PAIR | {"rejected": ""}, ("rejected",)),
    "an empty answer in a chat": (CHAT | {"chosen": [{**GOOD, "content": ""}]}, ("chosen",)),
    "no message": (CHAT | {"chosen": []}, ("chosen",)),
    "a prompt without a message": (CHAT | {"prompt": []}, ("prompt",)),
    "numbers": (PAIR | {"chosen": 3, "rejected": 4}, ("chosen",)),
    "a number and a text": (PAIR | {"chosen": 3}, ("chosen",)),
    "a prompt of a number": (PAIR | {"prompt": 12}, ("prompt",)),
    "texts that share nothing": (without(PAIR, "prompt"), ("prompt",)),
    "chats that share nothing": (
        {"chosen": [U, GOOD], "rejected": [{**U, "content": "2 + 2?"}, BAD]},
        ("prompt",),
    ),
    "another prompt than the chats'": (
        {"prompt": "2 + 2?", "chosen": [U, GOOD], "rejected": [U, BAD]},
        ("prompt",),
    ),
    "a question as answer": (CHAT | {"rejected": [BAD, U]}, ("rejected", "user")),
    "an unknown role": (CHAT | {"prompt": [{"role": "narrator", "content": "x"}]}, ("narrator",)),
    "an answer to nothing": (CHAT | {"prompt": [{"role": "system", "content": "Hi."}]}, ()),
    "a message without a role": (CHAT | {"chosen": [{"content": "3"}]}, ("role",)),
    "a message without content": (CHAT | {"chosen": [{"role": "assistant"}]}, ("content",)),
    "a turn without value": (CHAT | {"chosen": {"from": "gpt"}}, ("value",)),
    "a picture": (CHAT | {"prompt": [{**U, "content": [{"type": "image"}]}]}, ("image",)),
    "an answer that is not trained": (CHAT | {"chosen": [{**GOOD, "train": False}]}, ()),
    "tools that are no list": (CHAT | {"tools": "{}"}, ("tools",)),
    "tools that are no JSON": (CHAT | {"tools": '[{"name": "add"'}, ("tools",)),
    "a tool without a name": (CHAT | {"tools": [without(TOOL, "name")]}, ("name",)),
    "a call with broken arguments": (
        CHAT
        | {
            "tools": [TOOL],
            "chosen": [
                {"role": "assistant", "tool_calls": [{"name": "add", "arguments": '{"a": 1'}]}
            ],
        },
        ("arguments",),
    ),
    "half a character": (PAIR | {"chosen": "\ud800"}, ("chosen", "U+D800")),
    "a system message of a number": (PAIR | {"system": 3}, ("system",)),
    "equal texts": (PAIR | {"rejected": "3"}, ()),
    "equal chats": (CHAT | {"rejected": [dict(GOOD)]}, ()),
    "answers that are equal once cut": (
        {"prompt": "Add.", "chosen": LONG + "3", "rejected": LONG + "4"},
        (),
    ),
    "a list": ([1, 2], ()),
}
ANSWERS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "no label": (without(ANSWER, "label"), ("label",)),
    "a label of null": (ANSWER | {"label": None}, ("label",)),
    "a label of text": (ANSWER | {"label": "positive"}, ("label", "positive")),
    "a label of 2": (ANSWER | {"label": 2}, ("label", "2")),
    "a label of 0.5": (ANSWER | {"label": 0.5}, ("label", "0.5")),
    "a label in a list": (ANSWER | {"label": [True]}, ("label",)),
    "no completion": (without(ANSWER, "completion"), ("completion",)),
    "no prompt for a completion": (without(ANSWER, "prompt"), ("prompt",)),
    "an empty completion": (ANSWER | {"completion": "\n"}, ("completion",)),
    "a completion of a number": (ANSWER | {"completion": 3}, ("completion",)),
    "messages that end with a question": ({"messages": [U, GOOD, U], "label": True}, ()),
    "messages without an answer": ({"messages": [U], "label": True}, ()),
    "a pair": (PAIR, ("label",)),
}


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refused(tiny: Path, folder: Path, method: Any, data: dict[str, Any], **more: Any) -> Any:
    """The error of a run that is started on some rows; nothing of it is on the disk."""
    run = make_run(tiny, folder, held=False, method=method, data=data, **more)
    before = sorted(folder.rglob("*"))
    with pytest.raises(TunesmithError) as caught:
        tunesmith.train(run)
    assert sorted(folder.rglob("*")) == before
    assert caught.value.what
    assert caught.value.fix
    return caught.value


def test_a_text_beside_a_chat_is_its_message() -> None:
    for row in (CHAT | {"rejected": "It is three."}, CHAT | {"chosen": "3"}):
        assert convert_row(
            row, Source(source="a", format="preference"), where="a:1"
        ) == convert_row(CHAT, Source(source="a", format="preference"), where="a:1")


@pytest.mark.parametrize("name", [*PAIRS, *ANSWERS])
def test_a_bad_row_is_named_by_file_and_line(name: str, tiny: Path, tmp_path: Path) -> None:
    """It is the third of four."""
    if name in PAIRS:
        row, names = PAIRS[name]
        good, other, method, form = PAIR, CHAT, "dpo", "preference"
    else:
        row, names = ANSWERS[name]
        good, other, method, form = ANSWER, ANSWER | {"label": False}, "kto", "feedback"
    file = write_lines(tmp_path / "train.jsonl", [good, other, row, good])
    data = {"source": str(file), "format": form}
    limits = {"seq_len": 96}
    if name == "answers that are equal once cut":
        limits |= {"allow_cut_answers": True}
    error = refused(tiny, tmp_path, method, {"train": data, **limits})
    assert isinstance(error, DataError)
    place = error.where.partition(",")[0]
    check_error(DataError("", where=place), where="train.jsonl:3")
    text = f"{error.what}\n{error.why}\n{error.where}"
    for value in names:
        assert holds(text, value), f"{value}: {error}"


# name: method, rows, more keys of the data, values that the error has
FILES: dict[str, tuple[str, list[Any] | str, dict[str, Any], tuple[str, ...]]] = {
    "an empty file": ("dpo", "", {}, ()),
    "a line that is cut": ("dpo", json.dumps(PAIR) + '\n{"prompt": "x', {}, ()),
    "good answers alone": ("kto", [ANSWER] * 3, {}, ("3",)),
    "bad answers alone": ("kto", [ANSWER | {"label": False}] * 3, {}, ("3",)),
    "pairs that are all too long": (
        "dpo",
        [PAIR | {"prompt": LONG}] * 3,
        {"too_long": "drop"},
        ("3",),
    ),
    "a pair that is too long": ("dpo", [PAIR, PAIR | {"chosen": LONG}], {"too_long": "error"}, ()),
    "answers that are cut": ("dpo", [PAIR | {"chosen": LONG, "rejected": LONG + "x"}] * 3, {}, ()),
    "a column that is not there": (
        "dpo",
        [PAIR] * 3,
        {"columns": {"chosen": "better"}},
        ("better",),
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_named(name: str, tiny: Path, tmp_path: Path) -> None:
    method, rows, keys, names = FILES[name]
    file = tmp_path / "train.jsonl"
    if isinstance(rows, str):
        file.write_text(rows)
    else:
        write_lines(file, rows)
    keys = dict(keys)
    source: dict[str, Any] = {"source": str(file)}
    source["format"] = "feedback" if method == "kto" else "preference"
    if "columns" in keys:
        source["columns"] = keys.pop("columns")
    error = refused(tiny, tmp_path, method, {"train": source, "seq_len": 96, **keys})
    assert "train.jsonl" in error.where
    for value in names:
        assert holds(f"{error.what}\n{error.why}", value), str(error)


@pytest.mark.slow
def test_bad_rows_of_an_eval_are_named_too(tiny: Path, tmp_path: Path) -> None:
    held = write_pairs(tmp_path / "held.jsonl", 4, first=8)
    sources = {
        "train": {
            "source": str(write_pairs(tmp_path / "train.jsonl", 8)),
            "format": "preference",
        },
        "validation": {"source": str(held), "format": "preference"},
    }
    steps = {"duration": "1 steps", "warmup": "0 steps"}
    tunesmith.train(make_run(tiny, tmp_path, method="dpo", data=sources, train=steps))
    before = sorted(tmp_path.rglob("*"))
    for name, rows, place in (
        ("no-rejected", [PAIR, without(PAIR, "rejected")], "2"),
        ("empty", [PAIR, PAIR, PAIR | {"chosen": ""}], "3"),
        ("no-message", [PAIR, PAIR | {"rejected": ["x"]}], "2, message 1"),
    ):
        file = write_lines(tmp_path.parent / f"{tmp_path.name}-{name}.jsonl", rows)
        with refuses(DataError, where=f"{file.name}:{place}"):
            tunesmith.evaluate(tmp_path / "run", file)
    # Rows that were held out, and are others now.
    write_lines(held, [PAIR] * 4)
    with refuses(UsageError, where="--data"):
        tunesmith.evaluate(tmp_path / "run")
    assert sorted(tmp_path.rglob("*")) == before
