"""Rows as a file has them -> examples, warnings, and whether the prompt is masked; or why not."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from tunesmith.config.schema import Source
from tunesmith.data.rows.bad_rows import is_of_row
from tunesmith.data.rows.formats import convert_row
from tunesmith.data.rows.lost_pictures import find_lost_pictures
from tunesmith.data.rows.samples import (
    Completion,
    Conversation,
    RowSamples,
    Sample,
    Text,
)
from tunesmith.data.source.table import Row
from tunesmith.data.text.example import Example
from tunesmith.data.text.row_warnings import ROW_WARNINGS, has_empty_answers, row_warnings
from tunesmith.data.text.template import Template, TrainOn, first_turns
from tunesmith.errors import DataError, TunesmithError

# Rows whose prompt is rendered alone and compared: the first so many, then every n-th.
_PROMPTS_ALL = 256
_PROMPTS_EVERY = 32


class RowBatch(NamedTuple):
    """Some rows with their places.

    Attributes:
        first: index of the first.
        rows: each row, or why it cannot be read.
    """

    first: int
    rows: list[Row | TunesmithError]
    places: list[str]


# Whether a token of a row's prompt is supervised. `apart`: rendered alone the prompt is not the
# beginning of the example; `unchecked`: this row's was not rendered alone.
Prompt = Literal["unsupervised", "supervised", "apart", "unchecked"]


class EncodedRow(NamedTuple):
    """The example of a row, uncut.

    Attributes:
        warnings: names in ROW_WARNINGS that fit it.
        has_empty_answer: whether one of its answers is, of a pair also the rejected one.
        unread: names of its columns, and of keys of its turns, that nothing reads.
        grades: as in `RowSamples`.
    """

    example: Example
    warnings: list[str]
    prompt: Prompt
    has_empty_answer: bool
    unread: tuple[str, ...] = ()
    grades: tuple[str, ...] = ()


class _ReadRow(NamedTuple):
    """A row as samples, with its place and the names of its parts that nothing has read.

    Attributes:
        lost: names in ROW_WARNINGS for pictures of the row that nothing reads.
    """

    row: RowSamples
    place: str
    unread: tuple[str, ...]
    lost: tuple[str, ...]


def _of_row(error: TunesmithError, place: str) -> DataError:
    """An error of the row at a place; one that is not of this row is raised."""
    if isinstance(error, DataError) and is_of_row(error, place):
        return error
    raise error


def _side_by_side(chosen: Example, rejected: Example) -> Example:
    """A pair as one example of two sequences."""
    return Example(
        ids=np.concatenate([chosen.ids, rejected.ids]),
        trained=np.concatenate([chosen.trained, rejected.trained]),
        sequences=(len(chosen.ids), len(rejected.ids)),
        flaws=tuple(dict.fromkeys([*chosen.flaws, *rejected.flaws])),
        control_tokens=chosen.control_tokens | rejected.control_tokens,
    )


@dataclass(frozen=True)
class RowEncoder:
    """All that the examples of a source depend on beside its rows."""

    template: Template
    source: Source
    system: str | None
    train_on: TrainOn

    def __call__(self, batch: RowBatch) -> list[EncodedRow | DataError]:
        """The examples of a batch; in the place of a row that cannot be read or rendered, why.

        Other errors are raised: a file that was changed, a template that fits no row.
        """
        read = []
        samples: list[Sample] = []
        places = []
        for values, place in zip(batch.rows, batch.places, strict=True):
            row = self._read(values, place)
            read.append(row)
            if isinstance(row, _ReadRow):
                samples += row.row.samples
                places += [place] * len(row.row.samples)
        # One call of the tokenizer for all of them.
        examples = iter(self.template.encode_many(samples, self.train_on, where=places))
        encoded: list[EncodedRow | DataError] = []
        for i, row in enumerate(read, batch.first):
            if isinstance(row, _ReadRow):
                sequences = [next(examples) for _ in row.row.samples]
                encoded.append(self._encoded(row, sequences, i))
            else:
                encoded.append(row)
        return encoded

    def _encoded(
        self, row: "_ReadRow", examples: Sequence[Example | DataError], i: int
    ) -> EncodedRow | DataError:
        """The examples of row i as one."""
        sequences = []
        for example in examples:
            if isinstance(example, DataError):
                return _of_row(example, row.place)
            sequences.append(example)
        samples = row.row.samples
        example = sequences[0]._replace(label=row.row.is_good)
        if len(samples) > 1:
            if np.array_equal(example.ids, sequences[1].ids):
                return DataError(
                    "chosen and rejected are the same tokens",
                    where=row.place,
                    why="a pair is learned from by the difference of its answers",
                    fix="delete the row",
                )
            example = _side_by_side(example, sequences[1])
        prompt: Prompt = "unchecked"
        # All of the first rows and a sample of the others: rendering the prompt alone takes time.
        is_compared = i < _PROMPTS_ALL or i % _PROMPTS_EVERY == 0
        if is_compared and self.train_on != "all":
            prompt = self._check_prompt(samples[0], example)
        warnings = [*row_warnings(samples[0], raw=self.template.raw), *row.lost, *example.flaws]
        if row.row.has_other_preference:
            warnings.append("other_preference")
        # Of a pair the rejected answer is no row to warn of.
        has_empty_answer = "empty" in warnings or any(map(has_empty_answers, samples[1:]))
        grades = row.row.grades
        return EncodedRow(example, warnings, prompt, has_empty_answer, row.unread, grades)

    def _read(self, values: Row | TunesmithError, place: str) -> "_ReadRow | DataError":
        """A row as a sample, or why it is none."""
        # Errors of reading come as values, so that rows before them are encoded.
        if isinstance(values, TunesmithError):
            return _of_row(values, place)
        unread: set[str] = set()
        try:
            row = convert_row(values, self.source, where=place, system=self.system, unread=unread)
        except DataError as error:
            return _of_row(error, place)
        if self.template.raw and any(
            isinstance(part, Completion) and part.system for part in row.samples
        ):
            return DataError(
                "there is no template to write the system message",
                where=place,
                why="raw rows are a prompt and a completion without a template",
                fix="data.template=alpaca; or write it into the prompt, and remove data.system",
            )
        sees = self.template.pictures is not None
        lost = dict(find_lost_pictures(values, row.samples[0], place, sees=sees))
        for name, found in lost.items() if sees else ():
            warning = ROW_WARNINGS[name]
            what = f"the row has {warning.what}: {found:.200}"
            fix = warning.fix.replace("COLUMN", found)
            return DataError(what, where=place, why=warning.why, fix=fix)
        if "picture_column" in lost:
            unread.add(lost["picture_column"])
        return _ReadRow(row, place, tuple(sorted(unread)), tuple(lost))

    def _check_prompt(self, sample: Sample, example: Example) -> Prompt:
        """Compare the prompt, rendered alone, with the beginning of the example."""
        if isinstance(sample, Text):
            return "apart"
        if isinstance(sample, Conversation):
            # Up to the first answer.
            roles = [message["role"] for message in sample.messages]
            sample = first_turns(sample, roles.index("assistant") + 1)
        try:
            prompt = self.template.prompt(sample)
        except DataError:
            # A template that wants more turns than this beginning has.
            return "apart"
        # Some templates write a turn differently once others follow.
        if not prompt or prompt != np.asarray(example.ids[: len(prompt)]).tolist():
            return "apart"
        is_supervised = np.any(example.trained[: len(prompt)])
        return "supervised" if is_supervised else "unsupervised"
