"""Sessions of coding agents -> rows of messages, a row for each conversation.

| written by | a line of the file |
|---|---|
| Claude Code | a part of a message, with the line that it follows (`parentUuid`) |
| Codex | an item of the Responses API in a `payload`, or an event about it |
| Hermes | a whole session; or a message, behind a line about the session |
| OpenAI Agents | an item of the Responses API |

A subagent is a row of its own. Where a harness compacts the history, a row ends, and the next one
begins with what the model sees from there on. Whatever is not in a row is counted by its name.
"""

import json
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from tunesmith.data.source.secrets import secrets_in
from tunesmith.data.source.session_turns import join_parts, parts_of
from tunesmith.data.source.table import MAX_ROW_BYTES, Row, Table, file_digest, json_type
from tunesmith.errors import DataError
from tunesmith.host.memory import open_uncached

# Lines of a file in which its form is looked for: some begin with lines about the session.
_HEAD_LINES = 50
_CODEX_LINES = ("session_meta", "response_item", "event_msg", "turn_context", "compacted")
# A line about a session of Claude Code has one of these keys.
_CLAUDE_KEYS = frozenset(("sessionId", "session_id", "uuid", "leafUuid", "snapshot"))
_HERMES_KEYS = frozenset(("id", "source", "model", "system_prompt", "messages"))
# The keys of a message that is a line. Rows of a table have others.
_MESSAGE_KEYS = frozenset(
    "id type role content status phase name tool_calls tool_call_id tool_name timestamp"
    " finish_reason reasoning reasoning_content reasoning_details".split()
)
# Types of items of the Responses API, each with a key that rows of a table do not have.
_ITEM_KEYS = {
    "function_call": "call_id",
    "function_call_output": "call_id",
    "reasoning": "summary",
    "compaction": "encrypted_content",
}
_COMPACTIONS = ("compaction", "compaction_summary", "context_compaction")
_BRANCHES = "lines of other branches, left out"

# The line at which a conversation begins, and the numbers of its lines.
_Conversation = tuple[int, list[int]]
_Lines = Iterable[tuple[int, dict[str, Any]]]


def session_form(path: Path) -> str:
    """Return who wrote a file of sessions; empty for a file of other lines."""
    form: str | None = ""
    if path.suffix.lower() in (".jsonl", ".ndjson") and path.is_file():
        with open_uncached(path) as file:
            for _ in range(_HEAD_LINES):
                try:
                    form = _form_of_line(json.loads(file.readline(MAX_ROW_BYTES)))
                except (ValueError, RecursionError):
                    break
                if form is not None:
                    break
    return form or ""


def _form_of_line(line: object) -> str | None:
    """Return who writes such a line; None if it is about a session, and empty for another."""
    if not isinstance(line, dict):
        return ""
    kind = line.get("type")
    if isinstance(line.get("payload"), dict) and kind in _CODEX_LINES:
        return "Codex"
    if isinstance(line.get("message"), dict) and kind in ("user", "assistant"):
        return "Claude Code"
    if line.get("role") == "session_meta" or line.keys() >= _HERMES_KEYS:
        return "Hermes"
    is_message = {"role", "content"} <= line.keys() <= _MESSAGE_KEYS
    if is_message or _ITEM_KEYS.get(str(kind)) in line:
        return "OpenAI Agents"
    is_about = isinstance(kind, str) and line.keys() & _CLAUDE_KEYS
    # Codex wrote items without a payload until 2025, behind such a line.
    return None if is_about or {"timestamp", "instructions"} <= line.keys() else ""


def read_sessions(path: Path, lines: Table, form: str) -> Table:
    """Make a table of the conversations of a file.

    Args:
        lines: the lines of the file.
        form: as of `session_form`.

    Raises:
        DataError: a line is no JSON. The last line may be cut off, because the session was killed.
    """
    notes: Counter[str] = Counter()
    secrets: dict[int, list[str]] = {}
    rows: list[tuple[int, array[int]]] = []
    numbered = ((i, line) for i in range(len(lines)) if (line := _read_line(lines, i, notes)))
    for start, numbers in _CONVERSATIONS[form](numbered, notes):
        row, found = _read_row(lines, start, numbers, notes)
        if row["messages"]:
            secrets[len(rows)] = found
            rows.append((start, array("q", numbers)))
        else:
            notes["conversations without an answer, left out"] += 1
    return Table(
        len(rows),
        lambda i: _read_row(lines, *rows[i], Counter())[0],
        where=lambda i: lines.where(rows[i][0]),
        fingerprint=lambda: file_digest(path),
        notes=Counter({f"rows of {form} sessions": len(rows)}) + notes,
        secrets=secrets,
    )


