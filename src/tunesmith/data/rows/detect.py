"""Detection of the row format and the columns of a data file, from a sample of its rows.

A layout is a format together with the columns that it reads. First, the column names determine
which layouts are possible. Rows with the columns chosen and rejected are preference pairs, and rows
with a label are labeled answers. The format text is used only if no other format fits.

Of the layouts that can read at least one row, the layout that uses the most columns is chosen. A
row that the chosen layout cannot read is an error, and no other layout is tried for this row. If
several layouts remain, an error lists them.
"""

import itertools
from collections.abc import Iterator
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
from tunesmith.config.row_settings import row_fix
from tunesmith.config.schema import Source
from tunesmith.data.rows.bad_rows import error_of_sources, find_bad_rows
from tunesmith.data.rows.formats import convert_row
from tunesmith.data.rows.row_masks import is_mask_column
from tunesmith.data.rows.row_reader import (
    MIN_NAME_SIMILARITY,
    is_named_rejected,
    looks_like_list,
    other_formats,
    plain,
    propose_columns,
    role_key_of,
)
from tunesmith.data.rows.samples import pictures_of
from tunesmith.data.source.csv_files import propose_header
from tunesmith.data.source.open_source import Rows
from tunesmith.data.source.table import Row
from tunesmith.errors import DataError
from tunesmith.host.files import relative_to_cwd
from tunesmith.units import count_of

# Maximum number of rows that are examined. They are spread evenly over the file.
SAMPLE = 200
# Column names that indicate a chat, even if all lists in the column are empty.
_CHAT_NAMES = frozenset(
    "messages conversations conversation chat chats dialog dialogue turns history_messages".split()
)
# Column names that indicate a class label for text classification.
_CLASS_NAMES = frozenset(
    "label labels label_text label_name class classes class_name sentiment sentiments polarity"
    " emotion emotions intent intents intent_name stance".split()
)
# Key of the role in a message (`role` or `from`) -> the columns with chats that use this key.
_Chats = dict[str, list[str]]


@dataclass(frozen=True)
class Detected:
    """A row format and the columns of the file that it reads.

    Attributes:
        columns: column name in the format -> column name in the file.
        ignored: the columns of the file that are not read.
        has_pictures: whether one of the examined rows has pictures.
    """

    format: FormatName
    columns: dict[str, str]
    ignored: tuple[str, ...] = ()
    has_pictures: bool = False

    @property
    def used(self) -> frozenset[str]:
        """Names of the file's columns that are read."""
        return frozenset(self.columns.values())

    @property
    def renamed(self) -> dict[str, str]:
        """Columns whose name in the file differs from the format's name."""
        return {name: column for name, column in self.columns.items() if name != column}

    def describe(self) -> str:
        """Return text such as `columns question, answer -> prompt-completion (prompt =
        question)`.
        """
        noun = "columns" if len(self.columns) > 1 else "column"
        columns = ", ".join(self.columns.values())
        text = f"{noun} {columns} -> {self.format}"
        renamed = [f"{name} = {column}" for name, column in self.renamed.items()]
        if renamed:
            text += f" ({', '.join(renamed)})"
        if self.ignored:
            text += f"; ignored: {', '.join(self.ignored)}"
        return text


class _Trial(NamedTuple):
    """The result of reading the sampled rows with one layout.

    Attributes:
        read: indices of the rows that the layout can read.
    """

    layout: Detected
    read: frozenset[int]


