"""Lines of agent sessions -> messages of a row, in OpenAI's form.

A line has items of OpenAI's Responses API, or messages of its chat API or Anthropic's. What a row
cannot have is counted by its name.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

_ROLES = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant"}
_TEXTS = ("text", "input_text", "output_text", "summary_text", "reasoning_text")
_MEDIA = ("image", "input_image", "image_url", "document", "input_file", "input_audio")
# Items that are calls. The result of each is another item.
CALLS = ("function_call", "custom_tool_call", "local_shell_call")
# The order in which templates write the parts of a turn.
_ORDER = ("thought", "result", "text", "call")


class Part(NamedTuple):
    """A part of a turn: its kind in `_ORDER`, and the id that a call shares with its result."""

    kind: str
    value: Any
    call_id: object = None
    name: object = None


class Turn(NamedTuple):
    """What one line says in one role."""

    role: str
    parts: list[Part]
    is_trained: bool


def turns_of(line: Mapping[str, Any], notes: Counter[str]) -> Iterator[Turn]:
    """Yield the turns of a line; `notes` counts what is left out or changed."""
    is_trained = True
    items: list[Any] = [line]
    match line:
        case {"type": "session_meta", "payload": payload}:
            instructions = payload.get("base_instructions") or {}
            items = [{"role": "system", "content": instructions.get("text")}]
        case {"type": "compacted", "payload": {"replacement_history": [*items]}}:
            # An earlier row trains on these answers.
            is_trained = False
        case {"type": "compacted", "payload": payload}:
            items = [{"role": "user", "content": payload.get("message")}]
        case {"payload": payload}:
            items = [payload]
        case {"isApiErrorMessage": True} | {"message": {"model": "<synthetic>"}}:
            items = []
            notes["API errors and other texts in place of an answer, left out"] += 1
        case {"type": "user" | "assistant", "message": message}:
            items = [message]
            notes["meta lines, kept as the model saw them"] += bool(line.get("isMeta"))
        case {"attachment": {"type": "queued_command", "prompt": prompt}}:
            items = [{"role": "user", "content": prompt}]
        case {"messages": [*items]}:
            items = [{"role": "system", "content": line.get("system_prompt")}, *items]
    for item in items:
        turn = _turn(item, notes)
        yield turn._replace(is_trained=is_trained and turn.is_trained)


def _turn(item: Mapping[str, Any], notes: Counter[str]) -> Turn:
    """Read an item of the Responses API, or a message of a chat."""
    kind = str(item.get("type", "message"))
    role = "user"
    parts: list[Part] = []
    call_id = item.get("call_id", item.get("tool_call_id"))
    if "output" in item or item.get("role") == "tool":
        parts = [_result(item.get("output", item.get("content")), call_id, notes)]
    elif kind in CALLS:
        role = "assistant"
        arguments = item.get("arguments", item.get("action", {"input": item.get("input")}))
        parts = [Part("call", arguments, call_id, item.get("name", "local_shell"))]
    elif kind == "reasoning":
        role = "assistant"
        parts = _thought(item.get("content") or item.get("summary"), notes)
    elif item.get("role") in _ROLES:
        role = _ROLES[item["role"]]
        if thought := item.get("reasoning_content") or item.get("reasoning"):
            parts = _thought(thought, notes)
        parts += _parts(item.get("content"), notes)
        for call in item.get("tool_calls") or ():
            function = call["function"]
            parts.append(Part("call", function.get("arguments"), call.get("id"), function["name"]))
    else:
        notes[f"lines of type {item.get('type', item.get('role'))}, left out"] += 1
    ends = (item.get("status"), item.get("stop_reason"), item.get("finish_reason"))
    is_cut = not {"incomplete", "max_tokens", "length"}.isdisjoint(ends)
    notes["parts of answers that were cut off, not trained"] += is_cut
    return Turn(role, parts, not is_cut)


def _text(content: object, notes: Counter[str]) -> str:
    return "\n\n".join(part.value for part in _parts(content, notes) if part.kind == "text")


def _result(content: object, call_id: object, notes: Counter[str]) -> Part:
    if isinstance(content, dict):
        content = content.get("content", content)
    return Part("result", _text(content, notes), call_id)


def _thought(content: object, notes: Counter[str]) -> list[Part]:
    text = _text(content, notes)
    notes["thoughts that are encrypted or not recorded, left out"] += not text
    return [Part("thought", text)] if text else []


def _parts(content: object, notes: Counter[str]) -> list[Part]:
    """Return the parts of a content that are read, and count the others by their types."""
    parts: list[Part] = []
    for given in content if isinstance(content, list) else [content]:
        part = given if isinstance(given, dict) else {"type": "text", "text": given or ""}
        kind = part.get("type")
        if kind in _TEXTS:
            if part["text"].strip():
                parts.append(Part("text", part["text"]))
        elif kind == "thinking":
            parts += _thought(part.get("thinking"), notes)
        elif kind == "tool_use":
            parts.append(Part("call", part.get("input"), part.get("id"), part.get("name")))
        elif kind == "tool_result":
            parts.append(_result(part.get("content"), part.get("tool_use_id"), notes))
        elif kind in _MEDIA:
            notes["pictures and files, written as [image] or [document]"] += 1
            parts.append(Part("text", "[image]" if "image" in kind else "[document]"))
        else:
            notes[f"parts of type {kind}, left out"] += 1
    return parts


def join_turns(turns: Iterable[Turn], notes: Counter[str]) -> list[dict[str, Any]]:
    """Join turns to messages, from the first question to the last answer. Lines of one role after
    each other are one message, as the API has it.
    """
    joined: list[Turn] = []
    calls: set[object] = set()
    waiting: set[object] = set()
    for turn in turns:
        parts = []
        for part in turn.parts:
            if part.kind == "result" and part.call_id not in waiting:
                notes["tool results without their call, left out"] += 1
                continue
            if part.kind == "call" and part.call_id in calls:
                continue  # the same line twice
            if part.kind == "call":
                calls.add(part.call_id)
                waiting.add(part.call_id)
            waiting -= {part.call_id} if part.kind == "result" else set()
            parts.append(part)
        is_first = turn.role == "assistant" and all(other.role == "system" for other in joined)
        if not parts or is_first:
            notes["answers in front of any question, left out"] += bool(parts)
        elif joined and joined[-1].role == turn.role:
            is_trained = joined[-1].is_trained and turn.is_trained
            joined[-1] = Turn(turn.role, joined[-1].parts + parts, is_trained)
        else:
            joined.append(turn._replace(parts=parts))
    while joined and not (joined[-1].role == "assistant" and joined[-1].is_trained):
        joined.pop()
        notes["turns behind the last trained answer, left out"] += 1
    notes["tool calls without a result"] += len(waiting)
    return [message for turn in joined for message in _messages(turn, notes)]


def _messages(turn: Turn, notes: Counter[str]) -> Iterator[dict[str, Any]]:
    """Yield the results of a turn, and the message with its other parts in the usual order."""
    parts = sorted(turn.parts, key=lambda part: _ORDER.index(part.kind))
    is_answer = turn.role == "assistant"
    notes["answers whose thoughts or calls were between texts"] += is_answer and parts != turn.parts
    thoughts = [part.value for part in parts if part.kind == "thought"]
    texts = [part.value for part in parts if part.kind == "text"]
    calls = []
    for part in parts:
        if part.kind == "result":
            yield {"role": "tool", "tool_call_id": part.call_id, "content": part.value}
        if part.kind == "call":
            function = {"name": part.name, "arguments": part.value}
            calls.append({"id": part.call_id, "type": "function", "function": function})
    if thoughts:
        # With tags, because templates without thoughts write these too.
        texts = ["<think>\n" + "\n\n".join(thoughts) + "\n</think>", *texts]
    message: dict[str, Any] = {"role": turn.role, "content": "\n\n".join(texts)}
    if calls:
        message["tool_calls"] = calls
    if is_answer and not turn.is_trained:
        message["train"] = False
    if texts or calls:
        yield message
