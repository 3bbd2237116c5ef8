"""Turns of a row -> messages: texts, thoughts, tool calls, results, and marks of untrained answers.

Two forms are read: OpenAI's (`role`, `content`) and ShareGPT's (`from`, `value`); both may have
content parts as OpenAI, Anthropic and Hugging Face write them. A key that changes what is learned
is read or refused by name; a key that nothing knows is counted, and the user is told.
"""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tunesmith.data.rows.labels import bad_labels
from tunesmith.data.rows.marks import is_mark, is_trained_turn
from tunesmith.data.rows.picture_places import PICTURE_PARTS, read_picture_part
from tunesmith.data.rows.row_reader import RowReader, from_lists, is_absent, plain
from tunesmith.data.rows.samples import CalledFunction, FunctionCall, Message, ToolSchema
from tunesmith.data.source.arrow_nulls import drop_nulls
from tunesmith.data.source.table import json_type

CHAT_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "call",
    "tool_call": "call",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
    "function_call_output": "tool",
    "tool_response": "tool",
    "function": "tool",
    "ipython": "tool",
}
# What a thought is called: by servers, gpt-oss's and Ollama's examples, and data sets.
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")
# Keys of a turn that say where it is from, or what it measures.
_HARMLESS_KEYS = frozenset(
    """
    id uuid idx index turn turn_id turn_idx turn_index message_id parent_id parent
    timestamp time date created created_at updated_at create_time update_time
    source model model_name lang language author name
    tokens token_count num_tokens length cache_control
    type status tool_call_id train_detail training_detail
    """.split()
)
_MEDIA = ("images", "image", "videos", "video", "audio", "audios")


class Form(NamedTuple):
    """A form of turns: their keys, and what errors call one."""

    noun: str
    role: str
    content: str
    example: str


MESSAGE = Form("message", "role", "content", 'write {"role": "user", "content": "..."}')
TURN = Form("turn", "from", "value", 'write {"from": "human", "value": "..."}')


def read_messages(row: RowReader, value: object, column: str, form: Form) -> list[Message]:
    """The messages of a column, in OpenAI's form; DataError if it is no list of turns, or empty.

    An answer that is not trained on has `"train": False`.
    """
    turns = row.list(value, column)
    messages: list[Message] = []
    previous_role = ""
    for n, value_of_turn in enumerate(turns, 1):
        at = f"{form.noun} {n}"
        turn = _as_turn(row, value_of_turn, form, at)
        role = CHAT_ROLES.get(str(turn[form.role]).strip().lower(), "")
        if not role:
            why = f"the roles are {', '.join(CHAT_ROLES)}"
            raise row.error(f"unknown role {turn[form.role]!r}", why, "rename the role", at)
        of_turn = _read_turn(row, role, turn, form, at)
        # Several calls in one answer are written as turns after one another.
        if role == previous_role == "call":
            _check_one_answer(row, messages[-1], of_turn[0], at)
            messages[-1]["tool_calls"] += of_turn[0]["tool_calls"]
        else:
            messages += of_turn
        previous_role = role
    if not messages:
        raise row.error(f"{column} is empty", fix="delete the row")
    return _in_order_of_calls(messages)


def _in_order_of_calls(messages: list[Message]) -> list[Message]:
    """The messages with the results of several calls in the order of these, by their ids.

    Servers take results in any order, and many templates write no id: a result then belongs to the
    call of its place.
    """
    ordered: list[Message] = []
    places: dict[str, int] = {}
    for is_result, group in itertools.groupby(messages, lambda turn: turn["role"] == "tool"):
        turns = list(group)
        if is_result and all(turn.get("tool_call_id") in places for turn in turns):
            turns.sort(key=lambda turn: places[turn["tool_call_id"]])
        calls = turns[-1].get("tool_calls", ())
        places = {call["id"]: n for n, call in enumerate(calls) if "id" in call}
        ordered += turns
    return ordered


def _check_one_answer(row: RowReader, answer: Message, call: Message, at: str) -> None:
    """DataError for a further call whose turn says more than a part of one answer can."""
    has_other_mark = answer.get("train", True) != call.get("train", True)
    if has_other_mark or "reasoning_content" in call:
        why = "calls behind each other are one answer: one thought before them, and one mark"
        raise row.error("a call has a thought or a mark of its own", why, "write one turn", at)


