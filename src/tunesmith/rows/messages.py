"""Conversion of the turns of a row to messages with texts, thoughts, tool calls and tool results.

Two forms of turns are supported: OpenAI's (`role`, `content`) and ShareGPT's (`from`, `value`). In
both forms, the content can be a list of parts as in the APIs of OpenAI, Anthropic and Hugging Face.
A known key that changes what the model learns is either read or raises an error. Unknown keys are
counted and reported to the user.
"""

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tunesmith.config.row_formats import CHAT_ROLES, ROW_FORMATS
from tunesmith.rows.columns import from_lists, is_absent, is_answer_name, is_null_word, plain
from tunesmith.rows.labels import bad_labels
from tunesmith.rows.picture_places import PICTURE_PARTS, read_picture_part
from tunesmith.rows.row_masks import is_mask_column, is_trained_turn
from tunesmith.rows.row_reader import RowReader
from tunesmith.rows.samples import (
    CalledFunction,
    Completion,
    Conversation,
    FunctionCall,
    Message,
    Sample,
    ToolSchema,
)
from tunesmith.rows.source.arrow_nulls import drop_nulls
from tunesmith.rows.source.table import json_type

# Keys that contain the reasoning of an answer. Inference servers, gpt-oss, Ollama and data sets use
# different names.
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")
# Keys of a turn with metadata. They do not change what the model learns, so no warning is needed.
_HARMLESS_KEYS = frozenset(
    """
    id uuid idx index turn turn_id turn_idx turn_index message_id parent_id parent
    timestamp time date created created_at updated_at create_time update_time
    source model model_name lang language author name
    tokens token_count num_tokens length cache_control
    type status tool_call_id tool_use_id is_error signature annotations
    channel recipient content_type train_detail training_detail
    """.split()
)
# A thought without text, as tools write it for models that always think.
_THOUGHT_WITHOUT_TEXT = re.compile(r"<(think|thinking|thought|reasoning)>\s*</\1>")
_MEDIA = ("images", "image", "videos", "video", "audio", "audios")


# Channels of OpenAI's Harmony whose messages are not an answer.
_THOUGHT_CHANNELS = ("analysis", "commentary", *THOUGHTS)
# Key that only the turns or content parts of another API have -> name of the API.
_OTHER_APIS = {
    "parts": "Gemini",
    "functionCall": "Gemini",
    "toolUse": "Amazon Bedrock",
    "toolResult": "Amazon Bedrock",
    "reasoningContent": "Amazon Bedrock",
    "call_id": "OpenAI's Responses API",
}


class Form(NamedTuple):
    """The names of the keys in a turn, for one of the forms of turns.

    Attributes:
        noun: the word for a turn in error messages.
        role: the key of the role.
        content: the key of the content.
        example: a correct turn, for error messages.
    """

    noun: str
    role: str
    content: str
    example: str


# The form of turns in OpenAI's API, and the form of ShareGPT.
MESSAGE = Form("message", "role", "content", 'write {"role": "user", "content": "..."}')
TURN = Form("turn", "from", "value", 'write {"from": "human", "value": "..."}')


# Keys of which a turn in ShareGPT's form must have at least one.
_TURN_CONTENT = frozenset(("value", "tool_calls", "function_call"))


