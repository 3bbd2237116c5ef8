"""Which format the rows of a file have, and in which columns, found by looking at some of them.

Every layout below that the column names allow is tried with the reader that training uses. A layout is taken if it
reads every row looked at and no other does; one that uses the columns of another and more is the better of the two
(instruction, input and output before input and output). What is left open is an error that names the choices.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tunesmith.config.check import COLUMNS
from tunesmith.config.schema import Source
from tunesmith.data.formats import convert_row
from tunesmith.data.source import Rows
from tunesmith.errors import DataError
from tunesmith.host_files import from_here
from tunesmith.shell import shell_word

SAMPLE = 200  # rows looked at, spread over the file

_QUESTION = ("prompt", "question", "query", "input", "problem", "user", "human")
_ANSWER = ("completion", "answer", "response", "output", "reply", "assistant", "solution")
_SYSTEM, _TOOLS = ("system", "system_prompt"), ("tools",)
_CHAT: tuple[str, ...] = ()  # a column of any name that holds lists of objects, or JSON text of them
# Format, the columns that it needs, those that it may have: the format's name of a column, its names in files.
_Names = Mapping[str, tuple[str, ...]]
_ALPACA_MORE: _Names = {"input": ("input", "context"), "system": _SYSTEM, "history": ("history",)}
_LAYOUTS: tuple[tuple[str, _Names, _Names], ...] = (
    ("messages", {"messages": _CHAT}, {"tools": _TOOLS}),
    ("sharegpt", {"conversations": _CHAT}, {"system": _SYSTEM, "tools": _TOOLS}),
    ("prompt-completion", {"prompt": _QUESTION, "completion": _ANSWER}, {}),
    ("alpaca", {"instruction": ("instruction", *_QUESTION), "output": _ANSWER}, _ALPACA_MORE),
    ("text", {"text": ("text", "content")}, {}),
)
# Columns with which a row is no example of an answer to learn: what such rows are.
_OTHER_KINDS = {"chosen rejected": "pairs of a chosen and a rejected answer", "images": "images", "image": "images"}


@dataclass(frozen=True)
class Detected:
    """How to read some rows. columns: the format's name of a column -> the file's. ignored: the columns not read."""

    format: str
    columns: dict[str, str]
    ignored: tuple[str, ...] = ()

    def describe(self) -> str:
        """`columns question, answer -> prompt-completion (prompt = question, completion = answer)`."""
        used = f"column{'s' if len(self.columns) > 1 else ''} {', '.join(self.columns.values())}"
        ignored = f"; ignored: {', '.join(self.ignored)}" if self.ignored else ""
        renamed = ", ".join(f"{name} = {column}" for name, column in self.columns.items() if name != column)
        return f"{used} -> {self.format}{f' ({renamed})' if renamed else ''}{ignored}"

    def flags(self) -> str:
        """The option that chooses it."""
        return "--columns " + shell_word(",".join(f"{name}={column}" for name, column in self.columns.items()))


def detect(rows: Rows, source: Source, *, any_format: bool = True) -> Detected:
    """Find the format and the columns of some rows; DataError unless one layout reads them all.

    `source` gives `columns` that are known already, and the `format`, unless `any_format`.
    """
    where, count = from_here(rows.name), min(SAMPLE, len(rows))
    sample = {i: rows[i] for i in (n * (len(rows) - 1) // max(1, count - 1) for n in range(count))}
    columns = list(dict.fromkeys(str(name) for row in sample.values() for name in row))
    listed, known = f"the columns are {', '.join(columns) or 'none'}", {_plain(column) for column in columns}
    other = next((what for names, what in _OTHER_KINDS.items() if set(names.split()) <= known), None)
    if other is not None and any_format and not source.columns:
        fix = "train on some columns only, such as --columns prompt=...,completion=..."
        raise DataError(f"the rows hold {other}, which cannot be trained on yet", where=where, why=listed, fix=fix)
    chats = [name for name in columns if any(_is_chat(row.get(name)) for row in sample.values())]
    tries: list[tuple[int, list[DataError], Detected]] = []  # rows read, what the others raise, the layout
    for layout in _layouts(columns, chats, None if any_format else source.format, source.columns):
        tried = replace(source, format=layout.format, columns=layout.columns)  # type: ignore[arg-type]
        errors = []
        for i, row in sample.items():
            try:
                convert_row(row, tried, where=rows.where(i))
            except DataError as error:
                errors.append(error)
        ignored = tuple(c for c in columns if c not in layout.columns.values())
        tries.append((count - len(errors), errors, replace(layout, ignored=ignored)))
    whole = _best([layout for _, errors, layout in tries if not errors])
    if len(whole) == 1:
        return whole[0]
    if whole:
        what, fix = f"the rows can be read in {len(whole)} ways", " or ".join(layout.flags() for layout in whole)
        raise DataError(what, where=where, why=f"{listed}; more than one may be meant", fix=f"say which: {fix}")
    if tries:  # report what keeps the likeliest layout from reading the rows
        read, (first, *_), layout = max(tries, key=lambda one: one[0])
        why = f"{read} of the {count} rows looked at can be read as {layout.format}; not this one"
        raise DataError(first.what, where=first.where, why=f"{first.why}; {why}".lstrip("; "), fix=first.fix)
    wanted = "prompt-completion" if any_format else source.format
    needed = next(names for form, names, _ in _LAYOUTS if form == wanted)
    meant = Detected(wanted, _guess_columns(needed, columns, sample.values()))
    pairs = ", ".join(f"{name}={column}" for name, column in source.columns.items())
    what = f"no format reads {pairs}" if pairs else "no column's name tells what to train on"
    raise DataError(what, where=where, why=listed, fix=f"say which columns are meant, such as {meant.flags()}")


def _guess_columns(needed: _Names, columns: list[str], rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The likeliest column for each name that a format needs, to propose; `...` where there are too few columns.

    A column of a usual name is taken for it. Of the others the first ones are, in their order; but where one column is
    left to find among several, the one with the most text.
    """
    guess: dict[str, str] = {}
    for name, usual_names in needed.items():
        matches = [column for column in columns if _plain(column) in usual_names and column not in guess.values()]
        if matches:
            guess[name] = matches[0]
    spare = [column for column in columns if column not in guess.values()]
    missing = [name for name in needed if name not in guess]
    if len(missing) == 1 and len(spare) > 1:
        letters = {column: sum(len(str(row.get(column) or "")) for row in rows) for column in spare}
        spare.sort(key=lambda column: -letters[column])
    guess |= dict(zip(missing, [*spare, *["..."] * len(missing)], strict=False))
    return {name: guess[name] for name in needed}