def any_messages(row: RowReader, value: object, column: str) -> list[Message]:
    """One message or a list of them, in either form."""
    value = from_lists(row.json(value, column))
    items = [value] if isinstance(value, Mapping) else row.list(value, column)
    is_sharegpt = any(isinstance(item, Mapping) and "from" in item for item in items)
    return read_messages(row, items, column, TURN if is_sharegpt else MESSAGE)


def _as_turn(row: RowReader, turn: Any, form: Form, at: str) -> Mapping[str, object]:
    """The turn; DataError for one without a role; of ShareGPT's also for one that says nothing."""
    has_role = isinstance(turn, Mapping) and form.role in turn
    said = ("value", "tool_calls", "function_call")
    if not has_role or (form is TURN and not any(key in turn for key in said)):
        what = f"a {form.noun} has no `{form.role}` and `{form.content}`: {turn!r:.80}"
        raise row.error(what, fix=form.example, at=at)
    return turn


@dataclass
class _ContentParts:
    """The parts of a content; `results` are those of tools, as messages."""

    text: str = ""
    thought: str = ""
    calls: list[FunctionCall] = field(default_factory=list)
    results: list[Message] = field(default_factory=list)


def _read_turn(
    row: RowReader, role: str, turn: Mapping[str, object], form: Form, at: str
) -> list[Message]:
    """The message of a turn; several where tool results stand in a content, as Anthropic has it."""
    content = turn.get(form.content)
    if role == "call":
        # The whole content of such a turn is a call.
        role = "assistant"
        parts = _ContentParts(calls=_calls(row, content, at))
        content = ""
    else:
        parts = _content(row, content, form, at, role)
    is_trained = True
    # Most turns have nothing else.
    others = {key: turn[key] for key in turn if key not in (form.role, form.content)}
    if others:
        _read_others(row, others, form, parts, at)
        is_trained = is_trained_turn(row, role, others, at)
        if role == "assistant" and is_trained:
            row.bad_turns += [(at, *label) for label in bad_labels(others)]
    if parts.results:
        return _with_results(row, role, parts, at)
    if (parts.thought or parts.calls) and role != "assistant":
        what = f"a {role} {form.noun} has reasoning or tool calls"
        raise row.error(what, "only an assistant's may", at=at)
    # An assistant may only call tools or reason.
    if content is None and not parts.calls and not parts.thought:
        fix = f'add "{form.content}": "...", or delete it'
        raise row.error(f"a {form.noun} has no {form.content}", fix=fix, at=at)
    message: Message = {"role": role, "content": parts.text}
    if not is_trained:
        message["train"] = False
    if parts.thought:
        message["reasoning_content"] = parts.thought
    if parts.calls:
        message["tool_calls"] = parts.calls
    # A turn's name is who speaks; a message's may be the tool's, which templates write.
    for name in ("name", "tool_call_id") if form is MESSAGE else ("tool_call_id",):
        if turn.get(name):
            message[name] = row.text(turn[name], f"{at} {name}")
    return [message]


def _with_results(row: RowReader, role: str, parts: _ContentParts, at: str) -> list[Message]:
    """The messages of a user's turn that holds tool results, and perhaps a text behind them."""
    if role not in ("user", "tool") or parts.thought or parts.calls:
        what = f"a tool result in a turn of the {role}"
        raise row.error(what, "it belongs to the user or the tool", at=at)
    if not parts.text:
        return parts.results
    return [*parts.results, {"role": "user", "content": parts.text}]


def _read_others(
    row: RowReader, others: Mapping[str, object], form: Form, parts: _ContentParts, at: str
) -> None:
    """Read the thought and the calls of a turn into its parts, and note keys that nothing reads."""
    thoughts = {"content": parts.thought} if parts.thought else {}
    for key, value in others.items():
        name = plain(key)
        if is_absent(value):
            continue
        if name in THOUGHTS:
            thoughts[key] = row.text(value, f"{at} {key}")
        elif key in ("tool_calls", "function_call"):
            if parts.calls:
                what = f"a turn has calls in {key} and in another place"
                raise row.error(what, fix="delete one of them", at=at)
            parts.calls = _calls(row, value, at)
        elif name in _MEDIA:
            why = "pictures are parts of a content, or in a column images of the row"
            fix = 'write {"type": "image", "path": "..."} as a part, or delete the row'
            raise row.error(f"a {form.noun} has {key}", why, fix)
        elif name not in _HARMLESS_KEYS and not is_mark(key):
            row.unread.add(f"{form.noun}.{key}")
    if len({thought.strip() for thought in thoughts.values()}) > 1:
        what = f"the thoughts {' and '.join(thoughts)} differ"
        raise row.error(what, "an answer has one", "delete one of them", at)
    parts.thought = next(iter(thoughts.values()), "")