def read_messages(row: RowReader, value: object, column: str, form: Form) -> list[Message]:
    """Convert the turns of a column to messages in OpenAI's form.

    A message that is excluded from training gets `"train": False`.

    Args:
        value: the value of the column, a list of turns or its JSON text.
        column: the name of the column, for error messages.
        form: the form of the turns.

    Raises:
        DataError: the value is not a list of turns, or the list is empty.
    """
    messages: list[Message] = []
    previous_role = ""
    for n, value_of_turn in enumerate(row.list(value, column), 1):
        at = f"{form.noun} {n}"
        turn = _as_turn(row, value_of_turn, form, at)
        role = CHAT_ROLES.get(str(turn[form.role]).strip().lower(), "")
        if not role:
            raise row.error(
                f"unknown role {turn[form.role]!r}",
                why=f"the roles are {', '.join(CHAT_ROLES)}",
                fix="rename the role",
                at=at,
            )
        turn_messages = _read_turn(row, role, turn, form, at)
        # Consecutive turns with the role `function_call` are several calls of one answer.
        if role == previous_role == "call":
            answer = messages[-1]
            [call] = turn_messages
            has_other_mask = answer.get("train", True) != call.get("train", True)
            if has_other_mask or "reasoning_content" in call:
                raise row.error(
                    "a tool call has reasoning, or another loss mask than the previous call",
                    why="consecutive calls are one answer, with one loss mask and with reasoning"
                    " only before the first call",
                    fix="write the calls into one turn",
                    at=at,
                )
            answer["tool_calls"] += call["tool_calls"]
        else:
            messages += turn_messages
        previous_role = role
    if not messages:
        raise row.error(f"the column {column} is empty", fix="delete the row")
    return _sort_results(messages)


def _sort_results(messages: list[Message]) -> list[Message]:
    """Sort consecutive tool results by the order of their calls, using the call ids.

    The order matters, because many templates do not write the ids, so the model can match results
    and calls only by their order.
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


def any_messages(row: RowReader, value: object, column: str) -> list[Message]:
    """Convert one turn or a list of turns, in OpenAI's or ShareGPT's form, to messages."""
    value = from_lists(row.json(value, column))
    items = [value] if isinstance(value, Mapping) else row.list(value, column)
    is_sharegpt = any(isinstance(item, Mapping) and "from" in item for item in items)
    return read_messages(row, items, column, TURN if is_sharegpt else MESSAGE)


def _as_turn(row: RowReader, turn: Any, form: Form, at: str) -> Mapping[str, object]:
    """Check that `turn` is a valid turn, and return it unchanged.

    Raise DataError if it has no role, or if it is a ShareGPT turn without content.
    """
    if isinstance(turn, Mapping):
        _check_api(row, turn, at)
    is_turn = isinstance(turn, Mapping) and form.role in turn
    if not is_turn or (form is TURN and _TURN_CONTENT.isdisjoint(turn)):
        raise row.error(
            f"a {form.noun} has no `{form.role}` and `{form.content}`: {turn!r:.80}",
            fix=form.example,
            at=at,
        )
    return turn


def _check_api(row: RowReader, value: Mapping[str, object], at: str) -> None:
    """Raise DataError if a turn or a content part has the form of an API that is not read."""
    keys = []
    if value.keys().isdisjoint(("content", "value", "text")):
        keys = [key for key in _OTHER_APIS if not is_absent(value.get(key))]
    # In OpenAI's Harmony, the reasoning and the calls of an answer are separate messages. The
    # results of calls are messages, too, and have the recipient `assistant`.
    recipient = str(value.get("recipient") or "")
    is_thought = str(value.get("channel")).strip().lower() in _THOUGHT_CHANNELS
    if (is_thought and recipient != "assistant") or recipient.startswith("functions."):
        keys.append("channel")
    if keys:
        api = _OTHER_APIS.get(keys[0], "OpenAI's Harmony")
        raise row.error(
            f"the turn has the form of {api}: it has the key {keys[0]}",
            why="the forms of OpenAI's chat API, Anthropic's API and ShareGPT are supported",
            fix='write {"role": "assistant", "content": "...", "reasoning_content": "...",'
            ' "tool_calls": [...]}, or delete the row',
            at=at,
        )


@dataclass
class _ContentParts:
    """The content of a turn, split into text, thought, tool calls and tool results.

    Attributes:
        results: tool results, one message each.
        given: the keys of each part, which can have loss masks.
    """

    text: str = ""
    thought: str = ""
    calls: list[FunctionCall] = field(default_factory=list)
    results: list[Message] = field(default_factory=list)
    given: list[Mapping[str, object]] = field(default_factory=list)


def _read_turn(
    row: RowReader, role: str, turn: Mapping[str, object], form: Form, at: str
) -> list[Message]:
    """Convert a turn to messages.

    The result is one message, or several if the content has tool results, as in Anthropic's API.
    """
    content = turn.get(form.content)
    if role == "call":
        # `call` is our name for the role `function_call`. The entire content is the call.
        role = "assistant"
        parts = _ContentParts(calls=_calls(row, content, at))
    else:
        parts = _content(row, content, form, at, role)
    # Keys other than role and content. Most turns have no such keys.
    others = {key: turn[key] for key in turn if key not in (form.role, form.content)}
    _read_others(row, others, form, parts, at)
    is_trained = is_trained_turn(row, role, others, at, parts.given)
    if role == "assistant" and is_trained:
        # Labels that rate this answer as bad. `labels.py` reports them.
        row.bad_turns += [(at, *label) for label in bad_labels(others)]
    if parts.results:
        return _with_results(row, role, parts, at)
    if (parts.thought or parts.calls) and role != "assistant":
        raise row.error(
            f"a {role} {form.noun} has reasoning or tool calls, which only the assistant can have",
            at=at,
        )
    # A turn with calls or reasoning does not need a text.
    if content is None and not parts.calls and not parts.thought:
        raise row.error(
            f"a {form.noun} has no {form.content}",
            fix=f'add "{form.content}": "...", or delete the {form.noun}',
            at=at,
        )
    message: Message = {"role": role, "content": parts.text}
    if not is_trained:
        message["train"] = False
    if parts.thought:
        message["reasoning_content"] = parts.thought
    if parts.calls:
        message["tool_calls"] = parts.calls
    # In OpenAI's form, keep `name`, because it can be the name of a tool that templates write. In
    # ShareGPT's form, drop `name`, because it is the speaker's name.
    for name in ("name", "tool_call_id") if form is MESSAGE else ("tool_call_id",):
        if turn.get(name):
            message[name] = row.text(turn[name], f"{at} {name}")
    return [message]


def _with_results(row: RowReader, role: str, parts: _ContentParts, at: str) -> list[Message]:
    """Return the tool results of a turn as messages, followed by the turn's text if it has one."""
    if role not in ("user", "tool") or parts.thought or parts.calls:
        raise row.error(
            f"a turn of the {role} has a tool result",
            why="only a turn of the user or the tool without reasoning and calls can have tool"
            " results",
            at=at,
        )
    if not parts.text:
        return parts.results
    return [*parts.results, {"role": "user", "content": parts.text}]


