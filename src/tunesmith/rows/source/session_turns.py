"""Conversion of the lines of an agent session to messages in OpenAI's form.

A line contains items of OpenAI's Responses API, or messages of OpenAI's or Anthropic's chat API.
Content that cannot be stored in a row is omitted. The omitted parts of each kind are counted.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

_ROLES = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant"}
# Values that mark a truncated answer in the Responses API, Anthropic's API and OpenAI's chat API,
# in this order.
UNASKED = "parts of answers before the first question, left out"
_TRUNCATED = {"incomplete", "max_tokens", "length"}


class SessionPart(NamedTuple):
    """A part of a message in an agent session: a thought, a text, a call or the result of a call.

    Attributes:
        kind: `thought`, `text`, `call` or `result`.
        value: the text, or the arguments of a call.
        call_id: id of a call. The result of the call has the same id. None for thoughts and texts.
        name: name of the called function.
        role: role of the message.
        is_trained: whether the model may be trained on this part.
    """

    kind: str
    value: Any
    call_id: object = None
    name: object = None
    role: str = "assistant"
    is_trained: bool = True


def parts_of(line: Mapping[str, Any], notes: Counter[str]) -> Iterator[SessionPart]:
    """Yield the parts of messages in one line of an agent session.

    Args:
        line: a line of a session, decoded from JSON.
        notes: counter to which the numbers of omitted and changed parts are added, by kind.
    """
    is_trained = True
    items = [line]
    match line:
        case {"type": "session_meta", "payload": payload}:
            instructions = payload.get("base_instructions") or {}
            items = [{"role": "system", "content": instructions.get("text")}]
        case {"type": "compacted", "payload": {"replacement_history": [*items]}}:
            # The line repeats answers of an earlier row. Exclude them from training, because the
            # model already learns them from that row.
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
    for item in items:
        is_cut = not _TRUNCATED.isdisjoint(
            map(item.get, ("status", "stop_reason", "finish_reason"))
        )
        notes["parts of answers that were cut off, not trained"] += is_cut
        role = _ROLES.get(str(item.get("role")), "assistant")
        for part in _parts_of_item(item, role, notes):
            yield part._replace(role=role, is_trained=is_trained and not is_cut)


def _parts_of_item(
    item: Mapping[str, Any], role: str, notes: Counter[str]
) -> Iterator[SessionPart]:
    """Yield the parts of one item of the Responses API, or of one message of a chat API."""
    kind = str(item.get("type", "message"))
    content = item.get("content")
    call_id = item.get("call_id", item.get("tool_call_id"))
    if kind.endswith("_output") or item.get("role") == "tool":
        yield SessionPart("result", _text(item.get("output", content), notes), call_id)
    elif kind.endswith("_call") and call_id:
        # Skip calls without an id, because the server ran their tool and the file has no result for
        # them.
        keys = [key for key in ("arguments", "action", "operation") if key in item]
        arguments = item[keys[0]] if keys else {"input": item.get("input")}
        yield SessionPart("call", arguments, call_id, item.get("name", kind.removesuffix("_call")))
    elif kind == "reasoning":
        thought = content or item.get("summary")
        yield from _parts_of_content({"type": "thinking", "thinking": thought}, role, notes)
    elif item.get("role") not in _ROLES:
        unknown = item.get("type", item.get("role"))
        notes[f"lines of type {unknown}, left out"] += 1
    else:
        parts = list(content) if isinstance(content, list) else [{"type": "text", "text": content}]
        thought = item.get("reasoning_content") or item.get("reasoning")
        if thought:
            parts.insert(0, {"type": "thinking", "thinking": thought})
        for part in parts:
            yield from _parts_of_content(part, role, notes)
        for call in item.get("tool_calls") or ():
            function = call["function"]
            arguments = function.get("arguments")
            yield SessionPart("call", arguments, call.get("id"), function["name"])


def _parts_of_content(
    part: Mapping[str, Any], role: str, notes: Counter[str]
) -> Iterator[SessionPart]:
    """Convert a content part of Anthropic's API to a message part. Yield nothing if it is empty."""
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
    else:
        text = _text([part], notes)
        if text:
            yield SessionPart("text", text)


def _text(content: object, notes: Counter[str]) -> str:
    """Join the texts in the content of a message or a tool result.

    `[type]` replaces a part without text, such as an image.
    """
    texts = []
    for part in content if isinstance(content, list) else [content]:
        text = part
        if isinstance(part, dict):
            kind = part.get("type")
            # Codex writes some tool results as an object with the key `content`.
            text = part.get("text", part.get("content", f"[{kind}]"))
            if text == f"[{kind}]":
                notes[f"parts without a text, written as {text}"] += 1
        texts.append(str(text or ""))
    text = "\n\n".join(text for text in texts if text.strip())
    # Agents truncate long outputs, which can cut a surrogate pair in half. Replace the remaining
    # half by "?".
    whole = text.encode(errors="replace").decode()
    notes["texts with half of a character, written as ?"] += whole != text
    return whole


def join_parts(parts: Iterable[SessionPart], notes: Counter[str]) -> list[dict[str, Any]]:
    """Join parts to messages, from the first question to the last trained answer.

    Consecutive parts of one role become one message, in the order of the API: thoughts, texts,
    calls. The results of the calls follow as separate messages.
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
            at = len(messages)
            if last["role"] == "user":
                # The user wrote a text before the tool finished. Insert the result before this
                # text, because it must follow its call.
                at -= 1
            messages.insert(at, message)
            continue
        if part.role == "assistant" and not is_asked:
            notes[UNASKED] += 1
            continue
        is_asked = is_asked or part.role == "user"
        if last["role"] != part.role:
            last = {"role": part.role, "thought": [], "text": [], "call": [], "train": True}
            messages.append(last)
        is_after_call = part.kind != "call" and last["call"]
        is_after_text = part.kind == "thought" and last["text"]
        if is_after_call or is_after_text:
            notes["parts of answers moved before a text or a call"] += 1
        value = part.value
        if part.kind == "call":
            waiting.add(part.call_id)
            function = {"name": part.name, "arguments": value}
            value = {"id": part.call_id, "type": "function", "function": function}
        last[part.kind].append(value)
        last["train"] &= part.is_trained
    while messages:
        last = messages[-1]
        if last["role"] == "assistant" and last["train"]:
            break
        messages.pop()
        notes["messages after the last trained answer, left out"] += 1
    notes["tool calls without a result"] += len(waiting)
    return [_to_message(message) for message in messages]


def _to_message(message: dict[str, Any]) -> dict[str, Any]:
    """Convert the lists of thoughts, texts and calls of a message to OpenAI's form."""
    if message["role"] == "tool":
        return message
    texts = message["text"]
    if message["thought"]:
        thought = "\n\n".join(message["thought"])
        # Write the thought between tags in the text, so that it is kept by templates without
        # support for reasoning.
        texts = [f"<think>\n{thought}\n</think>", *texts]
    finished = {"role": message["role"], "content": "\n\n".join(texts)}
    if message["call"]:
        finished["tool_calls"] = message["call"]
    if message["role"] == "assistant" and not message["train"]:
        finished["train"] = False
    return finished
