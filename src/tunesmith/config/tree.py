"""YAML 1.2 text as a small tree in which every value knows its file and line.

ruamel.yaml scans and parses. The tree is built from its events, because only these tell a quoted scalar from a plain
one and let duplicate keys, aliases and depth be refused before the tree grows. What a plain scalar means follows the
core schema of YAML 1.2.2 (section 10.3.2): `3e-4` is a number, `on` and `yes` are text, there are no timestamps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, events
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.reader import ReaderError

from tunesmith.errors import RecipeError

Scalar = str | int | float | bool | None

MAX_BYTES = 1 << 20
MAX_DEPTH = 20
MAX_NODES = 10_000  # with aliases expanded: nine lines of nested aliases can stand for a billion values

# The core schema: the first form that matches the whole plain scalar gives its value; anything else is text.
_CORE: tuple[tuple[str, Callable[[str], Scalar]], ...] = (
    (r"|~|null|Null|NULL", lambda text: None),
    (r"true|True|TRUE", lambda text: True),
    (r"false|False|FALSE", lambda text: False),
    # int() refuses more than 4300 digits with an error of its own; a longer number becomes a float below.
    (r"[-+]?[0-9]{1,300}", int),
    (r"0o[0-7]{1,300}", lambda text: int(text[2:], 8)),
    (r"0x[0-9a-fA-F]{1,300}", lambda text: int(text[2:], 16)),
    (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", float),
    (r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", lambda text: float(text.replace(".", ""))),
)


@dataclass(frozen=True)
class Node:
    """A value of a recipe, its place, and the folder that a relative path in it starts from."""

    value: dict[str, Node] | list[Node] | Scalar
    where: str
    base: Path

    def children(self) -> list[tuple[str, Node]]:
        """The entries of a mapping, or of a list with their indices; none for a scalar."""
        if isinstance(self.value, dict):
            return list(self.value.items())
        return [(str(i), item) for i, item in enumerate(self.value)] if isinstance(self.value, list) else []

    def plain(self) -> Any:
        """The value without places: dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return [node.plain() for node in self.value] if isinstance(self.value, list) else self.value

    def places(self, key: str = "") -> Iterator[tuple[str, str]]:
        """Every dotted key below this one (`data.train.0.split`) with its place."""
        for name, node in self.children():
            below = f"{key}.{name}" if key else name
            yield below, node.where
            yield from node.places(below)

    def extent(self) -> tuple[int, int]:
        """How many nodes this is, and how deep they nest."""
        inside = [node.extent() for _, node in self.children()]
        return 1 + sum(count for count, _ in inside), max((1 + depth for _, depth in inside), default=0)


def scalar(text: str) -> Scalar:
    """The value of a plain scalar in YAML 1.2's core schema.

    >>> [scalar(x) for x in ("3e-4", "on", "0o17", "2026-01-31", "~")]
    [0.0003, 'on', 15, '2026-01-31', None]
    """
    return next((meaning(text) for form, meaning in _CORE if re.fullmatch(form, text)), text)


def wrap(values: Any, *, where: str, base: Path, key: str = "") -> Node:
    """Plain values as a tree whose places are `where: key`."""
    place = f"{where}: {key}" if key else where
    if isinstance(values, Mapping | list | tuple):
        pairs = values.items() if isinstance(values, Mapping) else enumerate(values)
        inside = {
            str(name): wrap(value, where=where, base=base, key=f"{key}.{name}" if key else str(name))
            for name, value in pairs
        }
        return Node(inside if isinstance(values, Mapping) else list(inside.values()), place, base)
    if not isinstance(values, Scalar):
        fix = "give text, a number, true, false, null, a list or a mapping"
        raise RecipeError(f"a {type(values).__name__} is not a recipe's value", where=place, fix=fix)
    return Node(values, place, base)