def _read_others(
    row: RowReader, others: Mapping[str, object], form: Form, parts: _ContentParts, at: str
) -> None:
    """Read reasoning and tool calls from `others`, and add them to `parts`.

    `others` contains the keys of a turn except role and content. Unknown keys are added to
    `row.unread`.
    """
    thoughts = {"content": parts.thought} if parts.thought else {}
    for key, value in others.items():
        name = plain(key)
        if is_absent(value):
            continue
        if name in THOUGHTS:
            thought = row.text(value, f"{at} {key}")
            # SWE-agent also writes the thought at the start of the content.
            if not parts.text.startswith(thought):
                thoughts[key] = thought
        elif key in ("tool_calls", "function_call"):
            if parts.calls:
                raise row.error(
                    f"a turn has tool calls in {key} and in another key or its content",
                    fix="delete one of the two",
                    at=at,
                )
            parts.calls = _calls(row, value, at)
        elif name in _MEDIA:
            raise row.error(
                f"a {form.noun} has the key {key}",
                why="pictures must be parts of a message's content, or in the row's column images",
                fix='write {"type": "image", "path": "..."} as a part, or delete the row',
            )
        elif name not in _HARMLESS_KEYS and not is_mask_column(key):
            row.unread.add(f"{form.noun}.{key}")
    if len({thought.strip() for thought in thoughts.values()}) > 1:
        raise row.error(
            f"the reasoning texts in {' and '.join(thoughts)} differ",
            fix="delete one of these texts",
            at=at,
        )
    parts.thought = next(iter(thoughts.values()), "")


