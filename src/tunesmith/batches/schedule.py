"""The batch schedule, which defines the examples of each optimizer step.

The schedule is a pure function of the seed, the epoch and the recipe. The examples of a step do not
depend on earlier steps, so a resumed run gets the same examples as an uninterrupted run. Packing,
the micro batch and the number of ranks do not change the examples of a step.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tunesmith.batches.pack import best_fit_decreasing
from tunesmith.config.schema import Run
from tunesmith.rows.shuffle import shuffled
from tunesmith.units import Length, ceil_div

if TYPE_CHECKING:
    from tunesmith.tokens.token_set import TokenSet


@dataclass(frozen=True)
class ScheduleSummary:
    """Sizes of the first epoch of a run, and the number of its steps.

    Attributes:
        examples: number of examples.
        tokens: number of tokens, without padding.
        rows: number of rows.
        fill: fraction of the tokens in the rows that are not padding. Packed rows have seq_len
            tokens. Unpacked rows have the length of the longest row of their step.
        steps_per_epoch: number of optimizer steps of the first epoch.
        steps: number of steps of the entire run. None if the duration is a time.
    """

    examples: int
    tokens: int
    rows: int
    fill: float
    steps_per_epoch: int
    steps: int | None


class StepSize(NamedTuple):
    """Number of tokens that an optimizer step of the first epoch computes.

    With packing, padding is counted; without packing, it is not. Tokens that the two sequences of a
    pair share are counted once.

    Attributes:
        mean: mean over the steps.
        largest: maximum over the steps. With packing, this is the size of a step with full rows.
    """

    mean: float
    largest: int


# Units of an epoch or a step. A unit is a packed row (a list of examples) or one example, in an
# array [units, 1].
_Units = Sequence[Sequence[int]] | np.ndarray


class BatchSchedule:
    """Schedule that defines which examples each global batch contains. The first step is step 0.

    Args:
        run: the recipe.
        tokens: the tokenized rows.
        repeats: float64 [n], how often each example is in an epoch. For example, all examples with
            the value 2.3 are in each epoch twice, and 30 % of them are in it a third time. The seed
            and the epoch determine which. If None, `tokens.repeats`.

    Attributes:
        lengths: int64 [n], the number of tokens of each example, at most the length of a row.
        row_length: number of tokens of a packed row.
        sequences: number of sequences of each example.
        sequence_lengths: int64 [n], the length of the longest sequence of each example. Without
            packing, each sequence has a separate row.
        row_lengths: int64 [n], the number of tokens of each example in a packed row, in which the
            sequences of a pair can share tokens. These lengths affect the micro batches, but not
            the examples of a step.
    """

    def __init__(self, run: Run, tokens: "TokenSet", repeats: np.ndarray | None = None) -> None:
        train = run.train
        self.lengths = tokens.lengths
        self.row_lengths = tokens.row_lengths
        self.sequences = 2 if tokens.has_pairs else 1
        self.sequence_lengths = tokens.longest_sequences
        self.packed = run.data.pack
        self.row_length = run.row_tokens
        self._repeats = tokens.repeats if repeats is None else repeats
        self._shuffle = run.data.shuffle
        self._seed = train.seed
        # Fractional parts of `repeats`. Each different fraction requires a random draw per epoch.
        fractions = np.unique(self._repeats % 1.0)
        self._fractions = fractions[fractions > 0].tolist()
        self._counts_tokens = train.global_batch.unit == "tokens"
        # Whether all epochs have the same number of steps. They differ if the global batch is a
        # number of tokens and `repeats` has fractions, because each epoch then draws examples of
        # other lengths.
        self._epochs_are_alike = not self._counts_tokens or not self._fractions
        units_per_step = train.global_batch.amount
        if self._counts_tokens:
            units_per_step //= self.row_length
        self._units_per_step = max(1, units_per_step)
        self._units = lru_cache(maxsize=2)(self._order_units)

    @property
    def longest(self) -> int:
        """Number of tokens of the largest example, including the padding of its rows."""
        if self.packed:
            return int(self.lengths.max())
        return self.sequences * int(self.sequence_lengths.max())

    def digest(self) -> str:
        """Return the SHA-256 (hex) of all settings and lengths that define the steps' examples."""
        settings = [
            self._seed,
            self._shuffle,
            self._counts_tokens,
            self._units_per_step,
            self.packed,
            self.row_length,
        ]
        digest = hashlib.sha256(json.dumps(settings).encode())
        digest.update(self.lengths.tobytes())
        digest.update(self._repeats.tobytes())
        return digest.hexdigest()

    def _order_examples(self, epoch: int) -> np.ndarray:
        """Return the examples of an epoch in their order, as int64 indices."""
        examples = np.repeat(np.arange(len(self._repeats)), self._repeats.astype(np.int64))
        # Start at random stream 2, because the streams 0 and 1 of an epoch shuffle its examples and
        # its rows.
        for stream, fraction in enumerate(self._fractions, start=2):
            group = np.flatnonzero(self._repeats % 1.0 == fraction)
            count = round(fraction * len(group))
            order = shuffled(len(group), self._seed, epoch, stream)
            examples = np.concatenate([examples, group[order[:count]]])
        if not self._shuffle:
            return np.sort(examples)
        order = shuffled(len(examples), self._seed, epoch, 0)
        return examples[order]

    def _order_units(self, epoch: int) -> _Units:
        """Return the units of an epoch in order: packed rows or single examples.

        Each step takes the next `_units_per_step` units.
        """
        order = self._order_examples(epoch)
        # If the global batch is a number of examples, the units are single examples.
        if not self._counts_tokens:
            return order[:, np.newaxis]
        # Packed rows. Each row is a list of indices into `order`.
        rows = best_fit_decreasing(self.lengths[order], self.row_length)
        if self._shuffle:
            rows = [rows[r] for r in shuffled(len(rows), self._seed, epoch, 1).tolist()]
        else:
            # If the data is not shuffled, sort the rows by their first example.
            rows.sort(key=min)
        return [order[sorted(row)].tolist() for row in rows]

    def steps_per_epoch(self, epoch: int) -> int:
        """Return the number of optimizer steps of an epoch. The last step can be smaller."""
        if self._epochs_are_alike:
            epoch = 0
        return ceil_div(len(self._units(epoch)), self._units_per_step)

    @property
    def ends_short(self) -> bool:
        """Return whether the last step of an epoch can be smaller than the global batch."""
        if not self._epochs_are_alike:
            return True
        return len(self._units(0)) % self._units_per_step > 0

    def locate(self, step: int) -> tuple[int, int]:
        """Return the epoch of an optimizer step, and the number of the step within this epoch."""
        if self.steps_per_epoch(0) == 0:
            raise ValueError("there are no examples to train on")
        if self._epochs_are_alike:
            return divmod(step, self.steps_per_epoch(0))
        # The epochs have different sizes, so subtract the steps of each epoch in turn.
        epoch = 0
        while step >= self.steps_per_epoch(epoch):
            step -= self.steps_per_epoch(epoch)
            epoch += 1
        return epoch, step

    def steps(self, duration: Length) -> int | None:
        """Return the number of optimizer steps for a duration, at least 1. None if it is a time."""
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
            # Round up, so that a small fraction of an epoch is at least one step. Subtract 1e-6
            # before rounding, so that a floating-point error does not add a step.
            steps += math.ceil(fraction * self.steps_per_epoch(whole_epochs) - 1e-6)
        return max(1, steps)

    def _step_units(self, step: int) -> _Units:
        epoch, step_of_epoch = self.locate(step)
        first = step_of_epoch * self._units_per_step
        return self._units(epoch)[first : first + self._units_per_step]

    def examples(self, step: int) -> list[int]:
        """Return the indices of the examples of an optimizer step."""
        return np.concatenate(self._step_units(step)).tolist()

    def rows(self, step: int) -> list[list[int]]:
        """Return the indices of the examples in each row of a step.

        Without packing, a row has one example.
        """
        examples = self.examples(step)
        if not self.packed:
            return [[example] for example in examples]
        if self._counts_tokens:
            return [list(row) for row in self._step_units(step)]
        bins = best_fit_decreasing(self.lengths[examples], self.row_length)
        return [[examples[i] for i in sorted(bin_)] for bin_ in bins]

    def epoch(self, step: int) -> float:
        """Return the number of epochs that are completed after this step, for example 0.25."""
        epoch, step_of_epoch = self.locate(step)
        return epoch + (step_of_epoch + 1) / self.steps_per_epoch(epoch)

    def step_size(self) -> StepSize:
        units = self._units(0)
        if self._counts_tokens:
            rows = min(self._units_per_step, len(units))
            tokens = rows * self.row_length
            # `row_lengths` counts the shared tokens of a pair once, and `lengths` counts them
            # twice. The factor removes the second count from the mean.
            mean = tokens * self.row_lengths.sum() / self.lengths.sum()
            return StepSize(mean, tokens)
        first_units = np.arange(0, len(units), self._units_per_step)
        tokens_per_step = np.add.reduceat(self.row_lengths[units], first_units)
        mean = tokens_per_step.mean()
        return StepSize(float(mean), int(tokens_per_step.max()))

    def summary(self, duration: Length) -> ScheduleSummary:
        """Compute the sizes of the first epoch and the number of steps for a duration."""
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
                # Each sequence has a separate row, which is padded to the longest sequence of the
                # step.
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
