"""Turns in the ways that servers and other tools write them: marks, thoughts, calls and system."""

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


def read(row: Row, form: Any = "messages", **columns: str) -> Any:
    source = Source(source="x", format=form, columns=columns)
    return convert_row(row, source, where="x row 1").samples[0]


def unread(row: Row, form: Any = "messages") -> set[str]:
    names: set[str] = set()
    convert_row(row, Source(source="x", format=form), where="x row 1", unread=names)
    return names


def as_turns(messages: list[Row]) -> list[Row]:
    """The same in ShareGPT's form."""
    turns = []
    for message in messages:
        others = {key: value for key, value in message.items() if key not in ("role", "content")}
        turns.append({"from": message["role"], "value": message["content"], **others})
    return turns


# --- marks of untrained turns

TRAINED = (
    *("train", "trainable", "train_on_turn", "training", "learn", "loss", "loss_mask", "weight"),
    *("loss_weight", "trained", "compute_loss", "Train"),
)
UNTRAINED = ("masked", "mask", "ignore", "exclude_from_loss")


@pytest.mark.parametrize("form", ["messages", "sharegpt"])
@pytest.mark.parametrize(
    "mark",
    [
        *({name: value} for name in TRAINED for value in (False, 0, 0.0)),
        *({name: True} for name in UNTRAINED),
        {"masked": 1},
    ],
    ids=str,
)
def test_a_turn_with_a_mark_is_context_only(mark: Row, form: str) -> None:
    messages = [U, {**A, **mark}, U, A]
    if form == "messages":
        sample = read({"messages": messages})
    else:
        sample = read({"conversations": as_turns(messages)}, "sharegpt")
    assert sample.untrained == {1}
    assert sample.messages == [U, A, U, A]


@pytest.mark.parametrize(
    "mark",
    [{name: True} for name in TRAINED] + [{name: False} for name in UNTRAINED],
    ids=str,
)
def test_a_turn_whose_mark_says_nothing_new_is_trained(mark: Row) -> None:
    assert read({"messages": [U, {**A, **mark}]}).untrained == frozenset()


@pytest.mark.parametrize(
    "mark",
    [
        {"loss": 0.5},
        {"mask": 1},
        {"mask": 0},
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
        read({"messages": [U, {**A, **mark}]})


@pytest.mark.parametrize(
    "marks",
    [
        {"loss_mask": [0, 1]},
        {"loss_mask": "[0, 1]"},
        {"weight": 0.5},
        {"weight": 0},
        {"weight": "0.5"},
        {"sample_weight": 2},
        {"train": False},
        {"train": "False"},
        {"masked": True},
    ],
    ids=str,
)
def test_a_mark_of_the_row_that_cannot_be_followed_is_refused(marks: Row) -> None:
    (name,) = marks
    for row, form in (
        ({"messages": [U, A, U, A]}, "messages"),
        ({"prompt": "1 + 2?", "completion": "3"}, "prompt-completion"),
        ({"instruction": "1 + 2?", "output": "3"}, "alpaca"),
    ):
        with refuses(DataError, where="x row 1", names=[name], fix=[name]):
            read({**row, **marks}, form)


@pytest.mark.parametrize(
    "marks", [{"weight": 1.0}, {"train": True}, {"masked": False}, {"loss": None}]
)
def test_a_mark_of_the_row_that_says_nothing_new(marks: Row) -> None:
    assert unread({"messages": [U, A], **marks}) == set()


# --- keys that nothing reads


def test_what_nothing_reads_is_named() -> None:
    turn = {**A, "grade": 3, "id": 7, "timestamp": "now", "refusal": None, "audio": []}
    row = {"messages": [U, turn], "score": 2, "source": "web", "notes": "", "prompt": "1 + 2?"}
    assert unread(row) == {"message.grade", "score"}, "a prompt that is the first question"
    call = {**CALL, "strict": True}
    row = {"messages": [U, {**A, "tool_calls": [call]}]}
    assert unread(row) == {"call.strict"}
    assert unread({"conversations": as_turns([U, turn])}, "sharegpt") == {"turn.grade"}


def test_harmless_keys_of_a_turn_are_no_harmless_columns() -> None:
    columns = ["file", "url", "subject", "title", "category", "tags"]
    marked = {**A, **dict.fromkeys(columns, "x")}
    assert unread({"messages": [U, marked]}) == {f"message.{name}" for name in columns}
    assert unread({"messages": [U, A], **dict.fromkeys(columns, "x"), "text": "x"}) == set()
    keys = ["turn", "parent", "cache_control"]
    assert unread({"messages": [U, A], **dict.fromkeys(keys, "x")}) == {*keys}
    assert unread({"messages": [U, {**A, **dict.fromkeys(keys, "x")}]}) == set()


def test_a_turn_with_an_image_is_refused() -> None:
    with refuses(DataError, names=["images"]):
        read({"messages": [{**U, "images": ["a.png"]}, A]})


# --- thoughts


@pytest.mark.parametrize("form", ["messages", "sharegpt"])
@pytest.mark.parametrize(
    "key", ["thinking", "thought", "thoughts", "reasoning", "reasoning_content"]
)
def test_thoughts_have_many_names(key: str, form: str) -> None:
    messages = [U, {**A, key: "hm"}]
    row = {"messages": messages}
    if form == "sharegpt":
        row = {"conversations": as_turns(messages)}
    assert read(row, form).messages == [U, {**A, "reasoning_content": "hm"}]


def test_one_thought_under_two_names_is_one() -> None:
    content = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "3"}]
    row = {"messages": [U, {"role": "assistant", "content": content, "reasoning": "hm\n"}]}
    assert read(row).messages == [U, {**A, "reasoning_content": "hm"}]
    with refuses(DataError, names=["thinking", "reasoning"]):
        read({"messages": [U, {**A, "thinking": "hm", "reasoning": "oh"}]})
    with refuses(DataError, names=["user"]):
        read({"messages": [{**U, "thinking": "hm"}, A]})