def _read_row(
    lines: Table, start: int, numbers: Iterable[int], notes: Counter[str]
) -> tuple[Row, list[str]]:
    """Read a conversation as a row, with the place of each secret that the model would read.

    Answers in front of its start are of an earlier row, and only context.
    """
    parts = []
    secrets = []
    tools = None
    size = 0
    for i in numbers:
        if size > MAX_ROW_BYTES:
            notes[f"conversations cut off after {MAX_ROW_BYTES >> 20} MiB"] += 1
            break
        line = _read_line(lines, i, notes)
        if "messages" in line or line.get("role") == "session_meta":
            tools = line.get("tools")
        try:
            of_line = list(parts_of(line, notes))
        except (AttributeError, LookupError, TypeError) as error:
            raise _unknown_line(lines.where(i), f"{type(error).__name__}: {error}") from None
        for part in of_line:
            size += len(part.value or "")
            secrets += [f"{lines.where(i)}: {kind}" for kind in secrets_in(part.value)]
            parts.append(part._replace(is_trained=part.is_trained and i >= start))
    return {"messages": join_parts(parts, notes), "tools": tools}, secrets


def _read_line(lines: Table, i: int, notes: Counter[str]) -> dict[str, Any]:
    """Read a line as an object, which is empty if the line is cut off at the end of the file."""
    try:
        line = lines.row(i)
    except DataError:
        if i < len(lines) - 1:
            raise
        notes["lines cut off at the end of a file"] = 1
        line = {}
    if not isinstance(line, dict):
        raise _unknown_line(lines.where(i), f"it is {json_type(line)}, not an object")
    return line


def _unknown_line(where: str, why: object) -> DataError:
    what = "the line is not as agents write it"
    return DataError(what, where=where, why=str(why), fix="fix or delete the line")


def _claude_conversations(lines: _Lines, notes: Counter[str]) -> Iterator[_Conversation]:
    """Find the conversations of Claude Code, those of each subagent apart."""
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
        agent = transcript.place(i, line)
        if isinstance(message, dict):
            transcript.turns[agent].append(i)
            transcript.note_answer(i, message, is_answer=kind == "assistant")
    for agent, turns in transcript.turns.items():
        conversations = transcript.paths(turns[-1])
        used = set(chain(*(numbers for _, numbers in conversations)))
        notes["subagents"] += bool(agent)
        notes["compactions"] += len(conversations) - 1
        notes[_BRANCHES] += len(set(turns) - used)
        yield from conversations


