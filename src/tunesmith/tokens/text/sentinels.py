"""Insertion of sentinels: short ASCII words in the texts of a conversation, which show where a
template writes the texts.

A sentinel is placed inside the whitespace at the edges of its text, so a template that trims texts
renders the same with and without it. Sentinels consist only of letters and digits, so JSON escaping
does not change them. However, a template may test a text (`startswith`, `in`), and the sentinels
may change the result of the test. If sentinels on both sides change the rendering, a single
sentinel at the end, at the start or in the middle is tried.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from tunesmith.rows.samples import PICTURE_MARK, Message, ToolSchema
from tunesmith.tokens.text.thoughts import find_thought

Messages = Sequence[Message]
Tools = list[ToolSchema] | None
Position = Literal["both", "end", "start", "middle"]
SENTINEL_POSITIONS: tuple[Position, ...] = ("both", "end", "start", "middle")


class Field(NamedTuple):
    """A text of a conversation into which sentinels are inserted.

    The fields are the index of the message (-1 for tools), the kind of text, and the text itself.
    """

    message: int
    kind: str
    text: str


class Sentinel(NamedTuple):
    """A sentinel that was found in a rendering.

    Attributes:
        field: index of the field with this sentinel.
        side: `b` at the beginning of the text, `e` at its end.
        at: position in the rendering without sentinels.
    """

    field: int
    side: str
    at: int


@dataclass
class Sentinels:
    """Inserts sentinels into a conversation and removes them from its rendering.

    Attributes:
        word: the first characters of every sentinel. They occur neither in the conversation nor in
            its rendering.
        position: position of the sentinels in a text.
        only: indices of the messages into which sentinels are inserted. If None, they are inserted
            into all messages and the tools.
        with_pictures: whether the texts contain pictures. Pictures at the edges of a text stay
            outside of its sentinels, like whitespace.
        fields: the texts that have sentinels.
    """

    word: str
    position: Position
    only: Collection[int] | None = None
    with_pictures: bool = False
    fields: list[Field] = field(default_factory=list)

    def insert(self, messages: Messages, tools: Tools) -> tuple[list[Message], Tools]:
        """Return copies of messages and tools with sentinels.

        Each text into which sentinels are inserted is added to `fields`.
        """
        marked_messages = []
        for i, message in enumerate(messages):
            is_marked = self.only is None or i in self.only
            marked_messages.append(self._message(i, message) if is_marked else message)
        if tools is None or self.only is not None:
            return marked_messages, tools
        marked_tools = []
        for tool in tools:
            function: Any = tool["function"]
            name = self._text(function["name"], -1, "tools")
            marked_tools.append({**tool, "function": {**function, "name": name}})
        return marked_messages, marked_tools

    def thought_of(self, message: int) -> str:
        """Return the reasoning text of a message (`reasoning_content`), or ""."""
        for marked in self.fields:
            if marked.message == message and marked.kind == "reasoning_content":
                return marked.text
        return ""

    def strip(self, text: str) -> tuple[str, list[Sentinel]]:
        """Return the rendering without sentinels, and the list of its sentinels in order."""
        pattern = re.compile(self.word + r"(\d+)([be])Q")
        sentinels = []
        removed = 0
        for match in pattern.finditer(text):
            sentinels.append(Sentinel(int(match[1]), match[2], match.start() - removed))
            removed += len(match[0])
        return pattern.sub("", text), sentinels

    def _message(self, i: int, message: Message) -> Message:
        """Return a copy of message i with sentinels in its thought, its text and its calls."""
        copy = message.copy()
        if "reasoning_content" in message:
            copy["reasoning_content"] = self._text(
                message["reasoning_content"], i, "reasoning_content"
            )
        copy["content"] = self._content(message, i)
        if "tool_calls" in message:
            copy["tool_calls"] = [
                {**call, "function": self._call(call["function"], i)}
                for call in message["tool_calls"]
            ]
        return copy

    def _content(self, message: Message, i: int) -> str:
        """Insert sentinels into the content of a message.

        If an answer begins with a thought, the thought and the rest of the text get separate
        sentinels, because templates may remove the thought.
        """
        content = message["content"]
        place = find_thought(content) if message["role"] == "assistant" else None
        if place is None:
            return self._text(content, i, "content")
        opening = content[: place.start]
        thought = self._text(content[place.start : place.end], i, "reasoning_content")
        closing = content[place.end : place.rest]
        rest = self._text(content[place.rest :], i, "content")
        return f"{opening}{thought}{closing}{rest}"

    def _call(self, value: Any, i: int) -> Any:
        """Insert sentinels into all texts of a call: its name, and the texts in its arguments.

        Numbers cannot contain sentinels. Names of arguments have no sentinels, because templates
        may sort the arguments by name.
        """
        if isinstance(value, str):
            return self._text(value, i, "tool_calls")
        if isinstance(value, dict):
            return {name: self._call(item, i) for name, item in value.items()}
        if isinstance(value, list):
            return [self._call(item, i) for item in value]
        return value

    def _text(self, text: str, message: int, kind: str) -> str:
        """Insert the sentinels into one text, inside of the whitespace at its edges."""
        bare = text.replace(PICTURE_MARK, " ") if self.with_pictures else text
        start = len(bare) - len(bare.lstrip())
        end = len(bare.rstrip())
        if start >= end:
            # Leave an empty text unchanged, because templates test `if content`, and a sentinel
            # would change the result.
            return text
        stripped = text[start:end]
        n = len(self.fields)
        self.fields.append(Field(message, kind, text))
        begin_sentinel = f"{self.word}{n}bQ"
        end_sentinel = f"{self.word}{n}eQ"
        if self.position == "both":
            return f"{text[:start]}{begin_sentinel}{stripped}{end_sentinel}{text[end:]}"
        if self.position == "end":
            return text[:end] + end_sentinel + text[end:]
        at = start + len(stripped) // 2 if self.position == "middle" else start
        return text[:at] + begin_sentinel + text[at:]