def detect(
    rows: Rows, source: Source, *, any_format: bool = True, skips_bad_rows: bool = False
) -> Detected:
    """Detect the format and the columns of the rows.

    Args:
        source: the data source. Its `columns` are the columns that the user has already chosen.
        any_format: whether to consider all formats. If False, only `source.format` is considered.
        skips_bad_rows: whether rows that the layout cannot read are skipped later. If True, they
            raise no error.

    Raises:
        DataError: no layout can read the rows, several layouts can read them, or the only layout
            cannot read some of the rows.
    """
    sample, is_whole = sample_rows(rows)
    examined = _SampledRows(rows, source, sample, None if any_format else source.format)
    layouts = _select_training_kind(list(examined.layouts()))
    if any_format and not source.columns:
        examined.check_rejected_is_read(layouts)
        examined.check_class_is_read(layouts)
    # Read the sampled rows with each layout. This uses the same function as training, so the same
    # rows are readable.
    trials = [examined.try_layout(layout) for layout in layouts]
    readable = _most_specific([trial for trial in trials if trial.read])
    if len(readable) == 1:
        [trial] = readable
        reads_all = is_whole and trial.read == examined.sample.keys()
        if not reads_all and not skips_bad_rows:
            raise examined.all_errors(trial)
        ignored = []
        for name in examined.columns:
            # Do not list a loss mask column such as `train` as ignored, because every layout reads
            # or refuses it.
            if name not in trial.layout.used and not is_mask_column(name):
                ignored.append(name)
        return replace(trial.layout, ignored=tuple(ignored))
    if readable:
        raise examined.ambiguous(readable)
    if trials:
        raise examined.all_errors(max(trials, key=lambda trial: len(trial.layout.columns)))
    what = "no column name indicates what to train on"
    if source.columns:
        pairs = [f"{name}={column}" for name, column in source.columns.items()]
        what = f"no row format can read the columns {', '.join(pairs)}"
    raise examined.error(what, examined.propose())


