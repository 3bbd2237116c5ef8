"""A row of any of the formats -> a sample.

    alpaca              instruction, input, output [system, history]
    messages            messages (OpenAI's chat form) [tools]
    sharegpt            conversations (from, value) [system, tools]
    prompt-completion   prompt, completion: texts or lists of messages [tools]
    text                text
    preference          prompt, chosen, rejected: texts or messages; without a prompt, chosen and
                        rejected begin with the same one [system, tools]; or conversations and two
                        turns chosen, rejected (LLaMA-Factory's form)
    feedback            prompt, completion, label (true or false) [system, tools]

Nothing is guessed. A row with something that training would ignore (a role that no template knows,
an image, a loss weight of 0.5) is refused, by its place. An assistant's message with `"train":
false` (or `"weight": 0`) is context only.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tunesmith.config.check import COLUMNS
from tunesmith.config.names import nearest
from tunesmith.config.schema import Source
from tunesmith.data.files import MAX_ROW_BYTES, json_type
from tunesmith.errors import DataError

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "function_call": "call",
    "tool_call": "call",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function": "tool",
    "ipython": "tool",
}


@dataclass(frozen=True)
class Conversation:
    """Messages in OpenAI's form.

    Attributes:
        messages: dicts of `role` (system, user, assistant, tool) and `content` (str); those of an
            assistant may have `reasoning_content` (str) and `tool_calls` ([{"type": "function",
            "function": {"name", "arguments": dict}}]).
        tools: OpenAI's tool schemas.
        prompt_messages: how many leading messages are a prompt, whose answers are not supervised.
        instruction: (instruction, input, output) of a row in alpaca's format, so that alpaca's own
            text can be made.
        untrained: indices of the assistant messages that the row itself leaves unsupervised.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    prompt_messages: int = 0
    instruction: tuple[str, str, str] | None = None
    untrained: frozenset[int] = frozenset()

    def supervised(self) -> list[dict[str, Any]]:
        """The assistant messages that are trained on, where nothing but the row decides."""
        answers = []
        for i, message in enumerate(self.messages):
            is_context = i < self.prompt_messages or i in self.untrained
            if message["role"] == "assistant" and not is_context:
                answers.append(message)
        return answers


@dataclass(frozen=True)
class Completion:
    """A prompt and its answer, as plain text.

    `system` is for the template that makes two turns of them.
    """

    prompt: str
    completion: str
    system: str | None = None


@dataclass(frozen=True)
class Text:
    """Plain text, supervised as a whole."""

    text: str


Sample = Conversation | Completion | Text


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, the first of which is the better one."""

    chosen: Conversation | Completion
    rejected: Conversation | Completion


@dataclass(frozen=True)
class Feedback:
    """An answer that is good or bad."""

    answer: Conversation | Completion
    is_good: bool


def with_system(messages: list[dict[str, Any]], system: str | None) -> list[dict[str, Any]]:
    """The messages with `system` (None: as they are) as system message, where they have none."""
    if system is None or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def convert_row(
    row: Mapping[str, Any], source: Source, *, where: str, system: str | None = None
) -> Sample | Pair | Feedback:
    """Convert one row.

    Args:
        row: column names and values as the file has them; null counts as absent.
        source: gives `format` and `columns` (the format's name of a column: the file's name of it).
        where: the row's place, for the DataError of one that is not of this format.
        system: a system message for conversations that have none (`data.system`).
    """
    reader = _RowReader(row, source, where)
    sample = _FORMATS[source.format].read(reader)
    if isinstance(sample, Pair):
        chosen = _complete(reader, sample.chosen, system)
        return Pair(chosen, _complete(reader, sample.rejected, system))
    if isinstance(sample, Feedback):
        return replace(sample, answer=_complete(reader, sample.answer, system))
    return _complete(reader, sample, system)


def convert_sample(
    row: Mapping[str, Any], source: Source, *, where: str, system: str | None = None
) -> Sample:
    """As `convert_row`; of a pair the chosen answer, of feedback the answer."""
    sample = convert_row(row, source, where=where, system=system)
    if isinstance(sample, Pair):
        return sample.chosen
    if isinstance(sample, Feedback):
        return sample.answer
    return sample


_AnySample = TypeVar("_AnySample", bound=Sample)


def _complete(reader: "_RowReader", sample: _AnySample, system: str | None) -> _AnySample:
    """The sample with the recipe's system message and its untrained turns, in a checked order."""
    if isinstance(sample, Completion):
        return sample if sample.system is not None else replace(sample, system=system)
    if not isinstance(sample, Conversation):
        return sample
    _check_order(reader, sample.messages)
    messages = with_system(sample.messages, system)
    prompt_messages = sample.prompt_messages
    if prompt_messages:
        # A system message in front of them is part of the prompt.
        prompt_messages += len(messages) - len(sample.messages)
    untrained = set()
    for i, message in enumerate(messages):
        if not message.pop("train", True):
            untrained.add(i)
    return replace(
        sample,
        messages=messages,
        prompt_messages=prompt_messages,
        untrained=frozenset(untrained),
    )