class _Transcript:
    """The lines of a file of Claude Code, which form trees.

    An answer is several lines, which follow each other. Each result of parallel calls follows its
    own call, so that the path to a line has one of them: all lines of an answer, and the results
    of its calls, belong to the path.

    Attributes:
        numbers: the line of each uuid.
        turns: the lines of each subagent with messages; those of the session are under "".
    """

    def __init__(self) -> None:
        self.turns: dict[str, list[int]] = defaultdict(list)
        self.numbers: dict[str, int] = {}
        self._parents: dict[int, int | None] = {}
        # The first line after a compaction -> the last line before it.
        self._compactions: dict[int, int | None] = {}
        # The first line that a compaction keeps -> the compaction, and the uuid of its new parent.
        self._kept: dict[int, tuple[int, str]] = {}
        self._agents: dict[int | None, str] = {}
        self._latest: dict[str, int] = {}
        # A line, or the id of an answer or a call -> the first line of the answer.
        self._answers: dict[object, int] = {}
        # The first line of an answer -> its lines, and the lines with results of its calls.
        self._members: dict[int, tuple[list[int], list[int]]] = {}

    def place(self, i: int, line: Mapping[str, Any]) -> str:
        """Place a line behind the one that it follows; return its subagent."""
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
            about = line.get("compactMetadata") or {}
            kept = about.get("preservedMessages") or about.get("preservedSegment") or {}
            first = str(kept.get("headUuid", (kept.get("uuids") or [""])[0]))
            if first in self.numbers:
                self._kept[self.numbers[first]] = (i, str(kept.get("anchorUuid")))
        self.numbers[uuid] = self._latest[agent] = i
        self._parents[i] = parent
        self._agents[i] = agent
        return agent

    def note_answer(self, i: int, message: Mapping[str, Any], *, is_answer: bool) -> None:
        """Note the answer that a line belongs to, as a part of it or as a result of its calls."""
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        ids = [part.get("tool_use_id", part.get("id")) for part in parts if isinstance(part, dict)]
        calls = [str(name) for name in ids if name]
        if is_answer:
            first = self._answers.setdefault(str(message.get("id", i)), i)
            self._answers.update(dict.fromkeys(calls, first))
        else:
            first = next((self._answers[name] for name in calls if name in self._answers), i)
        self._answers[i] = first
        self._members.setdefault(first, ([], []))[not is_answer].append(i)

    def paths(self, last: int) -> list[_Conversation]:
        """Return the path to a line, and before a compaction the path to the last line."""
        conversations: list[_Conversation] = []
        end: int | None = last
        while end is not None:
            path = self._path(end)
            # Results may be between the lines of their answer.
            answers = dict.fromkeys(self._answers.get(i, i) for i in reversed(path))
            lines = [self._members.get(first, ([first],)) for first in answers]
            conversations.insert(0, (path[-1], [*chain(*chain(*lines))]))
            end = self._compactions.get(path[-1])
        return conversations

    def _path(self, end: int) -> list[int]:
        """Return the lines from one to its first ancestor. What a compaction kept follows it."""
        path: dict[int, None] = {}
        at: int | None = end
        while at is not None and at not in path:
            path[at] = None
            boundary, anchor = self._kept.get(at, (end, ""))
            at = self._parents[at]
            if boundary < end:
                at = max(boundary, self.numbers.get(anchor, 0))
        return list(path)


def _codex_conversations(lines: _Lines, notes: Counter[str]) -> Iterator[_Conversation]:
    """Find the conversations of Codex: the history between compactions, without what was undone."""
    about: list[int] = []
    # Each line, and whether it is something other than an answer, a call or a result.
    history: dict[int, bool] = {}
    questions: list[int] = []
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
                # Without a history that replaces it, what the user said stays.
                is_replaced = payload.get("replacement_history") is not None
                history = {n: True for n, stays in history.items() if stays and not is_replaced}
                history[i] = False
                start = i
            case "event_msg", "user_message" if history:
                # The event follows the item with the question, or comes before it.
                last = next(reversed(history))
                questions.append(last if history[last] else i)
            case "event_msg", "thread_rolled_back" if questions:
                first = questions[-int(payload.get("num_turns", 1)) :][0]
                questions = [n for n in questions if n < first]
                notes[_BRANCHES] += sum(n >= first for n in history)
                history = {n: stays for n, stays in history.items() if n < first}
            case kind, _:
                notes[f"lines of type {kind}, left out"] += 1
    yield start, [*about, *history]


def _item_conversations(lines: _Lines, notes: Counter[str]) -> Iterator[_Conversation]:
    """Find the conversations of files with an item, a message or a session a line."""
    about: list[int] = []
    history: list[int] = []
    for i, line in lines:
        if line.get("role") == "session_meta":
            about = [i]
        elif "messages" in line:
            yield i, [i]
        else:
            if line.get("type") in _COMPACTIONS and history:
                notes["compactions"] += 1
                yield history[0], about + history
                history = []
            history.append(i)
    if history:
        yield history[0], about + history


_CONVERSATIONS: dict[str, Callable[[_Lines, Counter[str]], Iterator[_Conversation]]] = {
    "Claude Code": _claude_conversations,
    "Codex": _codex_conversations,
    "Hermes": _item_conversations,
    "OpenAI Agents": _item_conversations,
}
