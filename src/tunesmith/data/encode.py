"""Rows as a file has them -> examples, warnings, and whether the prompt is masked; or why not."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from tunesmith.config.schema import Source
from tunesmith.data.bad_rows import is_of_row
from tunesmith.data.batch import Example
from tunesmith.data.formats import (
    Completion,
    Conversation,
    Feedback,
    Pair,
    Sample,
    Text,
    convert_row,
    samples_of,
)
from tunesmith.data.row_warnings import has_empty_answers, row_warnings
from tunesmith.data.template import Template, TrainOn
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
    rows: list[dict[str, Any] | TunesmithError]
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
    """

    example: Example
    warnings: list[str]
    prompt: Prompt
    has_empty_answer: bool
    unread: tuple[str, ...] = ()


class _ReadRow(NamedTuple):
    """A row as a sample, with its place and what of it nothing has read."""

    sample: Sample | Pair | Feedback
    place: str
    unread: tuple[str, ...]


def _of_row(error: TunesmithError, place: str) -> DataError:
    """An error of the row at a place; one that is not of this row is raised."""
    if isinstance(error, DataError) and is_of_row(error, place):
        return error
    raise error


def _check_raw(samples: Sequence[Sample], place: str) -> None:
    """DataError for a system message of a row whose texts no template joins."""
    if any(isinstance(sample, Completion) and sample.system for sample in samples):
        raise DataError(
            "there is no template to write the system message",
            where=place,
            why="raw rows are a prompt and a completion without a template",
            fix="data.template=alpaca; or write it into the prompt, and remove data.system",
        )


def _check_differs(chosen: Example, rejected: Example, place: str) -> None:
    """DataError for a pair that has nothing to learn from."""
    if np.array_equal(chosen.ids, rejected.ids):
        raise DataError(
            "chosen and rejected are the same tokens",
            where=place,
            why="a pair is learned from by the difference of its answers",
            fix="delete the row",
        )


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
        for values, place in zip(batch.rows, batch.places, strict=True):
            read.append(self._read(values, place))
        rows = [row for row in read if isinstance(row, _ReadRow)]
        examples = iter(self._encode_or_explain(rows))
        encoded: list[EncodedRow | DataError] = []
        for i, row in enumerate(read, batch.first):
            if isinstance(row, DataError):
                encoded.append(row)
                continue
            example = next(examples)
            if isinstance(example, DataError):
                encoded.append(example)
                continue
            prompt: Prompt = "unchecked"
            # All of the first rows and a sample of the others: rendering the prompt alone takes
            # time.
            is_compared = i < _PROMPTS_ALL or i % _PROMPTS_EVERY == 0
            samples = samples_of(row.sample)
            if is_compared and self.train_on != "all":
                prompt = self._check_prompt(samples[0], example)
            warnings = [*row_warnings(samples[0], raw=self.template.raw), *example.flaws]
            # Of a pair the rejected answer is no row to warn of.
            has_empty_answer = "empty" in warnings or any(map(has_empty_answers, samples[1:]))
            encoded.append(EncodedRow(example, warnings, prompt, has_empty_answer, row.unread))
        return encoded

    def _read(self, values: dict[str, Any] | TunesmithError, place: str) -> "_ReadRow | DataError":
        """A row as a sample, or why it is none."""
        # Errors of reading come as values, so that rows before them are encoded.
        if isinstance(values, TunesmithError):
            return _of_row(values, place)
        unread: set[str] = set()
        try:
            sample = convert_row(
                values, self.source, where=place, system=self.system, unread=unread
            )
        except DataError as error:
            return _of_row(error, place)
        return _ReadRow(sample, place, tuple(sorted(unread)))

    def _encode_or_explain(self, rows: Sequence["_ReadRow"]) -> list[Example | DataError]:
        """The example of each row, or why it has none."""
        try:
            return [*self._encode_samples(rows)]
        except DataError as error:
            # One row spoils the call for all: the halves find it.
            if len(rows) == 1:
                return [_of_row(error, rows[0].place)]
        half = len(rows) // 2
        return [*self._encode_or_explain(rows[:half]), *self._encode_or_explain(rows[half:])]

    def _encode_samples(self, rows: Sequence["_ReadRow"]) -> list[Example]:
        """The example of each row, with one call of the tokenizer for all of them."""
        samples = []
        sample_places = []
        for row in rows:
            of_row = samples_of(row.sample)
            samples += of_row
            sample_places += [row.place] * len(of_row)
            if self.template.raw:
                _check_raw(of_row, row.place)
        encoded = iter(self.template.encode_many(samples, self.train_on, where=sample_places))
        examples = []
        for row in rows:
            example = next(encoded)
            if isinstance(row.sample, Pair):
                rejected = next(encoded)
                _check_differs(example, rejected, row.place)
                example = _side_by_side(example, rejected)
            elif isinstance(row.sample, Feedback):
                example = example._replace(label=row.sample.is_good)
            examples.append(example)
        return examples

    def _check_prompt(self, sample: Sample, example: Example) -> Prompt:
        """Compare the prompt, rendered alone, with the beginning of the example."""
        if isinstance(sample, Text):
            return "apart"
        if isinstance(sample, Conversation):
            # Up to the first answer.
            roles = [message["role"] for message in sample.messages]
            messages = sample.messages[: roles.index("assistant") + 1]
            sample = Conversation(messages, sample.tools, instruction=sample.instruction)
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
