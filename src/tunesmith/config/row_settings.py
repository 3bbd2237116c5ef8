"""Notation in which an error proposes settings of a data source, such as `columns` and `split`.

A user can copy a fix only if it has the notation in which the rows are given:

    option     --format alpaca --columns output=answer
    override   data.train.format=alpaca 'data.train.columns={output: answer}'
    recipe     format: alpaca, columns: {output: answer}
    Python     overrides={'data.train.format': 'alpaca', 'data.train.columns': {'output': 'answer'}}

`load_recipe` records which data sources have overrides. The others are written in a recipe file.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TypeVar

from tunesmith.host.shell import shell_word

T = TypeVar("T")
R = TypeVar("R")

# Options of the command line for keys of a data source.
_OPTIONS = {"source": "--data", "split": "--split", "format": "--format", "columns": "--columns"}
# Matches a text that YAML reads as the same text without quotes, such as `train[:95%]`.
_PLAIN = re.compile(
    r"(?!(?:null|true|false)$)[a-z_](?:[\w .?()/+-]*[\w?()-])?(?:\[[\w:%-]+\])?", re.I
)


@dataclass(frozen=True)
class RowNotation:
    """A notation of errors: how the user has given the rows.

    Attributes:
        by_option: whether the rows are given by `--data`, or by an argument in Python. If False, a
            recipe names them.
        in_python: whether a Python program has called the command.
        overridden: data source of the recipe -> the key under which an override changes it, such as
            `data.train`.
    """

    by_option: bool = False
    in_python: bool = False
    overridden: Mapping[str, str] = field(default_factory=dict)


_BY_RECIPE = RowNotation()
# The current notation. `with_notation` sets it in a worker process.
NOTATION = ContextVar("NOTATION", default=_BY_RECIPE)


@contextmanager
def rows_set_by(*, option: bool = False, python: bool = False) -> Iterator[None]:
    """Return a context in which errors use the notation of a command.

    A command that a Python program calls uses the notation of Python.
    """
    token = NOTATION.set(RowNotation(option, python or NOTATION.get().in_python))
    try:
        yield
    finally:
        NOTATION.reset(token)


def with_notation(notation: RowNotation, function: Callable[[T], R], argument: T) -> R:
    """Call a function in a worker process with the notation of the process that starts it."""
    NOTATION.set(notation)
    return function(argument)


def record_overrides(overridden: Mapping[str, str]) -> None:
    """Record which data sources of the recipe have overrides, see `RowNotation.overridden`."""
    NOTATION.set(replace(NOTATION.get(), overridden=overridden))


def row_fix(source: str, /, **settings: object) -> str:
    """Return the settings of a data source in the notation in which the user has given the rows.

    Args:
        source: the value of the key `source`.
        settings: keys of the data source with their values. `method` is a key of the recipe.
    """
    notation = NOTATION.get()
    section = notation.overridden.get(source)
    by_option = notation.by_option and section is None
    if by_option:
        section = "data.train"
    if section is None:
        return ", ".join(f"{name}: {_yaml(value)}" for name, value in settings.items())
    values = {}
    for name, value in settings.items():
        values["method" if name == "method" else f"{section}.{name}"] = value
    if notation.in_python:
        return f"overrides={values!r}"
    words = []
    for (key, value), name in zip(values.items(), settings, strict=True):
        if by_option and name in _OPTIONS:
            text = value
            if isinstance(value, Mapping):
                text = ",".join(f"{column}={own}" for column, own in value.items())
            words.append(f"{_OPTIONS[name]} {shell_word(text)}")
        else:
            words.append(shell_word(f"{key}={_yaml(value)}"))
    return " ".join(words)


def _yaml(value: object) -> str:
    """Return a text or a mapping of texts as one line of YAML."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_yaml(name)}: {_yaml(item)}' for name, item in value.items())}}}"
    text = str(value)
    return text if text == "..." or _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)
