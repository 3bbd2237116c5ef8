"""Marks: short ASCII words set around the texts of a conversation, to find in its rendering where each text went.

A mark stands inside the blanks at its text's edges, so that a template that trims meets what it met before, and is of
letters and digits alone, so that JSON escapes leave it be. Templates ask questions of a text (`startswith`, `in`);
where marks on both sides change the answer, one at the end, one at the start or one in the middle may not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

Message = dict[str, Any]
Messages = Sequence[Message]
Tools = list[dict[str, Any]] | None


class Field(NamedTuple):
    """One marked text: the index of its message (-1 for tools), what it is, and the text."""

    message: int
    what: str
    text: str


class Sentinel(NamedTuple):
    """A mark found in a rendering: which field's, its side, and where it stood in the text without marks."""

    field: int
    side: str
    at: int


Place = Literal["both", "last", "first", "middle"]
PLACES: tuple[Place, ...] = ("both", "last", "first", "middle")


class Sentinels:
    """Sets marks into the texts of a conversation and takes them out of renderings."""

    def __init__(self, word: str, place: Place) -> None:
        self.word, self.place = word, place
        self.fields: list[Field] = []
        self.bare: list[str] = []  # names of arguments, which carry no marks: templates may sort by them
        self._found = re.compile(word + r"(\d+)([be])Q")

    def mark(self, messages: Messages, tools: Tools) -> tuple[list[Message], Tools]:
        """Copies with marks; `fields` names them."""
        marked = [self._message(i, message) for i, message in enumerate(messages)]
        if tools is None:
            return marked, None
        return marked, [self._tool(tool) for tool in tools]

    def unmark(self, text: str) -> tuple[str, list[Sentinel]]:
        marks, gone = [], 0
        for found in self._found.finditer(text):
            marks.append(Sentinel(int(found[1]), found[2], found.start() - gone))
            gone += len(found[0])
        return (self._found.sub("", text) if marks else text), marks

    def _message(self, i: int, message: Message) -> Message:
        copy = dict(message)
        for what in ("reasoning_content", "content"):
            if isinstance(copy.get(what), str):
                copy[what] = self._put(copy[what], i, what)
        if copy.get("tool_calls"):
            calls = []
            for call in copy["tool_calls"]:
                function = dict(call["function"])
                function["name"] = self._put(function["name"], i, "tool_calls")
                function["arguments"] = self._leaves(function.get("arguments"), i)
                calls.append({**call, "function": function})
            copy["tool_calls"] = calls
        return copy

    def _leaves(self, value: Any, i: int) -> Any:
        """Marks on every text within a call's arguments; numbers and keys stay bare."""
        if isinstance(value, str):
            return self._put(value, i, "tool_calls")
        if isinstance(value, dict):
            self.bare += value
            return {key: self._leaves(item, i) for key, item in value.items()}
        if isinstance(value, list):
            return [self._leaves(item, i) for item in value]
        return value

    def _tool(self, tool: dict[str, Any]) -> dict[str, Any]:
        if isinstance(tool.get("function"), dict):
            return {**tool, "function": self._tool(tool["function"])}
        name = tool.get("name")
        return {**tool, "name": self._put(name, -1, "tools")} if isinstance(name, str) else tool

    def _put(self, text: str, message: int, what: str) -> str:
        body = text.strip()
        if not body:
            return text  # a mark would make an empty text a full one, and templates ask `if content`
        n, lead = len(self.fields), len(text) - len(text.lstrip())
        self.fields.append(Field(message, what, text))
        begin, end = f"{self.word}{n}bQ", f"{self.word}{n}eQ"
        cut = {"both": len(body), "last": len(body), "first": 0, "middle": len(body) // 2}[self.place]
        head, tail = text[: lead + cut], text[lead + cut :]
        if self.place == "both":
            return f"{head[:lead]}{begin}{head[lead:]}{end}{tail}"
        return f"{head}{end if self.place == 'last' else begin}{tail}"
