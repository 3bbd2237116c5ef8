"""Sentinels: short ASCII words set into the texts of a conversation, to find where a template renders each text.

A sentinel stands inside the whitespace at its text's edges, so a template that trims renders the same text with and
without it. It is letters and digits alone, so JSON escapes leave it as it is. Templates may test a text (`startswith`,
`in`): where sentinels on both sides change the rendering, one at the end, at the start or in the middle may not.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Message = dict[str, Any]
Messages = Sequence[Message]
Tools = list[dict[str, Any]] | None
Position = Literal["both", "end", "start", "middle"]
POSITIONS: tuple[Position, ...] = ("both", "end", "start", "middle")


class Field(NamedTuple):
    """A text that carries sentinels: the index of its message (-1: tools), what it is, and the text."""

    message: int
    kind: str
    text: str


class Sentinel(NamedTuple):
    """A sentinel found in a rendering: its field's index, its side (`b` or `e`), its place in the text without them."""

    field: int
    side: str
    at: int


@dataclass
class Sentinels:
    """Sets sentinels into a conversation and takes them out of its rendering."""

    word: str  # begins every sentinel; occurs nowhere in the conversation or its rendering
    position: Position  # where in a text they stand
    fields: list[Field] = field(default_factory=list)  # the texts that carry sentinels
    # Names of call arguments. They carry none, because templates may sort by them.
    argument_names: list[str] = field(default_factory=list)

    def insert(self, messages: Messages, tools: Tools) -> tuple[list[Message], Tools]:
        """Copies with sentinels; `fields` lists what carries them."""
        marked = [self._message(i, message) for i, message in enumerate(messages)]
        return marked, None if tools is None else [self._tool(tool) for tool in tools]

    def strip(self, text: str) -> tuple[str, list[Sentinel]]:
        """The rendering without sentinels, and those that it held, in order."""
        found, removed, pattern = [], 0, re.compile(self.word + r"(\d+)([be])Q")
        for match in pattern.finditer(text):
            found.append(Sentinel(int(match[1]), match[2], match.start() - removed))
            removed += len(match[0])
        return pattern.sub("", text), found

    def _message(self, i: int, message: Message) -> Message:
        copy = dict(message)
        for kind in ("reasoning_content", "content"):
            if isinstance(copy.get(kind), str):
                copy[kind] = self._text(copy[kind], i, kind)
        if copy.get("tool_calls"):
            copy["tool_calls"] = [{**call, "function": self._call(i, call["function"])} for call in copy["tool_calls"]]
        return copy

    def _call(self, i: int, function: dict[str, Any]) -> dict[str, Any]:
        name, arguments = self._text(function["name"], i, "tool_calls"), function.get("arguments")
        return {**function, "name": name, "arguments": self._arguments(arguments, i)}

    def _arguments(self, value: Any, i: int) -> Any:
        """Sentinels in every text within a call's arguments; numbers and names carry none."""
        if isinstance(value, str):
            return self._text(value, i, "tool_calls")
        if isinstance(value, dict):
            self.argument_names += value
            return {key: self._arguments(item, i) for key, item in value.items()}
        return [self._arguments(item, i) for item in value] if isinstance(value, list) else value

    def _tool(self, tool: dict[str, Any]) -> dict[str, Any]:
        if isinstance(tool.get("function"), dict):
            return {**tool, "function": self._tool(tool["function"])}
        name = tool.get("name")
        return {**tool, "name": self._text(name, -1, "tools")} if isinstance(name, str) else tool

    def _text(self, text: str, message: int, kind: str) -> str:
        body = text.strip()
        if not body:
            return text  # a sentinel would make an empty text a full one, and templates ask `if content`
        n, lead = len(self.fields), len(text) - len(text.lstrip())
        self.fields.append(Field(message, kind, text))
        begin, end = f"{self.word}{n}bQ", f"{self.word}{n}eQ"
        if self.position == "both":
            return f"{text[:lead]}{begin}{body}{end}{text[lead + len(body) :]}"
        at = lead + {"end": len(body), "start": 0, "middle": len(body) // 2}[self.position]
        return f"{text[:at]}{end if self.position == 'end' else begin}{text[at:]}"
