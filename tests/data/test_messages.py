"""Turns as servers and other tools write them: marks, thoughts, calls, tools and system messages."""

from __future__ import annotations

import json
from typing import Any

import pytest

from errors import refuses
from tunesmith.config.schema import Source
from tunesmith.data.rows.detect import detect
from tunesmith.data.rows.formats import convert_row
from tunesmith.data.rows.samples import Completion, Conversation
from tunesmith.data.source.open_source import from_list
from tunesmith.errors import DataError

Row = dict[str, Any]
U, A = {"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "3"}
S = {"role": "system", "content": "S"}
CALL = {"name": "add", "arguments": {"a": 1, "b": 2}}
CALLS = [{"type": "function", "function": CALL}]
CALLING = {"role": "assistant", "content": "", "tool_calls": CALLS}
PARAMETERS = {"type": "object"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": PARAMETERS}}


def read(row: Row, form: Any = "messages", **columns: str) -> Any:
    source = Source(source="x", format=form, columns=columns)
    return convert_row(row, source, where="x row 1").samples[0]


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


@pytest.mark.parametrize("name", [*TRAINED, *UNTRAINED])
def test_a_turn_with_a_mark_is_context_only(name: str) -> None:
    is_positive = name in TRAINED
    values: list[Any] = [False, 0, 0.0] if is_positive else [True]
    for value in [*values, *([1] if name == "masked" else [])]:
        sample = read_both(chat(U, {**A, name: value}, U, A))
        assert sample.untrained == {1}
        assert sample.messages == [U, A, U, A]
    assert read(answered(**{name: is_positive})).untrained == frozenset()


@pytest.mark.parametrize(
    "mark",
    [
        {"loss": 0.5},
        {"mask": 1},
        {"trainable": "no"},
        {"train": True, "weight": 0},
        {"masked": True, "loss": 1},
        {"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]},
        {"weight": [0]},
    ],
    ids=str,
)
def test_a_mark_that_cannot_be_followed_is_refused(mark: Row) -> None:
    with refuses(DataError, where="x row 1, message 2", names=[*mark]):
        read(answered(**mark))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loss_mask", [0, 1]),
        ("loss_mask", "[0, 1]"),
        ("weight", 0.5),
        ("weight", "0.5"),
        ("sample_weight", 2),
        ("train", False),
        ("train", "False"),
        ("masked", True),
    ],
)
def test_a_mark_of_the_row_that_cannot_be_followed_is_refused(name: str, value: Any) -> None:
    for row, form in (
        (chat(U, A, U, A), "messages"),
        ({"prompt": "1 + 2?", "completion": "3"}, "prompt-completion"),
        ({"instruction": "1 + 2?", "output": "3"}, "alpaca"),
    ):
        with refuses(DataError, where="x row 1", names=[name], fix=[name]):
            read({**row, name: value}, form)


@pytest.mark.parametrize(
    "marks", [{"weight": 1.0}, {"train": True}, {"masked": False}, {"loss": None}]
)
def test_a_mark_of_the_row_that_says_nothing_new(marks: Row) -> None:
    assert unread(chat(U, A, **marks)) == set()


# --- keys that nothing reads


def test_what_nothing_reads_is_named() -> None:
    turn = {**A, "grade": 3, "id": 7, "timestamp": "now", "refusal": None, "audio": []}
    row = chat(U, turn, score=2, source="web", notes="", prompt="1 + 2?")
    assert unread(row) == {"message.grade", "score"}, "a prompt that is the first question"
    assert unread(turned(chat(U, turn)), "sharegpt") == {"turn.grade"}
    assert unread(answered(tool_calls=[{**CALL, "strict": True}])) == {"call.strict"}
    call = {"type": "function", "function": {"name": "now", "arguments": ""}, "result": "r"}
    assert read(answered(tool_calls=[call])).messages[-1]["tool_calls"][0]["function"]["arguments"] == {}  # fmt: skip
    assert unread(answered(tool_calls=[call])) == {"call.result"}


# --- thoughts


@pytest.mark.parametrize(
    "key",
    ["thinking", "thought", "thoughts", "reasoning", "reasoning_content", "Thinking", "reasoningContent"],
)  # fmt: skip
def test_thoughts_have_many_names(key: str) -> None:
    assert read_both(answered(**{key: "hm"})).messages == [U, {**A, "reasoning_content": "hm"}]


def test_one_thought_under_two_names_is_one() -> None:
    hm, text = {"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "3"}
    row = answered(content=[hm, text], reasoning="hm\n")
    assert read(row).messages == [U, {**A, "reasoning_content": "hm"}]
    two = [hm, {**hm, "thinking": "oh"}, text]
    assert read(answered(content=two)).messages == [U, {**A, "reasoning_content": "hm\noh"}]
    with refuses(DataError, names=["thinking", "reasoning"]):
        read(answered(thinking="hm", reasoning="oh"))
    with refuses(DataError, names=["user"]):
        read(chat({**U, "thinking": "hm"}, A))


# --- calls


@pytest.mark.parametrize(
    "turn",
    [
        {**A, "content": None, "function_call": {"name": "add", "arguments": '{"a": 1, "b": 2}'}},
        {**A, "content": "", "function_call": CALL, "tool_calls": None},
        {**A, "content": "", "tool_calls": json.dumps([CALL])},
        {**A, "content": "", "tool_calls": [{"name": "add", "parameters": CALL["arguments"]}]},
        {"role": "function_call", "content": json.dumps(CALL)},
        {**A, "content": [{"type": "tool_use", "name": "add", "input": CALL["arguments"]}]},
    ],
)
def test_calls_have_many_forms(turn: Row) -> None:
    result = {"role": "function", "name": "add", "content": "3"}
    expected = [U, CALLING, {"role": "tool", "name": "add", "content": "3"}, A]
    assert read(chat(U, turn, result, A)).messages == expected


def test_calls_of_a_sharegpt_turn() -> None:
    row = chat(U, {**CALLING, "tool_calls": [CALL]}, {"role": "tool", "content": "3"}, A)
    assert read_both(row).messages[:2] == [U, CALLING]
    human, made = turned(chat(U))["conversations"][0], {"from": "function_call", "value": json.dumps(CALL)}  # fmt: skip
    for place, turns in (
        (2, [human, {"from": "gpt", "value": "", "tool_calls": [{}]}]),
        # A second call with a mark or a thought of its own.
        (3, [human, made, {**made, "train": False}]),
        (3, [human, made, {**made, "reasoning": "T"}]),
    ):
        with refuses(DataError, where=f"x row 1, turn {place}"):
            read({"conversations": turns}, "sharegpt")
    with refuses(DataError, names=["function_call"]):
        read(answered(tool_calls=[CALL], function_call=CALL))
    # Consecutive turns are calls of one answer, which has the mark of the first.
    mark = {"train": False}
    sample = read({"conversations": [human, {**made, **mark}, {**made, **mark}]}, "sharegpt")
    assert sample.messages == [U, {**CALLING, "tool_calls": CALLS * 2}]
    assert sample.untrained == {1}


def test_tools_have_many_forms() -> None:
    for columns in (
        {"functions": [TOOL["function"]]},
        {"tools": [{"name": "add", "input_schema": PARAMETERS}]},
        {"tools": [{**TOOL, "function": {**TOOL["function"], "strict": None}}]},
    ):
        assert read(chat(U, A, **columns)).tools == [TOOL]
    sample = read(
        {"prompt": "1 + 2?", "completion": "3", "tools": [TOOL["function"]]}, "prompt-completion"
    )
    assert (sample.messages, sample.prompt_messages, sample.tools) == ([U, A], 1, [TOOL])
    with refuses(DataError, names=["tools", "functions"]):
        read(chat(U, A, functions=[TOOL["function"]], tools=[{"name": "other"}]))
    for column, tool, name in (
        ("tools", {"functionDeclarations": [CALL]}, "functionDeclarations"),
        ("functions", {"toolSpec": CALL}, "toolSpec"),
    ):
        with refuses(DataError, where="x row 1", names=[name], fix=["parameters"]):
            read(chat(U, A, **{column: [tool]}))


def test_calls_as_json_text_beside_tools() -> None:
    row = {"query": "1 + 2?", "answers": json.dumps([CALL]), "tools": json.dumps([TOOL["function"]])}  # fmt: skip
    columns = {"prompt": "query", "completion": "answers"}
    answer = read(row, "prompt-completion", **columns).messages[-1]
    assert (answer["content"], answer["tool_calls"][0]["function"]) == ("", CALL)
    row["answers"] = '{"sum": 3}'
    assert read(row, "prompt-completion", **columns).messages[-1]["content"] == row["answers"]


def test_results_stand_in_the_order_of_their_calls() -> None:
    calling = {**CALLING, "tool_calls": [{**CALLS[0], "id": name} for name in ("a", "b")]}
    results = [{"role": "tool", "content": name, "tool_call_id": name} for name in ("b", "a")]
    assert read(chat(U, calling, *results, A)).messages[2:] == [*results[::-1], A]
    # Results that name no call, or one that is not there, stay as they are.
    for unnamed in ({"role": "tool", "content": "b"}, {**results[0], "tool_call_id": "c"}):
        messages = read(chat(U, calling, unnamed, results[1], A)).messages
        assert [message["content"] for message in messages[2:]] == ["b", "a", "3"]
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


Q, ANSWER = {"role": "user", "content": "A?"}, {"role": "assistant", "content": "10"}
GET = {"type": "function", "id": "c1", "function": {"name": "get", "arguments": {"key": "A"}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [GET]}
RESULT = {"role": "tool", "content": '{"v": 10}', "tool_call_id": "c1"}
OUTPUT = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "10"}]}  # fmt: skip
OTHER_FORMS: dict[str, Row] = {
    "Responses' input and output": {
        "input": [Q, {**CALLED, "content": None}, RESULT],
        "output": [OUTPUT],
    },
    "lists of Arrow": {
        "messages": {
            "role": ["user", "assistant", "tool", "assistant"],
            "content": ["A?", "", '{"v": 10}', "10"],
            "tool_calls": [[], CALLED["tool_calls"], [], None],
            "tool_call_id": [None, None, "c1", None],
        }
    },
}


