"""Detection of the row format and the columns of a data file, from a sample of its rows.

A layout is a format together with the columns that it reads. First, the column names determine
which layouts are possible. Rows with the columns chosen and rejected are preference pairs, and rows
with a label are labeled answers. The format text is used only if no other format fits.

Of the layouts that can read at least one row, the layout that uses the most columns is chosen. A
row that the chosen layout cannot read is an error, and no other layout is tried for this row. If
several layouts remain, an error lists them.
"""

from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from tunesmith.config.row_formats import ROW_FORMATS, FormatName
from tunesmith.config.row_settings import row_fix
from tunesmith.config.schema import Source
from tunesmith.errors import DataError
from tunesmith.host.files import relative_to_cwd
from tunesmith.rows.bad_rows import error_of_sources, find_bad_rows
from tunesmith.rows.columns import (
    RowColumns,
    is_named_rejected,
    propose_fix,
    select_training_kind,
)
from tunesmith.rows.formats import convert_row
from tunesmith.rows.row_masks import is_mask_column
from tunesmith.rows.samples import pictures_of
from tunesmith.rows.source.open_source import Rows
from tunesmith.rows.source.table import Row
from tunesmith.units import count_of

# Maximum number of rows that are examined. They are spread evenly over the file.
SAMPLE = 200
# Maximum number of different columns in the examined rows.
MAX_COLUMN_NAMES = 10_000


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
    def renamed(self) -> dict[str, str]:
        """Columns whose name in the file differs from the format's name."""
        return {name: column for name, column in self.columns.items() if name != column}

    def describe(self, *, has_scorers: bool = False) -> str:
        """Return text such as `columns question, answer -> prompt-completion (prompt =
        question)`.

        Args:
            has_scorers: whether the run has scorers, which get all columns.
        """
        noun = "columns" if len(self.columns) > 1 else "column"
        columns = ", ".join(self.columns.values())
        text = f"{noun} {columns} -> {self.format}"
        renamed = [f"{name} = {column}" for name, column in self.renamed.items()]
        if renamed:
            text += f" ({', '.join(renamed)})"
        if self.ignored:
            use = "only for the scorers" if has_scorers else "ignored"
            text += f"; {use}: {', '.join(self.ignored)}"
        return text


class _Trial(NamedTuple):
    """The result of reading the sampled rows with one layout.

    Attributes:
        layout: the data source with the format and the columns.
        read: indices of the rows that the layout can read.
        has_pictures: whether one of the read rows has pictures.
    """

    layout: Source
    read: frozenset[int]
    has_pictures: bool

    @property
    def used(self) -> frozenset[str]:
        """Names of the file's columns that are read."""
        return frozenset(self.layout.columns.values())


def detect(
    rows: Rows,
    source: Source,
    *,
    any_format: bool = True,
    skips_bad_rows: bool = False,
    is_trained: bool = True,
) -> Detected:
    """Detect the format and the columns of the rows.

    Args:
        source: the data source. Its `columns` are the columns that the user has already chosen.
        any_format: whether to consider all formats. If False, only `source.format` is considered.
        skips_bad_rows: whether rows that the layout cannot read are skipped later. If True, they
            raise no error.
        is_trained: whether the rows are used for training, see `convert_row`. If False, answers can
            be missing.

    Raises:
        DataError: no layout can read the rows, several layouts can read them, or the only layout
            cannot read some of the rows.
    """
    sample, is_whole = sample_rows(rows)
    examined = _SampledRows(rows, source, sample)
    columns = examined.columns
    layouts = columns.layouts(source, any_format=any_format, is_trained=is_trained)
    if is_trained and any_format and not source.columns:
        examined.check_rejected_is_read(layouts)
    # Read the sampled rows with each layout. This uses the same function as training, so the same
    # rows are readable.
    trials = [examined.try_layout(layout, is_trained=is_trained) for layout in layouts]
    if not is_trained:
        kind = select_training_kind([trial.layout for trial in trials if trial.read])
        trials = [trial for trial in trials if trial.layout in kind]
    readable = _most_specific([trial for trial in trials if trial.read])
    if len(readable) == 1:
        [trial] = readable
        if any_format and not source.columns:
            examined.check_text_is_alone(trial.layout)
        reads_all = is_whole and trial.read == sample.keys()
        if not reads_all and not skips_bad_rows:
            raise examined.unreadable_rows(trial)
        layout = trial.layout
        # Do not list a loss mask column such as `train` as ignored, because every layout reads or
        # refuses it.
        unread = [name for name in columns.values if name not in trial.used]
        ignored = tuple(name for name in unread if not is_mask_column(name))
        return Detected(layout.format, layout.columns, ignored, trial.has_pictures)
    if readable:
        raise examined.ambiguous(readable)
    if trials:
        raise examined.unreadable_rows(max(trials, key=lambda trial: len(trial.layout.columns)))
    what = "no column name indicates what to train on"
    if source.columns:
        pairs = [f"{name}={column}" for name, column in source.columns.items()]
        what = f"no row format can read the columns {', '.join(pairs)}"
    raise examined.unclear(what, any_format=any_format)