def _content(row: RowReader, content: object, form: Form, at: str, role: str) -> _ContentParts:
    """Text, thought, calls and results of a content that is a text or a list of parts.

    Where a picture stands the text has its mark.
    """
    if content is None:
        return _ContentParts()
    if not isinstance(content, list | Mapping):
        return _ContentParts(text=row.text(content, f"{at} {form.content}"))
    parts = _ContentParts()
    for given in content if isinstance(content, list) else [content]:
        part = given if isinstance(given, Mapping) else {"type": "text", "text": given}
        kind = part.get("type")
        is_text = kind in ("text", "input_text", "output_text")
        is_thought = kind in ("reasoning", "thinking")
        if (is_text and parts.calls) or ((is_thought or kind == "tool_result") and parts.text):
            why = "a template writes results and thoughts, then the text, then calls"
            what = f"a part of type {kind} behind a {'call' if parts.calls else 'text'}"
            raise row.error(what, why, "write it in front", at)
        if is_text:
            parts.text += row.text(_part_value(part), f"{at} {form.content}")
        elif is_thought:
            thought = row.text(_part_value(part), f"{at} reasoning")
            parts.thought = "\n".join(filter(None, (parts.thought, thought)))
        elif kind in PICTURE_PARTS:
            parts.text += read_picture_part(row, part, role, at)
        elif kind in ("tool_call", "tool_use"):
            call = part if kind == "tool_use" else _part_value(part)
            parts.calls += _calls(row, call, at)
        elif kind == "tool_result":
            parts.results.append(_result(row, part, at))
        else:
            raise row.error(
                f"a content part of type {kind or ', '.join(part)!r}",
                "supported: text, image, reasoning, tool_call; parts of Anthropic",
                "delete the row, or write the part as text",
                at,
            )
    return parts


def _part_value(part: Mapping[str, object]) -> object:
    """Read the value of a part, which stands under one of several names."""
    for name in ("text", "value", "reasoning", "thinking"):
        if name in part:
            return part[name]
    return None


def _result(row: RowReader, part: Mapping[str, object], at: str) -> Message:
    """Return a tool result in Anthropic's form as a message."""
    text = _content(row, part.get("content"), MESSAGE, at, "tool").text
    message: Message = {"role": "tool", "content": text}
    if part.get("tool_use_id"):
        message["tool_call_id"] = row.text(part["tool_use_id"], f"{at} tool_use_id")
    return message


# The arguments of a call: OpenAI's name, Llama 3's and Anthropic's.
_ARGUMENTS = ("arguments", "parameters", "input")


def _calls(row: RowReader, value: object, at: str) -> list[FunctionCall]:
    """Tool calls: one or a list, bare or in OpenAI's wrapping.

    Their arguments are an object, or JSON text of one.
    """
    value = row.json(value, f"{at} tool call")
    values: list[Any] = value if isinstance(value, list) else [value]
    if not values:
        raise row.error("a list of tool calls is empty", at=at)
    calls = []
    for item in values:
        function = _function_of(item)
        if function is None:
            fix = 'write {"name": "f", "arguments": {...}}, or a list of these'
            raise row.error("a tool call has no name", fix=fix, at=at)
        name = function["name"]
        # Some servers write an empty text for no arguments.
        names = [key for key in _ARGUMENTS if function.get(key) not in (None, "")]
        if len(names) > 1:
            what = f"the call of {name} has both {names[0]} and {names[1]}"
            raise row.error(what, fix="delete one of them", at=at)
        # Arguments may be JSON text, as OpenAI's API gives them.
        arguments = row.json(function[names[0]], f"{at} arguments") if names else {}
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, dict):
            what = f"the arguments of {name} are {json_type(arguments)}, not an object"
            raise row.error(what, fix='write {"a": 1}', at=at)
        for key, of_call in {**item, **function}.items():
            is_read = key in ("name", "type", "index", "function", "id", *_ARGUMENTS)
            if not is_read and not is_absent(of_call):
                row.unread.add(f"call.{key}")
        called: CalledFunction = {"name": name, "arguments": arguments}
        call: FunctionCall = {"type": "function", "function": called}
        if isinstance(item.get("id"), str):
            # In this order: a template may write the call as JSON.
            call = {"type": "function", "id": item["id"], "function": called}
        calls.append(call)
    return calls


