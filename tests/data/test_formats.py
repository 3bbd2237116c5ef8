"""Rows of every format come into one form."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tunesmith.config.schema import Source
from tunesmith.data.rows.formats import convert_row
from tunesmith.data.rows.samples import Completion, Conversation, Text
from tunesmith.errors import DataError

CALL = {"name": "add", "arguments": {"a": 1, "b": [2]}}
OPENAI = [{"type": "function", "function": CALL}]
TOOL = {"name": "add", "description": "adds", "parameters": {"type": "object"}}
U, A = {"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "3"}
CALLING = {"role": "assistant", "content": "", "tool_calls": OPENAI}
RESULT = {"role": "tool", "content": "3"}


def form(row: dict[str, Any], kind: str, **columns: str) -> Any:
    source = Source(source="x", format=kind, columns=columns)  # type: ignore[arg-type]
    return convert_row(row, source, where="x row 1").samples[0]


def turns(*pairs: tuple[str, Any], **columns: Any) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": value} for who, value in pairs], **columns}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"instruction": "go", "output": "ok"}, [("user", "go"), ("assistant", "ok")]),
        (
            {"instruction": "go", "input": None, "output": "ok"},
            [("user", "go"), ("assistant", "ok")],
        ),
        ({"instruction": "go", "input": "", "output": ""}, [("user", "go"), ("assistant", "")]),
        (
            {"instruction": "go", "input": "far", "output": "ok"},
            [("user", "go\nfar"), ("assistant", "ok")],
        ),
        (
            {"instruction": "go", "output": "ok", "system": "S", "history": [["a", "b"]]},
            [
                ("system", "S"),
                ("user", "a"),
                ("assistant", "b"),
                ("user", "go"),
                ("assistant", "ok"),
            ],
        ),
        (
            {
                "instruction": "go",
                "output": "ok",
                "history": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                ],
            },
            [("user", "a"), ("assistant", "b"), ("user", "go"), ("assistant", "ok")],
        ),
    ],
)
def test_alpaca(row: dict[str, Any], messages: list[tuple[str, str]]) -> None:
    sample = form(row, "alpaca")
    assert [(m["role"], m["content"]) for m in sample.messages] == messages
    single = len(messages) == 2
    assert sample.instruction == (
        (row["instruction"], row.get("input") or "", row["output"]) if single else None
    )


def test_alpaca_by_other_column_names() -> None:
    row = {"question": "go", "answer": "ok", "input": "not the format's, but of its name"}
    sample = form(row, "alpaca", instruction="question", output="answer", input="none")
    assert sample.messages == [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "ok"},
    ]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([U, A], [U, A]),
        (json.dumps([U, A]), [U, A]),
        ([{"role": "developer", "content": "S"}, U, A], [{"role": "system", "content": "S"}, U, A]),
        ([U, {**A, "name": None, "tool_calls": None, "refusal": None}], [U, A]),
        ([U, {"role": "assistant", "content": [{"type": "text", "text": "3"}]}], [U, A]),
        ([U, {"role": "assistant", "content": [{"type": "text", "value": "3"}]}], [U, A]),
        (
            [
                U,
                {
                    "role": "assistant",
                    "content": [
                        {"type": "reasoning", "value": "hm"},
                        {"type": "text", "value": "3"},
                    ],
                },
            ],
            [U, {**A, "reasoning_content": "hm"}],
        ),
        ([U, {**A, "reasoning_content": "hm"}], [U, {**A, "reasoning_content": "hm"}]),
        (
            [U, {"role": "assistant", "content": None, "tool_calls": OPENAI}, RESULT, A],
            [U, CALLING, RESULT, A],
        ),
        (
            [
                U,
                {
                    "role": "assistant",
                    "tool_calls": [
                        {
                            "id": "c1",
                            "type": "function",
                            "function": {"name": "add", "arguments": json.dumps(CALL["arguments"])},
                        }
                    ],
                },
                {**RESULT, "tool_call_id": "c1"},
                A,
            ],
            [
                U,
                {**CALLING, "tool_calls": [{**OPENAI[0], "id": "c1"}]},
                {**RESULT, "tool_call_id": "c1"},
                A,
            ],
        ),
        (
            [
                U,
                {
                    "role": "assistant",
                    "content": [{"type": "tool_call", "value": json.dumps(CALL)}] * 2,
                },
                RESULT,
                RESULT,
                A,
            ],
            [U, {**CALLING, "tool_calls": OPENAI * 2}, RESULT, RESULT, A],
        ),
        ([{**U, "loss_weight": 0.0}, {**A, "loss_weight": 1.0}], [U, A]),
    ],
)
def test_messages(given: Any, expected: list[dict[str, Any]]) -> None:
    assert form({"messages": given}, "messages").messages == expected
    assert form({"chat": given}, "messages", messages="chat").messages == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (turns(("human", "1 + 2?"), ("gpt", "3")), [U, A]),
        (
            turns(("user", "1 + 2?"), ("assistant", "3"), system="S"),
            [{"role": "system", "content": "S"}, U, A],
        ),
        (
            turns(("system", "S"), ("human", "1 + 2?"), ("gpt", "3"), system=None),
            [{"role": "system", "content": "S"}, U, A],
        ),
        (
            turns(
                ("human", "1 + 2?"),
                ("function_call", json.dumps(CALL)),
                ("observation", "3"),
                ("gpt", "3"),
            ),
            [U, CALLING, RESULT, A],
        ),
        (
            turns(
                ("human", "1 + 2?"),
                ("tool_call", [CALL, CALL]),
                ("function_response", "3"),
                ("gpt", "3"),
            ),
            [U, {**CALLING, "tool_calls": OPENAI * 2}, RESULT, A],
        ),
        (
            turns(
                ("human", "1 + 2?"),
                (
                    "function_call",
                    json.dumps({"name": "add", "arguments": json.dumps(CALL["arguments"])}),
                ),
                ("function_call", json.dumps([CALL])),
                ("tool", "3"),
                ("gpt", "3"),
            ),
            [U, {**CALLING, "tool_calls": OPENAI * 2}, RESULT, A],
        ),
    ],
)
def test_sharegpt(row: dict[str, Any], expected: list[dict[str, Any]]) -> None:
    assert form(row, "sharegpt").messages == expected


@pytest.mark.parametrize(
    "tools", [[TOOL], json.dumps([TOOL]), [{"type": "function", "function": TOOL}]]
)
def test_tools(tools: Any) -> None:
    wrapped = [{"type": "function", "function": TOOL}]
    assert form(turns(("human", "hi"), ("gpt", "ho"), tools=tools), "sharegpt").tools == wrapped
    assert form({"messages": [U, A], "tools": tools}, "messages").tools == wrapped


@pytest.mark.parametrize("tools", [None, "", "[]", [], "null", "None", " [] "])
def test_no_tools(tools: Any) -> None:
    assert form(turns(("human", "hi"), ("gpt", "ho"), tools=tools), "sharegpt").tools is None


def test_prompt_and_completion() -> None:
    assert form({"prompt": "2 +", "completion": " 2"}, "prompt-completion") == Completion(
        "2 +", " 2"
    )
    row = {"prompt": [U, A, U], "completion": [A]}
    assert form(row, "prompt-completion") == Conversation([U, A, U, A], prompt_messages=3)


def test_text() -> None:
    assert form({"text": "héllo 🎉"}, "text") == Text("héllo 🎉")
    assert form({"body": "x"}, "text", text="body") == Text("x")


def test_a_system_message_for_conversations_without_one() -> None:
    system = {"role": "system", "content": "S"}

    def made(row: dict[str, Any], name: Any) -> Any:
        source = Source(source="x", format=name)
        return convert_row(row, source, where="row 1", system="S").samples[0]

    assert made({"messages": [U, A]}, "messages").messages == [system, U, A]
    own = {"role": "system", "content": "own"}
    assert made({"messages": [own, U, A]}, "messages").messages == [own, U, A]
    assert made({"instruction": "hi", "output": "ho", "system": "own"}, "alpaca").messages[0] == own
    assert made({"prompt": [U, A, U], "completion": [A]}, "prompt-completion").prompt_messages == 4
    assert made({"prompt": "a", "completion": "b"}, "prompt-completion") == Completion(
        "a", "b", "S"
    )
    with pytest.raises(DataError) as caught:
        made({"messages": [U, {"role": "tool", "content": "3"}, A]}, "messages")
    assert caught.value.where == "row 1, message 2", "the row's own count"
