"""Conversion of session files of coding agents to rows with messages.

Each conversation becomes one row.

| agent | a line of the file |
|---|---|
| Claude Code | a part of a message, with the uuid of the previous line (`parentUuid`) |
| Codex | an item of the Responses API in a `payload`, or an event about it |
| OpenAI Agents | an item of the Responses API, or a message |

The conversation of a subagent is a separate row. If an agent compacts its history, the row ends,
and the next row starts with the compacted history. A resumed session is trained only on its new
answers. Omitted lines and parts are counted by kind.
"""

import json
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunesmith.errors import DataError
from tunesmith.host.memory import open_uncached
from tunesmith.rows.source.secrets import secrets_in
from tunesmith.rows.source.session_turns import join_parts, parts_of
from tunesmith.rows.source.table import MAX_ROW_BYTES, Row, Rows, Table, json_type

# Maximum number of lines that are examined to recognize the agent. One line is not enough, because
# some files start with lines that only describe the session.
_HEAD_LINES = 50
# Values of `type` in the lines of a Codex file.
_CODEX_LINES = ("session_meta", "response_item", "event_msg", "turn_context", "compacted")
# Keys of the lines in a Claude Code file that hold no message. Each of these lines has at least one
# of the keys.
_CLAUDE_KEYS = frozenset(("sessionId", "session_id", "uuid", "leafUuid", "snapshot"))
# All keys that a message of OpenAI Agents can have. Rows of ordinary data sets have other keys, so
# they are not mistaken for messages of an agent.
_MESSAGE_KEYS = frozenset(
    "id type role content status phase name tool_calls tool_call_id tool_name timestamp"
    " finish_reason reasoning reasoning_content reasoning_details".split()
)
# Type of an item of the Responses API -> key that identifies the item, because rows of ordinary
# data sets do not have this key.
_ITEM_KEYS = {
    "function_call": "call_id",
    "function_call_output": "call_id",
    "reasoning": "summary",
    "compaction": "encrypted_content",
}
# Types of the items of the Responses API that contain a compacted history.
_COMPACTIONS = ("compaction", "compaction_summary", "context_compaction")
_BRANCHES = "lines of other branches, left out"
# Maximum number of times that the compactions of a session repeat its lines, on average.
MAX_REPEATS = 50
# Exceptions for values that have another type or form than the agents write.
_ODD_VALUES = (AttributeError, LookupError, TypeError, ValueError, RecursionError)

# A conversation: the first line to train on, and the numbers of all lines of the conversation. The
# lines before the first line to train on are only context.
_Conversation = tuple[int, list[int]]
_Line = tuple[int, dict[str, Any]]
_Lines = Iterable[_Line]


def session_form(path: Path) -> str:
    """Return the name of the agent that wrote the file, or "" if it is not a session file."""
    form: str | None = ""
    is_described = False
    if path.suffix.lower() in (".jsonl", ".ndjson") and path.is_file():
        with open_uncached(path) as file:
            for _ in range(_HEAD_LINES):
                try:
                    form = _form_of_line(json.loads(file.readline(MAX_ROW_BYTES)))
                except (ValueError, RecursionError):
                    break
                # After a line that describes a session, read past unknown lines.
                is_described = is_described or form is None
                if form or not is_described:
                    break
    return form or ""


def _form_of_line(line: object) -> str | None:
    """Return the name of the agent that writes lines like this one.

    Return None if the line only describes a session, so that the next line must be examined. Return
    "" if no known agent writes such lines.
    """
    if not isinstance(line, dict):
        return ""
    kind = line.get("type")
    if isinstance(line.get("payload"), dict) and kind in _CODEX_LINES:
        return "Codex"
    if isinstance(line.get("message"), dict) and kind in ("user", "assistant"):
        return "Claude Code"
    is_message = {"role", "content"} <= line.keys() <= _MESSAGE_KEYS
    if is_message or _ITEM_KEYS.get(str(kind)) in line:
        return "OpenAI Agents"
    if isinstance(kind, str) and line.keys() & _CLAUDE_KEYS:
        return None
    # Old Codex files (until 2025) start with a line that has these keys, and their items have no
    # payload.
    if line.keys() >= {"timestamp", "instructions"}:
        return None
    return ""