def _function_of(value: object) -> Mapping[str, Any] | None:
    """A call or a tool, bare or in OpenAI's wrapping {"type": "function", "function": ...}.

    None for what has no name.
    """
    function = value.get("function", value) if isinstance(value, Mapping) else None
    is_named = isinstance(function, Mapping) and isinstance(function.get("name"), str)
    return function if is_named else None


def calls_in_text(row: RowReader, text: str) -> list[FunctionCall]:
    """The calls of an answer that is JSON text of nothing else; none of another text.

    Rows with columns query, tools and answers are such.
    """
    if not text.lstrip().startswith(("[", "{")):
        return []
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    items = value if isinstance(value, list) else [value]
    are_calls = all(
        isinstance(item, dict) and {"name", "arguments"} <= item.keys() for item in items
    )
    return _calls(row, items, "completion") if items and are_calls else []


def read_tools(row: RowReader) -> list[ToolSchema] | None:
    """Tool schemas of a row: a list, or JSON text of one; bare schemas get OpenAI's wrapping.

    A keyword of a schema that is null is left out. No schema has one by itself: it is what a file
    that was exported from Arrow has, where each object gets the keys of all others.
    """
    value = row.optional("tools")
    # A CSV file may hold None as text.
    if value is None or (isinstance(value, str) and value.strip() in ("", "null", "None")):
        return None
    tools: list[ToolSchema] = []
    for n, tool in enumerate(row.list(value, "tools"), 1):
        function = _function_of(tool)
        if function is None:
            fix = 'write {"name", "description", "parameters"}'
            raise row.error(f"tool {n} is {tool!r:.80}, without a name", fix=fix)
        schema: dict[str, object] = drop_nulls(function)
        # Anthropic's name.
        if "input_schema" in schema and "parameters" not in schema:
            schema["parameters"] = schema.pop("input_schema")
        tools.append({"type": "function", "function": schema})
    return tools or None


def read_system(row: RowReader) -> str | None:
    """The row's own system column, which may be a list of parts; None without one."""
    system = row.optional("system")
    if is_absent(system):
        return None
    parts = _content(row, system, MESSAGE, "system", "system")
    return row.text(parts.text, "system")


def with_row_system(row: RowReader, messages: list[Message]) -> list[Message]:
    """The messages behind the row's system column; DataError if they have another one."""
    system = read_system(row)
    if system is None:
        return messages
    first = messages[0] if messages else {"role": ""}
    if first["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if not first["content"].strip():
        return [{"role": "system", "content": system}, *messages[1:]]
    if first["content"].strip() != system.strip():
        why = "a conversation has one system message"
        fix = "delete one of them"
        raise row.error("the system column and the system message differ", why, fix)
    return messages


def check_order(row: RowReader, messages: list[Message]) -> None:
    """Raise DataError for messages that no template can render.

    They have a result without a call, an answer to nothing, or no answer at the end.
    """
    roles = [message["role"] for message in messages]
    why = "roles are out of order"
    if next((role for role in roles if role != "system"), "") == "assistant":
        what = "the first turn is the assistant's, without a question"
        raise row.error(what, why, at=f"message {roles.index('assistant') + 1}")
    for n, (before, role) in enumerate(itertools.pairwise(["", *roles]), 1):
        # Results follow the calls of the last answer, and may be several. Hermes' and ToolACE's
        # rows have calls in its text.
        if role == "tool" and before not in ("assistant", "tool"):
            raise row.error("a tool result behind no answer", why, at=f"message {n}")
    if "assistant" not in roles:
        why = f"the roles are {', '.join(roles)}"
        fix = "delete the row, or map the answer's column by `columns:`"
        raise row.error("there is no assistant turn to train on", why, fix)
    if roles[-1] != "assistant":
        what = "the conversation does not end with an answer"
        why = f"its last message is of role {roles[-1]}"
        raise row.error(what, why, "delete the row, or its last messages")


def is_said(message: Message) -> bool:
    """Tell whether an answer has a text, a thought or a call."""
    says_more = "tool_calls" in message or "reasoning_content" in message
    return says_more or bool(message["content"].strip())