def _content(row: RowReader, content: object, form: Form, at: str, role: str) -> _ContentParts:
    """Split the content of a turn into text, thought, tool calls and tool results.

    The content is a text or a list of parts. In the text, PICTURE_MARK replaces each picture.
    """
    if content is None:
        return _ContentParts()
    if not isinstance(content, list | Mapping):
        return _ContentParts(text=row.text(content, f"{at} {form.content}"))
    parts = _ContentParts()
    for given in content if isinstance(content, list) else [content]:
        part = given if isinstance(given, Mapping) else {"type": "text", "text": given}
        parts.given.append(part)
        _check_api(row, part, at)
        # Amazon Bedrock writes a text without a type.
        kind = "text" if part.keys() == {"text"} else part.get("type")
        is_text = kind in ("text", "input_text", "output_text")
        is_thought = kind in ("reasoning", "thinking") or part.get("thought") is True
        is_text = is_text and not is_thought
        goes_first = is_thought or kind == "tool_result"
        if (is_text and parts.calls) or (goes_first and parts.text):
            raise row.error(
                f"a content part of type {kind} follows a {'call' if parts.calls else 'text'}",
                why="templates write results and reasoning first, then the text, then calls",
                fix="sort the parts in this order",
                at=at,
            )
        if is_text:
            parts.text += row.text(_part_value(part), f"{at} {form.content}")
        elif is_thought:
            thought = row.text(_part_value(part), f"{at} reasoning")
            parts.thought = "\n".join(filter(None, (parts.thought, thought)))
        elif kind in PICTURE_PARTS:
            parts.text += read_picture_part(row, part, role, at)
        elif kind in ("tool_call", "tool_use"):
            call = _part_value(part) if kind == "tool_call" else part
            parts.calls += _calls(row, call, at)
        elif kind == "tool_result":
            parts.results.append(_result(row, part, at))
        else:
            raise row.error(
                f"content parts of type {kind or ', '.join(part)!r} are not supported",
                "the types are text, image, reasoning, tool_call, and those of Anthropic's API",
                "delete the row, or write the part as text",
                at,
            )
        if is_text or goes_first:
            row.unread |= {
                f"part.{key}"
                for key, value in part.items()
                if key not in _HARMLESS_KEYS.union(_PART_VALUES, ("content", "thought"))
                and not is_mask_column(key)
                and not is_absent(value)
            }
    return parts


# Names of the value of a content part. The name depends on the API.
_PART_VALUES = ("text", "value", "reasoning", "thinking")


def _part_value(part: Mapping[str, object]) -> object:
    return next((part[name] for name in _PART_VALUES if name in part), None)


def _result(row: RowReader, part: Mapping[str, object], at: str) -> Message:
    """Convert a tool result in Anthropic's form to a message."""
    text = _content(row, part.get("content"), MESSAGE, at, "tool").text
    message: Message = {"role": "tool", "content": text}
    if part.get("tool_use_id"):
        message["tool_call_id"] = row.text(part["tool_use_id"], f"{at} tool_use_id")
    return message


# Keys for the arguments of a tool call in OpenAI's API, in Llama 3 and in Anthropic's API, in this
# order.
_ARGUMENTS = ("arguments", "parameters", "input")


