"""The configuration of another tool as flat keys and their places: a YAML file, or a command that trains."""

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
PROGRAMS = ("trl", "accelerate", "torchrun", "python", "python3")  # the first word of a command that trains
_TRUTH = {"yes": True, "on": True, "no": False, "off": False}  # in YAML 1.1, which these tools read


@dataclass(frozen=True)
class Given:
    """A value of the other tool's file and its place, `file:line`, or a default of that tool."""

    key: str
    value: Any
    where: str


@dataclass(frozen=True)
class Foreign:
    """What was read: whose it is, its keys (`optimizer.lr`, `datasets.0.path`), and where relative paths start."""

    tool: str
    name: str
    given: dict[str, Given]
    base: Path

    def nearby(self, file: str | Path) -> Path | None:
        """A file that the configuration names: from its folder, three folders above it, or the working directory."""
        base = self.base.resolve()
        for folder in (base, *base.parents[:3], Path.cwd()):
            if (folder / file).is_file():
                return folder / file
        return None


@cache
def table(tool: str) -> dict[str, Any]:
    """What is known of a tool's keys; tables/torchtune.yaml says what the parts are."""
    return read_file(Path(__file__).parent / "tables" / f"{tool}.yaml").plain()


def read_foreign(path: Path, tool: str | None) -> Foreign:
    """A file; UsageError if it cannot be read, or does not tell its tool."""
    if lines := _command_lines(path):
        return read_command(lines, path.name, path.parent)
    given = {one.key: one for one in _leaves(path)}
    given = {key: replace(one, value=_interpolated(one, given)) for key, one in given.items()}
    words = {word for key in given for word in key.split(".")}
    found = {name: len(words & {*table(name)["marks"]}) for name in TOOLS}
    best = [name for name in TOOLS if found[name] == max(found.values())]
    if tool is None and len(best) > 1:
        why = f"its keys could be of {' or '.join(best)}" if any(found.values()) else "none of its keys is known"
        fix = f"name the tool: --from {best[0]}; known are {', '.join(TOOLS)}"
        raise UsageError("this file does not tell which tool it is for", where=str(path), why=why, fix=fix)
    return Foreign(tool or best[0], path.name, given, path.parent)


def read_command(words: Sequence[tuple[str, str]], name: str, base: Path) -> Foreign:
    """The words of a command, each with its place, as TRL reads them; flags of what starts it become `launch.FLAG`."""
    at = next((i for i, (word, _) in enumerate(words) if re.search(r"^trl$|\.py$|\.scripts\.", word)), len(words) - 1)
    program, rest = words[at], words[at + 1 :]
    if program[0] == "trl" and rest:
        program, *rest = rest
    if not re.search(r"(^|/|\.|_)sft(\.py)?$", program[0]):
        fix = "what can be imported is trl sft, or its script sft.py, with the values written out"
        raise UsageError(f"{program[0]} is not trl sft", where=program[1], fix=fix)
    given = _flags(rest)
    before = _flags([pair for pair in words[:at] if pair[0] not in (*PROGRAMS, "launch", "-m")])
    given |= {f"launch.{key}": replace(one, key=f"launch.{key}") for key, one in before.items()}
    if config := given.get("config"):
        given = {one.key: one for one in _leaves(base / str(config.value))} | given
    return Foreign("trl", name, given, base)


def _command_lines(path: Path) -> list[tuple[str, str]]:
    """The words of a file that holds a command, each with its line; none if it holds something else."""
    try:
        lines = path.read_bytes().decode("utf-8", "replace").splitlines()
    except OSError:
        return []  # the reader of YAML says why
    first = next((line.split()[0] for line in lines if line.strip() and not line.lstrip().startswith("#")), "")
    words, where = list[tuple[str, str]](), ""
    try:
        for number, line in enumerate(lines if first in PROGRAMS else [], 1):
            where = f"{path.name}:{number}"
            words += [(word, where) for word in shlex.split(line.rstrip().removesuffix("\\"), comments=True)]
    except ValueError as error:
        fix = "close the quotation on the same line"
        raise UsageError("this line of the command cannot be read", where=where, why=str(error), fix=fix) from None
    return words


def _flags(words: Sequence[tuple[str, str]]) -> dict[str, Given]:
    """`--key value ...`, `--key=value` and `--key`, which is true; values as YAML 1.2 has them."""
    given, last = dict[str, Given](), ""
    for word, where in words:
        flag = re.fullmatch(r"--([A-Za-z][\w-]*)(=(.*))?", word, re.DOTALL)
        name = flag[1].replace("-", "_") if flag else last
        problem = "holds a variable" if "$" in word else "is given twice" if flag and name in given else ""
        if problem or not name:
            fix = "write each flag once, as --flag value, its value written out"
            raise UsageError(f"{word} {problem or 'belongs to no flag'}", where=where, fix=fix)
        if flag:
            last, given[name] = name, Given(name, scalar(flag[3]) if flag[2] else True, where)
        else:
            old = given[name].value
            listed = old if isinstance(old, list) else [old]
            given[name] = replace(given[name], value=scalar(word) if old is True else [*listed, scalar(word)])
    return given


def _leaves(path: Path) -> Iterator[Given]:
    """Every scalar, list of scalars and empty mapping of a YAML file, by its dotted key."""

    def below(node: Node, key: str) -> Iterator[Given]:
        if any(inside.children() for _, inside in node.children()) or (node.value and isinstance(node.value, dict)):
            for child, inside in node.children():
                yield from below(inside, f"{key}.{child}".lstrip("."))
            return
        value, line = node.plain(), node.where.rpartition(":")[2]
        value = _TRUTH.get(value.lower(), value) if isinstance(value, str) else value
        yield Given(key, value, f"{path.name}:{line}")

    try:
        yield from below(read_file(path), "")
    except RecipeError as error:
        fix = "give the YAML file of another tool, or a command" if "a recipe is" in error.what else error.fix
        raise UsageError(error.what.replace("recipe", "file"), where=error.where, why=error.why, fix=fix) from None


def _interpolated(one: Given, given: dict[str, Given], depth: int = 0) -> Any:
    """The value with each `${other.key}` of OmegaConf replaced; UsageError for one that is not in the file."""
    if not isinstance(one.value, str) or "${" not in one.value:
        return one.value

    value = one.value
    for name in re.findall(r"\$\{([^}]*)\}", value):
        other = given.get(name)
        if other is None or isinstance(other.value, list | dict) or depth > 10:
            what, fix = f"${{{name}}} names no value of this file", "write the value in its place"
            raise UsageError(f"{one.key}: {what}", where=one.where, fix=fix)
        value = value.replace(f"${{{name}}}", str(_interpolated(other, given, depth + 1)))
    return value
