"""Fixes of errors in Python's words, for a program that called a function, not a command.

fresh=True in place of --fresh, {"train.seed": 1} in place of train.seed=1, tunesmith.merge(RUN) in
place of the command.
"""

import json
import re
import shlex
from collections.abc import Callable, Container
from functools import partial, wraps
from inspect import signature
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from tunesmith.config.layers import COMMAND_LINE, FROM_PYTHON
from tunesmith.config.names import keys
from tunesmith.config.tree import read_value
from tunesmith.errors import RecipeError, TunesmithError

P = ParamSpec("P")
R = TypeVar("R")

_FUNCTIONS = {"train": "train", "eval": "evaluate", "merge": "merge"}
_FLAGS = ("fresh", "force", "base", "exact-match", "adapter", "chat-template")
_PARAMETERS = {"format": "format_name", "score": "scorers"}  # of other names than their options
_WORD = r"""(?:'[^']*'|[^\s;,`'-][^\s;,`']*(?<!\?))"""
_PAIRS = r"\w+=[^\s;,]+(?:,\w+=[^\s;,]+)*"
_OPTION = re.compile(
    rf"(?<![\w/-])--({'|'.join(_FLAGS)})\b"
    rf"|(?<![\w/-])--([a-z][a-z-]*)(?: ({_PAIRS}|{_WORD}))?"
)
_REPEATED_COLUMNS = re.compile(rf"--columns {_PAIRS}(?: --columns {_PAIRS})+")
_ARGUMENT = rf"--(?:{'|'.join(_FLAGS)})\b|--[a-z][a-z-]* {_WORD}|[\w.]+={_WORD}|'[\w.]+=[^']*'"
# Between backquotes `eval` may name several runs.
_COMMAND = re.compile(
    rf"(?<=`)tunesmith eval(?: {_WORD})+(?: (?:{_ARGUMENT}))*(?=`)"
    rf"|tunesmith (?:{'|'.join(_FUNCTIONS)}) (?:{_ARGUMENT}|{_WORD})(?: (?:{_ARGUMENT}))*"
)
_SECTIONS = "|".join(sorted({key.partition(".")[0] for key in keys()}))
_SETTING = re.compile(
    rf"""'((?:{_SECTIONS})[\w.]*=[^']*)'|\b((?:{_SECTIONS})(?:\.\w+)+=(?:'[^']*'|\[[^]]*\]|[^\s;,:)`]+))"""
)


def in_python(function: Callable[P, R]) -> Callable[P, R]:
    """The function; place and fix of an error that it raises are in Python's words."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except TunesmithError as error:
            error.where = _where_in_python(error.where, signature(function).parameters)
            error.fix = fix_in_python(error.fix, function.__name__)
            raise

    return call


def _where_in_python(where: str, parameters: Container[str]) -> str:
    """The place of an error: an option is the argument of that name, if there is one."""
    if where.startswith(COMMAND_LINE):
        return FROM_PYTHON + where.removeprefix(COMMAND_LINE)
    option, _, value = where.partition(" ")
    name = _parameter(option.removeprefix("--"))
    if not option.startswith("--") or name not in parameters:
        return where
    return f"{name}={_literal(value)}" if value else name


def fix_in_python(fix: str, function: str) -> str:
    """A fix that names commands, options and settings, for who called this function."""
    fix = _REPEATED_COLUMNS.sub(lambda match: match[0].replace(" --columns ", ","), fix)
    fix = _COMMAND.sub(_call, fix)
    fix = _SETTING.sub(lambda match: _mapping([match[1] or match[2]]), fix)
    return _OPTION.sub(partial(_keyword, function), fix)


def _call(match: re.Match[str]) -> str:
    """A command as a call; of several runs, which `evaluate` takes one by one, a call for each."""
    verb, *words = shlex.split(match[0])[1:]
    runs = []
    arguments = []
    settings = []
    while words:
        word = words.pop(0)
        if word.removeprefix("--") in _FLAGS:
            arguments.append(f"{_parameter(word.removeprefix('--'))}=True")
        elif word.startswith("--"):
            arguments.append(_argument(verb, word[2:], words.pop(0)))
        elif "=" in word:
            settings.append(word)
        else:
            runs.append(_literal(word))
    if settings:
        arguments.insert(0, _mapping(settings) if runs else f"overrides={_mapping(settings)}")
    calls = []
    for run in runs or [""]:
        calls.append(f"tunesmith.{_FUNCTIONS[verb]}({', '.join(filter(None, [run, *arguments]))})")
    return ", ".join(calls)


def _mapping(settings: list[str]) -> str:
    """Settings `key=value` as overrides."""
    pairs = []
    for setting in settings:
        key, _, value = setting.partition("=")
        pairs.append(f"{json.dumps(key)}: {_literal(value.strip(chr(39)))}")
    return f"{{{', '.join(pairs)}}}"


def _keyword(function: str, match: re.Match[str]) -> str:
    """An option as an argument; as an override where `train` has rows, and no such argument."""
    flag, name, value = match.groups()
    if flag:
        return f"{_parameter(flag)}=True"
    if value is None:
        return _parameter(name)
    argument = _argument(function, name, value.strip("'"))
    if function == "train" and name in ("columns", "format", "split"):
        return f'{{"data.train.{name}": {argument.partition("=")[2]}}}'
    return argument


def _parameter(option: str) -> str:
    """The argument that an option without its dashes is."""
    return _PARAMETERS.get(option, option.replace("-", "_"))


def _argument(function: str, option: str, value: str) -> str:
    """An option with its value as an argument."""
    if function == "train" and option == "data":
        return "rows=ROWS"  # a program has them in memory
    if option == "score":
        return f"scorers=[{_literal(value)}]"
    pairs = [pair.partition("=") for pair in value.split(",")]
    if option == "columns" and all(equals for _, equals, _ in pairs):
        return f"columns={json.dumps({name: column for name, _, column in pairs})}"
    return f"{_parameter(option)}={_literal(value)}"


def _literal(text: str) -> str:
    """A word of a command as Python writes it; a placeholder, such as RUN, stays."""
    if text.isupper():
        return text
    try:
        value: Any = read_value(text, where="", base=Path()).plain()
    except RecipeError:
        value = text
    return json.dumps(value) if isinstance(value, str) else repr(value).replace("'", '"')