def read_file(path: Path) -> Node:
    """A recipe file as a tree whose top is a mapping.

    Raises:
        RecipeError: it cannot be read, is not UTF-8, not YAML 1.2, empty, more than one document, or not a mapping.
    """
    name = str(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        why = error.strerror or str(error)
        raise RecipeError("this recipe cannot be read", where=name, why=why, fix=f"ls -l {name}") from error
    if len(raw) > MAX_BYTES:
        fix = "give the recipe, not the data: a recipe is a page of YAML"
        raise RecipeError("this recipe is larger than 1 MiB", where=name, fix=fix)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        fix = f"iconv -f LATIN1 -t UTF-8 {name} > fixed.yaml   # if it was written in that encoding"
        what = f"this recipe is not UTF-8 text: byte 0x{raw[error.start]:02x}"
        raise RecipeError(what, where=f"{name}:{line}", fix=fix) from error
    top = _Builder(text, name, path.parent).document()
    if top is None or top.value is None:
        raise RecipeError("this recipe is empty", where=name, fix="start from one that ships: tunesmith recipes")
    if not isinstance(top.value, dict):
        kind = "a list" if isinstance(top.value, list) else "a single value"
        fix = "begin with `model:`; see a whole one with: tunesmith recipes show smollm2-135m-lora"
        raise RecipeError(f"a recipe is a mapping of keys, this is {kind}", where=top.where, fix=fix)
    return top


def read_value(text: str, *, where: str, base: Path) -> Node:
    """One YAML value from the command line; no text is null, as in a file."""
    return _Builder(text, where, base, lines=False).document() or Node(None, where, base)


class _Builder:
    """Builds a `Node` from ruamel's events, within the bounds above."""

    def __init__(self, text: str, name: str, base: Path, *, lines: bool = True) -> None:
        self.text, self.name, self.base, self.lines = text, name, base, lines
        self.anchors: dict[str, Node] = {}
        self.count = 0

    def place(self, line: int) -> str:
        return f"{self.name}:{line + 1}" if self.lines else self.name

    def document(self) -> Node | None:
        """The only document of the text; None if there is none."""
        self.stream: Iterator[events.Event] = iter(YAML(typ="safe", pure=True).parse(self.text))
        top = None
        try:
            for event in self.stream:
                if isinstance(event, events.DocumentStartEvent):
                    if top is not None:
                        where, fix = self.place(event.start_mark.line), "remove the line `---` and what follows"
                        raise RecipeError("a second YAML document begins here", where=where, fix=fix)
                    top = self.node(next(self.stream), depth=0)
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            raise self.syntax(error.problem or str(error), self.place(mark.line) if mark else self.name) from error
        except ReaderError as error:  # a character that YAML does not allow
            line = self.text.count("\n", 0, error.position)
            raise self.syntax(str(error).splitlines()[0], self.place(line)) from error
        except (ValueError, OverflowError) as error:  # an escape such as "\UFFFFFFFF" that is no character
            raise self.syntax(str(error), self.name) from error
        return top

    def syntax(self, problem: str, where: str) -> RecipeError:
        tab = "\\t" in problem
        fix = (
            "indent with spaces: a tab is not allowed there" if tab else "correct the YAML at or just before this place"
        )
        return RecipeError("this is not YAML 1.2", where=where, why=problem, fix=fix)

    def node(self, event: events.Event, depth: int) -> Node:
        """The value that begins with `event`, at `depth` in the tree."""
        where = self.place(event.start_mark.line)
        if isinstance(event, events.AliasEvent):
            if event.anchor not in self.anchors:
                what = f"*{event.anchor} stands for an anchor that is not complete before this line"
                raise RecipeError(what, where=where, fix=f"mark the value with &{event.anchor} further up")
            count, below = self.anchors[event.anchor].extent()
            self.grow(count, depth + below, where)
            return replace(self.anchors[event.anchor], where=where)
        self.grow(1, depth, where)
        assert isinstance(event, events.ScalarEvent | events.CollectionStartEvent)
        if event.tag is not None:
            what = f"the YAML tag {event.tag} is not allowed in a recipe"
            raise RecipeError(what, where=where, fix="write the plain value")
        if isinstance(event, events.ScalarEvent):
            node = Node(scalar(event.value) if event.implicit[0] else event.value, where, self.base)
        elif isinstance(event, events.MappingStartEvent):
            node = Node(self.mapping(depth), where, self.base)
        else:
            items = []
            while not isinstance(inner := next(self.stream), events.SequenceEndEvent):
                items.append(self.node(inner, depth + 1))
            node = Node(items, where, self.base)
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def grow(self, count: int, depth: int, where: str) -> None:
        self.count += count
        if self.count > MAX_NODES or depth > MAX_DEPTH:
            what = "too deeply nested" if depth > MAX_DEPTH else f"more than {MAX_NODES} values, aliases written out"
            raise RecipeError(f"this recipe is {what}", where=where, fix="use fewer levels, and no aliases")

    def mapping(self, depth: int) -> dict[str, Node]:
        given: dict[str, Node] = {}
        while not isinstance(event := next(self.stream), events.MappingEndEvent):
            key = self.node(event, depth + 1)
            value = replace(self.node(next(self.stream), depth + 1), where=key.where)
            if not isinstance(key.value, str):
                shown = "a list or mapping" if isinstance(key.value, dict | list) else repr(key.value)
                raise RecipeError(f"a key is text, this one is {shown}", where=key.where, fix="put it in quotes")
            if key.value in given:
                what, why = f"the key {key.value!r} is given twice", f"the first one is at {given[key.value].where}"
                raise RecipeError(what, where=key.where, why=why, fix="remove one of the two")
            given[key.value] = value
        merged = given.pop("<<", None)
        for source in [] if merged is None else merged.value if isinstance(merged.value, list) else [merged]:
            if not isinstance(source.value, dict):
                raise RecipeError("`<<` takes a mapping", where=source.where, fix="write <<: *name_of_a_mapping")
            given = {**source.value, **given}
        return given
