"""The YAML or JSON file of another tool as flat keys with their places, and the tools' tables."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import JsonValue

from tunesmith.config.tree import Node, Scalar, read_file, scalar, wrap
from tunesmith.errors import RecipeError, UsageError
from tunesmith.host.files import near_path
from tunesmith.host.shell import shell_path

IMPORTED_TOOLS = ("torchtune", "axolotl", "llamafactory", "trl")
_INTERPOLATION = re.compile(r"\$\{([^}]*)\}")
_MAX_INTERPOLATIONS = 10
TABLES = Path(__file__).parent / "tables"


# The keys of a tool; tables/trl.yaml describes the parts, and a test checks them.
ToolTable = dict[str, Any]


@dataclass(frozen=True)
class SourceKey:
    """A value of the other tool's file and its place, `file:line`, or a default of that tool."""

    key: str
    value: JsonValue
    where: str


@dataclass(frozen=True)
class SourceConfig:
    """The configuration of another tool.

    Attributes:
        keys: the values by dotted key: `optimizer.lr`, `datasets.0.path`.
        base: the folder that relative paths start from.
        referenced: the keys that other values contain as OmegaConf's `${key}`.
    """

    tool: str
    name: str
    keys: dict[str, SourceKey]
    base: Path
    referenced: frozenset[str] = frozenset()


@cache
def table(tool: str) -> ToolTable:
    """Return the table of a tool, joined with the table that it extends."""
    own: ToolTable = read_file(TABLES / f"{tool}.yaml").plain()
    if "extends" in own:
        for part, content in table(own["extends"]).items():
            if isinstance(content, list):
                own[part] = [*content, *own.get(part, [])]
            else:
                # The entries of the tool come first and win.
                own[part] = own.get(part, {}) | content | own.get(part, {})
    return own


def read_config(path: Path, tool: str | None) -> SourceConfig:
    """Read a file. Raise UsageError if it cannot be read or its tool cannot be identified."""
    if path.suffix == ".py":
        raise UsageError(
            f"{path} is a Python script, and import does not read Python",
            where=str(path),
            why="configuration files are read: YAML or JSON",
            fix="add before trainer.train(): import json; json.dump({**trainer.args.to_dict(), "
            "'model_name_or_path': ..., 'dataset_name': ..., 'use_peft': True, 'lora_r': ..., "
            "'lora_alpha': ..., 'lora_target_modules': ...}, open('trl.yaml', 'w')); run it, then: "
            "tunesmith import trl.yaml",
        )
    raw_keys = {key.key: key for key in source_keys(path)}
    keys = {}
    referenced: set[str] = set()
    for name, key in raw_keys.items():
        value = _interpolate(key, raw_keys)
        # Transformers' `to_dict` writes this text in place of a token.
        if value == f"<{name.upper()}>":
            value = None
        keys[name] = replace(key, value=value)
        if isinstance(key.value, str):
            referenced.update(_INTERPOLATION.findall(key.value))
    if not tool and not {"model.name", "extends"}.isdisjoint(keys):
        fix = f"tunesmith train {shell_path(path)}; or name a tool with --from"
        raise UsageError("this is already a tunesmith recipe", where=str(path), fix=fix)
    tool = _choose_tool(keys, path, tool)
    return SourceConfig(tool, path.name, keys, path.parent, referenced=frozenset(referenced))


