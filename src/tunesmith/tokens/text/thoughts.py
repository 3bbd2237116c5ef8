"""Parts of an answer (thought, text and calls), in the forms that rows and chat templates use.

A row stores the thought in `reasoning_content`, or between tags at the start of the answer's text,
as models write it. A template may read another key (gpt-oss: `thinking`), or find thoughts only by
their tags. It may require the arguments of a call as JSON text (DeepSeek V3). `probe.py` tries the
forms to find the one that a template reads.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from tunesmith.rows.samples import FunctionCall, Message

# A message in the form that a template reads.
TemplateMessage = Mapping[str, object]

# Closing tag -> opening tag of a thought at the start of a row's text.
THOUGHT_TAGS = {
    "</think>": "<think>",
    "</thinking>": "<thinking>",
    "</thought>": "<thought>",
    "</reasoning>": "<reasoning>",
    "[/THINK]": "[THINK]",
}
_CLOSING = re.compile("|".join(map(re.escape, THOUGHT_TAGS)))
# Pattern of the key that contains the thought of a message, as a template writes it:
# message.thinking or message['thinking'].
_THOUGHT_KEY = re.compile(r"""(?<=[.'"])[a-z_]*(?:think|thought|reason)[a-z_]*\b""")


class InlineThought(NamedTuple):
    """Position of a thought in a text.

    The thought is the characters [start, end), and the answer begins at `rest`.
    """

    start: int
    end: int
    rest: int


def find_thought(text: str) -> InlineThought | None:
    """Find the thought at the start of an answer's text.

    The opening tag may be missing if </think> is at the end of a line, because models whose prompt
    opens the thought (DeepSeek R1) write only the closing tag.
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
    """Move the thought in a message's text to `reasoning_content`, which is "" for an empty
    thought.
    """
    if message["role"] != "assistant" or message.get("reasoning_content"):
        return message
    content = message["content"]
    place = find_thought(content)
    if place is None:
        return message
    thought = content[place.start : place.end].strip()
    return {**message, "content": content[place.rest :].lstrip(), "reasoning_content": thought}


class MessageForm(NamedTuple):
    """The form in which a template reads thoughts and calls.

    Attributes:
        thought_key: the message's key for a thought.
        thought_tags: opening and closing tag if the template reads the thought in the content. None
            if it reads `thought_key`.
        text_arguments: whether the arguments of a call are JSON text.
    """

    thought_key: str = "reasoning_content"
    thought_tags: tuple[str, str] | None = None
    text_arguments: bool = False

    def apply(self, messages: Sequence[Message]) -> Sequence[TemplateMessage]:
        """Convert the messages to the form that the template reads."""
        return [self._message(message) for message in messages]

    def _message(self, message: Message) -> TemplateMessage:
        """Convert the thought and the calls of a message to the form that the template reads.

        A blank thought is left out, because templates disagree whether it is a thought.
        """
        calls = message.get("tool_calls")
        thought = message.get("reasoning_content")
        if thought is None and not (calls and self.text_arguments):
            return message
        changed: dict[str, object] = dict(message)
        changed.pop("reasoning_content", None)
        if thought is not None and thought.strip():
            if self.thought_tags is None:
                changed[self.thought_key] = thought
            else:
                opening, closing = self.thought_tags
                content = message["content"]
                changed["content"] = f"{opening}{thought.strip()}{closing}{content}"
        if calls and self.text_arguments:
            text_calls: list[FunctionCall] = []
            for call in calls:
                function = call["function"]
                text = json.dumps(function["arguments"], ensure_ascii=False)
                text_calls.append({**call, "function": {**function, "arguments": text}})
            changed["tool_calls"] = text_calls
        return changed


DEFAULT_FORM = MessageForm()


def thought_forms(jinja: str) -> Iterator[MessageForm]:
    """Yield the forms of thoughts that a template may read, according to words in the template.

    The default form is first.
    """
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


def missing_parts(message: Message, supervised: str) -> Iterator[str]:
    """Yield the parts of an answer that are missing in its supervised characters.

    The parts are names of ROW_WARNINGS. Whitespace at the edges of a text is ignored, because
    templates trim texts.
    """
    if len(message) == 2 and message["content"] in supervised:
        return  # The message has only role and content, like most messages.
    message = split_thought(message)
    if (message.get("reasoning_content") or "").strip() not in supervised:
        yield "lost_thought"
    if message["content"].strip() not in supervised:
        yield "lost_text"
    for call in message.get("tool_calls") or ():
        function = call["function"]
        texts = [function["name"], *_texts_of(function["arguments"])]
        if not all(_holds(supervised, text) for text in texts):
            yield "lost_call"
            return


def _texts_of(value: object) -> Iterator[str]:
    """Yield all names and values in a call's arguments as texts.

    The value null is skipped, because templates write it in different ways.
    """
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
    """Return whether `supervised` contains `text`, either unchanged or escaped as in JSON or
    Python.
    """
    text = text.strip()
    if text in supervised:
        return True
    # Forms in which a template may write the text: with a capital letter, as Python's True, or with
    # escaped characters.
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
