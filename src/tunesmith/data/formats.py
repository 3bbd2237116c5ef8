"""A row of any of the five formats -> one of three samples.

    alpaca              instruction, input, output [system, history]
    messages            messages (OpenAI's chat form) [tools]
    sharegpt            conversations (from, value) [system, tools]
    prompt-completion   prompt, completion: texts or lists of messages [tools]
    text                text

Nothing is guessed. A row with something that training would ignore (a role that no template knows, an image, a loss
weight of 0.5) is refused, by its place. An assistant's message with `"train": false` (or `"weight": 0`) is context only.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tunesmith.config.schema import Source
from tunesmith.data.files import MAX_ROW_BYTES, json_type
from tunesmith.errors import DataError

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "model": "assistant", "chatgpt": "assistant", "bot": "assistant", "function_call": "call",
    "tool_call": "call", "observation": "tool", "tool": "tool", "function_response": "tool", "tool_response": "tool",
    "function": "tool", "ipython": "tool",
}  # fmt: skip


@dataclass(frozen=True)
class Conversation:
    """Messages in OpenAI's form."""

    # Dicts of `role` (system, user, assistant, tool) and `content` (str); an assistant's may have `reasoning_content` (str)
    # and `tool_calls` ([{"type": "function", "function": {"name", "arguments": dict}}]).
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None  # OpenAI's tool schemas
    given: int = 0  # how many leading messages are a prompt, whose answers are not supervised
    # (instruction, input, output) of a row in alpaca's format, so that alpaca's own text can be made.
    instruction: tuple[str, str, str] | None = None
    untrained: frozenset[int] = frozenset()  # indices of the assistant messages that the row itself leaves unsupervised

    def supervised(self) -> list[dict[str, Any]]:
        """The assistant messages that are trained on, where nothing but the row decides."""
        own = [i for i in range(self.given, len(self.messages)) if i not in self.untrained]
        return [self.messages[i] for i in own if self.messages[i]["role"] == "assistant"]


@dataclass(frozen=True)
class Completion:
    """A prompt and its answer, as plain text; `system` is for the template that makes two turns of them."""

    prompt: str
    completion: str
    system: str | None = None


@dataclass(frozen=True)
class Text:
    """Plain text, supervised as a whole."""

    text: str


Sample = Conversation | Completion | Text


def with_system(messages: list[dict[str, Any]], system: str | None) -> list[dict[str, Any]]:
    """The conversation with `system` as its system message, where it has none of its own; None: as it is."""
    if system is None or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def convert_row(row: Mapping[str, Any], source: Source, *, where: str, system: str | None = None) -> Sample:
    """Convert one row.

    Args:
        row: column names and values as the file has them; null counts as absent.
        source: gives `format` and `columns` (the format's name of a column: the file's name of it).
        where: the row's place, for the DataError of one that is not of this format.
        system: a system message for conversations that have none (`data.system`).
    """
    reader = _RowReader(row, source, where)
    sample = _FORMATS[source.format][0](reader)
    if isinstance(sample, Completion):
        return replace(sample, system=system)
    if not isinstance(sample, Conversation):
        return sample
    _check_order(reader, sample.messages)
    messages = with_system(sample.messages, system)
    given = sample.given and sample.given + len(messages) - len(sample.messages)
    untrained = frozenset(i for i, message in enumerate(messages) if not message.pop("train", True))
    return Conversation(messages, sample.tools, given, sample.instruction, untrained)


def _yaml_text(name: str) -> str:
    """A column's name as a value in a mapping of YAML on one line."""
    return name if re.fullmatch(r"[A-Za-z_][\w .-]*", name) else json.dumps(name, ensure_ascii=False)