def detected(row: Row) -> tuple[Any, ...]:
    """The samples of a row, all of which something reads."""
    found = detect(from_list([row]), Source(source="x", format="messages"))
    source = Source(source="x", format=found.format, columns=found.columns)
    names: set[str] = set()
    samples = convert_row(row, source, where="x row 1", unread=names).samples
    assert names == set()
    return samples


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_messages_of_other_interfaces(name: str) -> None:
    assert detected(OTHER_FORMS[name])[0].messages == [Q, CALLED, RESULT, ANSWER]


def test_pairs_of_openai() -> None:
    prompt = {"messages": [U], "tools": CALLS, "parallel_tool_calls": True}
    other = {**A, "content": "4"}
    row = {"input": prompt, "preferred_output": [A], "non_preferred_output": [other]}
    chosen, rejected = detected(row)
    assert (chosen.messages, rejected.messages) == ([U, A], [U, other])
    assert chosen.tools == rejected.tools == prompt["tools"]


@pytest.mark.parametrize(
    ("messages", "name"),
    [
        ([U, {"type": "function_call", "name": "f", "arguments": "{}"}, A], "function_call"),
        ([{"type": "human", "data": {"content": "A?"}}, A], "human"),
        ([{"role": "user", "content": [{"text": "A?", "image": {"url": "a.png"}}]}, A], "image"),
        ([{**U, "images": ["a.png"]}, A], "images"),
        ([U, {**A, "content": [{"type": "refusal", "refusal": "No."}]}], "refusal"),
        ([U, {**A, "content": [{"type": "redacted_thinking", "data": "x"}]}], "redacted_thinking"),
        ([{"role": "user", "content": [{"document": {"name": "x"}}]}, A], "document"),
        ([{"role": "user", "parts": [{"text": "x"}]}, A], "content"),
        ([U, {**A, "content": [{"toolUse": {"name": "f"}}]}], "toolUse"),
        ([U, {**A, "content": [None, 5]}], "content is null"),
    ],
)
def test_what_is_not_read_of_other_interfaces_is_named(messages: list[Row], name: str) -> None:
    with refuses(DataError, names=[name]):
        read(chat(*messages))


