"""The YAML or JSON file of another tool as flat keys and their places."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TypedDict

from pydantic import JsonValue
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from tunesmith.config.tree import MAX_DIGITS, Node, Scalar, read_file, scalar, wrap
from tunesmith.errors import RecipeError, UsageError
from tunesmith.host.files import near_file
from tunesmith.host.shell import shell_path

IMPORTED_TOOLS = ("torchtune", "axolotl", "llamafactory", "trl", "accelerate")
# TRL's trainers that have a counterpart.
TRL_TRAINERS = ("sft", "dpo", "kto", "orpo", "cpo")
# In YAML 1.1, which these tools read, besides true and false.
_TRUTH_1_1 = {
    word: value
    for name, value in (("yes", True), ("on", True), ("no", False), ("off", False))
    for word in (name, name.title(), name.upper())
}
_INTERPOLATION = re.compile(r"\$\{([^}]*)\}")
_MAX_INTERPOLATIONS = 10
TABLES = Path(__file__).parent / "tables"


class RowsTable(TypedDict, total=False):
    """The part `rows` of a table; tables/torchtune.yaml describes it."""

    type: str
    silent: str
    sources: list[str]
    role_keys: list[str]
    roles: dict[str, str]
    usual_names: list[str]
    other_splits: list[str]
    keys: dict[str, str]
    columns: dict[str, dict[str, str]]
    pictures: dict[str, str]
    mentioned: list[str]
    flags: list[str]
    types: dict[str, dict[str, JsonValue]]
    types_of_preference: dict[str, dict[str, JsonValue]]
    types_of_feedback: dict[str, dict[str, JsonValue]]
    types_of_text: dict[str, dict[str, JsonValue]]


class PreferencesTable(TypedDict, total=False):
    """The part `preferences` of a table: keys and defaults of each trainer."""

    identified_by: dict[str, list[str]]
    defaults: dict[str, dict[str, JsonValue]]


class ToolTable(TypedDict, total=False):
    """A tool's keys; tables/torchtune.yaml describes the parts."""

    marks: list[str]
    names: dict[str, str | list[str]]
    defaults: dict[str, JsonValue]
    carried: list[str]
    words: dict[str, str]
    ours: dict[str, str]
    rules: list[tuple[str, str | int, str, JsonValue, str]]
    nothing: dict[str, list[str]]
    differs: dict[str, list[str]]
    rows: RowsTable
    preferences: PreferencesTable
    owners: dict[str, str]
    usual: dict[str, list[str]]


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
        tool: whose it is.
        keys: by dotted key: `optimizer.lr`, `datasets.0.path`.
        base: where relative paths start.
        referenced: keys that another value takes in by OmegaConf's `${key}`.
    """

    tool: str
    name: str
    keys: dict[str, SourceKey]
    base: Path
    referenced: frozenset[str] = frozenset()


def nearby(base: Path, file: str | Path) -> Path | None:
    """A file that a configuration in the folder `base` names.

    It is looked for there, in three folders above, and in the working directory.
    """
    base = base.resolve()
    for folder in (base, *base.parents[:3], Path.cwd()):
        if (folder / file).is_file():
            return folder / file
    return None


@cache
def table(tool: str) -> ToolTable:
    """The table of a tool's keys; tables/torchtune.yaml describes the parts."""
    content: ToolTable = read_file(TABLES / f"{tool}.yaml").plain()
    return content


def read_config(path: Path, tool: str | None) -> SourceConfig:
    """A file; UsageError if it cannot be read, or does not tell its tool."""
    _check_no_program(path)
    raw_keys = {key.key: key for key in _leaves(path)}
    keys = {}
    referenced: set[str] = set()
    for name, key in raw_keys.items():
        value = _interpolate(key, raw_keys)
        # What Transformers' `to_dict` writes in place of a token.
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


def _choose_tool(keys: dict[str, SourceKey], path: Path, named: str | None) -> str:
    """The named tool, or the one of whose own keys the file has most.

    UsageError where several do alike, and where all keys that are known are of another tool.
    """
    names = {name for key in keys for name in key.split(".")}
    for name, key in keys.items():
        if name.endswith("_target_"):
            names.add(str(key.value).partition(".")[0])
    unsupported: dict[str, list[str]] = read_file(TABLES / "unsupported.yaml").plain()
    tables = unsupported | {tool: table(tool)["marks"] for tool in IMPORTED_TOOLS}
    marks = {tool: [mark for mark in known if mark in names] for tool, known in tables.items()}
    most = max(len(marks[tool]) for tool in IMPORTED_TOOLS)
    likely = [tool for tool in IMPORTED_TOOLS if len(marks[tool]) == most]
    other = max(unsupported, key=lambda tool: len(marks[tool]))
    if len(marks[other]) > most and not (named and marks[named]):
        raise _unsupported(other, path, f"it has {', '.join(marks[other][:3])}")
    if named:
        if most and not marks[named]:
            what = f"this file has no key of {named}, and looks like one of {likely[0]}"
            why = f"it has {', '.join(marks[likely[0]][:3])}"
            raise UsageError(what, where=str(path), why=why, fix=f"--from {likely[0]}")
        return named
    if len(likely) > 1:
        raise UsageError(
            "cannot detect which tool this file is for",
            where=str(path),
            why=f"its keys could be of {' or '.join(likely)}" if most else "it has no known keys",
            fix=f"name the tool: --from {likely[0]}; known are {', '.join(IMPORTED_TOOLS)}",
        )
    return likely[0]