def _yaml_text(name: str) -> str:
    """A column's name as a value in a mapping of YAML on one line."""
    if re.fullmatch(r"[A-Za-z_][\w .-]*", name):
        return name
    return json.dumps(name, ensure_ascii=False)


class _RowReader:
    """One row with its column mapping and place."""

    def __init__(self, row: Mapping[str, Any], source: Source, where: str) -> None:
        self.row = row
        self.source = source
        self.where = where

    def error(self, what: str, why: str = "", fix: str = "fix the row", at: str = "") -> DataError:
        where = f"{self.where}, {at}" if at else self.where
        return DataError(what, where=where, why=why, fix=fix)

    def optional(self, name: str) -> Any:
        return self.row.get(self.source.columns.get(name, name))

    def required(self, name: str) -> Any:
        column = self.source.columns.get(name, name)
        if column not in self.row:
            raise self._missing_columns(column)
        if self.row[column] is None:
            raise self.error(f"column {column} is null", fix="fill it, or delete the row")
        return self.row[column]

    def _missing_columns(self, column: str) -> DataError:
        """The error for a column that the row does not have.

        It names all columns that are mapped to one that is missing. Its fix is the whole
        `columns:` line, and the formats that fit as the row is.
        """
        needed = _FORMATS[self.source.format].columns
        mapped = self.source.columns
        missing = [name for name in needed if mapped.get(name, name) not in self.row]
        # Columns that nothing reads yet are proposed for those that are missing: the nearest name,
        # or else the first.
        readable = {mapped.get(name, name) for name in COLUMNS[self.source.format]}
        unmapped = [str(row_column) for row_column in self.row if row_column not in readable]
        proposed: dict[str, str | None] = dict(mapped)
        for name in missing:
            near = nearest(mapped.get(name, name), unmapped)
            proposed[name] = near
            if near is not None:
                unmapped.remove(near)
        pairs = []
        for name, row_column in proposed.items():
            if row_column is None:
                pairs.append(f"{name}: {_yaml_text(unmapped.pop(0)) if unmapped else '...'}")
            elif row_column != name:
                pairs.append(f"{name}: {_yaml_text(row_column)}")
        fix = f"columns: {{{', '.join(pairs)}}}"
        fitting = [name for name, form in _FORMATS.items() if self.row.keys() >= set(form.columns)]
        if fitting:
            fix += f", or format: {' or '.join(fitting)}"
        wrong = dict.fromkeys([column, *(mapped[name] for name in missing if name in mapped)])
        what = f"there is no column {column}"
        if len(wrong) > 1:
            what = f"there are no columns {', '.join(wrong)}"
        columns = ", ".join(map(str, self.row)) or "none"
        needs = "needs it" if len(wrong) == 1 else "needs them"
        why = f"format {self.source.format} {needs}; the columns are {columns}"
        return self.error(what, why, fix)

    def text(self, value: Any, at: str) -> str:
        """A value that must be text; numbers of a CSV or JSON column are not text."""
        if not isinstance(value, str):
            fix = 'write it in quotes: "..."'
            # The columns of these files have one type each.
            if Path(self.source.source).suffix in (".parquet", ".arrow"):
                fix = "store this column as text"
            raise self.error(f"{at} is {json_type(value)}, not a text", fix=fix)
        if len(value) > MAX_ROW_BYTES:
            what = f"{at} is a text of {len(value) >> 20} MiB"
            limit = f"a row may have {MAX_ROW_BYTES >> 20} MiB"
            raise self.error(what, limit, "split it into several rows")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            what = f"{at} contains half of a surrogate pair (U+{ord(value[error.start]):04X})"
            why = "a lone surrogate is not Unicode text"
            raise self.error(what, why, "write the whole character, or delete it") from None
        return value

    def json(self, value: Any, at: str) -> Any:
        """A value that may be JSON as text, as columns of a CSV file and old tool calls are."""
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            fix = "fix the text, or write the value itself"
            raise self.error(f"{at} is not JSON", str(error), fix) from None

    def list(self, value: Any, at: str) -> list[Any]:
        items = self.json(value, at)
        if not isinstance(items, list):
            raise self.error(f"{at} is {json_type(items)}, not a list", fix="write a list: [...]")
        return items

    def role(self, name: Any, at: str) -> str:
        role = ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            why = f"the roles are {', '.join(ROLES)}"
            raise self.error(f"unknown role {name!r}", why, "rename the role", at)
        return role


