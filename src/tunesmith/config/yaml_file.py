"""Reader of YAML 1.2 into plain values, and the position of each value.

ruamel.yaml parses the text into nodes. This module checks the nodes for duplicate keys, tags, size
and depth, and computes their values. The value of a scalar without quotes follows the core schema
of YAML 1.2.2 (section 10.3.2): `3e-4` is a number, `on` and `yes` are text, and there are no
timestamps.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, nodes
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.resolver import BaseResolver, VersionedResolver

from tunesmith.errors import RecipeError, first_line
from tunesmith.host.functions import file_and_name
from tunesmith.host.shell import shell_path

Scalar = str | int | float | bool | None

# Maximum size of a recipe file in bytes. If a user passes a data file instead of a recipe, parsing
# each MB would take half a minute.
MAX_BYTES = 256 << 10
MAX_DEPTH = 20
# Maximum number of brackets. ruamel needs minutes for 100,000 open brackets before it fails.
MAX_BRACKETS = 1000
# Maximum number of digits of an integer. A float can hold 16**250.
MAX_DIGITS = 250
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


@dataclass(frozen=True)
class RecipeLayer:
    """Values of a recipe, with their positions.

    Attributes:
        values: the recipe as plain dicts, lists and scalars.
        positions: dotted key of a value, such as `data.train.0.split` -> its position for error
            messages, such as `recipe.yaml:3`. The key of the entire layer is "".
    """

    values: dict[str, Any]
    positions: Mapping[str, str]

    def where(self, key: str = "") -> str:
        """Return the position of a key, or of the innermost section around it that has one."""
        while key and key not in self.positions:
            key = key.rpartition(".")[0]
        return self.positions[key]


def scalar(text: str) -> Scalar:
    """Return the value of a YAML scalar without quotes, by the core schema of YAML 1.2.

    >>> [scalar(x) for x in ("3e-4", "on", "0o17", "2026-01-31", "~")]
    [0.0003, 'on', 15, '2026-01-31', None]
    """
    for form, meaning in _CORE:
        if re.fullmatch(form, text):
            return meaning(text)
    return text


def as_json(value: object) -> str:
    """Return a Python value as JSON, which is valid YAML: its quotes keep a text a text.

    Raise RecipeError for a value that a recipe cannot have.
    """
    try:
        # YAML requires an escape for DEL, and JSON does not.
        return json.dumps(value, default=_as_text).replace("\x7f", "\\u007f")
    except (TypeError, ValueError, RecursionError) as error:
        raise RecipeError(
            "a recipe cannot have this value",
            why=str(error),
            fix="use text, a number, true, false, null, a list or a mapping",
        ) from None


def _as_text(value: Any) -> str:
    return file_and_name(value) if callable(value) else os.fspath(value)


def layer_of(values: Mapping[str, object], where: str) -> RecipeLayer:
    """Convert plain values to a layer. The position of a value is the text `where: key`."""
    reader = _Reader(lambda line, key: f"{where}: {key}" if key else where)
    return RecipeLayer(reader.read(as_json(values)), reader.positions)


def read_file(path: Path, plain_scalar: Callable[[str], Scalar] = scalar) -> RecipeLayer:
    """Read a recipe file.

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
        fix = f"check the permissions of the file with `ls -l {shell_path(name)}`"
        why = first_line(error)
        raise RecipeError("this recipe cannot be read", where=name, why=why, fix=fix) from error
    if len(raw) > MAX_BYTES:
        fix = "name a recipe instead of a file of rows; a recipe is about one page of YAML"
        raise RecipeError("this recipe is larger than 256 KiB", where=name, fix=fix)
    try:
        # `utf-8-sig` removes the byte order mark that Windows editors write at the start of a file.
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"this recipe is not UTF-8 text: byte 0x{raw[error.start]:02x}",
            where=f"{name}:{line}",
            fix=f"iconv -f LATIN1 -t UTF-8 {shell_path(name)} > fixed.yaml   # or its encoding",
        ) from error
    reader = _Reader(lambda line, key: f"{name}:{line + 1}", plain_scalar)
    values = reader.read(text)
    if not isinstance(values, dict):
        raise RecipeError(
            "a recipe must be a mapping of keys to values, but this file is not a mapping",
            where=reader.positions.get("", name),
            fix="begin the file with `model:`, as `tunesmith recipes show smollm2-135m-lora` does",
        )
    return RecipeLayer(values, reader.positions)