# --- calls


@pytest.mark.parametrize(
    "turn",
    [
        {**A, "content": None, "function_call": {"name": "add", "arguments": '{"a": 1, "b": 2}'}},
        {**A, "content": "", "function_call": CALL, "tool_calls": None},
        {**A, "content": "", "tool_calls": json.dumps([CALL])},
        {**A, "content": "", "tool_calls": [{"name": "add", "parameters": {"a": 1, "b": 2}}]},
        {"role": "function_call", "content": json.dumps(CALL)},
        {"role": "assistant", "content": [{"type": "tool_use", "name": "add", "input": CALL["arguments"]}]},
    ],
)  # fmt: skip
def test_calls_have_many_forms(turn: Row) -> None:
    result = {"role": "function", "name": "add", "content": "3"}
    expected = [U, CALLING, {"role": "tool", "name": "add", "content": "3"}, A]
    assert read({"messages": [U, turn, result, A]}).messages == expected


def test_calls_of_a_sharegpt_turn() -> None:
    calling = {**A, "content": "", "tool_calls": [CALL]}
    turns = as_turns([U, calling, {"role": "tool", "content": "3"}, A])
    assert read({"conversations": turns}, "sharegpt").messages[:2] == [U, CALLING]
    with refuses(DataError, where="x row 1, turn 2"):
        read(
            {"conversations": [turns[0], {"from": "gpt", "value": "", "tool_calls": [{}]}]},
            "sharegpt",
        )
    with refuses(DataError, names=["function_call"]):
        read({"messages": [U, {**A, "tool_calls": [CALL], "function_call": CALL}]})


def test_functions_are_tools() -> None:
    schema = {"name": "add", "parameters": {"type": "object"}}
    wrapped = [{"type": "function", "function": schema}]
    assert read({"messages": [U, A], "functions": [schema]}).tools == wrapped
    anthropic = {"name": "add", "input_schema": {"type": "object"}}
    assert read({"messages": [U, A], "tools": [anthropic]}).tools == wrapped
    with refuses(DataError, names=["tools", "functions"]):
        read({"messages": [U, A], "functions": [schema], "tools": [{"name": "other"}]})


def test_tools_beside_texts_are_kept() -> None:
    schema = {"name": "add", "parameters": {"type": "object"}}
    sample = read({"prompt": "1 + 2?", "completion": "3", "tools": [schema]}, "prompt-completion")
    assert sample.messages == [U, A]
    assert sample.prompt_messages == 1
    assert [tool["function"] for tool in sample.tools] == [schema]


def test_blocks_of_anthropic() -> None:
    blocks = [
        {"type": "thinking", "thinking": "hm", "signature": "x"},
        {"type": "text", "text": "Let me add."},
        {"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 1, "b": 2}},
    ]
    result = {
        "type": "tool_result",
        "tool_use_id": "c1",
        "content": [{"type": "text", "text": "3"}],
    }
    more = {"type": "text", "text": "And?"}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "1 + 2?"}]},
        {"role": "assistant", "content": blocks},
        {"role": "user", "content": [result, more]},
        A,
    ]
    call = {"type": "function", "id": "c1", "function": CALL}
    answer = {**A, "content": "Let me add.", "reasoning_content": "hm", "tool_calls": [call]}
    assert read({"system": [{"type": "text", "text": "S"}], "messages": messages}).messages == [
        S,
        U,
        answer,
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
        {"role": "user", "content": "And?"},
        A,
    ]
    with refuses(DataError, names=["redacted_thinking"]):
        read({"messages": [U, {**A, "content": [{"type": "redacted_thinking", "data": "x"}]}]})


