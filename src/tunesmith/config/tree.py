"""YAML 1.2 text as a small tree in which every key and value knows its file and line.

ruamel.yaml scans and parses; what a plain scalar means is decided here, by the core schema of YAML 1.2.2
(section 10.3.2), so `3e-4` is a number, `on` and `yes` are text, and there are no timestamps. The tree is built
straight from the parser's events because only these still tell a quoted scalar from a plain one, and because
duplicate keys, aliases and depth can then be bounded before anything grows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.errors import RecipeError

if TYPE_CHECKING:
    from ruamel.yaml.events import Event, MappingStartEvent, ScalarEvent

Scalar = str | int | float | bool | None

MAX_BYTES = 1 << 20
MAX_DEPTH = 20
MAX_NODES = 10_000  # after aliases are written out: nine lines of nested aliases can stand for a billion values

# The core schema: what a plain scalar matches in full, first match wins, and what it then is; text otherwise.
_CORE: tuple[tuple[re.Pattern[str], Callable[[str], Scalar]], ...] = (
    (re.compile(r"|~|null|Null|NULL"), lambda text: None),
    (re.compile(r"true|True|TRUE"), lambda text: True),
    (re.compile(r"false|False|FALSE"), lambda text: False),
    # int() refuses more than 4300 digits with an error of its own; a longer number is read as a float below.
    (re.compile(r"[-+]?[0-9]{1,300}"), int),
    (re.compile(r"0o[0-7]{1,300}"), lambda text: int(text[2:], 8)),
    (re.compile(r"0x[0-9a-fA-F]{1,300}"), lambda text: int(text[2:], 16)),
    (re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"), float),
    (re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"), lambda text: float(text.replace(".", ""))),
)


@dataclass(frozen=True)
class Node:
    """A value of a recipe, where it was written, and the folder that a relative path in it starts from."""

    value: dict[str, Node] | list[Node] | Scalar
    where: str
    base: Path

    def plain(self) -> Any:
        """The value without its places: dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return [node.plain() for node in self.value] if isinstance(self.value, list) else self.value

    def places(self, key: str = "") -> Iterator[tuple[str, str]]:
        """Every dotted key below this one (`data.train.0.split`) with its place."""
        for name, node in children(self):
            below = f"{key}.{name}" if key else name
            yield below, node.where
            yield from node.places(below)


def children(node: Node) -> list[tuple[str, Node]]:
    """The entries of a mapping, or of a list under its indices; none for a scalar."""
    if isinstance(node.value, dict):
        return list(node.value.items())
    return [(str(i), item) for i, item in enumerate(node.value)] if isinstance(node.value, list) else []


def scalar(text: str) -> Scalar:
    """What a plain scalar means in YAML 1.2's core schema.

    >>> [scalar(x) for x in ("3e-4", "on", "0o17", "2026-01-31", "~")]
    [0.0003, 'on', 15, '2026-01-31', None]
    """
    return next((meaning(text) for form, meaning in _CORE if form.fullmatch(text)), text)


def wrap(values: Any, *, where: str, base: Path, key: str = "") -> Node:
    """Plain values as a tree whose places are `where: key`."""
    place = f"{where}: {key}" if key else where
    if isinstance(values, Mapping):
        inside = {
            str(name): wrap(value, where=where, base=base, key=f"{key}.{name}" if key else str(name))
            for name, value in values.items()
        }
        return Node(inside, place, base)
    if isinstance(values, list | tuple):
        items = [wrap(value, where=where, base=base, key=f"{key}.{i}") for i, value in enumerate(values)]
        return Node(items, place, base)
    return Node(values, place, base)


