"""Which format the rows of a file have, and in which columns, detected from some of them.

Every layout below that the column names allow is tried with the reader that training uses. A layout
is chosen if it reads every row looked at and no other does; one that uses the columns of another
and more is the better of the two (instruction, input and output before input and output). What
remains open is an error that names the choices.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tunesmith.config.check import COLUMNS
from tunesmith.config.schema import Source
from tunesmith.data.formats import convert_row
from tunesmith.data.source import Rows
from tunesmith.errors import DataError
from tunesmith.host.files import from_here
from tunesmith.host.shell import shell_word

# Rows looked at, spread over the file.
SAMPLE = 200

_QUESTION = ("prompt", "question", "query", "input", "problem", "user", "human")
_ANSWER = ("completion", "answer", "response", "output", "reply", "assistant", "solution")
_SYSTEM = ("system", "system_prompt")
_TOOLS = ("tools",)
_LABEL = ("label", "kto_tag")
# A column of any name that holds lists of objects, or JSON text of them.
_CHAT: tuple[str, ...] = ()

# The format's name of a column -> its names in files.
_Names = Mapping[str, tuple[str, ...]]


class _Layout(NamedTuple):
    """A format, the columns that it needs and those that it may have, by their names in files."""

    format: str
    needed: _Names
    optional: _Names


_LAYOUTS = (
    _Layout("messages", {"messages": _CHAT}, {"tools": _TOOLS}),
    _Layout("sharegpt", {"conversations": _CHAT}, {"system": _SYSTEM, "tools": _TOOLS}),
    _Layout("prompt-completion", {"prompt": _QUESTION, "completion": _ANSWER}, {}),
    _Layout(
        "alpaca",
        {"instruction": ("instruction", *_QUESTION), "output": _ANSWER},
        {"input": ("input", "context"), "system": _SYSTEM, "history": ("history",)},
    ),
    _Layout("text", {"text": ("text", "content")}, {}),
    _Layout(
        "preference",
        {"chosen": ("chosen",), "rejected": ("rejected",)},
        {
            "prompt": ("prompt", "question", "instruction", "query"),
            "conversations": ("conversations",),
            "system": _SYSTEM,
            "tools": _TOOLS,
        },
    ),
    _Layout(
        "feedback",
        {"prompt": _QUESTION, "completion": _ANSWER, "label": _LABEL},
        {"system": _SYSTEM, "tools": _TOOLS},
    ),
    _Layout("feedback", {"messages": _CHAT, "label": _LABEL}, {"tools": _TOOLS}),
)
# Columns with which a row is no example of an answer to learn: what such rows are.
_OTHER_KINDS = {
    ("images",): "images",
    ("image",): "images",
}


@dataclass(frozen=True)
class Detected:
    """How to read some rows.

    Attributes:
        columns: the format's name of a column -> the file's.
        ignored: the columns that are not read.
    """

    format: str
    columns: dict[str, str]
    ignored: tuple[str, ...] = ()

    def describe(self) -> str:
        """`columns question, answer -> prompt-completion (prompt = question, ...)`."""
        noun = "columns" if len(self.columns) > 1 else "column"
        text = f"{noun} {', '.join(self.columns.values())} -> {self.format}"
        renamed = [f"{name} = {column}" for name, column in self.columns.items() if name != column]
        if renamed:
            text += f" ({', '.join(renamed)})"
        if self.ignored:
            text += f"; ignored: {', '.join(self.ignored)}"
        return text

    def flags(self) -> str:
        """The option that chooses it."""
        pairs = [f"{name}={column}" for name, column in self.columns.items()]
        return f"--columns {shell_word(','.join(pairs))}"


class _Trial(NamedTuple):
    """A layout with which some rows were read, and the errors of those that it does not read."""

    layout: Detected
    errors: list[DataError]


def detect(rows: Rows, source: Source, *, any_format: bool = True) -> Detected:
    """Find the format and the columns of some rows.

    Args:
        source: gives `columns` where some are named already, and the `format`, unless `any_format`.

    Raises:
        DataError: no layout reads all rows that are looked at, or several do.
    """
    where = from_here(rows.name)
    sample = _sample(rows)
    columns = list(dict.fromkeys(str(name) for row in sample.values() for name in row))
    columns_text = f"the columns are {', '.join(columns) or 'none'}"
    if any_format and not source.columns:
        _check_kind(columns, where, columns_text)
    # The content of its cells shows a chat, not the column's name.
    chats = [name for name in columns if any(_is_chat(row.get(name)) for row in sample.values())]
    only_format = None if any_format else source.format
    trials = []
    # Each layout is tried on the sample: only what reads without an error counts.
    for layout in _possible_layouts(columns, chats, only_format, source.columns):
        trials.append(_Trial(layout, _reading_errors(sample, rows, source, layout)))
    # Rows with instruction, input and output also read without the input: that leaves a column
    # unused.
    layouts = _most_specific([trial.layout for trial in trials if not trial.errors])
    if len(layouts) == 1:
        used = layouts[0].columns.values()
        ignored = tuple(column for column in columns if column not in used)
        return replace(layouts[0], ignored=ignored)
    if layouts:
        raise DataError(
            f"the rows can be read in {len(layouts)} ways",
            where=where,
            why=f"{columns_text}; it is ambiguous",
            fix=f"choose one: {' or '.join(layout.flags() for layout in layouts)}",
        )
    if trials:
        raise _reading_error(trials, len(sample))
    what = "no column name indicates what to train on"
    if source.columns:
        pairs = [f"{name}={column}" for name, column in source.columns.items()]
        what = f"no format reads {', '.join(pairs)}"
    proposal = _propose("prompt-completion" if any_format else source.format, columns, sample)
    fix = f"name the columns, such as {proposal.flags()}"
    raise DataError(what, where=where, why=columns_text, fix=fix)


def _reading_error(trials: list[_Trial], count: int) -> DataError:
    """What keeps the likeliest layout from reading the `count` rows that were looked at."""
    likeliest = min(trials, key=lambda trial: len(trial.errors))
    error = likeliest.errors[0]
    readable = count - len(likeliest.errors)
    why = (
        f"{readable} of the {count} rows examined can be read as {likeliest.layout.format};"
        " not this one"
    )
    if error.why:
        why = f"{error.why}; {why}"
    return DataError(error.what, where=error.where, why=why, fix=error.fix)


def _sample(rows: Rows) -> dict[int, dict[str, Any]]:
    """At most SAMPLE rows by their index, spread evenly from the first to the last."""
    count = min(SAMPLE, len(rows))
    indices = [n * (len(rows) - 1) // max(1, count - 1) for n in range(count)]
    return {i: rows[i] for i in indices}


def _check_kind(columns: list[str], where: str, columns_text: str) -> None:
    """DataError where the columns are those of rows for another kind of training."""
    plain_columns = {_plain(column) for column in columns}
    for names, kind in _OTHER_KINDS.items():
        if plain_columns.issuperset(names):
            raise DataError(
                f"the rows contain {kind}, which is not supported yet",
                where=where,
                why=columns_text,
                fix="train on some columns only, such as --columns prompt=...,completion=...",
            )


def _reading_errors(
    sample: Mapping[int, dict[str, Any]], rows: Rows, source: Source, layout: Detected
) -> list[DataError]:
    """What the reader of training raises for some rows, read by a layout."""
    source = replace(source, format=layout.format, columns=layout.columns)  # type: ignore[arg-type]
    errors = []
    for i, row in sample.items():
        try:
            convert_row(row, source, where=rows.where(i))
        except DataError as error:
            errors.append(error)
    return errors


def _propose(
    format_name: str, columns: list[str], sample: Mapping[int, dict[str, Any]]
) -> Detected:
    """The likeliest column for each name that a format needs; `...` where there are too few.

    A column of a usual name is mapped to it. Of the others the first ones are, in their order; but
    where one column is left to find among several, the one with the most text.
    """
    needed = next(layout.needed for layout in _LAYOUTS if layout.format == format_name)
    guess: dict[str, str] = {}
    for name, usual_names in needed.items():
        for column in columns:
            if _plain(column) in usual_names and column not in guess.values():
                guess[name] = column
                break
    missing = [name for name in needed if name not in guess]
    unmapped = [column for column in columns if column not in guess.values()]
    # One column is left to find: the one with the most letters is the likeliest text.
    if len(missing) == 1 and len(unmapped) > 1:
        unmapped.sort(key=lambda column: _letters(sample, column), reverse=True)
    for name in missing:
        guess[name] = unmapped.pop(0) if unmapped else "..."
    return Detected(format_name, {name: guess[name] for name in needed})


def _letters(sample: Mapping[int, dict[str, Any]], column: str) -> int:
    """How much text a column has."""
    return sum(len(str(row.get(column) or "")) for row in sample.values())


def _possible_layouts(
    columns: list[str],
    chats: list[str],
    only_format: str | None,
    chosen_columns: Mapping[str, str],
) -> Iterator[Detected]:
    """Every way to read the columns that their names allow.

    `only_format` and `chosen_columns` (the format's name of a column -> the file's) narrow it.
    """
    for layout in _LAYOUTS:
        if only_format not in (None, layout.format):
            continue
        # Columns that the user names must all belong to the format.
        if not chosen_columns.keys() <= set(COLUMNS[layout.format]):
            continue
        candidates: dict[str, list[str]] = {}
        for name, usual_names in {**layout.needed, **layout.optional}.items():
            if name in chosen_columns:
                candidates[name] = [chosen_columns[name]]
            elif usual_names is _CHAT:
                candidates[name] = chats
            # A single column needs no usual name to be the text.
            elif layout.format == "text" and len(columns) == 1:
                candidates[name] = columns
            else:
                candidates[name] = [c for c in columns if _plain(c) in usual_names]
        for name in layout.optional:
            if not candidates[name]:
                del candidates[name]
        # Each choice of one column a name; no column may serve twice.
        for picked in itertools.product(*candidates.values()):
            if len(set(picked)) == len(picked):
                yield Detected(layout.format, dict(zip(candidates, picked, strict=True)))


def _most_specific(layouts: list[Detected]) -> list[Detected]:
    """Without those whose columns another one uses too: with more, or with the same and earlier in
    the list.

    Text is what is left where nothing else reads the rows: data sets often add the text of a whole
    example.
    """
    # A chosen and a rejected answer have no other meaning, whatever stands beside them.
    layouts = [layout for layout in layouts if layout.format == "preference"] or layouts
    # Any column of text reads as plain text, so that is the last resort.
    layouts = [layout for layout in layouts if layout.format != "text"] or layouts
    specific: list[Detected] = []
    for layout in layouts:
        columns = set(layout.columns.values())
        is_part_of_another = any(columns < set(other.columns.values()) for other in layouts)
        is_repeated = any(columns == set(other.columns.values()) for other in specific)
        if not is_part_of_another and not is_repeated:
            specific.append(layout)
    return specific


def _plain(column: str) -> str:
    return column.strip().lower().replace(" ", "_").replace("-", "_")


def _is_chat(value: Any) -> bool:
    """Whether a column's value looks like a list of messages, or JSON text of one."""
    if isinstance(value, str):
        text = value.lstrip()
        return text.startswith("[") and text[1:].lstrip().startswith("{")
    return isinstance(value, list) and (not value or isinstance(value[0], Mapping))
