"""Rows of every format come into one form, and one conversation in any format gives one mask."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from chat_tokenizers import train
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_templates import encode

from errors import refuses
from tunesmith.config.schema import Data, Source
from tunesmith.data.rows.formats import convert_row
from tunesmith.data.rows.samples import Completion, Conversation, Text
from tunesmith.data.text import builtin_templates
from tunesmith.data.text.select_template import select_template
from tunesmith.data.text.template import TrainOn
from tunesmith.data.tokens.encode import RowEncoder
from tunesmith.errors import DataError

Row = dict[str, Any]
CALL = {"name": "add", "arguments": {"a": 1, "b": [2]}}
OPENAI = [{"type": "function", "function": CALL}]
TOOL = {"name": "add", "description": "adds", "parameters": {"type": "object"}}
U, A = {"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "3"}
S = {"role": "system", "content": "S"}
CALLING = {"role": "assistant", "content": "", "tool_calls": OPENAI}
CALLING_TWICE = {**CALLING, "tool_calls": OPENAI * 2}
RESULT = {"role": "tool", "content": "3"}


def form(row: Row, kind: Any, system: str | None = None, **columns: str) -> Any:
    source = Source(source="x", format=kind, columns=columns)
    return convert_row(row, source, where="x row 1", system=system).samples[0]


def turns(*pairs: tuple[str, Any], **columns: Any) -> Row:
    return {"conversations": [{"from": who, "value": value} for who, value in pairs], **columns}


def said(*contents: str) -> list[Row]:
    """Questions and answers in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"instruction": "go", "input": None, "output": "ok"}, said("go", "ok")),
        ({"instruction": "go", "input": "", "output": ""}, said("go", "")),
        ({"instruction": "go", "input": "far", "output": "ok"}, said("go\nfar", "ok")),
        (
            {"instruction": "go", "output": "ok", "system": "S", "history": [["a", "b"]]},
            [S, *said("a", "b", "go", "ok")],
        ),
        (
            {"instruction": "go", "output": "ok", "history": said("a", "b")},
            said("a", "b", "go", "ok"),
        ),
    ],
)
def test_alpaca(row: Row, messages: list[Row]) -> None:
    sample = form(row, "alpaca")
    assert sample.messages == messages
    alone = (row["instruction"], row.get("input") or "", row["output"])
    assert sample.instruction == (alone if len(messages) == 2 else None)


def test_alpaca_by_other_column_names() -> None:
    row = {"question": "go", "answer": "ok", "input": "not the format's, but of its name"}
    sample = form(row, "alpaca", instruction="question", output="answer", input="none")
    assert sample.messages == said("go", "ok")


def parts(*pairs: tuple[str, str], key: str = "value") -> Row:
    return {"role": "assistant", "content": [{"type": kind, key: text} for kind, text in pairs]}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (json.dumps([U, A]), [U, A]),
        ([{**U, "role": "User"}, {**A, "role": "ASSISTANT"}], [U, A]),
        ([{"role": "developer", "content": "S"}, U, A], [S, U, A]),
        ([U, {**A, "name": None, "tool_calls": None, "refusal": None}], [U, A]),
        ([U, parts(("text", "3"), key="text")], [U, A]),
        (
            [U, parts(("reasoning", "hm"), ("text", "3"))],
            [U, {**A, "reasoning_content": "hm"}],
        ),
        ([U, {**A, "reasoning_content": "hm"}], [U, {**A, "reasoning_content": "hm"}]),
        ([U, {**CALLING, "content": None}, RESULT, A], [U, CALLING, RESULT, A]),
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
            [U, parts(*[("tool_call", json.dumps(CALL))] * 2), RESULT, RESULT, A],
            [U, CALLING_TWICE, RESULT, RESULT, A],
        ),
        ([{**U, "loss_weight": 0.0}, {**A, "loss_weight": 1.0}], [U, A]),
    ],
)
def test_messages(given: Any, expected: list[Row]) -> None:
    assert form({"messages": given}, "messages").messages == expected
    assert form({"chat": given}, "messages", messages="chat").messages == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (turns(("user", "1 + 2?"), ("assistant", "3"), system="S"), [S, U, A]),
        (turns(("system", "S"), ("human", "1 + 2?"), ("gpt", "3"), system=None), [S, U, A]),
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
            [U, CALLING_TWICE, RESULT, A],
        ),
        (
            turns(
                ("human", "1 + 2?"),
                ("function_call", json.dumps({**CALL, "arguments": json.dumps(CALL["arguments"])})),
                ("function_call", json.dumps([CALL])),
                ("tool", "3"),
                ("gpt", "3"),
            ),
            [U, CALLING_TWICE, RESULT, A],
        ),
    ],
)
def test_sharegpt(row: Row, expected: list[Row]) -> None:
    assert form(row, "sharegpt").messages == expected


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), None, "", "[]", "null", "None", []])
def test_tools(tools: Any) -> None:
    wrapped = [{"type": "function", "function": TOOL}] if tools and "add" in str(tools) else None
    assert form(turns(("human", "hi"), ("gpt", "ho"), tools=tools), "sharegpt").tools == wrapped
    assert form({"messages": [U, A], "tools": tools}, "messages").tools == wrapped
    assert form({"messages": [U, A], "tools": wrapped}, "messages").tools == wrapped