def read_sessions(lines: Table, form: str) -> Table:
    """Return the conversations of a session file as a table with one row per conversation.

    Args:
        lines: the lines of the file.
        form: the name of the agent, see `session_form`.

    Raises:
        DataError: a line other than the last line is not valid JSON. The last line can be truncated
            because the session was killed.
    """
    notes: Counter[str] = Counter()
    secrets = {}
    rows: list[tuple[int, array[int]]] = []
    histories = []
    at = 0
    read = 0

    def read_line(i: int) -> dict[str, Any]:
        nonlocal at
        at = i
        return _read_line(lines, i, notes)

    def read_lines() -> Iterator[_Line]:
        for i in range(len(lines)):
            line = read_line(i)
            if line:
                yield i, line

    # Any value of a line can have another type than the agents write. The error then names the line
    # that was read last.
    try:
        for start, numbers in _CONVERSATIONS[form](read_lines(), notes):
            read += len(numbers)
            if read > MAX_REPEATS * len(lines):
                raise ValueError(f"the compactions repeat the lines over {MAX_REPEATS} times")
            found: list[str] = []
            values: Any = _read_row(lines, read_line, start, numbers, notes, found)
            messages = values["messages"]
            if messages:
                secrets[len(rows)] = found
                texts = [json.dumps(message, sort_keys=True) for message in messages]
                # The hash of the conversation up to and including each message.
                histories.append([hash(tuple(texts[: n + 1])) for n in range(len(texts))])
                rows.append((start, array("q", numbers)))
            else:
                notes["conversations without an answer, left out"] += 1
    except _ODD_VALUES as error:
        raise _unknown_line(lines.where(at), f"{type(error).__name__}: {error}") from None

    def row(i: int) -> Row:
        return _read_row(lines, read_line, *rows[i], Counter(), [])

    return Table(
        len(rows),
        row,
        lambda i: lines.where(rows[i][0]),
        lines.fingerprint,
        notes=Counter({f"rows of {form} sessions": len(rows)}) + notes,
        secrets=secrets,
        histories=histories,
    )


def without_shared(table: Table) -> Table:
    """Train each answer of agent sessions only once.

    A session that is resumed or forked in another file begins with the messages of the first file.
    These messages are only context. A row without other messages is left out.
    """
    if not table.histories:
        return table
    seen: set[int] = set()
    # Number of a row -> number of its messages that an earlier row has.
    kept = {}
    for i, history in enumerate(table.histories):
        shared = sum(each in seen for each in history)
        seen.update(history)
        if shared < len(history):
            kept[i] = shared
    numbers = list(kept)
    rows = Rows("", [table], numbers)

    def row(i: int) -> object:
        values: Any = rows[i]
        for message in values["messages"][: kept[numbers[i]]]:
            if message["role"] == "assistant":
                message["train"] = False
        return values

    notes = Counter({"conversations of an earlier file, left out": len(table) - len(kept)})
    return replace(
        table,
        size=len(kept),
        row=row,
        where=rows.where,
        fingerprint=rows.digest,
        notes=table.notes + notes,
        secrets=rows.secrets,
    )


def _read_row(
    lines: Table,
    read_line: Callable[[int], dict[str, Any]],
    start: int,
    numbers: Iterable[int],
    notes: Counter[str],
    secrets: list[str],
) -> Row:
    """Convert a conversation to a row. Add location and kind of its secrets to `secrets`.

    Answers before the line `start` are only context, because the model is trained on them in an
    earlier row.
    """
    parts = []
    size = 0
    for i in numbers:
        if size > MAX_ROW_BYTES:
            notes[f"conversations cut off after {MAX_ROW_BYTES >> 20} MiB"] += 1
            break
        line = read_line(i)
        where = lines.where(i)
        for part in parts_of(line, notes):
            size += len(part.value or "")
            secrets += [f"{where}: {kind}" for kind in secrets_in(part.value)]
            parts.append(part._replace(is_trained=part.is_trained and i >= start))
    return {"messages": join_parts(parts, notes)}


