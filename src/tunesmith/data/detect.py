"""Which format the rows of a file have, and in which columns, detected from some of them.

The columns decide first: rows with chosen and rejected are pairs, rows with a label are labeled
answers, and text is only what has no other columns. Of the layouts that the columns allow, the one
that uses the most of them is taken if the reader of training reads any row by it; a row that it
does not read is then an error that names the row, and never a reason for a poorer layout. What
remains open is an error that names the choices.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tunesmith.config.names import nearest
from tunesmith.config.row_formats import (
    READ_BY_ANY_NAME,
    ROW_FORMATS,
    ChatColumn,
    ColumnSet,
    FormatName,
)
from tunesmith.config.schema import Source
from tunesmith.data.bad_rows import find_bad_rows
from tunesmith.data.formats import convert_row
from tunesmith.data.messages import is_mark
from tunesmith.data.row_reader import (
    HARMLESS_COLUMNS,
    is_absent,
    looks_like_list,
    plain,
    role_key_of,
)
from tunesmith.data.source import Rows
from tunesmith.errors import DataError
from tunesmith.host.files import from_here
from tunesmith.host.shell import shell_word
from tunesmith.units import count_of

# Rows looked at, spread over the file.
SAMPLE = 200
_IMAGES = ("images", "image")
# Names of columns that hold a chat, though one is empty.
_CHAT_NAMES = frozenset(
    "messages conversations conversation chat chats dialog dialogue turns history_messages".split()
)
# Columns with texts that are no question and no answer.
_NO_TEXTS = (HARMLESS_COLUMNS - {"text"}) | {
    name for column in READ_BY_ANY_NAME for name in ROW_FORMATS["messages"].names(column)
}
# Words in the names of two columns that hold the better and the worse answer.
_BETTER_AND_WORSE = (
    ("chosen", "rejected"),
    ("preferred", "rejected"),
    ("preferred", "dispreferred"),
    ("accepted", "rejected"),
    ("better", "worse"),
    ("best", "worst"),
    ("good", "bad"),
    ("correct", "incorrect"),
    ("winner", "loser"),
    ("win", "lose"),
)
# The least similarity of a mistyped name to that of a column, as `nearest` measures it.
_MISTYPED = 0.75


# The key of the roles in a chat, `role` or `from` -> the columns that hold such chats.
_Chats = dict[str, list[str]]


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

    @property
    def renamed(self) -> dict[str, str]:
        """The columns whose names are not the format's own."""
        return {name: column for name, column in self.columns.items() if name != column}

    def describe(self) -> str:
        """`columns question, answer -> prompt-completion (prompt = question, ...)`."""
        noun = "columns" if len(self.columns) > 1 else "column"
        text = f"{noun} {', '.join(self.columns.values())} -> {self.format}"
        renamed = [f"{name} = {column}" for name, column in self.renamed.items()]
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
    """A layout with which some rows were read, and the errors of those that it does not read.

    Attributes:
        read: indices of the rows that it reads.
    """

    layout: Detected
    read: frozenset[int]
    errors: list[DataError]


def detect(
    rows: Rows, source: Source, *, any_format: bool = True, skips_bad_rows: bool = False
) -> Detected:
    """Find the format and the columns of some rows.

    Args:
        source: gives `columns` where some are named already, and the `format`, unless `any_format`.
        skips_bad_rows: rows that the layout does not read are left out later, and are no error.

    Raises:
        DataError: no layout reads the rows, several do, or some rows are not of the one that does.
    """
    where = from_here(rows.name)
    sample, is_whole = sample_rows(rows)
    columns = list(dict.fromkeys(str(name) for row in sample.values() for name in row))
    columns_text = f"the columns are {', '.join(columns) or 'none'}"
    if any_format and not source.columns:
        filled = [c for c in columns if any(not is_absent(row.get(c)) for row in sample.values())]
        _check_kind(filled, where, columns_text)
    # The content of its cells shows a chat, not the column's name.
    chats = _find_chats(columns, sample)
    only_format = None if any_format else source.format
    layouts = _of_one_kind([*_possible_layouts(columns, chats, only_format, source.columns)])
    if any_format and not source.columns:
        _check_pair_is_read(layouts, columns, chats, sample, rows, source)
    # Each layout is tried on the sample, with the reader of training.
    trials = [_try_layout(sample, rows, source, layout) for layout in layouts]
    readable = _most_specific([trial for trial in trials if trial.read])
    if len(readable) == 1:
        layout = readable[0].layout
        if (readable[0].errors or not is_whole) and not skips_bad_rows:
            raise _all_errors(rows, source, readable[0], len(sample))
        used = layout.columns.values()
        # Marks of untrained rows are read or refused, whatever the layout.
        ignored = tuple(name for name in columns if name not in used and not is_mark(name))
        return replace(layout, ignored=ignored)
    if readable:
        raise _ambiguous(readable, rows, sample, columns_text)
    if trials:
        raise _nothing_read(trials, len(sample))
    what = "no column name indicates what to train on"
    if source.columns:
        pairs = [f"{name}={column}" for name, column in source.columns.items()]
        what = f"no format reads {', '.join(pairs)}"
    fix = _propose(columns, sample, rows, source, only_format)
    raise DataError(what, where=where, why=columns_text, fix=fix)