def _calls(row: RowReader, value: object, at: str) -> list[FunctionCall]:
    """Convert one tool call or a list of tool calls to OpenAI's form.

    A call can be wrapped as {"type": "function", "function": ...} or not. Its arguments can be an
    object or the JSON text of an object.
    """
    value = row.json(value, f"{at} tool call")
    values: list[Any] = value if isinstance(value, list) else [value]
    if not values:
        raise row.error("a list of tool calls is empty", at=at)
    calls = []
    for item in values:
        function = _function_of(item)
        if function is None:
            raise row.error(
                "a tool call has no name",
                fix='write {"name": "f", "arguments": {...}}, or a list of these',
                at=at,
            )
        name = function["name"]
        # Some servers write an empty text if a call has no arguments.
        names = [key for key in _ARGUMENTS if function.get(key) not in (None, "")]
        if len(names) > 1:
            raise row.error(
                f"the call of {name} has both {names[0]} and {names[1]}",
                fix="delete one of the two",
                at=at,
            )
        # OpenAI's API writes the arguments as JSON text.
        arguments = row.json(function[names[0]], f"{at} arguments") if names else None
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, dict):
            raise row.error(
                f"the arguments of {name} are {json_type(arguments)}, not an object",
                fix='write the arguments as an object, such as {"a": 1}',
                at=at,
            )
        keys = {**item, **function}
        if not is_trained_turn(row, "assistant", keys, at):
            raise row.error(
                f"the loss mask excludes the call of {name}",
                why="training on only a part of an answer is not supported",
                fix="write the loss mask into the turn",
                at=at,
            )
        for key, field_value in keys.items():
            is_read = key in ("name", "type", "index", "function", "id", *_ARGUMENTS)
            if not is_read and not is_mask_column(key) and not is_absent(field_value):
                row.unread.add(f"call.{key}")
        called: CalledFunction = {"name": name, "arguments": arguments}
        call: FunctionCall = {"type": "function", "function": called}
        if isinstance(item.get("id"), str):
            # The order of the keys matters, because a template can write the call as JSON.
            call = {"type": "function", "id": item["id"], "function": called}
        calls.append(call)
    return calls


def _function_of(value: object) -> Mapping[str, Any] | None:
    """Return a call or a tool without OpenAI's wrapper {"type": "function", "function": ...}.

    Return None if it has no name.
    """
    function = value.get("function", value) if isinstance(value, Mapping) else None
    is_named = isinstance(function, Mapping) and isinstance(function.get("name"), str)
    return function if is_named else None


def calls_in_text(row: RowReader, text: str) -> list[FunctionCall]:
    """Return the tool calls of an answer whose text is only the JSON of tool calls, else an empty
    list.

    Data sets with the columns query, tools and answers have such answers.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    items = value if isinstance(value, list) else [value]
    for item in items:
        if not isinstance(item, dict) or not {"name", "arguments"} <= item.keys():
            return []
    return _calls(row, items, "completion") if items else []


def read_tools(row: RowReader) -> list[ToolSchema] | None:
    """Return the tool schemas of a row in OpenAI's form, or None if it has no tools.

    The column `tools` is a list or the JSON text of a list. Keys with the value null are removed.
    Arrow adds such keys: it gives each object in a column the keys of all other objects.
    """
    value = row.optional("tools")
    if is_absent(value) or is_null_word(value):
        return None
    tools: list[ToolSchema] = []
    for n, tool in enumerate(row.list(value, "tools"), 1):
        function = _function_of(tool)
        if function is None:
            raise row.error(
                f"tool {n} has no name: {tool!r:.80}",
                fix='write {"name": "f", "description": "...", "parameters": {...}}',
            )
        schema: dict[str, object] = drop_nulls(function)
        # `input_schema` is Anthropic's name of `parameters`.
        if "input_schema" in schema and "parameters" not in schema:
            schema["parameters"] = schema.pop("input_schema")
        tools.append({"type": "function", "function": schema})
    return tools or None


def read_system(row: RowReader) -> str | None:
    """Return the text of the row's column `system`, or None. The column can be a list of parts."""
    system = row.optional("system")
    if is_absent(system):
        return None
    return row.text(_content(row, system, MESSAGE, "system", "system").text, "system")