def _read_line(lines: Table, i: int, notes: Counter[str]) -> dict[str, Any]:
    """Return a line as a JSON object. Return {} if the last line of the file is truncated."""
    try:
        line = lines.row(i)
    except DataError:
        if i < len(lines) - 1:
            raise
        notes["lines cut off at the end of a file"] = 1
        line = {}
    if not isinstance(line, dict):
        raise _unknown_line(lines.where(i), f"the line is {json_type(line)}, not an object")
    return line


def _unknown_line(where: str, why: str) -> DataError:
    return DataError(
        "the line does not have the format of an agent session",
        where=where,
        why=why,
        fix="correct or delete the line",
    )


def _claude_conversations(lines: _Lines, notes: Counter[str]) -> Iterator[_Conversation]:
    """Yield the conversations of a Claude Code file. Each subagent has separate conversations."""
    transcript = _Transcript()
    for i, line in lines:
        kind = line.get("type")
        message = line.get("message") if kind in ("user", "assistant") else None
        if not message and "uuid" not in line:
            notes[f"lines of type {kind}, left out"] += 1
            continue
        if str(line.get("uuid")) in transcript.numbers:
            notes["repeated lines, left out"] += 1
            continue
        if transcript.is_copy(i, line):
            notes["repeated lines, left out"] += 1
            continue
        agent = transcript.place(i, line)
        if isinstance(message, dict):
            transcript.turns[agent].append(i)
            transcript.note_answer(i, message, is_answer=kind == "assistant")
    for agent, turns in transcript.turns.items():
        others = set(turns)
        notes["subagents"] += bool(agent)
        notes["compactions"] -= 1
        for conversation in transcript.paths(turns[-1]):
            notes["compactions"] += 1
            others.difference_update(conversation[1])
            yield conversation
        notes[_BRANCHES] += len(others)


class _Transcript:
    """The lines of a Claude Code file as trees, in which each line has a parent line.

    An answer consists of several lines. The results of parallel calls are on different branches, so
    a path from the root to a line contains only one of these results. Therefore, if a path contains
    one line of an answer, all other lines of the answer and all results of its calls are added to
    the path.

    Attributes:
        numbers: uuid of a line -> number of the line.
        turns: name of a subagent -> numbers of its lines with messages. The main agent has the
            name "".
    """

    def __init__(self) -> None:
        self.turns: dict[str, list[int]] = defaultdict(list)
        self.numbers: dict[str, int] = {}
        # Number of a line -> number of its parent line.
        self._parents: dict[int, int | None] = {}
        # First line after a compaction -> last line before the compaction.
        self._compactions: dict[int, int | None] = {}
        # Number of a line -> first line of its tree.
        self._roots: dict[int, int] = {}
        # A line -> the name of its subagent.
        self._agents: dict[int | None, str] = {}
        # The name of a subagent -> its latest line.
        self._latest: dict[str, int] = {}
        # Number of a line, id of an answer, or id of a call -> number of the answer's first line.
        self._answers: dict[object, int] = {}
        # The first line of an answer -> its lines, and the lines with results of its calls.
        self._members: dict[int, tuple[list[int], list[int]]] = {}
        # Id and content of a part of an answer -> number of its first line.
        self._contents: dict[str, int] = {}

    def is_copy(self, i: int, line: Mapping[str, Any]) -> bool:
        """Return whether an earlier line has the same part of an answer.

        If so, the children of this line become children of the earlier line, so that the copied
        question before it is on another branch.
        """
        message = line.get("message")
        if not isinstance(message, dict) or not message.get("id"):
            return False
        content = json.dumps([message["id"], message.get("content")], sort_keys=True)
        first = self._contents.setdefault(content, i)
        if first != i:
            self.numbers[str(line.get("uuid"))] = first
        return first != i

    def place(self, i: int, line: Mapping[str, Any]) -> str:
        """Add a line to the tree as a child of its parent line.

        Return the name of the line's subagent.
        """
        uuid = str(line.get("uuid", i))
        parent = self.numbers.get(str(line.get("parentUuid")))
        agent = str(line.get("agentId") or line.get("parent_tool_use_id") or "")
        if line.get("isSidechain") and not agent:
            agent = self._agents.get(parent) or uuid
        before = self._latest.get(agent)
        if "parentUuid" not in line:
            parent = before
        if line.get("subtype") == "compact_boundary":
            self._compactions[i] = self.numbers.get(str(line.get("logicalParentUuid")), before)
            parent = None
        self.numbers[uuid] = i
        self._latest[agent] = i
        self._parents[i] = parent
        self._roots[i] = i if parent is None else self._roots[parent]
        self._agents[i] = agent
        return agent

    def note_answer(self, i: int, message: Mapping[str, Any], *, is_answer: bool) -> None:
        """Record that a line is a part of an answer, or the result of a call in an answer.

        `is_answer` is True if the line is a part of the answer.
        """
        content = message.get("content")
        calls = []
        for part in content if isinstance(content, list) else []:
            if isinstance(part, dict):
                call_id = part.get("tool_use_id", part.get("id"))
                if call_id:
                    calls.append(str(call_id))
        if is_answer:
            first = self._answers.setdefault(str(message.get("id", i)), i)
            self._answers.update(dict.fromkeys(calls, first))
        else:
            first = next((self._answers[call] for call in calls if call in self._answers), i)
        self._answers[i] = first
        answer_lines, result_lines = self._members.setdefault(first, ([], []))
        (answer_lines if is_answer else result_lines).append(i)

    def paths(self, last: int) -> Iterator[_Conversation]:
        """Yield the conversation that ends at line `last`.

        If the history was compacted, first yield the conversations that ended at each compaction,
        in order.
        """
        ends = [last]
        while (end := self._compactions.get(self._roots[ends[-1]])) is not None:
            ends.append(end)
        for end in reversed(ends):
            path = []
            at: int | None = end
            while at is not None:
                path.append(at)
                at = self._parents[at]
            answers = dict.fromkeys(self._answers.get(i, i) for i in reversed(path))
            numbers = []
            for first in answers:
                # Put the results after all lines of the answer, because in the file they can be
                # between these lines.
                answer_lines, result_lines = self._members.get(first, ([first], []))
                numbers += answer_lines + result_lines
            yield path[-1], numbers