def _alpaca(row: _RowReader) -> Sample:
    instruction = row.text(row.required("instruction"), "instruction")
    output = row.text(row.required("output"), "output")
    extra = row.optional("input")
    extra_text = "" if extra is None else row.text(extra, "input")
    messages = _system(row)
    # `history` holds the turns before the instruction, as pairs.
    history = row.optional("history")
    turns = [] if history is None else row.list(history, "history")
    for n, turn in enumerate(turns, 1):
        pair = row.list(turn, f"history {n}")
        if len(pair) != 2:
            fix = "write pairs: [instruction, answer]"
            raise row.error(f"history {n} has {len(pair)} entries", fix=fix)
        question = row.text(pair[0], f"history {n}")
        answer = row.text(pair[1], f"history {n}")
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    # Only a row of one turn is what the Alpaca template writes.
    is_single_turn = not messages
    question = f"{instruction}\n{extra_text}" if extra_text else instruction
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": output})
    if is_single_turn:
        return Conversation(messages, instruction=(instruction, extra_text, output))
    return Conversation(messages)


def _messages(row: _RowReader) -> Sample:
    messages = _read_messages(row, row.required("messages"), "messages")
    return Conversation(messages, _tools(row))


def _sharegpt(row: _RowReader) -> Sample:
    turns = row.list(row.required("conversations"), "conversations")
    messages = _system(row)
    if not turns and not messages:
        raise row.error("conversations is empty", fix="delete the row")
    return Conversation(messages + _read_turns(row, turns), _tools(row))


def _read_turns(row: _RowReader, turns: list[Any]) -> list[dict[str, Any]]:
    """Messages of turns that are written as `from` and `value`."""
    messages: list[dict[str, Any]] = []
    previous_role = ""
    for n, turn in enumerate(turns, 1):
        at = f"turn {n}"
        if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
            fix = 'write {"from": "human", "value": "..."}'
            raise row.error("a turn has no `from` and `value`", fix=fix, at=at)
        role = row.role(turn["from"], at)
        if role != "call":
            text = row.text(turn["value"], f"{at} value")
            messages.append({"role": role, "content": text})
        else:
            # Several calls in one answer are written as turns after one another.
            if previous_role != "call":
                messages.append({"role": "assistant", "content": "", "tool_calls": []})
            messages[-1]["tool_calls"] += _calls(row, turn["value"], at)
        previous_role = role
        if not _is_trained(row, messages[-1]["role"], turn, at):
            messages[-1]["train"] = False
    return messages


def _prompt_completion(row: _RowReader) -> Sample:
    prompt = row.required("prompt")
    completion = row.required("completion")
    # Both as text, or both as messages: one of each has no border.
    if isinstance(prompt, list) != isinstance(completion, list):
        fix = "write both as lists of messages"
        raise row.error(
            "prompt and completion have different types", "one is text, the other a list", fix
        )
    if not isinstance(prompt, list):
        return Completion(row.text(prompt, "prompt"), row.text(completion, "completion"))
    prompt = _read_messages(row, prompt, "prompt")
    completion = _read_messages(row, completion, "completion")
    return Conversation(prompt + completion, _tools(row), prompt_messages=len(prompt))


def _text(row: _RowReader) -> Sample:
    text = row.text(row.required("text"), "text")
    if not text:
        raise row.error("the text is empty", fix="delete the row")
    return Text(text)