# --- other interfaces

Q, ANSWER = {"role": "user", "content": "A?"}, {"role": "assistant", "content": "10"}
CALLED = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "id": "c1", "function": {"name": "get", "arguments": {"key": "A"}}}
    ],
}
RESULT = {"role": "tool", "content": '{"v": 10}', "tool_call_id": "c1"}
OTHER_FORMS: dict[str, Row] = {
    "Responses' input and output": {
        "input": [Q, {**CALLED, "content": None}, RESULT],
        "output": [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "10"}]}],
    },
    "lists of Arrow": {
        "messages": {
            "role": ["user", "assistant", "tool", "assistant"],
            "content": ["A?", "", '{"v": 10}', "10"],
            "tool_calls": [[], CALLED["tool_calls"], [], None],
            "tool_call_id": [None, None, "c1", None],
        }
    },
}  # fmt: skip


def detected(row: Row) -> tuple[Conversation, set[str]]:
    """The first conversation of a row, and what of it nothing reads."""
    source = Source(source="x", format="messages")
    found = detect(from_list([row]), source)
    source = Source(source="x", format=found.format, columns=found.columns)
    names: set[str] = set()
    sample = convert_row(row, source, where="x row 1", unread=names).samples[0]
    assert isinstance(sample, Conversation)
    return sample, names


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_messages_of_other_interfaces(name: str) -> None:
    sample, names = detected(OTHER_FORMS[name])
    assert sample.messages == [Q, CALLED, RESULT, ANSWER]
    assert names == set()


@pytest.mark.parametrize(
    "system",
    [
        {"system": [{"type": "text", "text": "S"}]},
        {"system": {"type": "text", "text": "S"}},
        {"instructions": "S"},
    ],
)
def test_system_messages_of_other_interfaces(system: Row) -> None:
    assert detected({"messages": [U, A], **system})[0].messages == [S, U, A]
    assert detected({"input": [U], "output": [A], "instructions": "S"})[0].messages == [S, U, A]


def test_pairs_of_openai() -> None:
    prompt = {
        "messages": [U],
        "tools": [{"type": "function", "function": CALL}],
        "parallel_tool_calls": True,
    }
    row = {
        "input": prompt,
        "preferred_output": [A],
        "non_preferred_output": [{**A, "content": "4"}],
    }
    found = detect(from_list([row]), Source(source="x", format="messages"))
    source = Source(source="x", format=found.format, columns=found.columns)
    names: set[str] = set()
    chosen, rejected = convert_row(row, source, where="x row 1", unread=names).samples
    assert isinstance(chosen, Conversation)
    assert isinstance(rejected, Conversation)
    assert (chosen.messages, rejected.messages[1]["content"]) == ([U, A], "4")
    assert chosen.tools == rejected.tools == prompt["tools"]
    assert names == set()


@pytest.mark.parametrize(
    ("messages", "name"),
    [
        ([U, {"type": "function_call", "name": "f", "arguments": "{}"}, A], "function_call"),
        ([{"type": "human", "data": {"content": "A?"}}, A], "human"),
        ([{"role": "user", "content": [{"text": "A?", "image": {"url": "a.png"}}]}, A], "image"),
        ([U, {**A, "content": [{"type": "refusal", "refusal": "No."}]}], "refusal"),
        ([{"role": "user", "content": [{"document": {"name": "x"}}]}, A], "document"),
        ([{"role": "user", "parts": [{"text": "x"}]}, A], "content"),
        ([U, {**A, "content": [{"toolUse": {"name": "f"}}]}], "toolUse"),
        ([U, {**A, "content": [None, 5]}], "content is null"),
    ],
)
def test_what_is_not_read_of_other_interfaces_is_named(messages: list[Row], name: str) -> None:
    with refuses(DataError, names=[name]):
        read({"messages": messages})