def test_completions_and_texts() -> None:
    row = {"prompt": "2 +", "completion": " 2"}
    assert form(row, "prompt-completion") == Completion("2 +", " 2")
    row = {"prompt": [U, A, U], "completion": [A]}
    assert form(row, "prompt-completion") == Conversation([U, A, U, A], prompt_messages=3)
    assert form({"body": "héllo 🎉"}, "text", text="body") == Text("héllo 🎉")


def test_a_system_message_for_conversations_without_one() -> None:
    assert form({"messages": [U, A]}, "messages", "S").messages == [S, U, A]
    own = {"role": "system", "content": "own"}
    assert form({"messages": [own, U, A]}, "messages", "S").messages == [own, U, A]
    row: Row = {"instruction": "hi", "output": "ho", "system": "own"}
    assert form(row, "alpaca", "S").messages[0] == own
    row = {"prompt": [U, A, U], "completion": [A]}
    assert form(row, "prompt-completion", "S").prompt_messages == 4
    row = {"prompt": "a", "completion": "b"}
    assert form(row, "prompt-completion", "S") == Completion("a", "b", "S")
    with refuses(DataError, where="x row 1, message 2"):  # the row's own count
        form({"messages": [U, RESULT, A]}, "messages", "S")


# --- one conversation in each format

CHATML = (Path(__file__).parent / "templates" / "chatml.jinja").read_text(encoding="utf-8")
PROFILE = settings(derandomize=True, deadline=None, database=None, max_examples=20)

EDGE = st.sampled_from(("", " ", "\n", "\n\n  ", "\t", "\u00a0", "\r\n"))
CORES = (
    "It is so.",
    "{{ name }} {% if x %}",
    '{"role": "user", "content": "no turn"}',
    "[1, 2]",
    "null",
    "<think>\nHm.\n</think>\n\nSo.",
    "<|im_end|>",
    "e\u0301 这 🎉",
    "a\nb",
)
CORE = st.sampled_from(CORES) | st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=8)
TEXT = st.builds(lambda before, core, after: f"{before}x{core}{after}", EDGE, CORE, EDGE)


class Written(NamedTuple):
    """A row, and which of its answers that format trains on."""

    format: str
    row: Row
    answers: TrainOn = "response"


@cache
def encoder(form: str, train_on: TrainOn, template: str) -> RowEncoder:
    source = Source(source="rows.jsonl", format=form)  # type: ignore[arg-type]
    tokenizer = copy.deepcopy(train("bytes", ("<|im_start|>", "<|im_end|>"), False))
    if template != "raw":
        tokenizer.chat_template = builtin_templates.with_tools(CHATML)
    data = Data(train=(source,), template=template)
    return RowEncoder(select_template(data, tokenizer, {2}), source, None, train_on)


def tokens(written: Written, train_on: TrainOn, template: str = "auto") -> tuple[Any, Any]:
    """Token ids and mask; of a pair those of the chosen answer."""
    example = encode(encoder(written.format, train_on, template), written.row).example
    size = example.sequences[0] if example.sequences else len(example.ids)
    return example.ids[:size].tolist(), example.trained[:size].tolist()


