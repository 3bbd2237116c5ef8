"""Rows as a file has them -> examples, warnings, and whether the prompt is masked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from tunesmith.config.schema import Source
from tunesmith.data.batch import Example
from tunesmith.data.formats import Conversation, Feedback, Pair, Sample, Text, convert_row
from tunesmith.data.row_warnings import row_warnings
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
    """The example of a row, uncut, and the names in ROW_WARNINGS that fit it."""

    example: Example
    warnings: list[str]
    prompt: Prompt


def _samples_of(row: Sample | Pair | Feedback) -> list[Sample]:
    """What is tokenized of a row; of a pair the chosen answer comes first."""
    if isinstance(row, Pair):
        return [row.chosen, row.rejected]
    if isinstance(row, Feedback):
        return [row.answer]
    return [row]


def _side_by_side(chosen: Example, rejected: Example) -> Example:
    """A pair as one example of two sequences."""
    return Example(
        ids=np.concatenate([chosen.ids, rejected.ids]),
        trained=np.concatenate([chosen.trained, rejected.trained]),
        sequences=(len(chosen.ids), len(rejected.ids)),
    )


@dataclass(frozen=True)
class RowEncoder:
    """All that the examples of a source depend on beside its rows."""

    template: Template
    source: Source
    system: str | None
    train_on: TrainOn

    def __call__(self, batch: RowBatch) -> list[EncodedRow]:
        """The examples of a batch; DataError for the first row that has none, or cannot be read."""
        rows = []
        for values, place in zip(batch.rows, batch.places, strict=True):
            # Errors of reading come as values, so that the first row's is raised, whichever worker
            # met it.
            if isinstance(values, TunesmithError):
                raise values
            rows.append(convert_row(values, self.source, where=place, system=self.system))
        examples = self._encode_samples(rows, batch.places)
        encoded = []
        for i, (row, example) in enumerate(zip(rows, examples, strict=True), batch.first):
            prompt: Prompt = "unchecked"
            # All of the first rows and a sample of the others: rendering the prompt alone takes
            # time.
            is_compared = i < _PROMPTS_ALL or i % _PROMPTS_EVERY == 0
            sample = _samples_of(row)[0]
            if is_compared and self.train_on != "all":
                prompt = self._check_prompt(sample, example)
            warnings = list(row_warnings(sample, raw=self.template.raw))
            encoded.append(EncodedRow(example, warnings, prompt))
        return encoded

    def _encode_samples(
        self, rows: Sequence[Sample | Pair | Feedback], places: Sequence[str]
    ) -> list[Example]:
        """The example of each row, with one call of the tokenizer for all of them."""
        samples = []
        sample_places = []
        for row, place in zip(rows, places, strict=True):
            of_row = _samples_of(row)
            samples += of_row
            sample_places += [place] * len(of_row)
        encoded = iter(self.template.encode_many(samples, self.train_on, where=sample_places))
        examples = []
        for row in rows:
            example = next(encoded)
            if isinstance(row, Pair):
                example = _side_by_side(example, next(encoded))
            elif isinstance(row, Feedback):
                example = example._replace(label=row.is_good)
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
