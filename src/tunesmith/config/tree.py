"""Reader of YAML 1.2 into a small tree, in which every value knows its file and line.

ruamel.yaml parses the text into nodes. This module checks the nodes for duplicate keys, tags, size
and depth, and computes their values. The value of a scalar without quotes follows the core schema
of YAML 1.2.2 (section 10.3.2): `3e-4` is a number, `on` and `yes` are text, and there are no
timestamps.
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

# Maximum size of a recipe file in bytes. If a user passes a data file instead of a recipe, parsing
# each MB would take half a minute.
MAX_BYTES = 256 << 10
MAX_DEPTH = 20
# Maximum number of open brackets. ruamel needs minutes for 100,000 open brackets before it fails.
MAX_OPEN = 200
# Maximum number of digits of an integer.
MAX_DIGITS = 300
# Maximum number of values after aliases are expanded. Without this limit, nine lines of nested
# aliases could expand to a billion values.
MAX_NODES = 10_000

# YAML's core schema as pairs of a regular expression and a function. The first expression that
# matches an entire scalar is used, and its function converts the scalar. A scalar without a match
# is text.
_CORE: tuple[tuple[str, Callable[[str], Scalar]], ...] = (
    (r"|~|null|Null|NULL", lambda text: None),
    (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    # int() raises ValueError for more than 4300 digits. An integer of more than MAX_DIGITS digits
    # matches the float expression below instead.
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


class NotAMappingError(RecipeError):
    """A recipe file whose content is not a mapping of keys to values."""


@dataclass(frozen=True)
class Node:
    """A value of a recipe with its position and base folder.

    Attributes:
        where: the position for error messages, such as `recipe.yaml:3`.
        base: the folder that a relative path in this value is relative to.
    """

    value: "dict[str, Node] | list[Node] | Scalar"
    where: str
    base: Path

    def children(self) -> "list[tuple[str, Node]]":
        """Return the (key, value) pairs of a mapping, or (index, value) pairs of a list.

        Return an empty list for a scalar.
        """
        if isinstance(self.value, dict):
            return list(self.value.items())
        if isinstance(self.value, list):
            return [(str(i), item) for i, item in enumerate(self.value)]
        return []

    def plain(self) -> Any:
        """Convert the tree to plain dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def places(self, key: str = "") -> Iterator[tuple[str, str]]:
        """Yield each nested key in dotted form (`data.train.0.split`), with its position."""
        for name, node in self.children():
            below = f"{key}.{name}" if key else name
            yield below, node.where
            yield from node.places(below)


def scalar(text: str) -> Scalar:
    """Return the value of a YAML scalar without quotes, by the core schema of YAML 1.2.

    >>> [scalar(x) for x in ("3e-4", "on", "0o17", "2026-01-31", "~")]
    [0.0003, 'on', 15, '2026-01-31', None]
    """
    for form, meaning in _CORE:
        if re.fullmatch(form, text):
            return meaning(text)
    return text


def wrap(values: object, *, where: str, base: Path, key: str = "") -> Node:
    """Convert plain values to a tree of nodes. The position of a node is the text `where: key`."""
    place = f"{where}: {key}" if key else where
    if isinstance(values, Mapping | list | tuple):
        children = {}
        for name, value in values.items() if isinstance(values, Mapping) else enumerate(values):
            path = f"{key}.{name}".lstrip(".")
            children[str(name)] = wrap(value, where=where, base=base, key=path)
        is_mapping = isinstance(values, Mapping)
        return Node(children if is_mapping else list(children.values()), place, base)
    if isinstance(values, os.PathLike):
        values = os.fspath(values)
    if isinstance(values, int) and abs(values) >= 10**MAX_DIGITS:
        # Use infinity, as `scalar` does for an integer of this size. str(values) could raise
        # ValueError.
        values = math.inf
    if not isinstance(values, Scalar):
        raise RecipeError(
            f"a recipe cannot have a value of type {type(values).__name__}",
            where=place,
            fix="use text, a number, true, false, null, a list or a mapping",
        )
    return Node(values, place, base)


def read_file(path: Path, plain_scalar: Callable[[str], Scalar] = scalar) -> Node:
    """Read a recipe file into a tree, whose root is a mapping.

    Args:
        plain_scalar: converts a scalar without quotes to its value.

    Raises:
        RecipeError: if the file cannot be read, is too large, is not UTF-8, or is not a YAML
            mapping.
    """
    name = str(path)
    try:
        with path.open("rb") as file:
            # Read one byte more than allowed, to detect a file that is too large.
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        what = "this recipe cannot be read"
        why = error.strerror or str(error)
        fix = f"check the permissions of the file with `ls -l {shell_path(name)}`"
        raise RecipeError(what, where=name, why=why, fix=fix) from error
    if len(raw) > MAX_BYTES:
        fix = "name a recipe instead of a file of rows; a recipe is about one page of YAML"
        raise RecipeError("this recipe is larger than 256 KiB", where=name, fix=fix)
    try:
        # `utf-8-sig` removes the byte order mark that Windows editors write at the start of a file.
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        # A UTF-16 file starts with a byte order mark of two bytes.
        encoding = "UTF-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "LATIN1"
        convert = f"iconv -f {encoding} -t UTF-8 {shell_path(name)} > fixed.yaml"
        fix = f"{convert}   # if the file has that encoding"
        what = f"this recipe is not UTF-8 text: byte 0x{raw[error.start]:02x}"
        raise RecipeError(what, where=f"{name}:{line}", fix=fix) from error
    top = _Reader(name, path.parent, plain_scalar=plain_scalar).read(text)
    if top is None or not isinstance(top.value, dict):
        raise NotAMappingError(
            "a recipe must be a mapping of keys to values, but this file is not a mapping",
            where=top.where if top else name,
            fix="begin the file with `model:`; `tunesmith recipes show smollm2-135m-lora` shows "
            "a complete example",
        )
    return top