def _unsupported(tool: str, path: Path, why: str) -> UsageError:
    return UsageError(
        f"this is a file of {tool}, which cannot be imported",
        where=str(path),
        why=why,
        fix="tunesmith train --model MODEL --data ROWS.jsonl writes a recipe; change the keys "
        "there (docs/recipe.md)",
    )


def _check_no_program(path: Path) -> None:
    """UsageError for a Python script, whose values are not in a configuration file."""
    if path.suffix == ".py":
        if path.is_file() and re.search(r"(?m)^\s*(from|import) nemo", path.read_text("latin-1")):
            raise _unsupported("NeMo", path, "it imports NeMo")
        raise UsageError(
            f"{path} is a Python script, and import does not read Python",
            where=str(path),
            why="configuration files are read: YAML or JSON",
            fix="add before trainer.train(): import json; json.dump({**trainer.args.to_dict(),"
            " 'model_name_or_path': ..., 'dataset_name': ..., 'use_peft': True, 'lora_r': ...,"
            " 'lora_alpha': ..., 'lora_target_modules': ...}, open('trl.yaml', 'w')); run it, then:"
            " tunesmith import trl.yaml",
        )


def _leaves(path: Path) -> Iterator[SourceKey]:
    """Every scalar, list of scalars and empty mapping of a YAML file, by its dotted key."""
    try:
        yield from _leaves_below(read_file(path, yaml_1_1_scalar), "", path.name)
    except RecipeError as error:
        fix = error.fix
        near = None if path.exists() else near_file(path, (".yaml", ".yml", ".json"))
        if near:
            fix = f"did you mean {near}?"
        if "a recipe is" in error.what:
            fix = "use the YAML file of another tool"
        what = error.what.replace("recipe", "file")
        raise UsageError(what, where=error.where, why=error.why, fix=fix) from None


def _leaves_below(node: Node, key: str, file_name: str) -> Iterator[SourceKey]:
    if isinstance(node.value, str) and node.value.startswith("{"):
        # Transformers reads a mapping also from JSON in a text. A chat template is none.
        with suppress(ValueError):
            node = wrap(json.loads(node.value), where=node.where, base=node.base)
    has_nested = any(child.children() for _, child in node.children())
    is_mapping = isinstance(node.value, dict) and bool(node.value)
    # A list of mappings has keys below; a list of values is one value.
    if has_nested or is_mapping:
        for name, child in node.children():
            yield from _leaves_below(child, f"{key}.{name}".lstrip("."), file_name)
        return
    line = node.where.rpartition(":")[2]
    yield SourceKey(key, node.plain(), f"{file_name}:{line}")


def yaml_1_1_scalar(text: str) -> Scalar:
    """The value of a plain scalar for PyYAML, which reads YAML 1.1.

    `1e-4` is a text there that the tools turn into a number; here it is the number at once.

    >>> [yaml_1_1_scalar(x) for x in ("16_384", "010", "1:30", "1e-4", "on", "y")]
    [16384, 8, 90, 0.0001, True, 'y']
    """
    if text in _TRUTH_1_1:
        return _TRUTH_1_1[text]
    if not re.fullmatch(r"[-+]?[.0-9][\w:.+-]*", text) or len(text) > MAX_DIGITS:
        return scalar(text)
    number = scalar(text.replace("_", ""))
    if isinstance(number, float):
        return number
    yaml = YAML(typ="safe", pure=True)
    yaml.version = (1, 1)  # octal, binary and sexagesimal numbers
    try:
        value = yaml.load(text)
    except (ValueError, YAMLError):
        return text
    # What is no number is text: a date too.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number else text


def python_scalar(text: str) -> Scalar:
    """The value of a text where a tool wants a number or a truth value: `int` and `float` read it.

    >>> [python_scalar(x) for x in ("16_384", "010", "1e-4", "true", "x")]
    [16384, 10, 0.0001, True, 'x']
    """
    # Python takes an underscore between digits alone.
    number = scalar(re.sub(r"(?<=[0-9])_(?=[0-9])", "", text))
    return scalar(text) if isinstance(number, str) else number


def _interpolate(key: SourceKey, keys: dict[str, SourceKey], depth: int = 0) -> JsonValue:
    """The value with each `${other.key}` of OmegaConf replaced.

    Raises:
        UsageError: one is not in the file.
    """
    value = key.value
    if not isinstance(value, str):
        return value
    for name in _INTERPOLATION.findall(value):
        target = keys.get(name)
        # A reference to itself would go round for ever.
        is_scalar = target is not None and not isinstance(target.value, list | dict)
        if target is None or not is_scalar or depth > _MAX_INTERPOLATIONS:
            raise UsageError(
                f"{key.key}: ${{{name}}} is not defined in this file",
                where=key.where,
                fix="write the value in its place",
            )
        replacement = _interpolate(target, keys, depth + 1)
        if value == f"${{{name}}}":
            # The whole value keeps its type.
            return replacement
        value = value.replace(f"${{{name}}}", str(replacement))
    return value