@pytest.mark.parametrize(
    ("column", "tools", "name"),
    [
        ("tools", [{"functionDeclarations": [CALL]}], "functionDeclarations"),
        ("functions", [{"toolSpec": CALL}], "toolSpec"),
    ],
)
def test_tools_of_other_interfaces_are_named(column: str, tools: Any, name: str) -> None:
    with refuses(DataError, where="x row 1", names=[name], fix=["parameters"]):
        read({"messages": [U, A], column: tools})


# --- system


@pytest.mark.parametrize("column", ["system", "system_prompt", "instructions"])
def test_a_system_column_beside_messages(column: str) -> None:
    row = {"messages": [U, A], column: "S"}
    assert read(row).messages == [S, U, A]
    row = {"conversations": as_turns([U, A]), column: "S"}
    assert read(row, "sharegpt").messages == [S, U, A]


def test_a_system_column_beside_prompt_and_completion() -> None:
    row = {"prompt": "1 + 2?", "completion": "3", "system": "S"}
    assert read(row, "prompt-completion") == Completion("1 + 2?", "3", "S")
    row = {"prompt": [U], "completion": [A], "system_prompt": "S"}
    expected = Conversation([S, U, A], prompt_messages=2)
    assert read(row, "prompt-completion") == expected
    assert read({"prompt": [S, U], "completion": [A]}, "prompt-completion") == expected


def test_two_system_messages_are_one_or_refused() -> None:
    assert read({"messages": [S, U, A], "system": "S\n"}).messages == [S, U, A]
    with refuses(DataError, names=["system"]):
        read({"messages": [S, U, A], "system": "T"})
    with refuses(DataError, names=["system", "system_prompt"], fix=["columns:"]):
        read({"messages": [U, A], "system": "S", "system_prompt": "T"})
    mapped = read({"messages": [U, A], "system": "S", "system_prompt": "T"}, system="system_prompt")
    assert mapped.messages[0]["content"] == "T"


# --- JSON text of messages


def test_json_text_of_messages_is_read() -> None:
    as_text = {"prompt": json.dumps([U]), "completion": json.dumps([A])}
    expected = Conversation([U, A], prompt_messages=1)
    assert read(as_text, "prompt-completion") == expected
    as_text = {"prompt": json.dumps([U]), "completion": json.dumps(A)}
    assert read(as_text, "prompt-completion") == expected
    pair = {"chosen": json.dumps([U, A]), "rejected": json.dumps([U, {**A, "content": "4"}])}
    assert read(pair, "preference") == expected
    labeled = {"prompt": json.dumps(as_turns([U])), "completion": "3", "label": True}
    assert read(labeled, "feedback") == expected
    with refuses(DataError, names=["prompt", "Python"]):
        read({"prompt": str([U]), "completion": "3"}, "prompt-completion")


@pytest.mark.parametrize(
    "text", ['[{"a": 1}]', '{"role": "user"}', '{"value": 3', "[1]", "{'from'"]
)
def test_a_text_about_json_stays_a_text(text: str) -> None:
    sample = read({"prompt": text, "completion": "ok"}, "prompt-completion")
    assert sample == Completion(text, "ok")


# --- columns and keys that serve twice, or half


def test_a_column_that_serves_as_another_is_read_once() -> None:
    """`input` is the question here: read again under its own name, it would be asked twice."""
    columns = {"instruction": "input"}
    answered = read({"input": "q", "output": "c", "system": "s"}, "alpaca", **columns)
    assert [m["content"] for m in answered.messages] == ["s", "q", "c"]
    labeled = read(
        {"input": "q", "output": "c", "label": 1}, "feedback", prompt="input", completion="output"
    )
    assert labeled == Completion("q", "c")
    pair = read({"input": "q", "chosen": "c", "rejected": "r"}, "preference", prompt="input")
    assert pair.prompt == "q"


def test_columns_that_are_named_win_over_messages() -> None:
    row = {"question": "q", "completion": "c", "label": True, "messages": [U, A]}
    assert read(row, "feedback", prompt="question") == Completion("q", "c")


@pytest.mark.parametrize("key", ["Thinking", "reasoningContent", "reasoning content"])
def test_a_thought_in_another_spelling(key: str) -> None:
    assert read({"messages": [U, {**A, key: "Hm."}]}).messages[-1]["reasoning_content"] == "Hm."


@pytest.mark.parametrize("more", [{"train": False}, {"reasoning": "T"}])
def test_a_second_call_with_a_mark_or_thought_of_its_own(more: Row) -> None:
    call = {"from": "function_call", "value": json.dumps(CALL)}
    turns = [{"from": "human", "value": "q"}, call, {**call, **more}]
    with refuses(DataError, where="x row 1, turn 3"):
        read({"conversations": turns}, "sharegpt")


