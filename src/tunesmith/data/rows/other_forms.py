"""Messages and content parts of other interfaces -> the forms of OpenAI and Anthropic.

| interface | a message has | a part has |
|---|---|---|
| Bedrock's Converse | `role`, `content` | no type: `text`, `toolUse`, `toolResult`, ... |
| Gemini | `role`, `parts` | no type: `text`, `functionCall`, `functionResponse` |
| LangChain | `type` for its role, perhaps in `data` or `kwargs` | a type |
| OpenAI's Responses | `role`, or for a call or a result `type` and `call_id` | a type |
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

# Keys of a message or a part -> the keys of OpenAI or Anthropic.
_RENAMED_KEYS = {
    "parts": "content",
    "output": "content",
    "call_id": "tool_call_id",
    "toolUseId": "tool_use_id",
}
# Keys of a part without a type -> its type. None: the value holds another part.
_PART_TYPES = {
    "toolUse": "tool_use",
    "functionCall": "tool_use",
    "toolResult": "tool_result",
    "functionResponse": "tool_result",
    "image": "image",
    "inlineData": "image",
    "reasoningContent": None,
    "reasoningText": "thinking",
    "json": "text",
    "text": "text",
}


def openai_message(turn: Mapping[str, Any], roles: Collection[str]) -> Mapping[str, Any]:
    """Return a message in OpenAI's form. A message with a role and a content is unchanged.

    Other interfaces have the role in `type`, or in the name of a class at the end of `id`.

    Args:
        roles: the known roles, in lower case.
    """
    if "role" in turn and "content" in turn:
        return turn
    fields = turn.get("data") or turn.get("kwargs") or turn
    if not isinstance(fields, Mapping):
        return turn
    # Older LangChain versions store the calls here, in the provider's form.
    calls = fields.get("additional_kwargs")
    message = _renamed({**calls, **fields} if isinstance(calls, Mapping) else fields)
    for name in (fields.get("type"), turn.get("type"), *str(turn.get("id")).split("'")):
        if str(name).lower() in roles:
            message.setdefault("role", name)
    if "arguments" in fields:
        # A call of the Responses API is an item without a message.
        return {"role": message.get("role", message.get("type")), "content": fields}
    return message


def typed_part(part: object) -> Mapping[str, Any]:
    """Return a content part with a type. A part with a type or several values is unchanged."""
    if not isinstance(part, Mapping):
        return {"type": "text", "text": part}
    known = [key for key in _PART_TYPES if part.get(key) is not None]
    if part.get("type") or len(known) != 1:
        return part
    [key] = known
    kind = _PART_TYPES[key]
    value = part[key]
    if kind is None:
        return typed_part(value)
    if key == "json":
        value = json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        return {"type": kind, **_renamed(value)}
    return {"type": "thinking" if part.get("thought") else kind, "text": value}


def _renamed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields with the key names of OpenAI and Anthropic."""
    return {_RENAMED_KEYS.get(key, key): value for key, value in fields.items()}
