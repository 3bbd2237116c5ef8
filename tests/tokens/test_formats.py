"""Rows of every format, and turns as other tools write them, come into one form with one mask."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_table import turns as said
from chat_tokenizers import train
from errors import refuses
from stored_templates import encode
from tunesmith.config.schema import Data, Source
from tunesmith.errors import DataError
from tunesmith.rows.detect import detect
from tunesmith.rows.formats import convert_row
from tunesmith.rows.samples import Completion, Conversation, Text
from tunesmith.rows.source.open_source import from_list
from tunesmith.tokens.encode import RowEncoder
from tunesmith.tokens.text import builtin_templates
from tunesmith.tokens.text.select_template import select_template
from tunesmith.tokens.text.template import TrainOn

Row = dict[str, Any]
CALL = {"name": "add", "arguments": {"a": 1, "b": 2}}
OPENAI = [{"type": "function", "function": CALL}]
TOOL = {"name": "add", "description": "adds", "parameters": {"type": "object"}}
WRAPPED = {"type": "function", "function": TOOL}
U, A = {"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "3"}
S = {"role": "system", "content": "S"}
CALLING = {"role": "assistant", "content": "", "tool_calls": OPENAI}
CALLING_TWICE = {**CALLING, "tool_calls": OPENAI * 2}
RESULT = {"role": "tool", "content": "3"}


def read(row: Row, form: Any = "messages", system: str | None = None, **columns: str) -> Any:
    source = Source(source="x", format=form, columns=columns)
    return convert_row(row, source, where="x row 1", system=system).samples[0]


def turns(*pairs: tuple[str, Any], **columns: Any) -> Row:
    return {"conversations": [{"from": who, "value": value} for who, value in pairs], **columns}


def test_alpaca() -> None:
    both = {"instruction": "go", "output": "ok"}
    for more, messages in (
        ({"input": None}, said("go", "ok")),
        ({"input": "far"}, said("go\nfar", "ok")),
        ({"system": "S", "history": [["a", "b"]]}, [S, *said("a", "b", "go", "ok")]),
    ):
        sample = read({**both, **more}, "alpaca")
        assert sample.messages == messages
        alone = ("go", more.get("input") or "", "ok")
        assert sample.instruction == (alone if len(messages) == 2 else None)


def parts(*pairs: tuple[str, str]) -> Row:
    return {"role": "assistant", "content": [{"type": kind, "value": text} for kind, text in pairs]}


CALL_TEXT = {"name": "add", "arguments": json.dumps(CALL["arguments"])}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (json.dumps([U, A]), [U, A]),
        ([{**U, "role": "User"}, {**A, "role": "ASSISTANT"}], [U, A]),
        ([{"role": "developer", "content": "S"}, U, A], [S, U, A]),
        ([U, {**A, "name": None, "tool_calls": None, "refusal": None}], [U, A]),
        ([U, parts(("reasoning", "hm"), ("text", "3"))], [U, {**A, "reasoning_content": "hm"}]),
        (
            [U, {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL_TEXT}]}, RESULT, A],
            [U, CALLING, RESULT, A],
        ),
        ([U, parts(*[("tool_call", json.dumps(CALL))] * 2), RESULT, RESULT, A], [U, CALLING_TWICE, RESULT, RESULT, A]),
    ],
)  # fmt: skip
def test_messages(given: Any, expected: list[Row]) -> None:
    assert read({"messages": given}, "messages").messages == expected


def test_sharegpt() -> None:
    row = turns(("user", "1 + 2?"), ("assistant", "3"), system="S")
    assert read(row, "sharegpt").messages == [S, U, A]
    asked, ended = ("human", "1 + 2?"), [("observation", "3"), ("gpt", "3")]
    calls = [("function_call", json.dumps(CALL_TEXT)), ("tool_call", [CALL])]
    row = turns(("system", "S"), asked, *calls, *ended, system=None)
    assert read(row, "sharegpt").messages == [S, U, CALLING_TWICE, RESULT, A]


def test_completions_and_texts() -> None:
    row = {"prompt": "2 +", "completion": " 2"}
    assert read(row, "prompt-completion") == Completion("2 +", " 2")
    row = {"prompt": [U, A, U], "completion": [A]}
    assert read(row, "prompt-completion") == Conversation([U, A, U, A], prompt_messages=3)
    assert read({"body": "héllo 🎉"}, "text", text="body") == Text("héllo 🎉")


def test_prompts_have_an_empty_answer() -> None:
    assert read({"prompt": "2 + 2?", "target": 4}, "prompt") == Completion("2 + 2?", "", None)
    empty = {"role": "assistant", "content": ""}
    chat = read({"prompt": [S, U], "target": 4}, "prompt")
    assert (chat.messages, chat.prompt_messages) == ([S, U, empty], 2)
    with_tools = read({"prompt": "2 + 2?", "tools": [WRAPPED]}, "prompt")
    assert with_tools.messages[-1] == empty
    with refuses(DataError, where="x row 1"):
        read({"prompt": [U, A]}, "prompt")


def test_a_system_message_for_conversations_without_one() -> None:
    assert read({"messages": [U, A]}, "messages", "S").messages == [S, U, A]
    own = {"role": "system", "content": "own"}
    assert read({"messages": [own, U, A]}, "messages", "S").messages == [own, U, A]
    row = {"prompt": [U, A, U], "completion": [A]}
    assert read(row, "prompt-completion", "S").prompt_messages == 4
    row = {"prompt": "a", "completion": "b"}
    assert read(row, "prompt-completion", "S") == Completion("a", "b", "S")
    with refuses(DataError, where="x row 1, message 2"):  # the row's own count
        read({"messages": [U, RESULT, A]}, "messages", "S")


def chat(*messages: Row, **columns: Any) -> Row:
    return {"messages": [*messages], **columns}


def answered(**keys: Any) -> Row:
    """A question and an answer with more keys."""
    return chat(U, {**A, **keys})


def unread(row: Row, form: Any = "messages") -> set[str]:
    names: set[str] = set()
    convert_row(row, Source(source="x", format=form), where="x row 1", unread=names)
    return names


def turned(row: Row) -> Row:
    """The same row in ShareGPT's form."""
    names = {"role": "from", "content": "value"}
    turns = [{names.get(k, k): v for k, v in message.items()} for message in row["messages"]]
    return {**{k: v for k, v in row.items() if k != "messages"}, "conversations": turns}