def _preference(row: _RowReader) -> Pair:
    chosen = row.required("chosen")
    rejected = row.required("rejected")
    prompt = row.optional("prompt")
    if isinstance(chosen, str) != isinstance(rejected, str):
        fix = "write both as texts, or both as lists of messages"
        raise row.error("chosen and rejected have different types", "one is a text", fix)
    if row.optional("conversations") is not None:
        prompt = row.optional("conversations")
    if isinstance(chosen, str) and not isinstance(prompt, list):
        return _pair_of_texts(row, prompt, chosen, rejected)
    chosen = _answer_messages(row, chosen, "chosen")
    rejected = _answer_messages(row, rejected, "rejected")
    if chosen[0]["role"] != "assistant":
        shared = _shared_beginning(row, chosen, rejected)
        if isinstance(prompt, str) and prompt.strip() not in _texts_of(shared):
            why = "chosen and rejected begin with different messages"
            fix = "make them equal, or remove the prompt"
            raise row.error("the prompt differs from that of chosen and rejected", why, fix)
        prompt = shared
        chosen = chosen[len(shared) :]
        rejected = rejected[len(shared) :]
    else:
        prompt = _prompt_messages(row, row.required("prompt") if prompt is None else prompt)
    prompt = [*_system(row), *prompt]
    tools = _tools(row)
    answers = []
    for column, answer in (("chosen", chosen), ("rejected", rejected)):
        _check_answer(row, answer, column)
        # Copies: each conversation marks its own messages.
        messages = [dict(message) for message in prompt + answer]
        answers.append(Conversation(messages, tools, prompt_messages=len(prompt)))
    return Pair(*answers)


def _pair_of_texts(row: _RowReader, prompt: Any, chosen: str, rejected: str) -> Pair:
    chosen = row.text(chosen, "chosen")
    rejected = row.text(rejected, "rejected")
    if prompt is None:
        prompt = _shared_text(row, chosen, rejected)
        chosen = chosen[len(prompt) :]
        rejected = rejected[len(prompt) :]
    prompt = row.text(prompt, "prompt")
    _check_answer(row, chosen, "chosen")
    _check_answer(row, rejected, "rejected")
    system = row.optional("system")
    system = row.text(system, "system") if system else None
    return Pair(Completion(prompt, chosen, system), Completion(prompt, rejected, system))