@pytest.mark.parametrize("behind", [{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "B"}])  # fmt: skip
def test_parts_in_an_order_that_no_template_writes(behind: Row) -> None:
    first = {"type": "tool_use", "name": "f", "input": {}}
    if behind["type"] == "thinking":
        first = {"type": "text", "text": "A"}
    with refuses(DataError, where="x row 1, message 2"):
        read(answered(content=[first, behind]))


# --- system


@pytest.mark.parametrize(
    "system",
    [
        {"system": "S"},
        {"system_prompt": "S"},
        {"instructions": "S"},
        {"system": [{"type": "text", "text": "S"}]},
        {"system": {"type": "text", "text": "S"}},
    ],
)
def test_a_system_column_beside_messages(system: Row) -> None:
    assert read_both(chat(U, A, **system)).messages == [S, U, A]
    assert detected(chat(U, A, **system))[0].messages == [S, U, A]
    assert detected({"input": [U], "output": [A], "instructions": "S"})[0].messages == [S, U, A]


def test_a_system_column_beside_prompt_and_completion() -> None:
    row = {"prompt": "1 + 2?", "completion": "3", "system": "S"}
    assert read(row, "prompt-completion") == Completion("1 + 2?", "3", "S")
    expected = Conversation([S, U, A], prompt_messages=2)
    row = {"prompt": [U], "completion": [A], "system_prompt": "S"}
    assert read(row, "prompt-completion") == expected
    assert read({"prompt": [S, U], "completion": [A]}, "prompt-completion") == expected


