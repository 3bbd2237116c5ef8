"""YAML 1.2 text as a small tree in which every value knows its file and line.

ruamel.yaml composes the text into nodes; here they are checked for duplicate keys, tags, size and
depth, and get their values. What a plain scalar means follows the core schema of YAML 1.2.2
(section 10.3.2): `3e-4` is a number, `on` and `yes` are text, there are no timestamps.
"""

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, nodes
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.resolver import BaseResolver, VersionedResolver

from tunesmith.errors import RecipeError
from tunesmith.host.shell import shell_path

Scalar = str | int | float | bool | None

# A megabyte of rows in place of a recipe would be parsed for half a minute.
MAX_BYTES = 256 << 10
MAX_DEPTH = 20
# Brackets: ruamel takes minutes for 100,000 of them before it gives up.
MAX_OPEN = 200
# Of a whole number.
MAX_DIGITS = 300
# With aliases expanded: nine lines of nested aliases can stand for a billion values.
MAX_NODES = 10_000

# The core schema: the first form that matches the whole plain scalar gives its value; anything else
# is text.
_CORE: tuple[tuple[str, Callable[[str], Scalar]], ...] = (
    (r"|~|null|Null|NULL", lambda text: None),
    (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    # int() refuses more than 4300 digits with an error of its own; a longer number becomes a float
    # below.
    (rf"[-+]?[0-9]{{1,{MAX_DIGITS}}}", int),
    (rf"0o[0-7]{{1,{MAX_DIGITS}}}|0x[0-9a-fA-F]{{1,{MAX_DIGITS}}}", lambda text: int(text, 0)),
    (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", float),
    (r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", lambda text: float(text.replace(".", ""))),
)

_UNTAGGED = (
    BaseResolver.DEFAULT_SCALAR_TAG,
    BaseResolver.DEFAULT_SEQUENCE_TAG,
    BaseResolver.DEFAULT_MAPPING_TAG,
)


@dataclass(frozen=True)
class Node:
    """A value of a recipe, its place, and the folder that a relative path in it starts from."""

    value: "dict[str, Node] | list[Node] | Scalar"
    where: str
    base: Path

    def children(self) -> "list[tuple[str, Node]]":
        """The entries of a mapping, or of a list with their indices; none for a scalar."""
        if isinstance(self.value, dict):
            return list(self.value.items())
        if isinstance(self.value, list):
            return [(str(i), item) for i, item in enumerate(self.value)]
        return []

    def plain(self) -> Any:
        """The value without places: dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def places(self, key: str = "") -> Iterator[tuple[str, str]]:
        """Every dotted key below this one (`data.train.0.split`) with its place."""
        for name, node in self.children():
            below = f"{key}.{name}" if key else name
            yield below, node.where
            yield from node.places(below)


def scalar(text: str) -> Scalar:
    """The value of a plain scalar in YAML 1.2's core schema.

    >>> [scalar(x) for x in ("3e-4", "on", "0o17", "2026-01-31", "~")]
    [0.0003, 'on', 15, '2026-01-31', None]
    """
    for form, meaning in _CORE:
        if re.fullmatch(form, text):
            return meaning(text)
    return text


def wrap(values: object, *, where: str, base: Path, key: str = "") -> Node:
    """Plain values as a tree whose places are `where: key`."""

    def wrap_child(name: object, value: object) -> Node:
        return wrap(value, where=where, base=base, key=f"{key}.{name}".lstrip("."))

    place = f"{where}: {key}" if key else where
    if isinstance(values, os.PathLike):
        values = os.fspath(values)
    if isinstance(values, int) and abs(values) >= 10**MAX_DIGITS:
        # As `scalar` reads it; str() of it may raise.
        values = math.inf
    if isinstance(values, Mapping):
        mapping = {str(name): wrap_child(name, value) for name, value in values.items()}
        return Node(mapping, place, base)
    if isinstance(values, list | tuple):
        return Node([wrap_child(i, value) for i, value in enumerate(values)], place, base)
    if not isinstance(values, Scalar):
        what = f"a {type(values).__name__} is not a recipe's value"
        fix = "give text, a number, true, false, null, a list or a mapping"
        raise RecipeError(what, where=place, fix=fix)
    return Node(values, place, base)


def read_file(path: Path, plain_scalar: Callable[[str], Scalar] = scalar) -> Node:
    """A recipe file as a tree whose top is a mapping; RecipeError for one that is not UTF-8 text
    with such a document. `plain_scalar` gives the value of a scalar without quotes.
    """
    name = str(path)
    try:
        with path.open("rb") as file:
            # One byte more than allowed tells a file that is too large from one that just fits.
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        what = "this recipe cannot be read"
        why = error.strerror or str(error)
        raise RecipeError(what, where=name, why=why, fix=f"ls -l {shell_path(name)}") from error
    if len(raw) > MAX_BYTES:
        fix = "name the recipe, not the data: a recipe is a page of YAML"
        raise RecipeError("this recipe is larger than 256 KiB", where=name, fix=fix)
    try:
        # `utf-8-sig` drops the mark that editors of Windows write in front.
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        # Windows writes UTF-16 with a mark of two bytes.
        encoding = "UTF-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "LATIN1"
        convert = f"iconv -f {encoding} -t UTF-8 {shell_path(name)} > fixed.yaml"
        fix = f"{convert}   # if it was written in that encoding"
        what = f"this recipe is not UTF-8 text: byte 0x{raw[error.start]:02x}"
        raise RecipeError(what, where=f"{name}:{line}", fix=fix) from error
    top = _Reader(name, path.parent, plain_scalar=plain_scalar).read(text)
    if top is None or not isinstance(top.value, dict):
        raise RecipeError(
            "a recipe is a mapping of keys, and this is none",
            where=top.where if top else name,
            fix="begin with `model:`; see a complete one with: tunesmith recipes show "
            "smollm2-135m-lora",
        )
    return top


def read_value(text: str, *, where: str, base: Path) -> Node:
    """One YAML value from the command line; no text is null, as in a file."""
    return _Reader(where, base, lines=False).read(text) or Node(None, where, base)


class _Untyped(VersionedResolver):
    """Gives plain scalars no type: `scalar` does."""

    def resolve(self, kind: object, value: object, implicit: object) -> object:
        return BaseResolver.resolve(self, kind, value, implicit)


def _check_brackets(text: str) -> None:
    """RecursionError where more than MAX_OPEN brackets and braces are open at once; those in quotes
    count too.
    """
    changes = (1 if bracket in "[{" else -1 for bracket in re.findall(r"[\[\]{}]", text))
    if max(accumulate(changes), default=0) > MAX_OPEN:
        raise RecursionError


def _whole_characters(text: str, where: str) -> str:
    """The text with each pair of surrogates, as JSON writes an emoji, joined to its character.

    RecipeError for half a pair, which no file can hold.
    """
    try:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError:
        what = "this text has half of a surrogate pair in it, which is no character"
        fix = "write the character itself, or both of its escapes"
        raise RecipeError(what, where=where, fix=fix) from None


class _Reader:
    """Reads one YAML document into a `Node`, within the bounds above."""

    def __init__(
        self,
        name: str,
        base: Path,
        *,
        lines: bool = True,
        plain_scalar: Callable[[str], Scalar] = scalar,
    ) -> None:
        self.name = name
        self.base = base
        self.lines = lines
        self.plain_scalar = plain_scalar
        self.count = 0

    def place(self, line: int) -> str:
        return f"{self.name}:{line + 1}" if self.lines else self.name

    def read(self, text: str) -> Node | None:
        yaml = YAML(typ="safe", pure=True)
        yaml.Resolver = _Untyped
        where = self.name
        try:
            _check_brackets(text)
            top = yaml.compose(text)
            return None if top is None else self.node(top)
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = self.place(mark.line) if mark else where
            problem = ": ".join(part for part in (error.context, error.problem) if part)
        except ReaderError as error:
            # A character that YAML does not allow.
            where = self.place(text.count("\n", 0, error.position))
            problem = str(error).splitlines()[0]
        except RecursionError:
            problem = "it is too deeply nested"
        except (ValueError, OverflowError) as error:
            # An escape such as "\UFFFFFFFF" that is no character.
            problem = str(error)
        raise RecipeError(
            "this YAML cannot be read",
            where=where,
            why=problem,
            fix="correct it at or just before this position: a recipe is one document, indented by "
            "spaces",
        )

    def node(self, yaml_node: nodes.Node, line: int = 0, depth: int = 0) -> Node:
        """The value of ruamel's node, which is written in `line` or below.

        That of an alias is where the alias is used.
        """
        line = max(line, yaml_node.start_mark.line)
        where = self.place(line)
        self.count += 1
        if depth > MAX_DEPTH or self.count > MAX_NODES:
            raise RecipeError(
                f"this recipe is too deeply nested or large: at most {MAX_DEPTH} levels and "
                f"{MAX_NODES} values, aliases written out",
                where=where,
                fix="use fewer levels, and no aliases",
            )
        if yaml_node.ctag not in _UNTAGGED:
            what = f"the YAML tag {yaml_node.tag} is not allowed"
            raise RecipeError(what, where=where, fix="write the plain value")
        value: dict[str, Node] | list[Node] | Scalar
        if isinstance(yaml_node, nodes.ScalarNode):
            # A text in quotes is a text.
            is_plain = yaml_node.style is None
            if is_plain:
                value = self.plain_scalar(yaml_node.value)
            else:
                value = _whole_characters(yaml_node.value, where)
        elif isinstance(yaml_node, nodes.SequenceNode):
            value = [self.node(item, line, depth + 1) for item in yaml_node.value]
        else:
            value = self.mapping(yaml_node, line, depth + 1)
        return Node(value, where, self.base)

    def mapping(self, yaml_node: nodes.Node, line: int, depth: int) -> dict[str, Node]:
        values: dict[str, Node] = {}
        for name, content in yaml_node.value:
            # A key is a node too, with its place and its type.
            key = self.node(name, line, depth)
            if not isinstance(key.value, str):
                what = f"a key is text, this one is {key.plain()!r}"
                raise RecipeError(what, where=key.where, fix="put it in quotes")
            # In quotes `<<` is a name like others, such as that of a column.
            if key.value == "<<" and name.style is None:
                fix = "write the keys out, or build on another recipe: extends: RECIPE"
                raise RecipeError("YAML 1.2 has no merge key `<<`", where=key.where, fix=fix)
            if key.value in values:
                what = f"the key {key.value!r} is given twice"
                why = f"the first one is at {values[key.value].where}"
                raise RecipeError(what, where=key.where, why=why, fix="remove one of the two")
            # An error of a value points to its key's line: a block of text begins a line below.
            value = self.node(content, max(line, name.start_mark.line), depth)
            values[key.value] = replace(value, where=key.where)
        return values
