"""Lines of agent sessions -> messages of a row, in OpenAI's form.

A line has items of OpenAI's Responses API, or messages of its chat API or of Anthropic's. What a
row cannot have is counted by its name.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

_ROLES = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant"}
# Why an answer ends that was cut off: in the Responses API, in Anthropic's API, and in chats.
_CUT = {"incomplete", "max_tokens", "length"}


class SessionPart(NamedTuple):
    """A part of a message: a `thought`, a `text`, a `call` or a `result`.

    Attributes:
        value: the text, or the arguments of a call.
        call_id: of a call and of its result.
    """

    kind: str
    value: Any
    call_id: object = None
    name: object = None
    role: str = "assistant"
    is_trained: bool = True


def parts_of(line: Mapping[str, Any], notes: Counter[str]) -> Iterator[SessionPart]:
    """Yield the parts of a line; `notes` counts what is left out or changed."""
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
        is_cut = not _CUT.isdisjoint(map(item.get, ("status", "stop_reason", "finish_reason")))
        notes["parts of answers that were cut off, not trained"] += is_cut
        role = _ROLES.get(str(item.get("role")), "assistant")
        for part in _parts_of_item(item, role, notes):
            yield part._replace(role=role, is_trained=is_trained and not is_cut)


def _parts_of_item(
    item: Mapping[str, Any], role: str, notes: Counter[str]
) -> Iterator[SessionPart]:
    """Yield the parts of an item of the Responses API, or of a message of a chat."""
    kind = str(item.get("type", "message"))
    content = item.get("content")
    call_id = item.get("call_id", item.get("tool_call_id"))
    if kind.endswith("_output") or item.get("role") == "tool":
        yield SessionPart("result", _text(item.get("output", content), notes), call_id)
    elif kind.endswith("_call") and call_id:
        # A call without an id is one whose result the model got in another way.
        name = item.get("name", kind.removesuffix("_call"))
        keys = [key for key in ("arguments", "action", "operation") if key in item]
        arguments = item[keys[0]] if keys else {"input": item.get("input")}
        yield SessionPart("call", arguments, call_id, name)
    elif kind == "reasoning":
        thinking = {"type": "thinking", "thinking": content or item.get("summary")}
        yield from _parts_of_content(thinking, role, notes)
    elif item.get("role") not in _ROLES:
        notes[f"lines of type {item.get('type', item.get('role'))}, left out"] += 1
    else:
        parts = list(content) if isinstance(content, list) else [{"type": "text", "text": content}]
        if thought := item.get("reasoning_content") or item.get("reasoning"):
            parts.insert(0, {"type": "thinking", "thinking": thought})
        for part in parts:
            yield from _parts_of_content(part, role, notes)
        for call in item.get("tool_calls") or ():
            function = call["function"]
            yield SessionPart("call", function.get("arguments"), call.get("id"), function["name"])


def _parts_of_content(
    part: Mapping[str, Any], role: str, notes: Counter[str]
) -> Iterator[SessionPart]:
    """Yield the part of a content in the form of Anthropic's API, unless it is empty."""
    kind = part.get("type")
    if kind == "tool_use":
        yield SessionPart("call", part.get("input"), part.get("id"), part.get("name"))
    elif kind == "tool_result":
        text = _text(part.get("content"), notes)
        yield SessionPart("result", text, part.get("tool_use_id"))
    elif kind == "thinking":
        thought = _text(part.get("thinking"), notes)
        notes["thoughts that are encrypted or not recorded, left out"] += not thought
        if thought:
            yield SessionPart("thought", thought)
    elif role == "assistant" and "text" not in part:
        notes[f"parts of type {kind}, left out"] += 1
    elif text := _text([part], notes):
        yield SessionPart("text", text)


def _text(content: object, notes: Counter[str]) -> str:
    """Join the texts of a content. Another part is written as its type, and counted."""
    texts = []
    for part in content if isinstance(content, list) else [content]:
        text = part
        if isinstance(part, dict):
            kind = part.get("type")
            # Codex writes some results as an object with their content.
            text = part.get("text", part.get("content", f"[{kind}]"))
            if text == f"[{kind}]":
                notes[f"parts without a text, written as {text}"] += 1
        texts.append(str(text or ""))
    text = "\n\n".join(text for text in texts if text.strip())
    # Agents cut off long outputs, perhaps in the middle of a surrogate pair.
    whole = text.encode(errors="replace").decode()
    notes["texts with half of a character, written as ?"] += whole != text
    return whole


def join_parts(parts: Iterable[SessionPart], notes: Counter[str]) -> list[dict[str, Any]]:
    """Join parts to messages, from the first question to the last trained answer.

    Parts of one role after each other are one message, as the API has it: its thoughts come first,
    then its texts, then its calls. Results of calls follow these.
    """
    messages: list[dict[str, Any]] = []
    waiting: set[object] = set()
    last: dict[str, Any]
    is_asked = False
    for part in parts:
        last = messages[-1] if messages else {"role": ""}
        if part.kind == "result":
            if part.call_id not in waiting:
                notes["tool results without their call, left out"] += 1
                continue
            waiting.remove(part.call_id)
            message = {"role": "tool", "tool_call_id": part.call_id, "content": part.value}
            # A text that was said before the result follows it.
            messages.insert(len(messages) - (last["role"] == "user"), message)
            continue
        if part.role == "assistant" and not is_asked:
            notes["parts of answers in front of any question, left out"] += 1
            continue
        is_asked = is_asked or part.role == "user"
        if last["role"] != part.role:
            last = {"role": part.role, "thought": [], "text": [], "call": [], "train": True}
            messages.append(last)
        is_late = (part.kind == "thought" and last["text"]) or (
            part.kind != "call" and last["call"]
        )
        notes["parts of answers moved in front of a text or a call"] += bool(is_late)
        value = part.value
        if part.kind == "call":
            waiting.add(part.call_id)
            function = {"name": part.name, "arguments": value}
            value = {"id": part.call_id, "type": "function", "function": function}
        last[part.kind].append(value)
        last["train"] &= part.is_trained
    while messages and not (messages[-1]["role"] == "assistant" and messages[-1]["train"]):
        messages.pop()
        notes["messages behind the last trained answer, left out"] += 1
    notes["tool calls without a result"] += len(waiting)
    return [_finished(message) for message in messages]


def _finished(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with its texts joined."""
    if message["role"] == "tool":
        return message
    texts = message["text"]
    if message["thought"]:
        # With tags, because templates without thoughts write these too.
        texts = ["<think>\n" + "\n\n".join(message["thought"]) + "\n</think>", *texts]
    finished = {"role": message["role"], "content": "\n\n".join(texts)}
    if message["call"]:
        finished["tool_calls"] = message["call"]
    if message["role"] == "assistant" and not message["train"]:
        finished["train"] = False
    return finished