def read_value(text: str, key: str, where: str) -> RecipeLayer:
    """Read one YAML value from the command line as the value of a dotted key.

    An empty text is null, as in a file.
    """
    reader = _Reader(lambda line, key: where, positions={key: where})
    value = reader.read(text, key)
    # Build the nested mapping from the inside: a.b=1 becomes {a: {b: 1}}.
    for name in reversed(key.split(".")):
        value = {name: value}
    return RecipeLayer(value, reader.positions)


class _Untyped(VersionedResolver):
    """A YAML resolver that gives scalars without quotes no type, because `scalar` converts them."""

    def resolve(self, kind: object, value: object, implicit: object) -> object:
        return BaseResolver.resolve(self, kind, value, implicit)


def _check_tag(node: nodes.Node, where: str) -> None:
    if node.ctag not in _UNTAGGED:
        raise RecipeError(
            f"the YAML tag {node.tag} is not allowed",
            where=where,
            fix="write the plain value without a tag",
        )


def _check_brackets(text: str) -> None:
    if text.count("[") + text.count("{") > MAX_BRACKETS:
        raise RecursionError(f"there are more than {MAX_BRACKETS:,} brackets")


@dataclass
class _Reader:
    """Reader that converts one YAML document to plain values.

    It enforces MAX_DEPTH and MAX_NODES.

    Attributes:
        place: returns the position of a value from its line, which counts from 0, and its key.
        positions: dotted key of each value so far -> its position.
    """

    place: Callable[[int, str], str]
    plain_scalar: Callable[[str], Scalar] = scalar
    positions: dict[str, str] = field(default_factory=dict)
    count: int = 0

    def read(self, text: str, key: str = "") -> Any:
        """Return the value of the text. `key` is the dotted key of the value."""
        yaml = YAML(typ="safe", pure=True)
        yaml.Resolver = _Untyped
        line = 0
        try:
            _check_brackets(text)
            top = yaml.compose(text)
            return None if top is None else self.value(top, key)
        except MarkedYAMLError as error:
            line = error.problem_mark.line if error.problem_mark else 0
            problem = ": ".join(filter(None, (error.context, error.problem)))
        except ReaderError as error:
            # The text has a character that YAML does not allow.
            line = text.count("\n", 0, error.position)
            problem = first_line(error)
        # A RecursionError is a text that is nested too deeply, and the others are escapes such as
        # "\UFFFFFFFF", which are no characters.
        except (RecursionError, ValueError, OverflowError) as error:
            problem = first_line(error)
        raise RecipeError(
            "this YAML cannot be read",
            where=self.place(line, key),
            why=problem,
            fix="correct the text at or just before this position: a recipe is one YAML document, "
            "indented with spaces",
        )

    def value(self, node: nodes.Node, key: str, line: int = 0, depth: int = 0) -> Any:
        """Convert a ruamel node to a plain value, and record its position.

        Args:
            line: the line of the node's parent. The target of an alias is in an earlier line. Its
                position is then `line`, where the alias is used.
        """
        line = max(line, node.start_mark.line)
        where = self.place(line, key)
        # An error about a value names the line of its key, which `mapping` has recorded. A block
        # scalar begins one line later.
        self.positions.setdefault(key, where)
        self.count += 1
        if depth > MAX_DEPTH or self.count > MAX_NODES:
            raise RecipeError(
                f"this recipe is too deeply nested or too large: at most {MAX_DEPTH} levels and "
                f"{MAX_NODES} values are allowed, counting expanded aliases",
                where=where,
                fix="use fewer levels, and no aliases",
            )
        _check_tag(node, where)
        if isinstance(node, nodes.SequenceNode):
            return [
                self.value(item, f"{key}.{i}".lstrip("."), line, depth + 1)
                for i, item in enumerate(node.value)
            ]
        if isinstance(node, nodes.MappingNode):
            return self.mapping(node, key, line, depth + 1)
        return self.text(node)

    def text(self, node: Any) -> Scalar:
        # Only a scalar without quotes can be a number, bool or null.
        if node.style is None:
            return self.plain_scalar(node.value)
        # JSON writes an emoji as two surrogates.
        text: str = node.value
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")

    def mapping(self, node: nodes.Node, key: str, line: int, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name_node, content in node.value:
            is_scalar = isinstance(name_node, nodes.ScalarNode)
            name = str(name_node.value) if is_scalar else "a list or mapping"
            path = f"{key}.{name}".lstrip(".")
            line_of_name = max(line, name_node.start_mark.line)
            where = self.place(line_of_name, path)
            if name in values:
                raise RecipeError(
                    f"the key {name!r} is given twice, first at {self.positions[path]}",
                    where=where,
                    fix="remove one of the two keys",
                )
            self.positions[path] = where
            values[name] = self.value(content, path, line_of_name, depth)
        return values