def with_row_system(row: RowReader, messages: list[Message]) -> list[Message]:
    """Add the text of the row's column `system` as the first message.

    Raise DataError if the messages already have another system message.
    """
    system = read_system(row)
    if system is None:
        return messages
    first = messages[0] if messages else {"role": ""}
    if first["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if not first["content"].strip():
        return [{"role": "system", "content": system}, *messages[1:]]
    if first["content"].strip() != system.strip():
        raise row.error(
            "the system column and the system message differ",
            fix="delete one of the two",
        )
    return messages


def check_order(row: RowReader, messages: list[Message]) -> None:
    """Raise DataError if the roles of the messages are in an order that templates cannot render.

    The errors are: a tool result does not follow an answer, an answer has no question, or the
    conversation does not end with an answer.
    """
    roles = [message["role"] for message in messages]
    why = "the roles are out of order"
    first_role = next((role for role in roles if role != "system"), "")
    if first_role == "assistant":
        raise row.error(
            "the first turn is an answer of the assistant without a question",
            why=why,
            at=f"message {roles.index('assistant') + 1}",
        )
    for n, (before, role) in enumerate(itertools.pairwise(["", *roles]), 1):
        # A tool result must follow an answer or another result. Whether the answer has calls is not
        # checked, because in Hermes' and ToolACE's data the calls are part of its text.
        if role == "tool" and before not in ("assistant", "tool"):
            raise row.error("a tool result does not follow an answer", why, at=f"message {n}")
    if "assistant" not in roles:
        raise row.error(
            "there is no assistant turn to train on",
            why=f"the roles are {', '.join(roles)}",
            fix=_use_answer(row),
        )
    if roles[-1] != "assistant":
        raise row.error(
            "the conversation does not end with an answer",
            why=f"the last message has the role {roles[-1]}",
            fix="delete the row, or its last messages",
        )


def _use_answer(row: RowReader) -> str:
    """Return the fix for messages without an answer: the column that has the answer."""
    key = ROW_FORMATS[row.source.format].key
    prompt = row.source.columns.get(key, key)
    if isinstance(row.row.get("choices"), list):
        return row.change_by_jq(f".[{json.dumps(prompt)}] += [.choices[0].message]")
    answer = next(filter(is_answer_name, row.row), "")
    setting = row.setting(
        format="prompt-completion", columns={"prompt": prompt, "completion": answer or "..."}
    )
    return f"use {setting}" if answer else f"delete the row, or name the answer with {setting}"


def check_answers(row: RowReader, sample: Sample) -> None:
    """Raise DataError if an answer that the model learns is empty."""
    at = ""
    if isinstance(sample, Conversation):
        empty = [answer for answer in sample.supervised() if not is_said(answer)]
        if not empty:
            return
        numbers = [n for n, message in enumerate(sample.messages, 1) if message is empty[0]]
        at = f"message {numbers[0]}"
    elif has_answer(sample):
        return
    raise row.error(
        "an answer is empty",
        why="the model would learn to give empty answers",
        fix='write the answer, delete the row, or exclude the turn: "train": false (for'
        " method=grpo, rows without answers have the format prompt)",
        at=at,
    )


def has_answer(sample: Sample) -> bool:
    """Return whether the last answer of a sample is not empty. Plain text has no empty answer."""
    if isinstance(sample, Conversation):
        return is_said(sample.messages[-1])
    if isinstance(sample, Completion):
        return is_said({"role": "assistant", "content": sample.completion})
    return True


def is_said(message: Message) -> bool:
    """Return True if an answer has a text, a thought or a call, and False if it is empty.

    An answer that only consists of an empty thought is empty.
    """
    says_more = "tool_calls" in message or "reasoning_content" in message
    return says_more or bool(_THOUGHT_WITHOUT_TEXT.sub("", message["content"]).strip())