class _RowReader:
    """One row with its column mapping and place."""

    def __init__(self, row: Mapping[str, Any], source: Source, where: str) -> None:
        self.row, self.source, self.where = row, source, where

    def error(self, what: str, why: str = "", fix: str = "fix the row", at: str = "") -> DataError:
        return DataError(what, where=f"{self.where}{', ' + at if at else ''}", why=why, fix=fix)

    def optional(self, name: str) -> Any:
        return self.row.get(self.source.columns.get(name, name))

    def required(self, name: str) -> Any:
        column = self.source.columns.get(name, name)
        if column not in self.row:
            why = f"format {self.source.format} needs it; the columns are {', '.join(map(str, self.row)) or 'none'}"
            raise self.error(f"there is no column {column}", why, self._column_fix())
        if self.row[column] is None:
            raise self.error(f"column {column} is null", fix="fill it, or delete the row")
        return self.row[column]

    def _column_fix(self) -> str:
        """The `columns:` line that would map missing columns, and the formats that these columns fit as they are."""
        needed, mapped = _FORMATS[self.source.format][1], self.source.columns
        spare = [str(c) for c in self.row if c not in needed and c not in mapped.values()]
        missing = [name for name in needed if mapped.get(name, name) not in self.row]
        candidates = [*map(_yaml_text, spare), *["..."] * len(missing)]
        pairs = ", ".join(f"{name}: {column}" for name, column in zip(missing, candidates, strict=False))
        fitting = " or ".join(form for form, (_, columns) in _FORMATS.items() if self.row.keys() >= set(columns))
        return f"columns: {{{pairs}}}" + (f", or format: {fitting}" if fitting else "")

    def text(self, value: Any, at: str) -> str:
        """A value that must be text; numbers of a CSV or JSON column are not text."""
        if not isinstance(value, str):
            fix = 'write it in quotes: "..."'
            if Path(self.source.source).suffix in (".parquet", ".arrow"):  # their columns have one type
                fix = "store this column as text"
            raise self.error(f"{at} is {json_type(value)}, not a text", fix=fix)
        if len(value) > MAX_ROW_BYTES:
            limit = f"a row may have {MAX_ROW_BYTES >> 20} MiB"
            raise self.error(f"{at} is a text of {len(value) >> 20} MiB", limit, "split it into several rows")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            what = f"{at} holds half of a character (U+{ord(value[error.start]):04X})"
            why = "a lone surrogate is not Unicode text"
            raise self.error(what, why, "write the whole character, or delete it") from None
        return value

    def json(self, value: Any, at: str) -> Any:
        """A value that may be JSON written as text, as columns of a CSV file and old tool calls are."""
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise self.error(f"{at} is not JSON", str(error), "fix the text, or write the value itself") from None

    def list(self, value: Any, at: str) -> list[Any]:
        found = self.json(value, at)
        if not isinstance(found, list):
            raise self.error(f"{at} is {json_type(found)}, not a list", fix="write a list: [...]")
        return found

    def role(self, name: Any, at: str) -> str:
        role = ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise self.error(f"unknown role {name!r}", f"the roles are {', '.join(ROLES)}", "rename the role", at)
        return role


def _alpaca(row: _RowReader) -> Sample:
    instruction = row.text(row.required("instruction"), "instruction")
    output = row.text(row.required("output"), "output")
    given = row.optional("input")
    extra = row.text(given, "input") if given is not None else ""
    messages = _system(row)
    history = row.optional("history")
    for n, turn in enumerate(row.list(history, "history") if history is not None else [], 1):
        pair = row.list(turn, f"history {n}")
        if len(pair) != 2:
            raise row.error(f"history {n} has {len(pair)} entries", fix="write pairs: [instruction, answer]")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": row.text(text, f"history {n}")})
    single = not messages
    messages.append({"role": "user", "content": f"{instruction}\n{extra}" if extra else instruction})
    messages.append({"role": "assistant", "content": output})
    return Conversation(messages, instruction=(instruction, extra, output) if single else None)


def _messages(row: _RowReader) -> Sample:
    return Conversation(_read_messages(row, row.required("messages"), "messages"), _tools(row))


