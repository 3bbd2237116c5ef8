"""One conversation, written in each of the formats, gives the same tokens and the same loss mask."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from chat_tokenizers import train
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_templates import encode

from tunesmith.config.schema import Data, Source
from tunesmith.data.text import builtin_templates
from tunesmith.data.text.select_template import select_template
from tunesmith.data.text.template import TrainOn
from tunesmith.data.tokens.encode import RowEncoder

CHATML = (Path(__file__).parent / "templates" / "chatml.jinja").read_text(encoding="utf-8")
PROFILE = settings(derandomize=True, deadline=None, database=None, max_examples=40)

EDGE = st.sampled_from(("", " ", "\n", "\n\n  ", "\t", "\u00a0", "\r\n"))
CORE = st.one_of(
    st.sampled_from(
        (
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
    ),
    st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=8),
)
TEXT = st.builds(lambda before, core, after: f"{before}x{core}{after}", EDGE, CORE, EDGE)


class Turn(NamedTuple):
    question: str
    answer: str


class Written(NamedTuple):
    """A row, and which of its answers that format trains on."""

    format: str
    row: dict[str, Any]
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
    encoded = encode(encoder(written.format, train_on, template), written.row)
    ids, trained = encoded.example.ids, encoded.example.trained
    if encoded.example.sequences:
        first = encoded.example.sequences[0]
        ids, trained = ids[:first], trained[:first]
    return ids, trained


def chat(system: str | None, turns: list[Turn]) -> list[dict[str, str]]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for turn in turns:
        messages.append({"role": "user", "content": turn.question})
        messages.append({"role": "assistant", "content": turn.answer})
    return messages


def every_format(system: str | None, turns: list[Turn]) -> list[Written]:
    """A conversation in each format that can hold it; the first is that of `messages`."""
    messages = chat(system, turns)
    prompt, answer = messages[:-1], messages[-1:]
    other = [{"role": "assistant", "content": "Otherwise."}]
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    conversations = [{"from": names[m["role"]], "value": m["content"]} for m in messages]
    in_column = {} if system is None else {"system": system}
    without_system = conversations[1:] if system is not None else conversations
    question, _, extra = turns[-1].question.partition("\n")
    if not extra:
        question = turns[-1].question
    alpaca = {
        "instruction": question,
        "input": extra,
        "output": turns[-1].answer,
        "history": [list(turn) for turn in turns[:-1]],
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
    if len(turns) == 1:
        pair = {"prompt": turns[0].question, **in_column}
        chosen = turns[0].answer
        written += [
            Written("preference", {**pair, "chosen": chosen, "rejected": "Otherwise."}),
            Written("feedback", {**pair, "completion": chosen, "label": 1}),
        ]
        if system is None:
            written.append(Written("prompt-completion", {**pair, "completion": chosen}))
    return written


@pytest.mark.slow
@PROFILE
@given(st.one_of(st.none(), TEXT), st.lists(st.builds(Turn, TEXT, TEXT), min_size=1, max_size=3))
def test_each_format_gives_the_same_tokens(system: str | None, turns: list[Turn]) -> None:
    first, *others = every_format(system, turns)
    for written in others:
        ids, trained = tokens(first, written.answers)
        their_ids, their_trained = tokens(written, written.answers)
        assert ids.tolist() == their_ids.tolist(), written
        # A last answer alone is trained on, whatever the recipe says, where the rest is its prompt.
        assert trained.tolist() == their_trained.tolist(), written


@PROFILE
@given(TEXT, TEXT)
def test_each_format_of_texts_gives_the_same_raw_tokens(prompt: str, answer: str) -> None:
    first, *others = (
        Written("prompt-completion", {"prompt": prompt, "completion": answer}),
        Written("preference", {"prompt": prompt, "chosen": answer, "rejected": "Otherwise."}),
        Written("feedback", {"prompt": prompt, "completion": answer, "label": True}),
    )
    ids, trained = tokens(first, "response", "raw")
    for written in others:
        their_ids, their_trained = tokens(written, "response", "raw")
        assert ids.tolist() == their_ids.tolist(), written
        assert np.array_equal(trained, their_trained), written


CALL = {"name": "weather", "arguments": {"place": "Oslo"}}
WRAPPED = {"type": "function", "id": "call00001", "function": CALL}
CALLED = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": "", "tool_calls": [WRAPPED]},
    {"role": "tool", "content": "wet", "tool_call_id": "call00001"},
    {"role": "assistant", "content": "Yes."},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize(
    "written",
    [
        Written("messages", {"messages": CALLED, "tools": json.dumps(TOOLS)}),
        Written(
            "sharegpt",
            {
                "conversations": [
                    {"from": "human", "value": "Rain?"},
                    {"from": "function_call", "value": json.dumps(CALL)},
                    {"from": "observation", "value": "wet"},
                    {"from": "gpt", "value": "Yes."},
                ],
                "tools": json.dumps([TOOLS[0]["function"]]),
            },
        ),
        Written(
            "prompt-completion",
            {"prompt": CALLED[:3], "completion": CALLED[3:], "tools": TOOLS},
            "last",
        ),
        Written(
            "preference",
            {
                "prompt": CALLED[:3],
                "chosen": CALLED[3:],
                "rejected": [{"role": "assistant", "content": "No."}],
                "tools": TOOLS,
            },
            "last",
        ),
        Written("feedback", {"messages": CALLED, "tools": TOOLS, "label": True}, "last"),
    ],
    ids=lambda written: written.format,
)
def test_each_format_with_tool_calls_gives_the_same_tokens(written: Written) -> None:
    ids, trained = tokens(
        Written("messages", {"messages": CALLED, "tools": TOOLS}), written.answers
    )
    their_ids, their_trained = tokens(written, written.answers)
    assert ids.tolist() == their_ids.tolist()
    assert trained.tolist() == their_trained.tolist()
    assert trained.any()
