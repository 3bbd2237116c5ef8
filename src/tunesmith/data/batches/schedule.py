"""The batch schedule: the examples that each optimizer step trains on.

A pure function of (seed, epoch, recipe): step k is computed without the steps before it, so a
run that resumes at k sees what an uninterrupted one sees. Packing, the micro batch and the number
of ranks do not change which examples a step has.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tunesmith.config.schema import Data, Run, Train
from tunesmith.data.batches.pack import best_fit_decreasing
from tunesmith.data.shuffle import shuffled
from tunesmith.units import Length, ceil_div, count_of

if TYPE_CHECKING:
    from tunesmith.data.tokens.token_set import TokenSet


def describe_long_warmup(train: Train, steps: int | None) -> list[str]:
    """A sentence, with its fix, where a warmup in steps is as long as the run of `steps`."""
    warmup = train.warmup
    if steps is None or warmup.unit != "steps" or warmup.amount < max(2, steps):
        return []
    what = f"train.warmup is {warmup}, and the run has {count_of(steps, 'step')}"
    return [f"{what}: the learning rate still rises at its end; fix: train.warmup='3 %'"]


@dataclass(frozen=True)
class ScheduleSummary:
    """The figures of a run: those of its first epoch, and its steps in all.

    Attributes:
        fill: non-padding share of the rows (packed: of rows * seq_len; others: padded to the
            longest of their step).
        steps: of the whole run; None where the duration is a time.
    """

    examples: int
    tokens: int
    rows: int
    fill: float
    steps_per_epoch: int
    steps: int | None


class StepSize(NamedTuple):
    """Tokens that an optimizer step of the first epoch computes.

    Packed rows count whole, examples with their own tokens; those that a pair's sequences share
    count once.
    """

    mean: float
    largest: int


# What an epoch or a step consists of: packed rows of examples, or examples.
_Units = Sequence[Sequence[int]] | np.ndarray


class BatchSchedule:
    """The sequence of global batches. Steps are counted from 0.

    Args:
        lengths: int64 [n], tokens of each example, at most a row's.
        data: gives seq_len, pack and shuffle.
        train: gives global_batch and seed.
        repeats: float64 [n], how often an epoch sees each example: the whole part for sure, and of
            the examples with the same fraction f, a share f that the seed draws anew each epoch.
            None: once.
        row_length: tokens of a packed row; None: `data.seq_len`.
        sequences, sequence_lengths: of each example how many sequences it has, and int64 [n] the
            tokens of its longest one: without packing each sequence has a row.
        row_lengths: int64 [n], tokens of each example in a packed row, where a pair's sequences may
            share some; None: `lengths`. They decide what a micro batch has, and not what a step
            has.

    Attributes:
        sequence_lengths, row_lengths: int64 [n].
    """

    def __init__(
        self,
        lengths: np.ndarray,
        data: Data,
        train: Train,
        *,
        repeats: np.ndarray | None = None,
        row_length: int | None = None,
        sequences: int = 1,
        sequence_lengths: np.ndarray | None = None,
        row_lengths: np.ndarray | None = None,
    ) -> None:
        self.lengths = np.asarray(lengths, np.int64)
        self.row_lengths = self.lengths if row_lengths is None else row_lengths
        self.sequences = sequences
        self.sequence_lengths = self.lengths if sequence_lengths is None else sequence_lengths
        self.packed = data.pack
        self.row_length = row_length or data.seq_len
        if repeats is None:
            repeats = np.ones(len(self.lengths))
        self._repeats = np.asarray(repeats, np.float64)
        self._shuffle = data.shuffle
        self._seed = train.seed
        self._fractions = [f for f in np.unique(self._repeats % 1.0).tolist() if f > 0]
        self._counts_tokens = train.global_batch.unit == "tokens"
        # Rows of whole epochs hold the same lengths each time, so only drawn fractions make epochs
        # of different size.
        self._epochs_are_alike = not self._counts_tokens or not self._fractions
        tokens_per_unit = self.row_length if self._counts_tokens else 1
        self._units_per_step = max(1, train.global_batch.amount // tokens_per_unit)
        self._units = lru_cache(maxsize=2)(self._order_units)

    @classmethod
    def of(cls, run: Run, tokens: "TokenSet", repeats: np.ndarray | None = None) -> "BatchSchedule":
        """Build it from a recipe and its rows; packed ones have room for the largest example.

        repeats: None takes those of `tokens`.
        """
        return cls(
            tokens.lengths,
            run.data,
            run.train,
            repeats=tokens.repeats if repeats is None else repeats,
            row_length=run.row_tokens,
            sequences=2 if tokens.has_pairs else 1,
            sequence_lengths=tokens.longest_sequences,
            row_lengths=tokens.row_lengths,
        )

    @property
    def longest(self) -> int:
        """Tokens that the largest example takes, with the padding of its rows."""
        if self.packed:
            return int(self.lengths.max())
        return self.sequences * int(self.sequence_lengths.max())

    def digest(self) -> str:
        """sha256 (hex) of every setting and length that decides which examples a step has."""
        settings = [
            self._seed,
            self._shuffle,
            self._counts_tokens,
            self._units_per_step,
            self.packed,
            self.row_length,
        ]
        content = json.dumps(settings).encode() + self.lengths.tobytes() + self._repeats.tobytes()
        return hashlib.sha256(content).hexdigest()

    def _order_examples(self, epoch: int) -> np.ndarray:
        """int64: the examples of an epoch in its order."""
        whole_repeats = self._repeats.astype(np.int64)
        examples = np.repeat(np.arange(len(self._repeats)), whole_repeats)
        for number, fraction in enumerate(self._fractions):
            group = np.flatnonzero(self._repeats % 1.0 == fraction)
            # Streams 0 and 1 of an epoch order its examples and its rows.
            order = shuffled(len(group), self._seed, epoch, 2 + number)
            drawn = group[order[: round(fraction * len(group))]]
            examples = np.concatenate([examples, drawn])
        if not self._shuffle:
            return np.sort(examples, kind="stable")
        return examples[shuffled(len(examples), self._seed, epoch, 0)]

    def _order_units(self, epoch: int) -> _Units:
        """All units of an epoch in its order; each step takes the next `_units_per_step`."""
        order = self._order_examples(epoch)
        if not self._counts_tokens:
            return order
        # Of indices into `order`.
        rows = best_fit_decreasing(self.lengths[order], self.row_length)
        if self._shuffle:
            row_order = shuffled(len(rows), self._seed, epoch, 1).tolist()
            rows = [rows[r] for r in row_order]
        else:
            rows.sort(key=min)
        return [order[sorted(row)].tolist() for row in rows]

    def steps_per_epoch(self, epoch: int) -> int:
        """Optimizer steps of one epoch; the last may be short."""
        if self._epochs_are_alike:
            epoch = 0
        return ceil_div(len(self._units(epoch)), self._units_per_step)

    @property
    def ends_short(self) -> bool:
        """Tell whether the last step of an epoch may have less than the global batch."""
        if not self._epochs_are_alike:
            return True
        return len(self._units(0)) % self._units_per_step > 0

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, step within it) of an optimizer step."""
        if self.steps_per_epoch(0) == 0:
            raise ValueError("there are no examples to train on")
        if self._epochs_are_alike:
            return divmod(step, self.steps_per_epoch(0))
        epoch = 0
        while step >= self.steps_per_epoch(epoch):
            step -= self.steps_per_epoch(epoch)
            epoch += 1
        return epoch, step

    def steps(self, duration: Length) -> int | None:
        """Optimizer steps of a run, at least one; None where the duration is a time."""
        if duration.unit == "steps":
            return int(duration.amount)
        if duration.unit != "epochs":
            return None
        whole_epochs = int(duration.amount)
        fraction = duration.amount % 1
        if self._epochs_are_alike:
            steps = whole_epochs * self.steps_per_epoch(0)
        else:
            steps = sum(self.steps_per_epoch(epoch) for epoch in range(whole_epochs))
        if fraction:
            # Rounded up, so that a part of an epoch is never nothing; the small term removes what
            # binary fractions add.
            steps += math.ceil(fraction * self.steps_per_epoch(whole_epochs) - 1e-6)
        return max(1, steps)

    def _step_units(self, step: int) -> _Units:
        epoch, step_of_epoch = self.locate(step)
        first = step_of_epoch * self._units_per_step
        return self._units(epoch)[first : first + self._units_per_step]

    def examples(self, step: int) -> list[int]:
        """Indices of the examples that an optimizer step trains on."""
        units = self._step_units(step)
        if isinstance(units, np.ndarray):
            return units.tolist()
        return [example for row in units for example in row]

    def rows(self, step: int) -> list[list[int]]:
        """Group the examples of a step that share rows of `seq_len` tokens.

        Without packing none shares a row with another.
        """
        units = self._step_units(step)
        if self.packed and not isinstance(units, np.ndarray):
            return [list(row) for row in units]
        examples = self.examples(step)
        if not self.packed:
            return [[example] for example in examples]
        rows = best_fit_decreasing(self.lengths[examples], self.row_length)
        return [[examples[i] for i in sorted(row)] for row in rows]

    def epoch(self, step: int) -> float:
        """Epochs completed after this step."""
        epoch, step_of_epoch = self.locate(step)
        return epoch + (step_of_epoch + 1) / self.steps_per_epoch(epoch)

    def step_size(self) -> StepSize:
        units = self._units(0)
        if not isinstance(units, np.ndarray):
            tokens = min(self._units_per_step, len(units)) * self.row_length
            return StepSize(tokens * self.row_lengths.sum() / self.lengths.sum(), tokens)
        first_units = np.arange(0, len(units), self._units_per_step)
        tokens_per_step = np.add.reduceat(self.row_lengths[units], first_units)
        return StepSize(float(tokens_per_step.mean()), int(tokens_per_step.max()))

    def summary(self, duration: Length) -> ScheduleSummary:
        """Examples -> rows -> optimizer steps."""
        examples = 0
        tokens = 0
        rows = 0
        tokens_with_padding = 0
        for step in range(self.steps_per_epoch(0)):
            step_rows = self.rows(step)
            step_examples = [example for row in step_rows for example in row]
            examples += len(step_examples)
            tokens += int(self.lengths[step_examples].sum())
            row_count = len(step_rows)
            row_length = self.row_length
            if not self.packed:
                # Each sequence has a row, padded to the longest of its step.
                row_count *= self.sequences
                row_length = int(self.sequence_lengths[step_examples].max())
            rows += row_count
            tokens_with_padding += row_count * row_length
        return ScheduleSummary(
            examples=examples,
            tokens=tokens,
            rows=rows,
            fill=tokens / max(1, tokens_with_padding),
            steps_per_epoch=self.steps_per_epoch(0),
            steps=self.steps(duration),
        )