def _sharegpt(row: _RowReader) -> Sample:
    turns, messages = row.list(row.required("conversations"), "conversations"), _system(row)
    if not turns and not messages:
        raise row.error("conversations is empty", fix="delete the row")
    before = ""
    for n, turn in enumerate(turns, 1):
        at = f"turn {n}"
        if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
            raise row.error("a turn has no `from` and `value`", "", 'write {"from": "human", "value": "..."}', at)
        role = row.role(turn["from"], at)
        if role != "call":
            messages.append({"role": role, "content": row.text(turn["value"], f"{at} value")})
        elif before == "call":  # several calls in one answer, written as turns after one another
            messages[-1]["tool_calls"] += _calls(row, turn["value"], at)
        else:
            messages.append({"role": "assistant", "content": "", "tool_calls": _calls(row, turn["value"], at)})
        before = role
        if not _is_trained(row, messages[-1]["role"], turn, at):
            messages[-1]["train"] = False
    return Conversation(messages, _tools(row))


def _prompt_completion(row: _RowReader) -> Sample:
    prompt, completion = row.required("prompt"), row.required("completion")
    if isinstance(prompt, list) != isinstance(completion, list):
        what, fix = "prompt and completion are of two kinds", "write both as lists of messages"
        raise row.error(what, "one is a text, one a list", fix)
    if not isinstance(prompt, list):
        return Completion(row.text(prompt, "prompt"), row.text(completion, "completion"))
    before = _read_messages(row, prompt, "prompt")
    return Conversation(before + _read_messages(row, completion, "completion"), _tools(row), given=len(before))


def _text(row: _RowReader) -> Sample:
    text = row.text(row.required("text"), "text")
    if not text:
        raise row.error("the text is empty", fix="delete the row")
    return Text(text)


# Name: its reader and the columns it needs.
_FORMATS: dict[str, tuple[Callable[[_RowReader], Sample], tuple[str, ...]]] = {
    "alpaca": (_alpaca, ("instruction", "output")),
    "messages": (_messages, ("messages",)),
    "sharegpt": (_sharegpt, ("conversations",)),
    "prompt-completion": (_prompt_completion, ("prompt", "completion")),
    "text": (_text, ("text",)),
}


def _system(row: _RowReader) -> list[dict[str, Any]]:
    """The row's own system column as a first message."""
    system = row.optional("system")
    return with_system([], row.text(system, "system") if system else None)


def _read_messages(row: _RowReader, value: Any, column: str) -> list[dict[str, Any]]:
    messages = []
    for n, message in enumerate(row.list(value, column), 1):
        at = f"message {n}"
        if not isinstance(message, Mapping) or "role" not in message:
            raise row.error("a message has no role", "", 'write {"role": "user", "content": "..."}', at)
        role = row.role(message["role"], at)
        if role == "call":
            raise row.error(f"unknown role {message['role']!r}", "calls belong in an assistant's tool_calls", at=at)
        messages.append(_message(row, role, message, at))
    if not messages:
        raise row.error(f"{column} is empty", fix="delete the row")
    return messages


def _message(row: _RowReader, role: str, message: Mapping[str, Any], at: str) -> dict[str, Any]:
    text, reasoning, calls = _content(row, message.get("content"), at)
    reasoning = reasoning or message.get("reasoning_content") or message.get("reasoning") or ""
    calls += _calls(row, message["tool_calls"], at) if message.get("tool_calls") else []
    if (reasoning or calls) and role != "assistant":
        raise row.error(f"a {role} message has reasoning or tool calls", "only an assistant's may", at=at)
    if message.get("content") is None and not calls and not reasoning:
        raise row.error("a message has no content", "", 'give it "content": "...", or delete it', at)
    out: dict[str, Any] = {"role": role, "content": text}
    if not _is_trained(row, role, message, at):
        out["train"] = False
    if reasoning:
        out["reasoning_content"] = row.text(reasoning, f"{at} reasoning")
    if calls:
        out["tool_calls"] = calls
    names = (name for name in ("name", "tool_call_id") if message.get(name))
    return out | {name: row.text(message[name], f"{at} {name}") for name in names}