def read_both(row: Row) -> Any:
    """A sample that is the same in both forms."""
    sample = read(row)
    assert read(turned(row), "sharegpt") == sample
    return sample


# --- marks of untrained turns

TRAINED = (
    *("train", "trainable", "train_on_turn", "training", "learn", "loss", "loss_mask", "weight"),
    *("loss_weight", "trained", "compute_loss", "Train"),
)
UNTRAINED = ("masked", "mask", "ignore", "exclude_from_loss")


def test_a_turn_with_a_mark_is_context_only() -> None:
    for name in (*TRAINED, *UNTRAINED):
        is_positive = name in TRAINED
        for value in (False, 0, 0.0) if is_positive else (True,):
            sample = read_both(chat(U, {**A, name: value}, U, A))
            assert sample.untrained == {1}
            assert sample.messages == [U, A, U, A]
        assert read(answered(**{name: is_positive})).untrained == frozenset()


def test_a_mark_that_cannot_be_followed_is_refused() -> None:
    part = {"begin_offset": 0, "end_offset": 1, "train": False}
    marks: list[Row] = [
        {"loss": 0.5},
        {"mask": 1},
        {"trainable": "no"},
        {"train": True, "weight": 0},
    ]
    for mark in (*marks, {"train_detail": [part]}):
        with refuses(DataError, where="x row 1, message 2", names=[*mark]):
            read(answered(**mark))


def test_a_mark_of_the_row_that_cannot_be_followed_is_refused() -> None:
    for name, value in (
        ("loss_mask", "[0, 1]"),
        ("weight", 0.5),
        ("train", False),
        ("masked", True),
    ):
        for row, form in (
            (chat(U, A, U, A), "messages"),
            ({"instruction": "1 + 2?", "output": "3"}, "alpaca"),
        ):
            with refuses(DataError, where="x row 1", names=[name], fix=[name]):
                read({**row, name: value}, form)
    for marks in ({"weight": 1.0}, {"train": True}, {"masked": False}, {"loss": None}):
        assert unread(chat(U, A, **marks)) == set(), "it says nothing new"