def _layouts(columns: list[str], chats: list[str], form: str | None, given: Mapping[str, str]) -> Iterator[Detected]:
    """Every way to read the columns that their names allow; `form` and `given` are asked for and narrow it."""
    for name, needed, optional in _LAYOUTS:
        if form not in (None, name) or not given.keys() <= set(COLUMNS[name]):
            continue
        choices: dict[str, list[str]] = {}
        for column, names in {**needed, **optional}.items():
            same = chats if names is _CHAT else [c for c in columns if _plain(c) in names]
            if name == "text" and len(columns) == 1:
                same = columns
            choices[column] = [given[column]] if column in given else same
        required = {column: choices.pop(column) for column in needed}
        present = required | {column: same for column, same in choices.items() if same}
        for picked in itertools.product(*present.values()):
            if len(set(picked)) == len(picked):
                yield Detected(name, dict(zip(present, picked, strict=True)))


def _best(layouts: list[Detected]) -> list[Detected]:
    """Without those whose columns another one uses too: with more, or with the same and earlier in the list.

    Text is what is left where nothing else reads the rows: data sets often add the text of a whole example.
    """
    layouts = [one for one in layouts if one.format != "text"] or layouts
    sets = [set(layout.columns.values()) for layout in layouts]
    return [
        layout
        for n, layout in enumerate(layouts)
        if not any(sets[n] < other or (sets[n] == other and m < n) for m, other in enumerate(sets))
    ]


def _plain(column: str) -> str:
    return column.strip().lower().replace(" ", "_").replace("-", "_")


def _is_chat(value: Any) -> bool:
    if isinstance(value, str):
        return value.lstrip().startswith("[") and value.lstrip()[1:].lstrip().startswith("{")
    return isinstance(value, list) and (not value or isinstance(value[0], Mapping))