def read_file(path: Path) -> Node:
    """A recipe file as a tree whose top is a mapping.

    Raises:
        RecipeError: it cannot be read, is no UTF-8, no YAML 1.2, empty, more than one document, or no mapping.
    """
    name = str(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        why = error.strerror or str(error)
        raise RecipeError("this recipe cannot be read", where=name, why=why, fix=f"ls -l {name}") from error
    if len(raw) > MAX_BYTES:
        raise RecipeError(
            "this recipe is larger than 1 MiB",
            where=name,
            fix="give the recipe, not the data: a recipe is a page of YAML",
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"this recipe is not UTF-8 text: byte 0x{raw[error.start]:02x}",
            where=f"{name}:{line}",
            fix=f"iconv -f LATIN1 -t UTF-8 {name} > fixed.yaml   # if that is the encoding it was written in",
        ) from error
    top = _Builder(text, name, path.parent).document()
    if top is None or top.value is None:
        raise RecipeError("this recipe is empty", where=name, fix="start from one that ships: tunesmith recipes")
    if not isinstance(top.value, dict):
        kind = "a list" if isinstance(top.value, list) else "a single value"
        raise RecipeError(
            f"a recipe is a mapping of keys, this is {kind}",
            where=top.where,
            fix="begin with `model:`; see a whole one with: tunesmith recipes show smollm2-135m-lora",
        )
    return top


def read_value(text: str, *, where: str, base: Path) -> Node:
    """One YAML value from the command line; nothing at all is null, as in a file."""
    node = _Builder(text, where, base, lines=False).document()
    return node or Node(None, where, base)


class _Builder:
    """Builds a `Node` from ruamel's events, within bounds."""

    def __init__(self, text: str, name: str, base: Path, *, lines: bool = True) -> None:
        self.text, self.name, self.base, self.lines = text, name, base, lines
        self.anchors: dict[str, Node] = {}
        self.sizes: dict[str, tuple[int, int]] = {}  # an anchor's count of nodes, and how deep it reaches below itself
        self.count = 0
        self.deepest = 0

    def place(self, line: int) -> str:
        return f"{self.name}:{line + 1}" if self.lines else self.name

    def document(self) -> Node | None:
        """The one document of the text; None where there is none."""
        from ruamel.yaml import YAML
        from ruamel.yaml.error import MarkedYAMLError
        from ruamel.yaml.events import DocumentStartEvent
        from ruamel.yaml.reader import ReaderError

        self.events: Iterator[Event] = iter(YAML(typ="safe", pure=True).parse(self.text))
        top = None
        try:
            for event in self.events:
                if isinstance(event, DocumentStartEvent):
                    if top is not None:
                        raise RecipeError(
                            "a second YAML document begins here",
                            where=self.place(event.start_mark.line),
                            why="a recipe is one document",
                            fix="remove the line `---` and what follows, or put it in a file of its own",
                        )
                    top = self.node(next(self.events), depth=0)
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            raise self.syntax(error.problem or str(error), self.place(mark.line) if mark else self.name) from error
        except ReaderError as error:  # a character that YAML does not allow at all
            line = self.text.count("\n", 0, error.position)
            raise self.syntax(str(error).splitlines()[0], self.place(line)) from error
        except (ValueError, OverflowError) as error:  # an escape such as "\UFFFFFFFF" that names no character
            raise self.syntax(str(error), self.name) from error
        return top

    def syntax(self, problem: str, where: str) -> RecipeError:
        tab = "\\t" in problem
        fix = "indent with spaces: a tab is not allowed there" if tab else "mend the YAML at or just before this place"
        return RecipeError("this is not YAML 1.2", where=where, why=problem, fix=fix)

    def node(self, event: Event, depth: int) -> Node:
        from ruamel.yaml.events import AliasEvent, CollectionStartEvent, MappingStartEvent, ScalarEvent

        where = self.place(event.start_mark.line)
        self.grow(1, depth, where)
        if isinstance(event, AliasEvent):
            return self.alias(event.anchor, depth, where)
        assert isinstance(event, ScalarEvent | CollectionStartEvent)
        if event.tag is not None:
            what = f"the YAML tag {event.tag} is not allowed in a recipe"
            raise RecipeError(what, where=where, fix="write the plain value")
        before, outer, self.deepest = self.count, self.deepest, depth
        if isinstance(event, ScalarEvent):
            node = Node(self.scalar(event), where, self.base)
        elif isinstance(event, MappingStartEvent):
            node = Node(self.mapping(event, depth), where, self.base)
        else:
            node = Node(self.sequence(depth), where, self.base)
        if event.anchor is not None:
            self.anchors[event.anchor] = node
            self.sizes[event.anchor] = (self.count - before, self.deepest - depth)
        self.deepest = max(outer, self.deepest)
        return node

    def grow(self, count: int, depth: int, where: str) -> None:
        self.count += count
        self.deepest = max(self.deepest, depth)
        if self.count > MAX_NODES or depth > MAX_DEPTH:
            what = "too deeply nested" if depth > MAX_DEPTH else f"more than {MAX_NODES} values, aliases written out"
            raise RecipeError(f"this recipe is {what}", where=where, fix="write out what is meant, without aliases")

    def alias(self, name: str, depth: int, where: str) -> Node:
        if name not in self.anchors:
            raise RecipeError(
                f"*{name} stands for an anchor that is not complete before this line",
                where=where,
                fix=f"mark the value with &{name} further up",
            )
        count, below = self.sizes[name]
        self.grow(count, depth + below, where)
        return replace(self.anchors[name], where=where)

    def scalar(self, event: ScalarEvent) -> Scalar:
        return scalar(event.value) if event.implicit[0] else event.value

    def sequence(self, depth: int) -> list[Node]:
        from ruamel.yaml.events import SequenceEndEvent

        items = []
        while not isinstance(event := next(self.events), SequenceEndEvent):
            items.append(self.node(event, depth + 1))
        return items

    def mapping(self, start: MappingStartEvent, depth: int) -> dict[str, Node]:
        from ruamel.yaml.events import MappingEndEvent

        given: dict[str, Node] = {}
        merged: list[Node] = []
        while not isinstance(event := next(self.events), MappingEndEvent):
            key = self.node(event, depth + 1)
            value = replace(self.node(next(self.events), depth + 1), where=key.where)
            if not isinstance(key.value, str):
                shown = "a list or mapping" if isinstance(key.value, dict | list) else repr(key.value)
                raise RecipeError(f"a key is text, this one is {shown}", where=key.where, fix="put it in quotes")
            if key.value in given:
                raise RecipeError(
                    f"the key {key.value!r} is given twice",
                    where=key.where,
                    why=f"the first one is at {given[key.value].where}",
                    fix="remove one of the two",
                )
            if key.value == "<<":
                merged += value.value if isinstance(value.value, list) else [value]
            given[key.value] = value
        given.pop("<<", None)
        for source in merged:
            if not isinstance(source.value, dict):
                raise RecipeError("`<<` takes a mapping", where=source.where, fix="write <<: *name_of_a_mapping")
            given = {**source.value, **given}
        return given