# --- keys that nothing reads


def test_what_nothing_reads_is_named() -> None:
    turn = {**A, "grade": 3, "id": 7, "timestamp": "now", "refusal": None, "audio": []}
    row = chat(U, turn, score=2, source="web", notes="", prompt="1 + 2?")
    assert unread(row) == {"message.grade", "score"}, "a prompt that is the first question"


# --- thoughts


def test_thoughts_have_many_names() -> None:
    for key in ("thinking", "thought", "reasoning", "reasoning_content", "reasoningContent"):
        assert read_both(answered(**{key: "hm"})).messages == [U, {**A, "reasoning_content": "hm"}]
    hm, text = {"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "3"}
    row = answered(content=[hm, text], reasoning="hm\n")
    assert read(row).messages == [U, {**A, "reasoning_content": "hm"}], "one under two names"
    with refuses(DataError, names=["thinking", "reasoning"]):
        read(answered(thinking="hm", reasoning="oh"))
    with refuses(DataError, names=["user"]):
        read(chat({**U, "thinking": "hm"}, A))


# --- calls


def test_calls_have_many_forms() -> None:
    result = {"role": "function", "name": "add", "content": "3"}
    expected = [U, CALLING, {"role": "tool", "name": "add", "content": "3"}, A]
    arguments = CALL["arguments"]
    for turn in (
        {**A, "content": None, "function_call": CALL_TEXT},
        {**A, "content": "", "tool_calls": json.dumps([CALL])},
        {**A, "content": "", "tool_calls": [{"name": "add", "parameters": arguments}]},
        {"role": "function_call", "content": json.dumps(CALL)},
        {**A, "content": [{"type": "tool_use", "name": "add", "input": arguments}]},
    ):
        assert read(chat(U, turn, result, A)).messages == expected


def test_calls_of_a_sharegpt_turn() -> None:
    row = chat(U, {**CALLING, "tool_calls": [CALL]}, {"role": "tool", "content": "3"}, A)
    assert read_both(row).messages[:2] == [U, CALLING]
    human = turned(chat(U))["conversations"][0]
    made = {"from": "function_call", "value": json.dumps(CALL)}
    with refuses(DataError, where="x row 1, turn 3"):
        read({"conversations": [human, made, {**made, "train": False}]}, "sharegpt")
    with refuses(DataError, names=["function_call"]):
        read(answered(tool_calls=[CALL], function_call=CALL))
    # Consecutive turns are calls of one answer, which has the mark of the first.
    mark = {"train": False}
    sample = read({"conversations": [human, {**made, **mark}, {**made, **mark}]}, "sharegpt")
    assert sample.messages == [U, {**CALLING, "tool_calls": OPENAI * 2}]
    assert sample.untrained == {1}


def test_tools_have_many_forms() -> None:
    for columns in (
        {"functions": [TOOL]},
        {"tools": [{"name": "add", "description": "adds", "input_schema": TOOL["parameters"]}]},
        {"tools": [{**WRAPPED, "function": {**TOOL, "strict": None}}]},
        {"tools": json.dumps([TOOL])},
    ):
        assert read_both(chat(U, A, **columns)).tools == [WRAPPED]
    for tools in (None, "", "[]", "null", []):
        assert read_both(chat(U, A, tools=tools)).tools is None
    with refuses(DataError, names=["tools", "functions"]):
        read(chat(U, A, functions=[TOOL], tools=[{"name": "other"}]))
    with refuses(DataError, where="x row 1", names=["toolSpec"], fix=["parameters"]):
        read(chat(U, A, functions=[{"toolSpec": CALL}]))


def test_calls_as_json_text_beside_tools() -> None:
    row = {"query": "1 + 2?", "answers": json.dumps([CALL]), "tools": json.dumps([TOOL])}
    columns = {"prompt": "query", "completion": "answers"}
    answer = read(row, "prompt-completion", **columns).messages[-1]
    assert (answer["content"], answer["tool_calls"][0]["function"]) == ("", CALL)


def test_results_stand_in_the_order_of_their_calls() -> None:
    calling = {**CALLING, "tool_calls": [{**OPENAI[0], "id": name} for name in ("a", "b")]}
    results = [{"role": "tool", "content": name, "tool_call_id": name} for name in ("b", "a")]
    assert read(chat(U, calling, *results, A)).messages[2:] == [*results[::-1], A]
    parts = [{"type": "tool_result", "tool_use_id": name, "content": name} for name in ("b", "a")]
    messages = read(chat(U, calling, {"role": "user", "content": parts}, A)).messages
    assert [message["content"] for message in messages[2:]] == ["a", "b", "3"]


# --- parts of other interfaces


def test_blocks_of_anthropic() -> None:
    blocks = [
        {"type": "thinking", "thinking": "hm", "signature": "x"},
        {"type": "text", "text": "Let me add."},
        {"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 1, "b": 2}},
    ]
    content = [{"type": "text", "text": "3"}]
    result = {"type": "tool_result", "tool_use_id": "c1", "content": content}
    row = chat(
        {"role": "user", "content": [{"type": "text", "text": "1 + 2?"}]},
        {"role": "assistant", "content": blocks},
        {"role": "user", "content": [result, {"type": "text", "text": "And?"}]},
        A,
        system=[{"type": "text", "text": "S"}],
    )
    call = {"type": "function", "id": "c1", "function": CALL}
    assert read(row).messages == [
        S,
        U,
        {**A, "content": "Let me add.", "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
        {"role": "user", "content": "And?"},
        A,
    ]


def detected(row: Row) -> tuple[Any, ...]:
    """The samples of a row, all of which something reads."""
    found = detect(from_list([row]), Source(source="x", format="messages"))
    source = Source(source="x", format=found.format, columns=found.columns)
    names: set[str] = set()
    samples = convert_row(row, source, where="x row 1", unread=names).samples
    assert names == set()
    return samples


def test_messages_of_other_interfaces() -> None:
    calling = {**CALLING, "tool_calls": [{**OPENAI[0], "id": "c1"}]}
    result = {"role": "tool", "content": "3", "tool_call_id": "c1"}
    parts = [{"type": "output_text", "text": "3"}]
    output = {"type": "message", "role": "assistant", "content": parts}
    columns = {
        "role": ["user", "assistant", "tool", "assistant"],
        "content": ["1 + 2?", "", "3", "3"],
        "tool_calls": [[], calling["tool_calls"], [], None],
        "tool_call_id": [None, None, "c1", None],
    }
    for row in (
        {"input": [U, {**calling, "content": None}, result], "output": [output]},  # Responses
        {"messages": columns},  # lists of Arrow
    ):
        assert detected(row)[0].messages == [U, calling, result, A]


def test_what_is_not_read_of_other_interfaces_is_named() -> None:
    for messages, name in (
        ([U, {"type": "function_call", "name": "f", "arguments": "{}"}, A], "function_call"),
        ([{"role": "user", "content": [{"text": "A?", "image": {"url": "a.png"}}]}, A], "image"),
        ([U, {**A, "content": [{"type": "refusal", "refusal": "No."}]}], "refusal"),
        ([{"role": "user", "parts": [{"text": "x"}]}, A], "parts"),
        ([U, {**A, "content": [{"toolUse": {"name": "f"}}]}], "toolUse"),
    ):
        with refuses(DataError, names=[name]):
            read(chat(*messages))


# --- system


def test_a_system_column_beside_messages_or_a_prompt() -> None:
    for system in (
        {"system": "S"},
        {"system_prompt": "S"},
        {"instructions": "S"},
        {"system": [{"type": "text", "text": "S"}]},
    ):
        assert read_both(chat(U, A, **system)).messages == [S, U, A]
        assert detected(chat(U, A, **system))[0].messages == [S, U, A]
    row = {"prompt": "1 + 2?", "completion": "3", "system": "S"}
    assert read(row, "prompt-completion") == Completion("1 + 2?", "3", "S")
    row = {"prompt": [U], "completion": [A], "system_prompt": "S"}
    expected = Conversation([S, U, A], prompt_messages=2)
    assert read(row, "prompt-completion") == expected


def test_two_system_messages_are_one_or_refused() -> None:
    assert read(chat(S, U, A, system="S\n")).messages == [S, U, A]
    with refuses(DataError, names=["system"]):
        read(chat(S, U, A, system="T"))
    row = chat(U, A, system="S", system_prompt="T")
    with refuses(DataError, names=["system", "system_prompt"], fix=["columns:"]):
        read(row)


# --- JSON text, and texts that are none


def test_json_text_of_messages_is_read() -> None:
    expected = Conversation([U, A], prompt_messages=1)
    for row, form in (
        ({"prompt": json.dumps([U]), "completion": json.dumps([A])}, "prompt-completion"),
        ({"chosen": json.dumps([U, A]), "rejected": json.dumps([U, {**A, "content": "4"}])}, "preference"),
        ({"prompt": json.dumps(turned(chat(U))["conversations"]), "completion": "3", "label": True}, "feedback"),
    ):  # fmt: skip
        assert read(row, form) == expected
    with refuses(DataError, names=["prompt", "Python"]):
        read({"prompt": str([U]), "completion": "3"}, "prompt-completion")


def test_a_text_about_json_stays_a_text() -> None:
    # Backtracking through blanks would take minutes.
    for text in ('[{"a": 1}]', '{"role": "user"}', '{"value": 3', "{'from'", " " * 100_000 + "x"):
        for prompt, completion in ((text, "ok"), ("q", text)):
            row = {"prompt": prompt, "completion": completion}
            assert read(row, "prompt-completion") == Completion(prompt, completion)


# --- columns that serve twice


def test_a_column_that_serves_as_another_is_read_once() -> None:
    """`input` is the question here: read again under its own name, it would be asked twice."""
    row = {"input": "q", "output": "c", "system": "s"}
    assert [m["content"] for m in read(row, "alpaca", instruction="input").messages] == ["s", "q", "c"]  # fmt: skip
    row = {"input": "q", "output": "c", "label": 1}
    assert read(row, "feedback", prompt="input", completion="output") == Completion("q", "c")


# --- one conversation in each format

CHATML = (Path(__file__).parent / "templates" / "chatml.jinja").read_text(encoding="utf-8")
PROFILE = settings(derandomize=True, deadline=None, database=None, max_examples=20)

EDGE = st.sampled_from(("", " ", "\n", "\n\n  ", "\t", "\u00a0", "\r\n"))
CORES = (
    *("It is so.", "{{ name }} {% if x %}", '{"role": "user", "content": "no turn"}'),
    *("<think>\nHm.\n</think>\n\nSo.", "<|im_end|>", "e\u0301 这 🎉", "a\nb"),
)
CORE = st.sampled_from(CORES) | st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=8)
TEXT = st.builds(lambda before, core, after: f"{before}x{core}{after}", EDGE, CORE, EDGE)


class Written(NamedTuple):
    """A row, and which of its answers that format trains on."""

    format: str
    row: Row
    answers: TrainOn = "response"


@cache
def encoder(form: str, train_on: TrainOn) -> RowEncoder:
    source = Source(source="rows.jsonl", format=form)  # type: ignore[arg-type]
    tokenizer = copy.deepcopy(train("bytes", ("<|im_start|>", "<|im_end|>"), False))
    tokenizer.chat_template = builtin_templates.with_tools(CHATML)
    data = Data(train=(source,))
    return RowEncoder(select_template(data, tokenizer, {2}), source, None, train_on)


def tokens(written: Written, train_on: TrainOn) -> tuple[Any, Any]:
    """Token ids and mask; of a pair those of the chosen answer."""
    example = encode(encoder(written.format, train_on), written.row).example
    size = example.sequences[0] if example.sequences else len(example.ids)
    return example.ids[:size].tolist(), example.trained[:size].tolist()


def agree(written: list[Written]) -> None:
    """A last answer alone is trained on, whatever the recipe says, where the rest is its prompt."""
    first, *others = written
    for other in others:
        theirs = tokens(other, other.answers)
        assert theirs == tokens(first, other.answers), other
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
def test_each_format_gives_the_tokens(system: str | None, exchange: list[tuple[str, str]]) -> None:
    agree(every_format(system, exchange))


@pytest.mark.slow
def test_each_format_with_tool_calls_gives_the_same_tokens() -> None:
    tools = [WRAPPED]
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
