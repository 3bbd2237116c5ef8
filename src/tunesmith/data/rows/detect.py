"""Detection of the format that the rows of a file have, and of its columns, from some rows.

The columns decide first: rows with chosen and rejected are pairs, rows with a label are labeled
answers, and text is only what has no other columns. Of the layouts that the columns allow, the one
that uses the most of them is taken if the reader of training reads any row by it; a row that it
does not read is then an error that names the row, and never a reason for a poorer layout. What
remains open is an error that names the choices.
"""

import itertools
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

from tunesmith.config.names import nearest
from tunesmith.config.row_formats import (
    ROW_FORMATS,
    ChatColumn,
    ColumnSet,
    FormatName,
)
from tunesmith.config.schema import Source
from tunesmith.data.rows.bad_rows import error_of_sources, find_bad_rows
from tunesmith.data.rows.formats import convert_row
from tunesmith.data.rows.marks import is_mark
from tunesmith.data.rows.row_reader import (
    MIN_NAME_SIMILARITY,
    guess_columns,
    is_named_rejected,
    looks_like_list,
    plain,
    role_key_of,
)
from tunesmith.data.rows.samples import pictures_of
from tunesmith.data.source.csv_files import propose_header
from tunesmith.data.source.open_source import Rows
from tunesmith.data.source.table import Row
from tunesmith.errors import DataError
from tunesmith.host.files import from_here
from tunesmith.host.shell import shell_word
from tunesmith.units import count_of

# Rows looked at, spread over the file.
SAMPLE = 200
# Names of columns that hold a chat, though one is empty.
_CHAT_NAMES = frozenset(
    "messages conversations conversation chat chats dialog dialogue turns history_messages".split()
)
# Names of columns that hold the class of a text.
_CLASS_NAMES = frozenset(
    "label labels label_text label_name class classes class_name sentiment sentiments polarity"
    " emotion emotions intent intents intent_name stance".split()
)
# The key of the roles in a chat, `role` or `from` -> the columns that hold such chats.
_Chats = dict[str, list[str]]


@dataclass(frozen=True)
class Detected:
    """A format and its columns, by which some rows can be read.

    Attributes:
        columns: the format's name of a column -> the file's.
        ignored: the columns that are not read.
        has_pictures: whether a row that was looked at has any.
    """

    format: FormatName
    columns: dict[str, str]
    ignored: tuple[str, ...] = ()
    has_pictures: bool = False

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
    """A layout with which some rows were read.

    Attributes:
        read: indices of the rows that it reads.
    """

    layout: Detected
    read: frozenset[int]


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
    sample, is_whole = sample_rows(rows)
    examined = _SampledRows(rows, source, sample, None if any_format else source.format)
    is_free = any_format and not source.columns
    layouts = _of_one_kind([*examined.layouts(examined.only_format, source.columns)])
    if is_free:
        examined.check_rejected_is_read(layouts)
        examined.check_class_is_read(layouts)
    # Each layout is tried on the sample, with the reader of training.
    trials = [examined.try_layout(layout) for layout in layouts]
    readable = _most_specific([trial for trial in trials if trial.read])
    if len(readable) == 1:
        layout = readable[0].layout
        reads_all = is_whole and readable[0].read == examined.sample.keys()
        if not reads_all and not skips_bad_rows:
            raise examined.all_errors(readable[0])
        used = layout.columns.values()
        # Marks of untrained rows are read or refused, whatever the layout.
        ignored = [name for name in examined.columns if name not in used and not is_mark(name)]
        return replace(layout, ignored=tuple(ignored))
    if readable:
        raise examined.ambiguous(readable)
    if trials:
        raise examined.all_errors(max(trials, key=lambda trial: len(trial.layout.columns)))
    what = "no column name indicates what to train on"
    if source.columns:
        pairs = [f"{name}={column}" for name, column in source.columns.items()]
        what = f"no format reads {', '.join(pairs)}"
    raise examined.error(what, examined.propose())


def sample_rows(rows: Rows) -> tuple[dict[int, Row], bool]:
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