def sample_rows(rows: Rows) -> tuple[dict[int, dict[str, Any]], bool]:
    """At most SAMPLE rows by their index, spread evenly from the first to the last; whether all of
    these can be read.

    A row that is no object, or no JSON, has no columns to tell a format by; it is named when all
    rows are read. DataError if there is no other row.
    """
    count = min(SAMPLE, len(rows))
    indices = [n * (len(rows) - 1) // max(1, count - 1) for n in range(count)]
    sample = {}
    first_error = None
    for i in indices:
        try:
            sample[i] = rows[i]
        except DataError as error:
            first_error = first_error or error
    if first_error is not None and not sample:
        raise first_error
    return sample, first_error is None


def _find_chats(columns: list[str], sample: Mapping[int, dict[str, Any]]) -> _Chats:
    """The columns that look like lists of messages, or JSON text of them, by what is in them.

    Under a chat's usual name these are also lists of another form: their error tells what is wrong.
    """
    chats: _Chats = {"role": [], "from": []}
    for column in columns:
        values = [row.get(column) for row in sample.values()]
        role_keys = {role_key_of(value) for value in values} - {""}
        is_named_so = plain(column) in _CHAT_NAMES
        if not role_keys and is_named_so and any(map(looks_like_list, values)):
            role_keys = {"role"}
        for role_key in role_keys:
            chats[role_key].append(column)
    return chats


def _check_kind(columns: list[str], where: str, columns_text: str) -> None:
    """DataError where the columns are those of rows for another kind of training."""
    if any(plain(column) in _IMAGES for column in columns):
        raise DataError(
            "the rows contain images, which is not supported yet",
            where=where,
            why=columns_text,
            fix="train on some columns only, such as --columns prompt=...,completion=...",
        )


def _possible_layouts(
    columns: list[str],
    chats: _Chats,
    only_format: str | None,
    chosen_columns: Mapping[str, str],
) -> Iterator[Detected]:
    """Every way to read the columns that their names allow.

    `only_format` and `chosen_columns` (the format's name of a column -> the file's) narrow it.
    """
    layouts: list[tuple[FormatName, ColumnSet]] = []
    for format_name, form in ROW_FORMATS.items():
        layouts += [(format_name, layout) for layout in form.layouts]
    # Of two with the same columns the one that has no others is meant.
    layouts.sort(key=lambda entry: bool(entry[1].optional))
    for name_of_format, layout in layouts:
        if only_format not in (None, name_of_format):
            continue
        # Columns that the user names must all belong to the format.
        if not chosen_columns.keys() <= {*layout.needed, *layout.optional}:
            continue
        candidates: dict[str, list[str | None]] = {}
        for name, usual_names in {**layout.needed, **layout.optional}.items():
            if name in chosen_columns:
                candidates[name] = [chosen_columns[name]]
                continue
            candidates[name] = [*_columns_for(name_of_format, usual_names, columns, chats)]
            if name in layout.optional:
                candidates[name].append(None)
        # Each choice of one column a name; no column may serve twice.
        for picked in itertools.product(*candidates.values()):
            used = [column for column in picked if column is not None]
            if len(set(used)) == len(used):
                pairs = zip(candidates, picked, strict=True)
                mapping = {name: column for name, column in pairs if column is not None}
                yield Detected(name_of_format, mapping)


def _columns_for(
    format_name: FormatName, usual_names: tuple[str, ...], columns: list[str], chats: _Chats
) -> list[str]:
    """The columns that may be what a format has under these names in files."""
    if isinstance(usual_names, ChatColumn):
        return list(dict.fromkeys(column for key in usual_names for column in chats[key]))
    if ROW_FORMATS[format_name].has_turns:
        return [column for column in columns if plain(column) in usual_names]
    # A single column needs no usual name to be the text; a chat is none.
    named = [column for column in columns if plain(column) in usual_names or len(columns) == 1]
    return [column for column in named if column not in (*chats["role"], *chats["from"])]


def _of_one_kind(layouts: list[Detected]) -> list[Detected]:
    """The layouts of the kind of training that the columns are for.

    A chosen and a rejected answer, or a label, have no other meaning, whatever stands beside them:
    learning each answer as it is would learn the bad ones too. Any column of text reads as plain
    text, and data sets often add the text of a whole example: that is the last resort.
    """
    for format_name in ("preference", "feedback"):
        of_format = [layout for layout in layouts if layout.format == format_name]
        if of_format:
            return of_format
    return [layout for layout in layouts if layout.format != "text"] or layouts


def _check_pair_is_read(
    layouts: list[Detected],
    columns: list[str],
    chats: _Chats,
    sample: Mapping[int, dict[str, Any]],
    rows: Rows,
    source: Source,
) -> None:
    """DataError where columns are named as two answers of a pair, and the layouts read no pairs."""
    if any(layout.format == "preference" for layout in layouts):
        return
    for chosen, rejected in _named_as_pairs(columns):
        mapping = {"chosen": chosen, "rejected": rejected}
        pairs = _possible_layouts(columns, chats, "preference", mapping)
        if any(_try_layout(sample, rows, source, layout).read for layout in pairs):
            raise DataError(
                f"{chosen} and {rejected} look like the two answers of a pair",
                where=from_here(rows.name),
                why="rows of pairs are read by columns named chosen and rejected",
                fix=Detected("preference", mapping).flags(),
            )
    rejected_alone = [column for column in columns if _is_named_rejected(column)]
    formats = dict.fromkeys(layout.format for layout in layouts)
    if rejected_alone and formats:
        raise DataError(
            f"{rejected_alone[0]} looks like the rejected answer of a pair, and there is no chosen",
            where=from_here(rows.name),
            why=f"the columns are {', '.join(columns)}",
            fix=f"name both as --columns chosen=...,rejected={rejected_alone[0]}; or train on the"
            f" other columns alone: --format {' or '.join(formats)}",
        )


def _named_as_pairs(columns: list[str]) -> Iterator[tuple[str, str]]:
    """Columns that may be the better and the worse answer by their names, mistyped ones first."""
    names = {plain(column): column for column in columns}
    chosen = nearest("chosen", names, cutoff=_MISTYPED)
    rejected = nearest("rejected", names, cutoff=_MISTYPED)
    if chosen and rejected:
        yield names[chosen], names[rejected]
    for better, worse in _BETTER_AND_WORSE:
        for name, column in names.items():
            words = name.split("_")
            counterpart = "_".join(better if word == worse else word for word in words)
            if worse in words and counterpart in names:
                yield names[counterpart], column


def _is_named_rejected(column: str) -> bool:
    name = plain(column)
    return "rejected" in name.split("_") or bool(nearest("rejected", [name], cutoff=_MISTYPED))


def _try_layout(
    sample: Mapping[int, dict[str, Any]], rows: Rows, source: Source, layout: Detected
) -> _Trial:
    """What the reader of training reads of some rows by a layout, and what it raises."""
    source = _with_layout(source, layout)
    read = set()
    errors = []
    for i, row in sample.items():
        try:
            convert_row(row, source, where=rows.where(i))
            read.add(i)
        except DataError as error:
            errors.append(error)
    return _Trial(layout, frozenset(read), errors)


def _with_layout(source: Source, layout: Detected) -> Source:
    return replace(source, format=layout.format, columns=layout.columns)  # type: ignore[arg-type]


def _most_specific(trials: list[_Trial]) -> list[_Trial]:
    """Without those whose columns another one uses too: with more, or with the same where it reads
    more rows or is earlier in the list.
    """
    specific: list[_Trial] = []
    for trial in sorted(trials, key=lambda trial: -len(trial.read)):
        columns = set(trial.layout.columns.values())
        others = [set(other.layout.columns.values()) for other in trials]
        is_repeated = any(columns == set(other.layout.columns.values()) for other in specific)
        if not is_repeated and not any(columns < other for other in others):
            specific.append(trial)
    return specific


def _all_errors(rows: Rows, source: Source, trial: _Trial, examined: int) -> DataError:
    """The error that lists all rows that a layout does not read: not of the sample alone."""
    bad = find_bad_rows(rows, _with_layout(source, trial.layout))
    listed = bad.error()
    readable = f"{len(trial.read)} of the {examined} rows examined can be read as"
    why = f"{readable} {trial.layout.format}; not this one"
    if len(bad) > 1:
        why = f"{readable} {trial.layout.format}"
    listed.why = f"{listed.why}; {why}" if listed.why else why
    listed.fix += _or_no_label(trial.layout)
    return listed


def _nothing_read(trials: list[_Trial], count: int) -> DataError:
    """What keeps the layout with the most columns from reading any of the `count` rows."""
    likeliest = max(trials, key=lambda trial: len(trial.layout.columns))
    error = likeliest.errors[0]
    why = f"none of the {count_of(count, 'row')} examined can be read as {likeliest.layout.format}"
    if error.why:
        why = f"{error.why}; {why}"
    fix = error.fix + _or_no_label(likeliest.layout)
    return DataError(error.what, where=error.where, why=why, fix=fix)


def _or_no_label(layout: Detected) -> str:
    """The way on where a column that looks like labels is none."""
    if layout.format != "feedback":
        return ""
    column = layout.columns["label"]
    return (
        f"; if {column} says something else: rename it, and --format says how the others are read"
    )


def _ambiguous(
    trials: list[_Trial], rows: Rows, sample: Mapping[int, dict[str, Any]], columns_text: str
) -> DataError:
    """The error for several layouts: a choice, or rows of several formats in one file."""
    order = list(ROW_FORMATS)
    trials = sorted(trials, key=lambda trial: order.index(trial.layout.format))  # type: ignore[arg-type]
    most = max(trials, key=lambda trial: len(trial.read))
    share_rows = any(a.read & b.read for a, b in itertools.combinations(trials, 2))
    if len(most.read) == len(sample) or share_rows:
        return DataError(
            f"the rows can be read in {len(trials)} ways",
            where=from_here(rows.name),
            why=f"{columns_text}; it is ambiguous",
            fix=f"choose one: {' or '.join(trial.layout.flags() for trial in trials)}",
        )
    counts = [f"{len(trial.read)} as {trial.layout.format}" for trial in trials]
    others = min(i for i in sample if i not in most.read)
    return DataError(
        f"the rows have several formats: {' and '.join(trial.layout.format for trial in trials)}",
        where=rows.where(others),
        why=f"of the {count_of(len(sample), 'row')} examined {', '.join(counts)} can be read;"
        f" this one is not {most.layout.format}",
        fix="write the rows of each format into a file of their own, and name each in data.train",
    )


def _propose(
    columns: list[str],
    sample: Mapping[int, dict[str, Any]],
    rows: Rows,
    source: Source,
    only_format: str | None,
) -> str:
    """How to name the columns: with the likeliest ones, where the rows are read by them."""
    formats = [only_format] if only_format else ["prompt-completion", "text"]
    for format_name in formats:
        layout = ROW_FORMATS[format_name].layouts[0]  # type: ignore[index]
        guess = Detected(format_name, _guess(layout, columns, sample))
        if _try_layout(sample, rows, source, guess).read == sample.keys():
            return f"name the columns, such as {guess.flags()}"
    names = ROW_FORMATS[formats[0]].layouts[0].needed  # type: ignore[index]
    pairs = ",".join(f"{name}=..." for name in names)
    needs_chat = any(isinstance(usual_names, ChatColumn) for usual_names in names.values())
    kind = "lists of messages, or JSON text of them" if needs_chat else "texts"
    return f"name the columns with {kind}: --columns {pairs}"


def _guess(
    layout: ColumnSet, columns: list[str], sample: Mapping[int, dict[str, Any]]
) -> dict[str, str]:
    """Columns of text for the names that a layout needs, the likeliest.

    A column of a usual name is mapped to it. Of the others those with the most letters are, in the
    order that they have in the file.
    """
    mapped: dict[str, str] = {}
    for name, usual_names in layout.needed.items():
        for column in columns:
            if plain(column) in usual_names and column not in mapped.values():
                mapped[name] = column
                break
    unmapped = {plain(column): column for column in columns if column not in mapped.values()}
    for name in [name for name in layout.needed if name not in mapped]:
        near = nearest(name, unmapped, cutoff=_MISTYPED)
        if near:
            mapped[name] = unmapped.pop(near)
    missing = [name for name in layout.needed if name not in mapped]
    letters = {column: _letters(sample, column) for column in columns}
    others = [column for column in unmapped.values() if letters[column]]
    if "rejected" not in layout.needed:
        # Nobody means to learn the worse answers.
        others = [column for column in others if not _is_named_rejected(column)]
    # Beside a mapped column one that is seldom a text may be the other; two of them are not.
    if not mapped:
        others = [column for column in others if plain(column) not in _NO_TEXTS]
    others.sort(key=lambda column: (plain(column) in _NO_TEXTS, -letters[column]))
    picked = sorted(others[: len(missing)], key=columns.index)
    mapped |= dict(zip(missing, picked, strict=False))
    return {name: mapped[name] for name in layout.needed if name in mapped}


def _letters(sample: Mapping[int, dict[str, Any]], column: str) -> int:
    """How many letters a column has; 0 where a value is no text, so that nobody could learn it."""
    count = 0
    for row in sample.values():
        value = row.get(column)
        if value is not None and not isinstance(value, str):
            return 0
        count += sum(map(str.isalpha, value or ""))
    return count
