"""Fixes of errors in Python's words, for a program that called a function, not a command.

fresh=True in place of --fresh, {"train.seed": 1} in place of train.seed=1, tunesmith.merge(RUN) in
place of the command.
"""

import json
import re
import shlex
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from tunesmith.config.names import keys
from tunesmith.config.tree import read_value
from tunesmith.errors import RecipeError, TunesmithError

P = ParamSpec("P")
R = TypeVar("R")

_FUNCTIONS = {"train": "train", "eval": "evaluate", "merge": "merge"}
_FLAGS = ("fresh", "force", "base", "exact-match", "adapter", "chat-template")
_WORD = r"""(?:'[^']*'|[^\s;,`']+)"""
_PAIRS = r"\w+=[^\s;,]+(?:,\w+=[^\s;,]+)*"
_OPTION = re.compile(rf"--({'|'.join(_FLAGS)})\b|--([a-z][a-z-]*)(?: ({_PAIRS}|{_WORD}))?")
_COMMAND = re.compile(
    rf"tunesmith ({'|'.join(_FUNCTIONS)}) {_WORD}"
    rf"(?: --(?:{'|'.join(_FLAGS)})\b| --[a-z][a-z-]* {_WORD}| [\w.]+={_WORD})*"
)
_SECTIONS = "|".join(sorted({key.partition(".")[0] for key in keys()}))
_SETTING = re.compile(
    rf"""'((?:{_SECTIONS})[\w.]*=[^']*)'|\b((?:{_SECTIONS})(?:\.\w+)+=(?:'[^']*'|\[[^]]*\]|[^\s;,:)`]+))"""
)


def in_python(function: Callable[P, R]) -> Callable[P, R]:
    """The function; the fix of an error that it raises is in Python's words."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except TunesmithError as error:
            error.fix = fix_in_python(error.fix, function.__name__)
            raise

    return call


def fix_in_python(fix: str, function: str) -> str:
    """A fix that names commands, options and settings, for who called this function."""
    fix = _COMMAND.sub(_call, fix)
    fix = _SETTING.sub(lambda match: _mapping([match[1] or match[2]]), fix)
    return _OPTION.sub(partial(_keyword, function), fix)


def _call(match: re.Match[str]) -> str:
    verb, *words = shlex.split(match[0])[1:]
    arguments = []
    settings = []
    while words:
        word = words.pop(0)
        if word.removeprefix("--") in _FLAGS:
            arguments.append(f"{word.removeprefix('--').replace('-', '_')}=True")
        elif word.startswith("--"):
            arguments.append(f"{word[2:].replace('-', '_')}={_literal(words.pop(0))}")
        elif "=" in word:
            settings.append(word)
        else:
            arguments.append(_literal(word))
    if settings:
        arguments.insert(1, _mapping(settings))
    return f"tunesmith.{_FUNCTIONS[verb]}({', '.join(arguments)})"


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
        return f"{flag.replace('-', '_')}=True"
    if value is None:
        return str(name.replace("-", "_"))
    text = _literal(value.strip("'"))
    if name == "columns":
        text = json.dumps(dict(pair.split("=", 1) for pair in value.strip("'").split(",")))
    if function == "train" and name in ("columns", "format", "split"):
        return f'{{"data.train.{name}": {text}}}'
    return f"{'format_name' if name == 'format' else name.replace('-', '_')}={text}"


def _literal(text: str) -> str:
    """A word of a command as Python writes it; a placeholder, such as RUN, stays."""
    if text.isupper():
        return text
    try:
        value: Any = read_value(text, where="", base=Path()).plain()
    except RecipeError:
        value = text
    return json.dumps(value) if isinstance(value, str) else repr(value).replace("'", '"')