class _SampledRows:
    """Some rows of a source, by their index, and what their columns are.

    Attributes:
        only_format: the format that the user names; None: any.
        chats: the columns that look like lists of messages, or JSON text of them, by what is in
            them. Under a chat's usual name these are also lists of another form: their error tells
            what is wrong.
    """

    def __init__(
        self,
        rows: Rows,
        source: Source,
        sample: dict[int, Row],
        only_format: FormatName | None,
    ) -> None:
        self.rows = rows
        self.source = source
        self.sample = sample
        self.only_format = only_format
        self.where = rows.where(min(sample))
        self.columns = list(dict.fromkeys(str(name) for row in sample.values() for name in row))
        self.chats: _Chats = {"role": [], "from": []}
        for column in self.columns:
            values = self._values(column)
            role_keys = {role_key_of(value) for value in values} - {""}
            is_named_so = plain(column) in _CHAT_NAMES
            if not role_keys and is_named_so and any(map(looks_like_list, values)):
                role_keys = {"role"}
            for role_key in role_keys:
                self.chats[role_key].append(column)

    def _values(self, column: str) -> list[object]:
        return [row.get(column) for row in self.sample.values()]

    def error(self, what: str, fix: str, why: str = "") -> DataError:
        """An error about the columns."""
        columns_text = f"the columns are {', '.join(self.columns) or 'none'}"
        return DataError(what, where=from_here(self.rows.name), why=columns_text + why, fix=fix)

    def layouts(
        self, only_format: FormatName | None, chosen_columns: Mapping[str, str]
    ) -> Iterator[Detected]:
        """Every way to read the columns that their names allow.

        `only_format` and `chosen_columns` (the format's name of a column -> the file's) narrow it.
        """
        layouts: list[tuple[FormatName, ColumnSet]] = []
        for format_name, form in ROW_FORMATS.items():
            if only_format in (None, format_name):
                layouts += [(format_name, layout) for layout in form.layouts]
        # Of two with the same columns the one that has no others is meant.
        layouts.sort(key=lambda entry: bool(entry[1].optional))
        for format_name, layout in layouts:
            # Columns that the user names must all belong to the format.
            if not chosen_columns.keys() <= {*layout.needed, *layout.optional}:
                continue
            candidates: dict[str, list[str | None]] = {}
            for name, usual_names in {**layout.needed, **layout.optional}.items():
                if name in chosen_columns:
                    candidates[name] = [chosen_columns[name]]
                    continue
                candidates[name] = [*self._columns_for(format_name, usual_names)]
                if name in layout.optional:
                    candidates[name].append(None)
            # Each choice of one column a name; no column may serve twice.
            for picked in itertools.product(*candidates.values()):
                pairs = zip(candidates, picked, strict=True)
                mapping = {name: column for name, column in pairs if column is not None}
                if len(set(mapping.values())) == len(mapping):
                    yield Detected(format_name, mapping)

    def _columns_for(self, format_name: FormatName, usual_names: tuple[str, ...]) -> list[str]:
        """The columns that may be what a format has under these names in files."""
        if isinstance(usual_names, ChatColumn):
            chats = dict.fromkeys(name for key in usual_names for name in self.chats[key])
            # A prompt beside its answer is no whole chat, whatever it ends with.
            needed = ROW_FORMATS["prompt-completion"].layouts[0].needed
            is_answered = any(plain(column) in needed["completion"] for column in self.columns)
            prompts = needed["prompt"] if is_answered else ()
            return [name for name in chats if plain(name) not in prompts]
        named = [column for column in self.columns if plain(column) in usual_names]
        if ROW_FORMATS[format_name].has_turns:
            return named
        # A single column needs no usual name to be the text; a chat is none.
        is_text = len(self.columns) == 1 and not propose_header(self.where, self.columns)
        texts = self.columns if is_text else named
        return [name for name in texts if name not in (*self.chats["role"], *self.chats["from"])]

    def try_layout(self, layout: Detected) -> _Trial:
        """Read the rows by a layout as training does; keep which it reads."""
        source = _with_layout(self.source, layout)
        read = set()
        has_pictures = False
        for i, row in self.sample.items():
            with suppress(DataError):
                samples = convert_row(row, source, where=self.rows.where(i)).samples
                read.add(i)
                has_pictures = has_pictures or any(map(pictures_of, samples))
        return _Trial(replace(layout, has_pictures=has_pictures), frozenset(read))

    def check_rejected_is_read(self, layouts: list[Detected]) -> None:
        """Raise DataError if a column is named as the worse answers of pairs, and none is read."""
        rejected = next(filter(is_named_rejected, self.columns), "")
        if not rejected or any(layout.format == "preference" for layout in layouts):
            return
        names = {plain(column): column for column in self.columns if column != rejected}
        counterpart = plain(rejected).replace("rejected", "chosen")
        near = nearest("chosen", names, cutoff=MIN_NAME_SIMILARITY) or counterpart
        pair = {"chosen": names.get(near, "..."), "rejected": rejected}
        fix = Detected("preference", pair).flags()
        if layouts:
            formats = dict.fromkeys(layout.format for layout in layouts)
            fix += f"; or train on the other columns alone: --format {' or '.join(formats)}"
        raise self.error(f"{rejected} looks like the rejected answer of a pair", fix)

    def check_class_is_read(self, layouts: list[Detected]) -> None:
        """Raise DataError if a column holds the class of a text, and only the text is read."""
        texts = [layout.columns["text"] for layout in layouts if layout.format == "text"]
        for column in self.columns if texts else ():
            # Or it ends in such a name, as coarse_label does.
            names = {plain(column), plain(column).rpartition("_")[2]}
            if column not in texts and names & _CLASS_NAMES:
                as_answer = Detected(
                    "prompt-completion", {"prompt": texts[0], "completion": column}
                )
                alone = Detected("text", {"text": texts[0]})
                raise self.error(
                    f"{column} looks like the class of a text, and nothing reads it",
                    f"to learn it as the answer, in words: {as_answer.flags()};"
                    f" to learn the text alone: {alone.flags()}",
                )

    def all_errors(self, trial: _Trial) -> DataError:
        """The error that lists all rows that a layout does not read; where it reads none, the
        first.
        """
        rows = self.rows
        if not trial.read:
            rows = rows.take([next(iter(self.sample))])
        bad = find_bad_rows(rows, _with_layout(self.source, trial.layout))
        error = error_of_sources([bad])
        examined = count_of(len(self.sample), "row")
        read = f"{len(trial.read)} of the {examined} examined can be read as {trial.layout.format}"
        error.why = "; ".join(filter(None, (error.why, read)))
        if trial.layout.format == "feedback":
            error.fix += f"; or rename {trial.layout.columns['label']} if it is no label"
        return error

    def ambiguous(self, trials: list[_Trial]) -> DataError:
        """The error for several layouts: a choice, or rows of several formats in one file."""
        order = list(ROW_FORMATS)
        trials = sorted(trials, key=lambda trial: order.index(trial.layout.format))
        ways = " or ".join(trial.layout.flags() for trial in trials)
        counts = [f"{len(trial.read)} as {trial.layout.format}" for trial in trials]
        return self.error(
            f"the rows can be read in {len(trials)} ways",
            f"choose one: {ways}; rows of several formats need a file for each",
            f"; of {count_of(len(self.sample), 'row')}, {' and '.join(counts)} can be read",
        )

    def propose(self) -> str:
        """Propose flags for the columns: the likeliest ones, where the rows are read by them."""
        formats: tuple[FormatName, ...] = ("prompt-completion", "text")
        if self.only_format is not None:
            formats = (self.only_format,)
        for format_name in formats:
            needed = ROW_FORMATS[format_name].layouts[0].needed
            first = next(iter(self.sample.values())).copy()
            first.pop(self.source.columns.get("images", ""), None)
            guess = Detected(format_name, guess_columns(needed, {}, first))
            if self.try_layout(guess).read == self.sample.keys():
                header = propose_header(self.where, self.columns)
                return f"{header}name the columns, such as {guess.flags()}"
        names = ROW_FORMATS[formats[0]].layouts[0].needed
        pairs = ",".join(f"{name}=..." for name in names)
        return f"name the columns: --columns {pairs}"


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


def _with_layout(source: Source, layout: Detected) -> Source:
    return replace(source, format=layout.format, columns=layout.columns)


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
