"""Sentinels: short ASCII words set into the texts of a conversation, to find where a template
renders each text.

A sentinel stands inside the whitespace at its text's edges, so a template that trims renders the
same text with and without it. It is letters and digits alone, so JSON escapes leave it as it is.
Templates may test a text (`startswith`, `in`): where sentinels on both sides change the rendering,
one at the end, at the start or in the middle may not.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from tunesmith.data.rows.samples import PICTURE_MARK, CalledFunction, Message, ToolSchema
from tunesmith.data.text.thoughts import find_thought

Messages = Sequence[Message]
Tools = list[ToolSchema] | None
Position = Literal["both", "end", "start", "middle"]
SENTINEL_POSITIONS: tuple[Position, ...] = ("both", "end", "start", "middle")


class Field(NamedTuple):
    """A text that carries sentinels: the index of its message (-1: tools), what it is, its text."""

    message: int
    kind: str
    text: str


class Sentinel(NamedTuple):
    """A sentinel in a rendering.

    Attributes:
        field: index of its field.
        side: `b` or `e`, where its text begins or ends.
        at: its place in the rendering without sentinels.
    """

    field: int
    side: str
    at: int


@dataclass
class Sentinels:
    """Sets sentinels into a conversation and takes them out of its rendering.

    Attributes:
        word: begins every sentinel; occurs nowhere in the conversation or its rendering.
        position: where in a text they stand.
        only: indices of the messages that carry some; None: all, and the tools.
        with_pictures: pictures stand in the texts; those at a text's edges stay outside of its
            sentinels, as white space does.
        fields: the texts that carry sentinels.
    """

    word: str
    position: Position
    only: Collection[int] | None = None
    with_pictures: bool = False
    fields: list[Field] = field(default_factory=list)

    def insert(self, messages: Messages, tools: Tools) -> tuple[list[Message], Tools]:
        """Copies with sentinels; `fields` lists what carries them."""
        marked_messages = []
        for i, message in enumerate(messages):
            is_marked = self.only is None or i in self.only
            marked_messages.append(self._message(i, message) if is_marked else message)
        if tools is None or self.only is not None:
            return marked_messages, tools
        return marked_messages, [self._tool(tool) for tool in tools]

    def thought_of(self, message: int) -> str:
        """The thought of a message; empty where it has none."""
        thoughts = (
            text for i, kind, text in self.fields if (i, kind) == (message, "reasoning_content")
        )
        return next(thoughts, "")

    def strip(self, text: str) -> tuple[str, list[Sentinel]]:
        """The rendering without sentinels, and those that it contained, in order."""
        pattern = re.compile(self.word + r"(\d+)([be])Q")
        sentinels = []
        removed = 0
        for match in pattern.finditer(text):
            sentinels.append(Sentinel(int(match[1]), match[2], match.start() - removed))
            removed += len(match[0])
        return pattern.sub("", text), sentinels

    def _message(self, i: int, message: Message) -> Message:
        copy = message.copy()
        if "reasoning_content" in message:
            thought = message["reasoning_content"]
            copy["reasoning_content"] = self._text(thought, i, "reasoning_content")
        copy["content"] = self._content(message, i)
        if "tool_calls" in message:
            calls = message["tool_calls"]
            copy["tool_calls"] = [
                {**call, "function": self._function(i, call["function"])} for call in calls
            ]
        return copy

    def _content(self, message: Message, i: int) -> str:
        """The content with sentinels; the thought that an answer's may open with is a text of its
        own, because templates take it out.
        """
        content = message["content"]
        place = find_thought(content) if message["role"] == "assistant" else None
        if place is None:
            return self._text(content, i, "content")
        thought = self._text(content[place.start : place.end], i, "reasoning_content")
        rest = self._text(content[place.rest :], i, "content")
        tags = content[: place.start], content[place.end : place.rest]
        return f"{tags[0]}{thought}{tags[1]}{rest}"

    def _function(self, i: int, function: CalledFunction) -> CalledFunction:
        name = self._text(function["name"], i, "tool_calls")
        arguments = self._arguments(function["arguments"], i)
        return {**function, "name": name, "arguments": arguments}

    def _arguments(self, value: object, i: int) -> object:
        """Sentinels in every text within a call's arguments.

        Numbers carry none, nor do names, because templates may sort by them.
        """
        if isinstance(value, str):
            return self._text(value, i, "tool_calls")
        if isinstance(value, dict):
            return {name: self._arguments(item, i) for name, item in value.items()}
        if isinstance(value, list):
            return [self._arguments(item, i) for item in value]
        return value

    def _tool(self, tool: ToolSchema) -> ToolSchema:
        function: Any = tool["function"]
        return {**tool, "function": {**function, "name": self._text(function["name"], -1, "tools")}}

    def _text(self, text: str, message: int, kind: str) -> str:
        bare = text.replace(PICTURE_MARK, " ") if self.with_pictures else text
        start = len(bare) - len(bare.lstrip())
        end = len(bare.rstrip())
        if start >= end:
            # A sentinel would make an empty text a full one, and templates ask `if content`.
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
        at = start
        if self.position == "middle":
            at += len(stripped) // 2
        return text[:at] + begin_sentinel + text[at:]