def sample_rows(rows: Rows) -> tuple[dict[int, Row], bool]:
    """Return a sample of at most SAMPLE rows (index -> row), and whether all of them were read.

    The rows are spread evenly from the first to the last. A row that is not a JSON object has no
    columns, so it is omitted from the sample. Raise DataError if no row is left.
    """
    count = min(SAMPLE, len(rows))
    last = len(rows) - 1
    steps = max(1, count - 1)
    indices = [n * last // steps for n in range(count)]
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
    """A sample of the rows of a source, and the analysis of its columns.

    Attributes:
        sample: the sampled rows by their index.
        only_format: the format that the user has chosen, or None if any format is possible.
        where: file and line of the first sampled row.
        chats: the columns that contain lists of messages, or JSON text of such lists, grouped by
            the key of the role. A column with a usual chat name is included even if its lists are
            not chats, because the error from reading the column then explains the correct form.
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
        names = itertools.chain.from_iterable(sample.values())
        self.columns = list(dict.fromkeys(map(str, names)))
        self.chats: _Chats = {"role": [], "from": []}
        for column in self.columns:
            values = [row.get(column) for row in sample.values()]
            role_keys = {role_key_of(value) for value in values} - {""}
            has_chat_name = plain(column) in _CHAT_NAMES
            if not role_keys and has_chat_name and any(map(looks_like_list, values)):
                role_keys = {"role"}
            for role_key in role_keys:
                self.chats[role_key].append(column)

    def error(self, what: str, fix: str, why: str = "") -> DataError:
        """Build an error about the columns. The message lists all columns of the file."""
        columns_text = f"the columns are {', '.join(self.columns) or 'none'}"
        return DataError(
            what, where=relative_to_cwd(self.rows.name), why=columns_text + why, fix=fix
        )

    def _setting(self, **settings: object) -> str:
        return row_fix(self.source.source, **settings)

    def layouts(self) -> Iterator[Detected]:
        """Yield every layout that the column names and the user's choices allow."""
        chosen_columns = self.source.columns
        layouts: list[tuple[FormatName, ColumnSet]] = []
        for format_name, form in ROW_FORMATS.items():
            if self.only_format in (None, format_name):
                layouts += [(format_name, layout) for layout in form.layouts]
        # Put layouts without optional columns first, because the first of several equal layouts is
        # used.
        layouts.sort(key=lambda entry: bool(entry[1].optional))
        for format_name, layout in layouts:
            columns = {**layout.needed, **layout.optional}
            # Skip the layout if it lacks a column that the user has chosen.
            if not chosen_columns.keys() <= columns.keys():
                continue
            candidates: dict[str, list[str | None]] = {}
            for name, usual_names in columns.items():
                if name in chosen_columns:
                    candidates[name] = [chosen_columns[name]]
                    continue
                candidates[name] = [*self._columns_for(format_name, usual_names)]
                if name in layout.optional:
                    candidates[name].append(None)
            # Try every combination of candidates, but use each column of the file only once.
            for picked in itertools.product(*candidates.values()):
                mapping: dict[str, str] = {}
                for name, column in zip(candidates, picked, strict=True):
                    if column is not None:
                        mapping[name] = column
                detected = Detected(format_name, mapping)
                if len(detected.used) == len(mapping):
                    yield detected

    def _columns_for(self, format_name: FormatName, usual_names: tuple[str, ...]) -> list[str]:
        """Return the columns of the file that can be read as one given column of the format.

        `usual_names` are the usual names of the format's column in files.
        """
        if isinstance(usual_names, ChatColumn):
            chats = {}
            for role_key in usual_names:
                chats.update(dict.fromkeys(self.chats[role_key]))
            needed = ROW_FORMATS["prompt-completion"].layouts[0].needed
            if any(plain(column) in needed["completion"] for column in self.columns):
                # Exclude prompt columns: the file has a completion column, so a list of messages in
                # the prompt column is only a prompt, and not an entire chat.
                return [name for name in chats if plain(name) not in needed["prompt"]]
            return list(chats)
        named = [column for column in self.columns if plain(column) in usual_names]
        if ROW_FORMATS[format_name].has_turns:
            return named
        if len(self.columns) == 1 and not propose_header(self.where, self.columns):
            # If the file has only one column, this column can be the text, whatever its name is.
            named = self.columns
        no_texts = (*self.chats["role"], *self.chats["from"])
        return [name for name in named if name not in no_texts]

    def _source_by(self, layout: Detected) -> Source:
        return replace(self.source, format=layout.format, columns=layout.columns)

    def try_layout(self, layout: Detected) -> _Trial:
        """Read the sampled rows with a layout, as training does. Record which rows can be read."""
        source = self._source_by(layout)
        read = set()
        has_pictures = False
        for i, row in self.sample.items():
            with suppress(DataError):
                samples = convert_row(row, source, where=self.rows.where(i)).samples
                read.add(i)
                has_pictures = has_pictures or any(map(pictures_of, samples))
        return _Trial(replace(layout, has_pictures=has_pictures), frozenset(read))

    def check_rejected_is_read(self, layouts: list[Detected]) -> None:
        """Raise DataError if a column's name is similar to `rejected`, but no layout reads
        pairs.
        """
        rejected = next(filter(is_named_rejected, self.columns), "")
        if not rejected:
            return
        formats = dict.fromkeys(layout.format for layout in layouts)
        if "preference" in formats:
            return
        names = {plain(column): column for column in self.columns if column != rejected}
        near = nearest("chosen", names, cutoff=MIN_NAME_SIMILARITY)
        if not near:
            near = plain(rejected).replace("rejected", "chosen")
        chosen = names.get(near, "...")
        fix = f"use {self._setting(columns={'chosen': chosen, 'rejected': rejected})}"
        if formats:
            ways = " or ".join(self._setting(format=name) for name in formats)
            fix += f"; to train on the other columns only, use {ways}"
        raise self.error(f"the column {rejected} looks like the rejected answer of a pair", fix)

    def check_class_is_read(self, layouts: list[Detected]) -> None:
        """Raise DataError if a column holds class labels, but only the text column is read."""
        texts = [layout.columns["text"] for layout in layouts if layout.format == "text"]
        for column in self.columns if texts else ():
            name = plain(column)
            # Compare also the last word of the name, for example `label` in `coarse_label`.
            names = {name, name.rpartition("_")[2]}
            if column not in texts and names & _CLASS_NAMES:
                as_answer = self._setting(columns={"prompt": texts[0], "completion": column})
                text_only = self._setting(columns={"text": texts[0]})
                raise self.error(
                    f"the column {column} looks like the class of the text, but would not be read",
                    f"use {as_answer} to train on the class, written as a text, as the"
                    f" answer, or {text_only} to train on the text only",
                )

    def all_errors(self, trial: _Trial) -> DataError:
        """Build the error that lists all rows that the layout cannot read.

        If the layout cannot read any sampled row, the error describes only the first row.
        """
        rows = self.rows
        if not trial.read:
            first = next(iter(self.sample))
            rows = rows.take([first])
        layout = trial.layout
        bad = find_bad_rows(rows, self._source_by(layout))
        error = error_of_sources([bad])
        examined = count_of(len(self.sample), "row")
        read = f"{len(trial.read)} of the {examined} examined can be read as {layout.format}"
        error.why = "; ".join(filter(None, (error.why, read)))
        if layout.format == "feedback":
            label = layout.columns["label"]
            error.fix += f"; or rename {label}, if it is not a label"
        return error

    def ambiguous(self, trials: list[_Trial]) -> DataError:
        """Build the error for rows that several layouts can read."""
        order = list(ROW_FORMATS)
        trials = sorted(trials, key=lambda trial: order.index(trial.layout.format))
        ways = []
        counts = []
        for trial in trials:
            ways.append(self._setting(columns=trial.layout.columns))
            counts.append(f"{len(trial.read)} as {trial.layout.format}")
        examined = count_of(len(self.sample), "row")
        return self.error(
            f"the rows can be read in {len(trials)} ways",
            f"choose one: {' or '.join(ways)}; if the file mixes formats, split it by format",
            f"; of the {examined} examined, {' and '.join(counts)} can be read",
        )

    def propose(self) -> str:
        """Return the setting that names the columns, for the error message.

        The names are guessed. If the rows cannot all be read with the guessed names, the setting
        contains `...` instead of the names.
        """
        formats: tuple[FormatName, ...] = ("prompt-completion", "text")
        if self.only_format is not None:
            formats = (self.only_format,)
        first = next(iter(self.sample.values())).copy()
        pictures = self.source.columns.get("images", "")
        first.pop(pictures, None)
        for format_name in formats:
            columns = propose_columns(replace(self.source, format=format_name), first)
            trial = self.try_layout(Detected(format_name, columns))
            if trial.read == self.sample.keys():
                header = propose_header(self.where, self.columns)
                return f"{header}name the columns, such as {self._setting(columns=columns)}"
        unknown = dict.fromkeys(ROW_FORMATS[formats[0]].layouts[0].needed, "...")
        others = other_formats(self.source, first)
        return f"name the columns with {self._setting(columns=unknown)}{others}"


def _select_training_kind(layouts: list[Detected]) -> list[Detected]:
    """Keep only the layouts for one kind of training: pairs, labeled answers, answers or text.

    Pairs come first and labeled answers second, because any other format would train on the bad
    answers, too. The format text comes last, because it can read any column of text, and many data
    sets have an additional column with the complete text of the example.
    """
    for format_name in ("preference", "feedback"):
        matching = [layout for layout in layouts if layout.format == format_name]
        if matching:
            return matching
    return [layout for layout in layouts if layout.format != "text"] or layouts


def _most_specific(trials: list[_Trial]) -> list[_Trial]:
    """Remove each trial whose layout uses only a part of the columns of another trial's layout.

    If two layouts use the same columns, keep the layout that reads more rows. If both read the same
    number of rows, keep the first.
    """
    specific: list[_Trial] = []
    for trial in sorted(trials, key=lambda trial: -len(trial.read)):
        columns = trial.layout.used
        is_repeated = any(columns == other.layout.used for other in specific)
        is_part = any(columns < other.layout.used for other in trials)
        if not is_repeated and not is_part:
            specific.append(trial)
    return specific