def _feedback(row: _RowReader) -> Feedback:
    label = row.required("label")
    # 0 and 1 stand in files that have no truth values; of other numbers and texts some mean a rank.
    if label not in (0, 1) or isinstance(label, float | str):
        fix = "write true for a good answer and false for a bad one"
        raise row.error(f"the label is {json.dumps(label, default=str)}", fix=fix)
    tools = _tools(row)
    if row.optional("messages") is not None:
        messages = [*_system(row), *_any_messages(row, row.optional("messages"), "messages")]
        _check_answer(row, messages[-1:], "the last message")
        sample = Conversation(messages, tools, prompt_messages=len(messages) - 1)
        return Feedback(sample, bool(label))
    prompt = row.required("prompt")
    completion = row.required("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        _check_answer(row, completion, "completion")
        system = row.optional("system")
        system = row.text(system, "system") if system else None
        completed = Completion(row.text(prompt, "prompt"), completion, system)
        return Feedback(completed, bool(label))
    prompt = [*_system(row), *_prompt_messages(row, prompt)]
    answer = _answer_messages(row, completion, "completion")
    _check_answer(row, answer, "completion")
    return Feedback(Conversation(prompt + answer, tools, prompt_messages=len(prompt)), bool(label))


def _any_messages(row: _RowReader, value: Any, column: str) -> list[dict[str, Any]]:
    """One message or a list of them, in OpenAI's form or ShareGPT's."""
    value = row.json(value, column) if isinstance(value, str) else value
    items = [value] if isinstance(value, Mapping) else row.list(value, column)
    if any(isinstance(item, Mapping) and "from" in item for item in items):
        return _read_turns(row, items)
    return _read_messages(row, items, column)


def _prompt_messages(row: _RowReader, prompt: Any) -> list[dict[str, Any]]:
    """A prompt that is a text, a message or a list of them."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": row.text(prompt, "prompt")}]
    return _any_messages(row, prompt, "prompt")


def _answer_messages(row: _RowReader, answer: Any, column: str) -> list[dict[str, Any]]:
    """An answer that is a text, a message or a list of them."""
    if isinstance(answer, str):
        return [{"role": "assistant", "content": row.text(answer, column)}]
    messages = _any_messages(row, answer, column)
    if messages[-1]["role"] != "assistant":
        what = f"{column} ends with a message of the {messages[-1]['role']}"
        raise row.error(what, "the last one must be the answer")
    return messages


def _check_answer(row: _RowReader, answer: str | list[dict[str, Any]], column: str) -> None:
    """DataError for an answer that says nothing."""
    if isinstance(answer, str):
        is_empty = not answer.strip()
    else:
        message = answer[-1]
        says_more = "tool_calls" in message or "reasoning_content" in message
        is_empty = not message["content"].strip() and not says_more
    if is_empty:
        why = "an answer without tokens cannot be compared"
        raise row.error(f"{column} is empty", why, "write the answer, or delete the row")


def _shared_beginning(
    row: _RowReader, chosen: list[dict[str, Any]], rejected: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The messages that both begin with; each is left with one of its own."""
    count = 0
    most = min(len(chosen), len(rejected)) - 1
    while count < most and chosen[count] == rejected[count]:
        count += 1
    # What is learned from begins with an answer.
    while count and chosen[count]["role"] != "assistant":
        count -= 1
    if not count:
        why = "without a prompt, both begin with the messages that they answer"
        fix = 'write {"prompt": "...", "chosen": "...", "rejected": "..."}'
        raise row.error("chosen and rejected do not begin with the same prompt", why, fix)
    return chosen[:count]


def _shared_text(row: _RowReader, chosen: str, rejected: str) -> str:
    """The text that both begin with, up to the word in which they part."""
    count = 0
    for left, right in zip(chosen, rejected, strict=False):
        if left != right:
            break
        count += 1
    prompt = chosen[:count]
    # A prompt ends with a whole word: its tokens are then those of both rows.
    while prompt and not prompt[-1].isspace():
        prompt = prompt[:-1]
    if not prompt.strip():
        why = "without a column prompt, both begin with the text that they answer"
        fix = 'write {"prompt": "...", "chosen": "...", "rejected": "..."}'
        raise row.error("chosen and rejected do not begin with the same prompt", why, fix)
    return prompt


def _texts_of(messages: list[dict[str, Any]]) -> list[str]:
    return [message["content"].strip() for message in messages]


class _Format(NamedTuple):
    """The reader of a format, and the columns that it needs."""

    read: Callable[[_RowReader], Sample | Pair | Feedback]
    columns: tuple[str, ...]


_FORMATS = {
    "alpaca": _Format(_alpaca, ("instruction", "output")),
    "messages": _Format(_messages, ("messages",)),
    "sharegpt": _Format(_sharegpt, ("conversations",)),
    "prompt-completion": _Format(_prompt_completion, ("prompt", "completion")),
    "text": _Format(_text, ("text",)),
    "preference": _Format(_preference, ("chosen", "rejected")),
    "feedback": _Format(_feedback, ("prompt", "completion", "label")),
}


def _system(row: _RowReader) -> list[dict[str, Any]]:
    """The row's own system column as a first message."""
    system = row.optional("system")
    if not system:
        return []
    return with_system([], row.text(system, "system"))


def _read_messages(row: _RowReader, value: Any, column: str) -> list[dict[str, Any]]:
    messages = []
    for n, message in enumerate(row.list(value, column), 1):
        at = f"message {n}"
        if not isinstance(message, Mapping) or "role" not in message:
            fix = 'write {"role": "user", "content": "..."}'
            raise row.error("a message has no role", fix=fix, at=at)
        role = row.role(message["role"], at)
        if role == "call":
            why = "calls belong in an assistant's tool_calls"
            raise row.error(f"unknown role {message['role']!r}", why, at=at)
        messages.append(_message(row, role, message, at))
    if not messages:
        raise row.error(f"{column} is empty", fix="delete the row")
    return messages


def _message(row: _RowReader, role: str, message: Mapping[str, Any], at: str) -> dict[str, Any]:
    text, reasoning, calls = _content(row, message.get("content"), at)
    # Servers write reasoning under two names.
    reasoning = reasoning or message.get("reasoning_content") or message.get("reasoning") or ""
    if message.get("tool_calls"):
        calls += _calls(row, message["tool_calls"], at)
    if (reasoning or calls) and role != "assistant":
        what = f"a {role} message has reasoning or tool calls"
        raise row.error(what, "only an assistant's may", at=at)
    # An assistant may only call tools or reason.
    if message.get("content") is None and not calls and not reasoning:
        fix = 'add "content": "...", or delete it'
        raise row.error("a message has no content", fix=fix, at=at)
    converted: dict[str, Any] = {"role": role, "content": text}
    if not _is_trained(row, role, message, at):
        converted["train"] = False
    if reasoning:
        converted["reasoning_content"] = row.text(reasoning, f"{at} reasoning")
    if calls:
        converted["tool_calls"] = calls
    for name in ("name", "tool_call_id"):
        if message.get(name):
            converted[name] = row.text(message[name], f"{at} {name}")
    return converted


def _is_trained(row: _RowReader, role: str, message: Mapping[str, Any], at: str) -> bool:
    """False where a turn says that it is not trained on: by `train`, or OpenAI's `weight`."""
    is_trained = True
    for name in ("train", "weight", "loss_weight"):
        value = message.get(name)
        if value is None:
            continue
        if value not in (0, 1) or (value and role != "assistant"):
            what = f"the message of the {role} has {name}: {value}"
            why = (
                "an assistant's turn is trained on (true, or weight 1) or not (false, or 0),"
                " and no other turn is"
            )
            raise row.error(what, why, f"remove {name}, or the row", at)
        if not value:
            is_trained = False
    return is_trained


def _content(row: _RowReader, content: Any, at: str) -> tuple[str, str, list[dict[str, Any]]]:
    """Text, reasoning and tool calls of a content that is a text or a list of parts."""
    if content is None:
        return "", "", []
    if not isinstance(content, list):
        return row.text(content, f"{at} content"), "", []
    text = ""
    reasoning = ""
    calls: list[dict[str, Any]] = []
    for part in content:
        kind = None
        value = None
        if isinstance(part, Mapping):
            # Parts come with their text under one of several names.
            kind = part.get("type")
            keys = [key for key in ("text", "value", "reasoning") if key in part]
            if keys:
                value = part[keys[0]]
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
    """Tool calls: one or a list, bare or in OpenAI's wrapping.

    Their arguments are an object, or JSON text of one.
    """
    value = row.json(value, f"{at} tool call")
    values = value if isinstance(value, list) else [value]
    if not values:
        raise row.error("a list of tool calls is empty", at=at)
    calls = []
    for item in values:
        # OpenAI wraps a function in {"type": "function", "function": ...}.
        function = item.get("function", item) if isinstance(item, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            fix = 'write {"name": "f", "arguments": {...}}, or a list of these'
            raise row.error("a tool call has no name", fix=fix, at=at)
        name = function["name"]
        # Arguments may be JSON text, as OpenAI's API gives them.
        arguments = row.json(function.get("arguments"), f"{at} arguments")
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, dict):
            what = f"the arguments of {name} are {json_type(arguments)}, not an object"
            raise row.error(what, fix='write {"a": 1}', at=at)
        call: dict[str, Any] = {"type": "function"}
        if isinstance(item.get("id"), str):
            call["id"] = item["id"]
        call["function"] = {"name": name, "arguments": arguments}
        calls.append(call)
    return calls


def _tools(row: _RowReader) -> list[dict[str, Any]] | None:
    """Tool schemas of a row: a list, or JSON text of one; bare schemas get OpenAI's wrapping."""
    value = row.optional("tools")
    if value is None or value in ("", []):
        return None
    tools = []
    for n, tool in enumerate(row.list(value, "tools"), 1):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping):
            fix = 'write {"name", "description", "parameters"}'
            raise row.error(f"tool {n} is {json_type(tool)}, not an object", fix=fix)
        if not isinstance(function.get("name"), str):
            raise row.error(f"tool {n} has no name", fix='add "name": "..."')
        tools.append({"type": "function", "function": dict(function)})
    return tools or None


def _check_order(row: _RowReader, messages: list[dict[str, Any]]) -> None:
    """DataError for what no template can render.

    That is a late system message, a result without a call, an answer to nothing, or no answer.
    """
    roles = [message["role"] for message in messages]
    may_have_result = False
    only_system_so_far = True
    for n, message in enumerate(messages):
        role = message["role"]
        fault = ""
        if role == "system" and n > 0:
            fault = "a system message comes after others; it must come first, once"
        elif role == "tool" and not may_have_result:
            fault = "a tool result without a tool call"
        elif role == "assistant" and only_system_so_far:
            fault = "the first turn is the assistant's, without a question"
        if fault:
            at = f"message {n + 1}"
            raise row.error(fault, "roles are out of order", "fix the row's order", at)
        if role == "assistant":
            # Results follow the calls of the last answer, and may be several.
            may_have_result = "tool_calls" in message
        elif role != "tool":
            may_have_result = False
        if role != "system":
            only_system_so_far = False
    if "assistant" not in roles:
        why = f"the roles are {', '.join(roles)}"
        fix = "delete the row, or map the answer's column by `columns:`"
        raise row.error("there is no assistant turn to train on", why, fix)
