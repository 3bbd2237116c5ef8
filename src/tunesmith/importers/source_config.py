"""The configuration of another tool as flat keys and their places: a YAML file, or a command that
trains.
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from tunesmith.config.tree import Node, read_file, scalar
from tunesmith.errors import RecipeError, UsageError

TOOLS = ("torchtune", "axolotl", "llamafactory", "trl", "accelerate")
# Scripts of TRL, each of which has a trainer.
TRL_TRAINERS = ("sft", "dpo", "kto", "orpo", "cpo")
# The first word of a command that trains.
PROGRAMS = ("trl", "accelerate", "torchrun", "python", "python3")
# In YAML 1.1, which these tools read.
_TRUTH = {"yes": True, "on": True, "no": False, "off": False}
_MAX_INTERPOLATIONS = 10

# A word of a command, and its place.
Word = tuple[str, str]


@dataclass(frozen=True)
class SourceKey:
    """A value of the other tool's file and its place, `file:line`, or a default of that tool."""

    key: str
    value: Any
    where: str


@dataclass(frozen=True)
class SourceConfig:
    """The configuration of another tool.

    Attributes:
        tool: whose it is.
        keys: by dotted key: `optimizer.lr`, `datasets.0.path`.
        base: where relative paths start.
        program: of a command of TRL, which trainer it starts; of a file "".
    """

    tool: str
    name: str
    keys: dict[str, SourceKey]
    base: Path
    program: str = ""

    def nearby(self, file: str | Path) -> Path | None:
        """A file that the configuration names.

        It is looked for in its folder, three folders above it, and the working directory.
        """
        base = self.base.resolve()
        for folder in (base, *base.parents[:3], Path.cwd()):
            if (folder / file).is_file():
                return folder / file
        return None


@cache
def table(tool: str) -> dict[str, Any]:
    """The table of a tool's keys; tables/torchtune.yaml describes the parts."""
    return read_file(Path(__file__).parent / "tables" / f"{tool}.yaml").plain()


def read_config(path: Path, tool: str | None) -> SourceConfig:
    """A file; UsageError if it cannot be read, or does not tell its tool."""
    words = _command_words(path)
    if words:
        return read_command(words, path.name, path.parent)
    raw_keys = {key.key: key for key in _leaves(path)}
    keys = {}
    for name, key in raw_keys.items():
        keys[name] = replace(key, value=_interpolate(key, raw_keys))
    return SourceConfig(tool or _guess_tool(keys, path), path.name, keys, path.parent)


def _guess_tool(keys: dict[str, SourceKey], path: Path) -> str:
    """The tool that knows most of the names; UsageError where several do alike."""
    # All parts of dotted keys: a nested one may be the mark.
    names = {name for key in keys for name in key.split(".")}
    counts = {tool: len(names.intersection(table(tool)["marks"])) for tool in TOOLS}
    most = max(counts.values())
    tools = [tool for tool in TOOLS if counts[tool] == most]
    if len(tools) > 1:
        why = "it has no known keys"
        if most > 0:
            why = f"its keys could be of {' or '.join(tools)}"
        raise UsageError(
            "cannot detect which tool this file is for",
            where=str(path),
            why=why,
            fix=f"name the tool: --from {tools[0]}; known are {', '.join(TOOLS)}",
        )
    return tools[0]


def read_command(words: Sequence[Word], name: str, base: Path) -> SourceConfig:
    """The words of a command, as TRL reads them.

    Flags of the program that starts it become `launch.FLAG`.
    """
    at = _program_index(words)
    program, where = words[at]
    arguments = words[at + 1 :]
    # `trl sft` is a program with a word for what it does.
    if program == "trl" and arguments:
        program, where = arguments[0]
        arguments = arguments[1:]
    trainer = re.search(rf"(?:^|/|\.|_)({'|'.join(TRL_TRAINERS)})(?:\.py)?$", program)
    if not trainer:
        commands = ", ".join(f"trl {name}" for name in TRL_TRAINERS)
        fix = f"what can be imported is {commands}, or its script, with the values written out"
        raise UsageError(f"{program} is not a known TRL program", where=where, fix=fix)
    keys = _flags(arguments)
    # Flags before the program are the launcher's.
    launch_words = [word for word in words[:at] if word[0] not in (*PROGRAMS, "launch", "-m")]
    for flag, key in _flags(launch_words).items():
        keys[f"launch.{flag}"] = replace(key, key=f"launch.{flag}")
    config = keys.get("config")
    if config is not None:
        in_file = {key.key: key for key in _leaves(base / str(config.value))}
        # The command line wins over the file that it names.
        keys = {**in_file, **keys}
    return SourceConfig("trl", name, keys, base, trainer[1])