def test_two_system_messages_are_one_or_refused() -> None:
    assert read(chat(S, U, A, system="S\n")).messages == [S, U, A]
    with refuses(DataError, names=["system"]):
        read(chat(S, U, A, system="T"))
    row = chat(U, A, system="S", system_prompt="T")
    with refuses(DataError, names=["system", "system_prompt"], fix=["columns:"]):
        read(row)
    assert read(row, system="system_prompt").messages[0]["content"] == "T"


# --- JSON text, and texts that are none


def test_json_text_of_messages_is_read() -> None:
    expected = Conversation([U, A], prompt_messages=1)
    for row, form in (
        ({"prompt": json.dumps([U]), "completion": json.dumps([A])}, "prompt-completion"),
        ({"prompt": json.dumps([U]), "completion": json.dumps(A)}, "prompt-completion"),
        ({"chosen": json.dumps([U, A]), "rejected": json.dumps([U, {**A, "content": "4"}])}, "preference"),
        ({"prompt": json.dumps(turned(chat(U))["conversations"]), "completion": "3", "label": True}, "feedback"),
    ):  # fmt: skip
        assert read(row, form) == expected
    with refuses(DataError, names=["prompt", "Python"]):
        read({"prompt": str([U]), "completion": "3"}, "prompt-completion")


@pytest.mark.parametrize(
    "text",
    ['[{"a": 1}]', '{"role": "user"}', '[{"role": "CEO"}]', '{"value": 3', "[1]", "{'from'"],
)
def test_a_text_about_json_stays_a_text(text: str) -> None:
    for prompt, completion in ((text, "ok"), ("q", text)):
        row = {"prompt": prompt, "completion": completion}
        assert read(row, "prompt-completion") == Completion(prompt, completion)


def test_a_text_that_begins_with_many_blanks() -> None:
    """Backtracking would take minutes."""
    text = " " * 100_000 + "x"
    assert read({"prompt": text, "completion": "c"}, "prompt-completion").prompt == text


# --- columns that serve twice


def test_a_column_that_serves_as_another_is_read_once() -> None:
    """`input` is the question here: read again under its own name, it would be asked twice."""
    row = {"input": "q", "output": "c", "system": "s"}
    assert [m["content"] for m in read(row, "alpaca", instruction="input").messages] == ["s", "q", "c"]  # fmt: skip
    row = {"input": "q", "output": "c", "label": 1}
    assert read(row, "feedback", prompt="input", completion="output") == Completion("q", "c")
    row = {"input": "q", "chosen": "c", "rejected": "r", "label": 0}
    assert read(row, "preference", prompt="input").prompt == "q", "a label beside a pair"
    row = chat(U, A, question="q", completion="c", label=True)
    assert read(row, "feedback", prompt="question") == Completion("q", "c")
