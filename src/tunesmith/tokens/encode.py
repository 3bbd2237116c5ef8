"""Conversion of rows to tokenized examples, with warnings about the rows.

If a row cannot be converted, the result is the error instead of an example.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from tunesmith.config.schema import Source
from tunesmith.errors import DataError, TunesmithError
from tunesmith.rows.bad_rows import is_row_error
from tunesmith.rows.formats import convert_row
from tunesmith.rows.samples import (
    Completion,
    Conversation,
    RowSamples,
    Sample,
    Text,
)
from tunesmith.rows.source.table import Row
from tunesmith.rows.unread_pictures import find_unread_pictures
from tunesmith.tokens.text.example import Example
from tunesmith.tokens.text.row_warnings import ROW_WARNINGS, row_warnings
from tunesmith.tokens.text.template import Template, TrainOn, first_turns

# To check the loss mask, the prompt of a row is also rendered separately and compared with the
# start of the example. This is done for the first _PROMPTS_ALL rows, and then for every row whose
# index is a multiple of _PROMPTS_EVERY.
_PROMPTS_ALL = 256
_PROMPTS_EVERY = 32


class RowBatch(NamedTuple):
    """A batch of rows with their locations.

    Attributes:
        first: index of the first row.
        rows: each row, or the error if the row cannot be read.
    """

    first: int
    rows: list[Row | TunesmithError]
    places: list[str]


# Result of the check of a row's prompt. `supervised`: a token of the prompt is supervised. `apart`:
# the example does not begin with the separately rendered prompt. `unchecked`: the prompt was not
# rendered separately.
Prompt = Literal["unsupervised", "supervised", "apart", "unchecked"]


class EncodedRow(NamedTuple):
    """The example of a row before truncation.

    Attributes:
        warnings: names in ROW_WARNINGS that apply to the row.
        unread: names of columns and of message keys that tunesmith does not read.
    """

    example: Example
    warnings: list[str]
    prompt: Prompt
    unread: tuple[str, ...] = ()


class _ReadRow(NamedTuple):
    """A row that was read and converted to samples, with its location and the names of its unread
    parts.

    Attributes:
        lost: names in ROW_WARNINGS for pictures of the row that tunesmith does not read.
    """

    row: RowSamples
    place: str
    unread: tuple[str, ...]
    lost: tuple[str, ...]


def _error_of_row(error: TunesmithError, place: str) -> DataError:
    """Return the error if it belongs to the row at `place`, else raise it."""
    if isinstance(error, DataError) and is_row_error(error, place):
        return error
    raise error


@dataclass(frozen=True)
class RowEncoder:
    """Function object that converts the rows of a source to examples."""

    template: Template
    source: Source
    system: str | None
    train_on: TrainOn

    def __call__(self, batch: RowBatch) -> list[EncodedRow | DataError]:
        """Encode a batch of rows. A row that cannot be read or rendered gives a DataError.

        Errors that concern more than one row are raised, for example if the file has changed.
        """
        read = []
        samples: list[Sample] = []
        places = []
        for values, place in zip(batch.rows, batch.places, strict=True):
            row = self._read(values, place)
            read.append(row)
            if isinstance(row, _ReadRow):
                own_samples = row.row.samples
                samples += own_samples
                places += [place] * len(own_samples)
        # Tokenize all samples in one call.
        examples = iter(self.template.encode_many(samples, self.train_on, where=places))
        encoded = []
        for i, row in enumerate(read, batch.first):
            if isinstance(row, _ReadRow):
                encoded.append(self._encoded(row, [next(examples) for _ in row.row.samples], i))
            else:
                encoded.append(row)
        return encoded

    def _encoded(
        self, row: "_ReadRow", examples: Sequence[Example | DataError], i: int
    ) -> EncodedRow | DataError:
        """Join the one or two examples of row i into one example, and check the result."""
        sequences = []
        for example in examples:
            if isinstance(example, DataError):
                return _error_of_row(example, row.place)
            sequences.append(example)
        samples = row.row.samples
        example = sequences[0]._replace(label=row.row.is_good)
        if len(samples) > 1:
            if np.array_equal(example.ids, sequences[1].ids):
                return DataError(
                    "the chosen answer and the rejected answer have the same tokens",
                    where=row.place,
                    why="preference methods learn from the difference between the answers",
                    fix="delete the row",
                )
            example = Example(
                ids=np.concatenate([example.ids, sequences[1].ids]),
                trained=np.concatenate([example.trained, sequences[1].trained]),
                sequences=(len(example.ids), len(sequences[1].ids)),
                flaws=tuple(dict.fromkeys([*example.flaws, *sequences[1].flaws])),
                control_tokens=example.control_tokens | sequences[1].control_tokens,
            )
        prompt: Prompt = "unchecked"
        # Check the first rows, and only a sample of the other rows, because rendering a prompt
        # takes time.
        is_compared = i < _PROMPTS_ALL or i % _PROMPTS_EVERY == 0
        if is_compared and self.train_on != "all":
            prompt = self._check_prompt(samples[0], example)
        warnings = [*row_warnings(samples[0], raw=self.template.raw), *row.lost, *example.flaws]
        return EncodedRow(example, warnings, prompt, row.unread)

    def _read(self, values: Row | TunesmithError, place: str) -> "_ReadRow | DataError":
        """Convert a row to samples. Return the error if this is impossible."""
        # `values` can be the error from reading the row. The reader stored the error instead of
        # raising it, so that the rows before it are encoded first.
        if isinstance(values, TunesmithError):
            return _error_of_row(values, place)
        unread: set[str] = set()
        try:
            row = convert_row(values, self.source, where=place, system=self.system, unread=unread)
        except DataError as error:
            return _error_of_row(error, place)
        has_system = any(isinstance(part, Completion) and part.system for part in row.samples)
        if self.template.raw and has_system:
            return DataError(
                "the system message cannot be rendered, because there is no chat template",
                where=place,
                why="with data.template=raw, the text is only the prompt and the completion",
                fix="set data.template=alpaca; or write the system message into the prompt, and "
                "remove data.system",
            )
        sees = self.template.pictures is not None
        lost = dict(find_unread_pictures(values, row.samples[0], place, sees=sees))
        if sees and lost:
            name, found = next(iter(lost.items()))
            warning = ROW_WARNINGS[name]
            what = f"the row has {warning.what}: {found:.200}"
            fix = warning.fix.replace("COLUMN", found)
            return DataError(what, where=place, why=warning.why, fix=fix)
        warnings = list(lost)
        if column := lost.get("picture_column"):
            unread.add(column)
            warnings[warnings.index("picture_column")] += f" {column}"
        return _ReadRow(row, place, tuple(sorted(unread)), tuple(warnings))

    def _check_prompt(self, sample: Sample, example: Example) -> Prompt:
        """Compare the prompt, rendered separately, with the start of the example."""
        if isinstance(sample, Text):
            return "apart"
        if isinstance(sample, Conversation):
            # Compare only the part of the conversation before the first answer.
            roles = [message["role"] for message in sample.messages]
            sample = first_turns(sample, roles.index("assistant") + 1)
        try:
            prompt = self.template.prompt(sample)
        except DataError:
            # The template requires more turns, so it cannot render the prompt without the answer.
            return "apart"
        # A different prompt is not an error here, because some templates render a turn differently
        # if more turns follow.
        if not prompt or prompt != np.asarray(example.ids[: len(prompt)]).tolist():
            return "apart"
        is_supervised = np.any(example.trained[: len(prompt)])
        return "supervised" if is_supervised else "unsupervised"