def _is_trained(row: _RowReader, role: str, message: Mapping[str, Any], at: str) -> bool:
    """False where a turn says that it is not trained on: by `train`, or OpenAI's `weight`."""
    given = {name: message[name] for name in ("train", "weight", "loss_weight") if message.get(name) is not None}
    for name, value in given.items():
        if value not in (0, 1) or (value and role != "assistant"):
            why = "an assistant's turn is trained on (true, or weight 1) or not (false, or 0), and no other turn is"
            raise row.error(f"the message of the {role} has {name}: {value}", why, f"remove {name}, or the row", at)
    return all(given.values())


def _content(row: _RowReader, content: Any, at: str) -> tuple[str, str, list[dict[str, Any]]]:
    """Text, reasoning and tool calls of a content that is a text or a list of parts."""
    if content is None:
        return "", "", []
    if not isinstance(content, list):
        return row.text(content, f"{at} content"), "", []
    text = reasoning = ""
    calls: list[dict[str, Any]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        value = next((part[k] for k in ("text", "value", "reasoning") if k in part), None) if kind else None
        if kind == "text":
            text += row.text(value, f"{at} content")
        elif kind in ("reasoning", "thinking"):
            reasoning += row.text(value, f"{at} reasoning")
        elif kind == "tool_call":
            calls += _calls(row, value, at)
        else:
            why = "parts are text, reasoning or tool_call; this is a text model"
            raise row.error(f"a content part of type {kind!r}", why, "remove the part", at)
    return text, reasoning, calls


def _calls(row: _RowReader, value: Any, at: str) -> list[dict[str, Any]]:
    """Tool calls: one or a list, bare or in OpenAI's wrapping, arguments as an object or as JSON text."""
    value = row.json(value, f"{at} tool call")
    calls = []
    for call in value if isinstance(value, list) else [value]:
        body = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(body, Mapping) or not isinstance(body.get("name"), str):
            fix = 'write {"name": "f", "arguments": {...}}, or a list of these'
            raise row.error("a tool call has no name", "", fix, at)
        given = row.json(body.get("arguments"), f"{at} arguments")
        arguments = {} if given is None else given
        if not isinstance(arguments, dict):
            what = f"the arguments of {body['name']} are {json_type(arguments)}, not an object"
            raise row.error(what, "", 'write {"a": 1}', at)
        name = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        calls.append({"type": "function", **name, "function": {"name": body["name"], "arguments": arguments}})
    if not calls:
        raise row.error("a list of tool calls is empty", at=at)
    return calls


def _tools(row: _RowReader) -> list[dict[str, Any]] | None:
    """Tool schemas of a row: a list, or JSON text of one; bare schemas get OpenAI's wrapping."""
    value = row.optional("tools")
    if value is None or value in ("", []):
        return None
    tools = []
    for n, tool in enumerate(row.list(value, "tools"), 1):
        body = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(body, Mapping):
            fix = 'write {"name", "description", "parameters"}'
            raise row.error(f"tool {n} is {json_type(tool)}, not an object", fix=fix)
        if not isinstance(body.get("name"), str):
            raise row.error(f"tool {n} has no name", fix='give it "name": "..."')
        tools.append({"type": "function", "function": dict(body)})
    return tools or None


def _check_order(row: _RowReader, messages: list[dict[str, Any]]) -> None:
    """What no template can render: a late system message, a result without a call, an answer to nothing, no answer."""
    roles, called = [message["role"] for message in messages], False
    for n, role in enumerate(roles):
        wrong = {
            "a system message comes after others; it must come first, once": role == "system" and n > 0,
            "a tool's result comes where no tool was called": role == "tool" and not called,
            "the first turn is the assistant's; it answers nothing": role == "assistant"
            and set(roles[:n]) <= {"system"},
        }
        if what := next((what for what, found in wrong.items() if found), ""):
            raise row.error(what, "roles are out of order", "fix the row's order", f"message {n + 1}")
        called = (role == "assistant" and "tool_calls" in messages[n]) or (role == "tool" and called)
    if "assistant" not in roles:
        fix = "delete the row, or map the answer's column by `columns:`"
        raise row.error("there is no assistant turn to train on", f"the roles are {', '.join(roles)}", fix)