def _program_index(words: Sequence[Word]) -> int:
    """Which word names the program that trains; the last one if none looks like one."""
    for i, (word, _) in enumerate(words):
        if re.search(r"^trl$|\.py$|\.scripts\.", word):
            return i
    return len(words) - 1


def _command_words(path: Path) -> list[Word]:
    """The words of a file that holds a command, each with its line; else none."""
    try:
        lines = path.read_bytes().decode("utf-8", "replace").splitlines()
    except OSError:
        # The reader of YAML says why.
        return []
    code_lines = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not code_lines or code_lines[0].split()[0] not in PROGRAMS:
        return []
    words = []
    for number, line in enumerate(lines, 1):
        where = f"{path.name}:{number}"
        try:
            line_words = shlex.split(line.rstrip().removesuffix("\\"), comments=True)
        except ValueError as error:
            what = "this line of the command cannot be read"
            fix = "close the quotation on the same line"
            raise UsageError(what, where=where, why=str(error), fix=fix) from None
        words += [(word, where) for word in line_words]
    return words


def _flags(words: Sequence[Word]) -> dict[str, SourceKey]:
    """`--key value ...`, `--key=value` and `--key`, which is true; values as YAML 1.2 has them."""
    keys: dict[str, SourceKey] = {}
    name = ""
    for word, where in words:
        flag = re.fullmatch(r"--([A-Za-z][\w-]*)(=(.*))?", word, re.DOTALL)
        if flag:
            name = flag[1].replace("-", "_")
        fault = ""
        if "$" in word:
            fault = "contains a variable"
        elif flag and name in keys:
            fault = "is given twice"
        elif not name:
            fault = "does not belong to a flag"
        if fault:
            fix = "write each flag once, as --flag value, without variables"
            raise UsageError(f"{word} {fault}", where=where, fix=fix)
        if flag:
            # `--flag` alone is true.
            value = scalar(flag[3]) if flag[2] else True
            keys[name] = SourceKey(name, value, where)
        else:
            keys[name] = _with_value(keys[name], scalar(word))
    return keys


def _with_value(key: SourceKey, value: Any) -> SourceKey:
    """A flag with one more value: its first, or a list of all."""
    if key.value is True:
        return replace(key, value=value)
    values = key.value if isinstance(key.value, list) else [key.value]
    return replace(key, value=[*values, value])


def _leaves(path: Path) -> Iterator[SourceKey]:
    """Every scalar, list of scalars and empty mapping of a YAML file, by its dotted key."""
    try:
        yield from _leaves_below(read_file(path), "", path.name)
    except RecipeError as error:
        fix = error.fix
        if "a recipe is" in error.what:
            fix = "use the YAML file of another tool, or a command"
        what = error.what.replace("recipe", "file")
        raise UsageError(what, where=error.where, why=error.why, fix=fix) from None


def _leaves_below(node: Node, key: str, file_name: str) -> Iterator[SourceKey]:
    has_nested = any(child.children() for _, child in node.children())
    is_mapping = isinstance(node.value, dict) and bool(node.value)
    # A list of mappings has keys below; a list of values is one value.
    if has_nested or is_mapping:
        for name, child in node.children():
            yield from _leaves_below(child, f"{key}.{name}".lstrip("."), file_name)
        return
    value = node.plain()
    if isinstance(value, str):
        # YAML 1.1 has words for true and false that 1.2 reads as text.
        value = _TRUTH.get(value.lower(), value)
    line = node.where.rpartition(":")[2]
    yield SourceKey(key, value, f"{file_name}:{line}")


def _interpolate(key: SourceKey, keys: dict[str, SourceKey], depth: int = 0) -> Any:
    """The value with each `${other.key}` of OmegaConf replaced.

    Raises:
        UsageError: one is not in the file.
    """
    value = key.value
    if not isinstance(value, str):
        return value
    for name in re.findall(r"\$\{([^}]*)\}", value):
        target = keys.get(name)
        # A reference to itself would go round for ever.
        is_scalar = target is not None and not isinstance(target.value, list | dict)
        if target is None or not is_scalar or depth > _MAX_INTERPOLATIONS:
            raise UsageError(
                f"{key.key}: ${{{name}}} is not defined in this file",
                where=key.where,
                fix="write the value in its place",
            )
        replacement = str(_interpolate(target, keys, depth + 1))
        value = value.replace(f"${{{name}}}", replacement)
    return value