def _codex_conversations(lines: _Lines, notes: Counter[str]) -> Iterator[_Conversation]:
    """Yield the conversations of a Codex file.

    A compaction ends a conversation. Turns that the user has undone are omitted.
    """
    about: list[int] = []
    # Line number -> whether the line is a message of the user or the system.
    history = {}
    questions = []
    start = 0
    for i, line in lines:
        payload = line.get("payload")
        if not isinstance(payload, dict):
            payload = {}
        match line.get("type"), payload.get("type"):
            case "session_meta", _ if not about:
                about = [i]
                notes["subagents"] += "subagent" in str(payload.get("source"))
            case "response_item", _:
                history[i] = payload.get("role") not in (None, "assistant")
            case "compacted", _:
                yield start, [*about, *history]
                notes["compactions"] += 1
                if payload.get("replacement_history") is None:
                    # A compaction without a replacement history keeps only the messages of the user
                    # and the system.
                    history = {n: True for n, stays in history.items() if stays}
                else:
                    history = {}
                history[i] = False
                start = i
            case "event_msg", "user_message" if history:
                # Record the line of the question. If the previous line is no message of the user,
                # the question follows this event.
                last = next(reversed(history))
                questions.append(last if history[last] else i)
            case "event_msg", "thread_rolled_back" if questions:
                for _ in range(min(len(questions), payload.get("num_turns", 1))):
                    first = questions.pop()
                    while history and next(reversed(history)) >= first:
                        history.popitem()
                        notes[_BRANCHES] += 1
            case kind, _:
                notes[f"lines of type {kind}, left out"] += 1
    yield start, [*about, *history]


def _item_conversations(lines: _Lines, notes: Counter[str]) -> Iterator[_Conversation]:
    """Yield the conversations of a file in which each line is one item or one message."""
    history: list[int] = []
    for i, line in lines:
        if line.get("type") in _COMPACTIONS and history:
            notes["compactions"] += 1
            yield history[0], history
            history = []
        history.append(i)
    if history:
        yield history[0], history


_CONVERSATIONS: dict[str, Callable[[_Lines, Counter[str]], Iterator[_Conversation]]] = {
    "Claude Code": _claude_conversations,
    "Codex": _codex_conversations,
    "OpenAI Agents": _item_conversations,
}
