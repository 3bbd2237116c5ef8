"""Reader of other tools' configuration files (YAML or JSON), and of the translation tables.

A configuration becomes a flat dict of dotted keys. Each key has its value and its position in the
file.
"""

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

from tunesmith.config.dump import leaves
from tunesmith.config.yaml_file import MAX_DIGITS, Scalar, read_file, scalar
from tunesmith.errors import RecipeError, UsageError
from tunesmith.host.files import find_similar_path
from tunesmith.host.shell import shell_path

IMPORTED_TOOLS = ("torchtune", "axolotl", "llamafactory", "trl")
_INTERPOLATION = re.compile(r"\$\{([^}]*)\}")
_MAX_INTERPOLATIONS = 10
TABLES = Path(__file__).parent / "tables"


# Translation table of a tool. Comments in tables/trl.yaml describe the parts of a table.
ToolTable = dict[str, Any]


@dataclass(frozen=True)
class SourceKey:
    """A key of the other tool with its value.

    The position of the key is `file:line`, or "TOOL's default" if the key is not in the file.
    """

    key: str
    value: JsonValue
    where: str


@dataclass(frozen=True)
class SourceConfig:
    """The configuration of another tool.

    Attributes:
        tool: name of the tool, one of IMPORTED_TOOLS.
        name: name of the file.
        keys: values by dotted key, such as `optimizer.lr` or `datasets.0.path`.
        base: folder that relative paths refer to.
        referenced: keys that other values reference with OmegaConf's `${key}`.
    """

    tool: str
    name: str
    keys: dict[str, SourceKey]
    base: Path
    referenced: frozenset[str] = frozenset()


@cache
def table(tool: str) -> ToolTable:
    """Return the translation table of a tool, merged with the table that it extends."""
    own: ToolTable = read_file(TABLES / f"{tool}.yaml").values
    base = own.pop("extends", None)
    for part, content in table(base).items() if base else ():
        ours = own.get(part) or type(content)()
        if isinstance(content, list):
            own[part] = content + ours
        else:
            # Put the tool's own entries first, because they have priority over the entries of the
            # table that it extends.
            own[part] = ours | content | ours
    return own


def read_config(path: Path, tool: str | None) -> SourceConfig:
    """Read a configuration file.

    Raise UsageError if the file cannot be read or its tool cannot be detected.
    """
    if path.suffix == ".py":
        raise UsageError(
            f"{path} is a Python script, which `tunesmith import` cannot read",
            where=path,
            why="`tunesmith import` reads configuration files in YAML or JSON",
            fix="add this line before trainer.train(): import json; "
            "json.dump({**trainer.args.to_dict(), 'model_name_or_path': ..., 'dataset_name': ..., "
            "'use_peft': True, 'lora_r': ..., 'lora_alpha': ..., 'lora_target_modules': ...}, "
            "open('trl.yaml', 'w')); then run the script and `tunesmith import trl.yaml`",
        )

    raw_keys = {key.key: key for key in source_keys(path)}
    keys = {}
    referenced = set()
    for name, key in raw_keys.items():
        value = _interpolate(key, raw_keys)
        # Transformers' `to_dict` replaces tokens such as `hub_token` by the text `<HUB_TOKEN>`.
        if value == f"<{name.upper()}>":
            value = None
        keys[name] = replace(key, value=value)
        if isinstance(key.value, str):
            referenced.update(_INTERPOLATION.findall(key.value))

    if not tool and not {"model.name", "extends"}.isdisjoint(keys):
        raise UsageError(
            "this is already a tunesmith recipe",
            where=path,
            fix=f"run `tunesmith train {shell_path(path)}`, or name the tool with --from",
        )
    tool = _choose_tool(keys, path, tool)
    return SourceConfig(tool, path.name, keys, path.parent, referenced=frozenset(referenced))