def _choose_tool(keys: Mapping[str, SourceKey], path: Path, named: str | None) -> str:
    """Return the named tool, or the tool of which the file has the most marks.

    Raise UsageError if the file has no mark of any tool, or if its tool is not supported.
    """
    unsupported: ToolTable = read_file(TABLES / "unsupported.yaml").plain()
    tables = {tool: table(tool) for tool in IMPORTED_TOOLS} | unsupported
    words = {word for name in keys for word in name.split(".")}
    classes = [str(key.value) for name, key in keys.items() if name.endswith("_target_")]
    packages = {name.partition(".")[0] for name in classes}
    found: dict[str, list[str]] = {}
    for tool, known in tables.items():
        found[tool] = [mark for mark in known["marks"] if mark in words]
        if known.get("package") in packages:
            # A class of a tool's package identifies it better than any key.
            found[tool] = [known["package"]] * (1 + len(words))
    # The first tools win over later ones with as many marks.
    best = max(found, key=lambda tool: len(found[tool]))
    if named and (found[named] or not found[best]):
        return named
    why = f"it has {', '.join(dict.fromkeys(found[best][:3])) or 'no known key'}"
    if found[best] and best in unsupported:
        what = f"this is a file of {best}, which is not supported by import"
        raise UsageError(what, where=str(path), why=why, fix=unsupported[best]["fix"])
    if named or not found[best]:
        what = "cannot detect which tool this file is for"
        if named:
            what = f"this file has no key of {named}, and looks like one of {best}"
        fix = f"name the tool: --from {best}; known are {', '.join(IMPORTED_TOOLS)}"
        raise UsageError(what, where=str(path), why=why, fix=fix)
    return best


def source_keys(path: Path) -> Iterator[SourceKey]:
    """Yield every scalar, list of scalars and empty mapping of a YAML file by its dotted key."""
    try:
        yield from _leaves_below(read_file(path, yaml_1_1_scalar), "", path.name)
    except RecipeError as error:
        fix = error.fix
        near = None if path.exists() else near_path(path)
        if near:
            fix = f"did you mean {near}?"
        if "a recipe is" in error.what:
            fix = "use the YAML file of another tool"
        what = error.what.replace("recipe", "file")
        raise UsageError(what, where=error.where, why=error.why, fix=fix) from None


def _leaves_below(node: Node, key: str, file_name: str) -> Iterator[SourceKey]:
    if isinstance(node.value, str) and node.value.startswith("{"):
        # Transformers also reads a mapping from JSON in a text. A chat template is not JSON.
        with suppress(ValueError):
            node = wrap(json.loads(node.value), where=node.where, base=node.base)
    has_nested = any(child.children() for _, child in node.children())
    is_mapping = isinstance(node.value, dict) and bool(node.value)
    # A list of mappings has keys below it; a list of values is one value.
    if has_nested or is_mapping:
        for name, child in node.children():
            yield from _leaves_below(child, f"{key}.{name}".lstrip("."), file_name)
        return
    line = node.where.rpartition(":")[2]
    yield SourceKey(key, node.plain(), f"{file_name}:{line}")


def yaml_1_1_scalar(text: str) -> Scalar:
    """Return the value of a plain scalar as PyYAML reads it, that is, in YAML 1.1.

    PyYAML reads `1e-4` as a text, which the tools convert to a number; here it is a number.

    >>> [yaml_1_1_scalar(x) for x in ("16_384", "010", "1:30", "1e-4", "on", "y")]
    [16384, 8, 90, 0.0001, True, 'y']
    """
    number = scalar(text.replace("_", ""))
    if isinstance(number, float):
        return number
    try:
        value = yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return text
    # A date stays a text.
    return value if isinstance(value, Scalar) else text


def _interpolate(key: SourceKey, keys: Mapping[str, SourceKey], depth: int = 0) -> JsonValue:
    """Return the value with each `${other.key}` of OmegaConf replaced.

    Raise UsageError if a key is not in the file.
    """

    def replaced(match: re.Match[str]) -> str:
        target = keys.get(match[1])
        # A reference to itself would not end.
        if target is None or isinstance(target.value, list | dict) or depth > _MAX_INTERPOLATIONS:
            what = f"{key.key}: {match[0]} is not defined in this file"
            raise UsageError(what, where=key.where, fix="write the value in its place")
        return str(_interpolate(target, keys, depth + 1))

    if not isinstance(key.value, str) or not _INTERPOLATION.search(key.value):
        return key.value
    # A number or a truth value keeps its type.
    return yaml_1_1_scalar(_INTERPOLATION.sub(replaced, key.value))