@pytest.mark.parametrize(
    "parts",
    [
        [{"type": "text", "text": "A"}, {"type": "thinking", "thinking": "t"}],
        [{"type": "tool_use", "name": "f", "input": {}}, {"type": "text", "text": "B"}],
    ],
)
def test_parts_in_an_order_that_no_template_writes(parts: list[Row]) -> None:
    with refuses(DataError, where="x row 1, message 2"):
        read({"messages": [U, {"role": "assistant", "content": parts}]})


def test_two_thoughts_in_front_of_an_answer_are_lines_of_one() -> None:
    parts = [{"type": "thinking", "thinking": t} for t in ("a", "b")]
    content = [*parts, {"type": "text", "text": "3"}]
    message = read({"messages": [U, {"role": "assistant", "content": content}]}).messages[-1]
    assert (message["reasoning_content"], message["content"]) == ("a\nb", "3")


def test_a_call_without_arguments_and_with_more_than_is_read() -> None:
    call = {"type": "function", "function": {"name": "now", "arguments": ""}, "result": "r"}
    row = {"messages": [U, {**A, "tool_calls": [call]}]}
    assert read(row).messages[-1]["tool_calls"][0]["function"]["arguments"] == {}
    assert unread(row) == {"call.result"}


def test_null_keywords_of_a_function_are_left_out() -> None:
    tool = {
        "type": "function",
        "function": {"name": "f", "strict": None, "parameters": {"a": None}},
    }
    tools = read({"messages": [U, A], "tools": [tool]}).tools
    assert tools[0]["function"] == {"name": "f", "parameters": {}}


def test_calls_as_json_text_beside_tools() -> None:
    tools = [{"name": "add", "parameters": {"type": "object"}}]
    row = {"query": "1 + 2?", "answers": json.dumps([CALL]), "tools": json.dumps(tools)}
    columns = {"prompt": "query", "completion": "answers"}
    answer = read(row, "prompt-completion", **columns).messages[-1]
    assert (answer["content"], answer["tool_calls"][0]["function"]) == ("", CALL)
    row["answers"] = '{"sum": 3}'
    assert read(row, "prompt-completion", **columns).messages[-1]["content"] == row["answers"]


def test_results_of_calls_that_stand_in_a_text() -> None:
    """As in Hermes' and ToolACE's rows."""
    calling = {"role": "assistant", "content": "<tool_call>\n{}\n</tool_call>"}
    messages = [U, calling, {"role": "tool", "content": "3"}, A]
    assert read({"messages": messages}).messages == messages


@pytest.mark.parametrize("name", ["desirable", "is_desirable", "thumbs"])
def test_a_bad_label_by_another_name(name: str) -> None:
    with refuses(DataError, where="x row 1", names=[name]):
        read({"prompt": "q", "completion": "c", name: False}, "prompt-completion")


def test_a_label_beside_a_pair_is_no_fault() -> None:
    assert read({"prompt": "q", "chosen": "c", "rejected": "r", "label": 0}, "preference")


def test_json_of_other_objects_with_a_role_is_an_answer() -> None:
    answer = '[{"role": "CEO", "name": "Ann"}]'
    assert read({"prompt": "q", "completion": answer}, "prompt-completion").completion == answer


def test_a_text_that_begins_with_many_blanks() -> None:
    """Backtracking would take minutes."""
    text = " " * 100_000 + "x"
    assert read({"prompt": text, "completion": "c"}, "prompt-completion").prompt == text


def test_results_stand_in_the_order_of_their_calls() -> None:
    calls = [{**CALLS[0], "id": name} for name in ("a", "b")]
    results = [{"role": "tool", "content": name, "tool_call_id": name} for name in ("b", "a")]
    sample = read({"messages": [U, {**CALLING, "tool_calls": calls}, *results, A]})
    assert sample.messages[2:] == [*results[::-1], A]
    # Results that name no call, or one that is not there, stay as they are.
    for unnamed in ({"role": "tool", "content": "b"}, {**results[0], "tool_call_id": "c"}):
        sample = read({"messages": [U, {**CALLING, "tool_calls": calls}, unnamed, results[1], A]})
        assert [message["content"] for message in sample.messages[2:]] == ["b", "a", "3"]
    parts = [{"type": "tool_result", "tool_use_id": name, "content": name} for name in ("b", "a")]
    turns = [U, {**CALLING, "tool_calls": calls}, {"role": "user", "content": parts}, A]
    assert [turn["content"] for turn in read({"messages": turns}).messages[2:]] == ["a", "b", "3"]