def _choose_tool(keys: Mapping[str, SourceKey], path: Path, named: str | None) -> str:
    """Return the tool that the user has named, or detect the tool.

    The tool is detected by counting the keys in the file that are characteristic of each tool.

    Raise UsageError if there is no characteristic key of any tool, or if the tool is not supported.
    """
    unsupported: ToolTable = read_file(TABLES / "unsupported.yaml").values
    tables = {tool: table(tool) for tool in IMPORTED_TOOLS} | unsupported

    words = {word for name in keys for word in name.split(".")}
    targets = [str(key.value) for name, key in keys.items() if name.endswith("_target_")]
    words |= {target.partition(".")[0] for target in targets}
    found = {
        tool: [mark for mark in known["marks"] if mark in words] for tool, known in tables.items()
    }
    # If several tools have the same number of matches, `max` returns the first.
    best = max(found, key=lambda tool: len(found[tool]))
    marks = found[best]
    if named and (found[named] or not marks):
        return named

    shown = ", ".join(dict.fromkeys(marks[:3])) or "no known key"
    why = f"the file has {shown}"
    what = "`import` cannot detect which tool this file is for"
    fix = f"name the tool, such as --from {best}; the tools are {', '.join(IMPORTED_TOOLS)}"
    if marks and best in unsupported:
        what = f"this is a file of {best}, which `tunesmith import` does not support"
        fix = unsupported[best]["fix"]
    elif named:
        what = f"this file has no key of {named}, and looks like a file of {best}"
    elif marks:
        return best
    raise UsageError(what, where=path, why=why, fix=fix)


def source_keys(path: Path) -> Iterator[SourceKey]:
    """Yield a key with its value for each scalar, list of scalars and empty mapping of a file."""
    try:
        layer = read_file(path, yaml_1_1_scalar)
    except RecipeError as error:
        near = None if path.exists() else find_similar_path(path)
        fix = "give the configuration file of another tool, in YAML or JSON"
        if near:
            fix = f"did you mean {near}?"
        what = error.what.replace("recipe", "file")
        raise UsageError(what, where=error.where, why=error.why, fix=fix) from None
    # A list of scalars is one value.
    for key, value in leaves(_with_json(layer.values)).items():
        line = layer.where(key).rpartition(":")[2]
        yield SourceKey(key, value, f"{path.name}:{line}")


def _with_json(value: Any) -> Any:
    """Return the values with the JSON texts of mappings as mappings, which Transformers accepts."""
    if isinstance(value, dict):
        return {name: _with_json(item) for name, item in value.items()}
    if isinstance(value, str) and value.startswith("{"):
        # A chat template may start with "{" but is not JSON.
        with suppress(ValueError):
            return json.loads(value)
    return value


def yaml_1_1_scalar(text: str) -> Scalar:
    """Convert a plain scalar as PyYAML does, that is, by the rules of YAML 1.1.

    The only difference is `1e-4`: PyYAML reads a string, which the tools convert to a number. This
    function returns the number.

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
    # Keep a date as a string, and an integer that is too large to be printed.
    is_printable = not isinstance(value, int) or abs(value) < 10**MAX_DIGITS
    return value if isinstance(value, Scalar) and is_printable else text


def _interpolate(key: SourceKey, keys: Mapping[str, SourceKey], depth: int = 0) -> JsonValue:
    """Return the value with each `${other.key}` of OmegaConf replaced by the value of that key.

    Raise UsageError if the other key is not in the file.
    """

    def replaced(match: re.Match[str]) -> str:
        target = keys.get(match[1])
        # The depth limit ends the recursion of keys that reference themselves.
        if target is None or isinstance(target.value, list | dict) or depth > _MAX_INTERPOLATIONS:
            raise UsageError(
                f"{key.key}: {match[0]} is not defined in this file",
                where=key.where,
                fix="replace the reference by its value",
            )
        return str(_interpolate(target, keys, depth + 1))

    if not isinstance(key.value, str) or not _INTERPOLATION.search(key.value):
        return key.value

    # Convert the resulting text to its YAML type, so that a number or boolean has the correct type.
    return yaml_1_1_scalar(_INTERPOLATION.sub(replaced, key.value))