def sample_rows(rows: Rows) -> tuple[dict[int, Row], bool]:
    """Return a sample of at most SAMPLE rows (index -> row), and whether all of them were read.

    The rows are spread evenly from the first to the last. A row that is not a JSON object has no
    columns, so it is omitted from the sample. Raise DataError if no row is left.
    """
    count = min(SAMPLE, len(rows))
    last = len(rows) - 1
    steps = max(1, count - 1)
    sample = {}
    first_error = None
    for i in (n * last // steps for n in range(count)):
        try:
            sample[i] = rows[i]
        except DataError as error:
            first_error = first_error or error
    if first_error is not None and not sample:
        raise first_error
    return sample, first_error is None


class _SampledRows:
    """A sample of the rows of a source, with its columns.

    Attributes:
        sample: the sampled rows by their index.
    """

    def __init__(self, rows: Rows, source: Source, sample: dict[int, Row]) -> None:
        self.rows = rows
        self.source = source
        self.sample = sample
        names = set[str]().union(*sample.values())
        if len(names) > MAX_COLUMN_NAMES:
            raise DataError(
                f"{count_of(len(sample), 'row')} have {len(names):,} different columns",
                where=relative_to_cwd(rows.name),
                why=f"at most {MAX_COLUMN_NAMES:,} are compared with the formats",
                fix="write values whose names differ from row to row as an object in one column",
            )
        self.columns = RowColumns(sample.values(), rows.where(min(sample)))

    def error(self, what: str, fix: str, why: str = "") -> DataError:
        """Build an error about the columns. The message lists all columns of the file."""
        columns_text = f"the columns are {', '.join(self.columns.values) or 'none'}"
        return DataError(
            what, where=relative_to_cwd(self.rows.name), why=columns_text + why, fix=fix
        )

    def try_layout(self, layout: Source, *, is_trained: bool = True) -> _Trial:
        """Read the sampled rows with a layout. Record which rows can be read.

        Args:
            is_trained: whether the rows are used for training, see `convert_row`.
        """
        read = set()
        has_pictures = False
        for i, row in self.sample.items():
            with suppress(DataError):
                where = self.rows.where(i)
                samples = convert_row(row, layout, where=where, is_trained=is_trained).samples
                read.add(i)
                has_pictures = has_pictures or any(map(pictures_of, samples))
        return _Trial(layout, frozenset(read), has_pictures)

    def check_rejected_is_read(self, layouts: list[Source]) -> None:
        """Raise DataError if a column's name is similar to `rejected`, but no layout reads
        pairs.
        """
        rejected = next(filter(is_named_rejected, self.columns.values), "")
        formats = dict.fromkeys(layout.format for layout in layouts)
        if not rejected or "preference" in formats:
            return
        fix = propose_fix(self.columns, self.source, any_format=True)
        if formats:
            ways = " or ".join(row_fix(self.source.source, format=name) for name in formats)
            fix += f"; to train on the other columns only, use {ways}"
        raise self.error(f"the column {rejected} looks like the rejected answer of a pair", fix)

    def check_text_is_alone(self, layout: Source) -> None:
        """Raise DataError if only a text is read, but another column is more than metadata."""
        column = self.columns.beside_text(layout)
        if column:
            raise self.unclear(f"the column {column} is no metadata, but would not be read")

    def unclear(self, what: str, *, any_format: bool = True) -> DataError:
        """Build the error for rows of which it is not known what to train on."""
        speaker = "" if self.source.columns else self.columns.speaker
        if speaker:
            said = dict.fromkeys(map(str, self.columns.values[speaker]))
            what = f"one message per row: the column {speaker} says who speaks"
            what += f" ({', '.join([*said][:3]):.60})"
        return self.error(what, propose_fix(self.columns, self.source, any_format=any_format))

    def unreadable_rows(self, trial: _Trial) -> DataError:
        """Build the error that lists all rows that the layout cannot read.

        If the layout cannot read any sampled row, the error describes only the first row.
        """
        rows = self.rows
        if not trial.read:
            rows = rows.take([next(iter(self.sample))])
        layout = trial.layout
        error = error_of_sources([find_bad_rows(rows, layout)])
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
        ways = [row_fix(self.source.source, columns=trial.layout.columns) for trial in trials]
        counts = [f"{len(trial.read)} as {trial.layout.format}" for trial in trials]
        examined = count_of(len(self.sample), "row")
        return self.error(
            f"the rows can be read in {len(trials)} ways",
            f"choose one: {' or '.join(ways)}; if the file mixes formats, split it by format",
            f"; of the {examined} examined, {' and '.join(counts)} can be read",
        )


def _most_specific(trials: list[_Trial]) -> list[_Trial]:
    """Remove each trial whose layout uses only a part of the columns of another trial's layout.

    If two layouts use the same columns, keep the layout that reads more rows. If both read the same
    number of rows, keep the first.
    """
    specific: list[_Trial] = []
    for trial in sorted(trials, key=lambda trial: -len(trial.read)):
        is_repeated = any(trial.used == other.used for other in specific)
        is_part = any(trial.used < other.used for other in trials)
        if not is_repeated and not is_part:
            specific.append(trial)
    return specific