def read_value(text: str, *, where: str, base: Path) -> Node:
    """Read one YAML value from the command line. An empty text is null, as in a file."""
    return _Reader(where, base, lines=False).read(text) or Node(None, where, base)


class _Untyped(VersionedResolver):
    """A YAML resolver that gives scalars without quotes no type, because `scalar` converts them."""

    def resolve(self, kind: object, value: object, implicit: object) -> object:
        return BaseResolver.resolve(self, kind, value, implicit)


def _check_brackets(text: str) -> None:
    """Raise RecursionError if more than MAX_OPEN brackets and braces are open at once.

    Brackets in quoted text count too.
    """
    changes = (1 if bracket in "[{" else -1 for bracket in re.findall(r"[\[\]{}]", text))
    if max(accumulate(changes), default=0) > MAX_OPEN:
        raise RecursionError


def _join_surrogates(text: str, where: str) -> str:
    """Replace each surrogate pair by its character.

    Surrogate pairs come from JSON, which can write an emoji as a pair.

    Raise RecipeError for a surrogate without its partner, because it cannot be encoded in a file.
    """
    try:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError:
        raise RecipeError(
            "this text contains half of a surrogate pair, which is not a character",
            where=where,
            fix="write the character itself, or both escapes of the pair",
        ) from None


@dataclass
class _Reader:
    """Reader that converts one YAML document to a `Node`.

    It enforces MAX_DEPTH, MAX_NODES and MAX_OPEN.

    Attributes:
        name: the file or the key of the command line, for positions.
        lines: whether positions have a line number.
        count: number of values so far.
    """

    name: str
    base: Path
    lines: bool = True
    plain_scalar: Callable[[str], Scalar] = scalar
    count: int = 0

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
            # ReaderError means that the text has a character that YAML does not allow.
            where = self.place(text.count("\n", 0, error.position))
            problem = str(error).splitlines()[0]
        except RecursionError:
            problem = "the YAML is nested too deeply"
        except (ValueError, OverflowError) as error:
            # An escape such as "\UFFFFFFFF" is not a Unicode character.
            problem = str(error)
        raise RecipeError(
            "this YAML cannot be read",
            where=where,
            why=problem,
            fix="correct the text at or just before this position: a recipe is one YAML document, "
            "indented with spaces",
        )

    def node(self, yaml_node: nodes.Node, line: int = 0, depth: int = 0) -> Node:
        """Convert a ruamel node to a `Node`.

        Args:
            line: the line of the key or parent of the node. The target of an alias is in an earlier
                line. Its position is then `line`, where the alias is used.
        """
        line = max(line, yaml_node.start_mark.line)
        where = self.place(line)
        self.count += 1
        if depth > MAX_DEPTH or self.count > MAX_NODES:
            raise RecipeError(
                f"this recipe is too deeply nested or too large: at most {MAX_DEPTH} levels and "
                f"{MAX_NODES} values are allowed, counting expanded aliases",
                where=where,
                fix="use fewer levels, and no aliases",
            )
        if yaml_node.ctag not in _UNTAGGED:
            raise RecipeError(
                f"the YAML tag {yaml_node.tag} is not allowed",
                where=where,
                fix="write the plain value without a tag",
            )
        value: dict[str, Node] | list[Node] | Scalar
        if isinstance(yaml_node, nodes.ScalarNode):
            # Only a scalar without quotes can be a number, bool or null.
            if yaml_node.style is None:
                value = self.plain_scalar(yaml_node.value)
            else:
                value = _join_surrogates(yaml_node.value, where)
        elif isinstance(yaml_node, nodes.SequenceNode):
            value = [self.node(item, line, depth + 1) for item in yaml_node.value]
        else:
            value = self.mapping(yaml_node, line, depth + 1)
        return Node(value, where, self.base)

    def mapping(self, yaml_node: nodes.Node, line: int, depth: int) -> dict[str, Node]:
        values: dict[str, Node] = {}
        for name, content in yaml_node.value:
            # Convert the key like a value, to get its position and its type.
            key = self.node(name, line, depth)
            if not isinstance(key.value, str):
                what = f"a key must be text, but this key is {key.plain()!r}"
                raise RecipeError(what, where=key.where, fix="put the key in quotes")
            # `<<` in quotes is an ordinary name, for example of a column.
            if key.value == "<<" and name.style is None:
                raise RecipeError(
                    "YAML 1.2 has no merge key `<<`",
                    where=key.where,
                    fix="write the keys out, or build on another recipe with `extends: RECIPE`",
                )
            if key.value in values:
                what = f"the key {key.value!r} is given twice"
                raise RecipeError(
                    what,
                    where=key.where,
                    why=f"the first one is at {values[key.value].where}",
                    fix="remove one of the two keys",
                )
            # Errors about a value point to the line of its key, because a block scalar starts one
            # line later.
            value = self.node(content, max(line, name.start_mark.line), depth)
            values[key.value] = replace(value, where=key.where)
        return values
