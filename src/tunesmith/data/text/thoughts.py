"""The parts of an answer: its thought, its text and its calls, in the forms that rows and chat
templates have for them.

A row has the thought in `reasoning_content`, or in front of the answer's text between tags, as
models write it. A template may read another key (gpt-oss: `thinking`), or know thoughts by their
tags alone; it may want the arguments of a call as JSON text (DeepSeek V3). `loss_mask` finds out by
trying the forms.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from tunesmith.data.rows.samples import FunctionCall, Message

# Between these a row's text may open with a thought.
THOUGHT_TAGS = {
    "</think>": "<think>",
    "</thinking>": "<thinking>",
    "</thought>": "<thought>",
    "</reasoning>": "<reasoning>",
    "[/THINK]": "[THINK]",
}
_CLOSING = re.compile("|".join(map(re.escape, THOUGHT_TAGS)))
# Two tags with no more than a word between them: <think></think>, Gemma 4's
# <|channel>thought\n<channel|>, Cohere's <|START_THINKING|><|END_THINKING|>.
_EMPTY_THOUGHT = re.compile(
    r"(?P<opening><[^<>]+>|\[[^\[\]]+\])\s*\w*\s*(?P<closing><[^<>]+>|\[[^\[\]]+\])\s*\Z"
)
# What tells a closing tag from its opening one.
_NO_NAME = re.compile(r"[^a-z]|start|end|begin|of", re.IGNORECASE)
# A message's key, as templates read it: message.thinking, message['thinking'].
_THOUGHT_KEY = re.compile(r"""(?<=[.'"])[a-z_]*(?:think|thought|reason)[a-z_]*\b""")


def open_thought(text: str) -> tuple[str, str] | None:
    """The tag with which a text ends and opens a thought, and the one that closes it; None: no such
    tag ends it.
    """
    for closing, opening in THOUGHT_TAGS.items():
        if text.rstrip().endswith(opening):
            return opening, closing
    return None


def thought_at_end(text: str) -> int | None:
    """Find where the thought at a text's end begins: its tag, or an empty one; None: no thought."""
    tags = open_thought(text)
    if tags is not None:
        return text.rindex(tags[0])
    match = _EMPTY_THOUGHT.search(text)
    if match is None or match["opening"] == match["closing"]:
        return None
    names = [_NO_NAME.sub("", match[tag]).lower() for tag in ("opening", "closing")]
    return match.start() if names[0] and names[0] == names[1] else None


class InlineThought(NamedTuple):
    """The place of a thought in a text: its [start, end), and where the answer itself begins."""

    start: int
    end: int
    rest: int


def find_thought(text: str) -> InlineThought | None:
    """The thought in front of an answer's text.

    The opening tag may be missing where the closing one stands at the edge of a line: models whose
    prompt opens the thought (DeepSeek R1) write the closing tag alone.
    """
    if "</" not in text and "[/" not in text:
        return None
    closing = _CLOSING.search(text)
    if closing is None:
        return None
    end = closing.start()
    start = len(text) - len(text.lstrip())
    opening = THOUGHT_TAGS[closing[0]]
    if text.startswith(opening, start):
        return InlineThought(start + len(opening), end, closing.end())
    is_line_end = text.startswith("\n", closing.end()) or text.endswith("\n", 0, end)
    if closing[0] == "</think>" and is_line_end and opening not in text[:end]:
        return InlineThought(0, end, closing.end())
    return None


def split_thought(message: Message) -> Message:
    """The message with the thought of its text in `reasoning_content`, empty where that is."""
    if message["role"] != "assistant" or message.get("reasoning_content"):
        return message
    content = message["content"]
    place = find_thought(content)
    if place is None:
        return message
    thought = content[place.start : place.end].strip()
    return {**message, "content": content[place.rest :].lstrip(), "reasoning_content": thought}


class MessageForm(NamedTuple):
    """The form in which a template takes what templates take in several ways.

    Attributes:
        thought_key: the message's key for a thought.
        thought_tags: what opens and closes a thought in the content; None: it has a key.
        text_arguments: a call's arguments are JSON text.
    """

    thought_key: str = "reasoning_content"
    thought_tags: tuple[str, str] | None = None
    text_arguments: bool = False

    def apply(self, messages: Sequence[Message]) -> Sequence[Mapping[str, object]]:
        """The messages in this form."""
        if self == DEFAULT_FORM:
            return messages
        return [self._message(message) for message in messages]

    def _message(self, message: Message) -> Mapping[str, object]:
        calls = message.get("tool_calls")
        thought = message.get("reasoning_content")
        if not calls and not thought:
            return message
        changed: dict[str, object] = dict(message)
        if thought:
            del changed["reasoning_content"]
            if self.thought_tags is None:
                changed[self.thought_key] = thought
            else:
                opening, closing = self.thought_tags
                content = message["content"]
                changed["content"] = f"{opening}{thought.strip()}{closing}{content}"
        if calls and self.text_arguments:
            changed["tool_calls"] = [_with_text_arguments(call) for call in calls]
        return changed


DEFAULT_FORM = MessageForm()


def _with_text_arguments(call: FunctionCall) -> FunctionCall:
    arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": arguments}}


def thought_forms(jinja: str) -> Iterator[MessageForm]:
    """Forms of thoughts that a template may know, by the words in it; the plain one comes first."""
    yield DEFAULT_FORM
    for key in dict.fromkeys(_THOUGHT_KEY.findall(jinja)):
        if key != DEFAULT_FORM.thought_key:
            yield MessageForm(thought_key=key)
    for closing, opening in THOUGHT_TAGS.items():
        if closing not in jinja:
            continue
        if opening.startswith("<"):
            yield MessageForm(thought_tags=(f"{opening}\n", f"\n{closing}\n\n"))
        else:
            yield MessageForm(thought_tags=(opening, closing))


def missing_parts(message: Message, supervised: str) -> list[str]:
    """The parts of an answer that its supervised characters do not hold whole.

    By names of ROW_WARNINGS. Blanks at the edges of a text are not compared: templates trim.
    """
    content = message["content"]
    if len(message) == 2 and content in supervised:
        return []  # nothing but role and content, as most messages are
    missing = []
    message = split_thought(message)
    if (message.get("reasoning_content") or "").strip() not in supervised:
        missing.append("lost_thought")
    if message["content"].strip() not in supervised:
        missing.append("lost_text")
    for call in message.get("tool_calls") or ():
        function = call["function"]
        texts = [function["name"], *_texts_of(function["arguments"])]
        if not all(_holds(supervised, text) for text in texts):
            missing.append("lost_call")
            break
    return missing


def _texts_of(value: object) -> Iterator[str]:
    """All names and values in a call's arguments, as texts; null may be written in any way."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield name
            yield from _texts_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts_of(item)
    elif isinstance(value, str):
        yield value
    elif value is not None:
        yield json.dumps(value)


def _holds(supervised: str, text: str) -> bool:
    """Tell whether a text stands there as it is, or escaped as JSON or Python writes it."""
    text = text.strip()
    if text in supervised:
        return True
    # Python writes True; a template that quotes with ' escapes that.
    backslashed = text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    escaped = (
        text.capitalize(),
        json.dumps(text, ensure_ascii=False)[1:-1],
        json.dumps(text)[1:-1],
        repr(text)[1:-1],
        backslashed,
        backslashed.replace("'", "\\'"),
    )
    return any(form in supervised for form in escaped)