def agree(written: list[Written], template: str = "auto") -> None:
    """A last answer alone is trained on, whatever the recipe says, where the rest is its prompt."""
    first, *others = written
    for other in others:
        theirs = tokens(other, other.answers, template)
        assert theirs == tokens(first, other.answers, template), other
        assert any(theirs[1])


def every_format(system: str | None, exchange: list[tuple[str, str]]) -> list[Written]:
    """A conversation in each format that can hold it; the first is that of `messages`."""
    messages = said(*[text for turn in exchange for text in turn])
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    prompt, answer = messages[:-1], messages[-1:]
    other = [{"role": "assistant", "content": "Otherwise."}]
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    conversations = [{"from": names[m["role"]], "value": m["content"]} for m in messages]
    in_column = {} if system is None else {"system": system}
    without_system = conversations[1:] if system is not None else conversations
    last, chosen = exchange[-1]
    question, _, extra = last.partition("\n")
    alpaca = {
        "instruction": question if extra else last,
        "input": extra,
        "output": chosen,
        "history": [list(turn) for turn in exchange[:-1]],
        **in_column,
    }
    written = [
        Written("messages", {"messages": messages}),
        Written("messages", {"messages": json.dumps(messages)}),
        Written("sharegpt", {"conversations": conversations}),
        Written("sharegpt", {"conversations": without_system, **in_column}),
        Written("alpaca", alpaca),
        Written("prompt-completion", {"prompt": prompt, "completion": answer}, "last"),
        Written("preference", {"prompt": prompt, "chosen": answer, "rejected": other}, "last"),
        Written("preference", {"chosen": messages, "rejected": [*prompt, *other]}, "last"),
        Written("feedback", {"prompt": prompt, "completion": answer, "label": True}, "last"),
        Written("feedback", {"messages": messages, "label": False}, "last"),
    ]
    if len(exchange) == 1:
        pair = {"prompt": last, **in_column}
        written += [
            Written("preference", {**pair, "chosen": chosen, "rejected": "Otherwise."}),
            Written("feedback", {**pair, "completion": chosen, "label": 1}),
        ]
        if system is None:
            written.append(Written("prompt-completion", {**pair, "completion": chosen}))
    return written


@pytest.mark.slow
@PROFILE
@given(st.none() | TEXT, st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
def test_each_format_gives_the_same_tokens(
    system: str | None, exchange: list[tuple[str, str]]
) -> None:
    agree(every_format(system, exchange))


@pytest.mark.slow
@PROFILE
@given(TEXT, TEXT)
def test_each_format_of_texts_gives_the_same_raw_tokens(prompt: str, answer: str) -> None:
    pair = {"prompt": prompt, "chosen": answer, "rejected": "Otherwise."}
    row = {"prompt": prompt, "completion": answer}
    first = Written("prompt-completion", row)
    agree([first, Written("preference", pair), Written("feedback", {**row, "label": True})], "raw")


@pytest.mark.slow
def test_each_format_with_tool_calls_gives_the_same_tokens() -> None:
    tools = [{"type": "function", "function": TOOL}]
    calling = {**CALLING, "tool_calls": [{**OPENAI[0], "id": "call00001"}]}
    called = [U, calling, {**RESULT, "tool_call_id": "call00001"}, A]
    sharegpt = turns(
        ("human", U["content"]),
        ("function_call", json.dumps(CALL)),
        ("observation", "3"),
        ("gpt", "3"),
        tools=json.dumps([TOOL]),
    )
    pair = {"prompt": called[:3], "tools": tools}
    rejected = [{"role": "assistant", "content": "No."}]
    agree(
        [
            Written("messages", {"messages": called, "tools": tools}),
            Written("messages", {"messages": called, "tools": json.dumps(tools)}),
            Written("sharegpt", sharegpt),
            Written("prompt-completion", {**pair, "completion": called[3:]}, "last"),
            Written("preference", {**pair, "chosen": called[3:], "rejected": rejected}, "last"),
            Written("feedback", {"messages": called, "tools": tools, "label": True}, "last"),
        ]
    )
