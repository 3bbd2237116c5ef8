"""Which examples each optimizer step trains on.

A pure function of (seed, epoch, recipe): step k is found without playing the steps before it, so a run that resumes at
k sees what an uninterrupted one sees. Packing, the micro batch and the number of ranks do not change which examples a
step has.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from tunesmith.config.schema import Data, Train
from tunesmith.data.pack import best_fit_decreasing
from tunesmith.units import Length


@dataclass(frozen=True)
class ScheduleSummary:
    """What a run will do: of its first epoch, and in `steps` (None where the duration is a time) of the whole run.

    fill: non-padding share of the rows (packed: of rows * seq_len; others: padded to the longest of their step).
    """

    examples: int
    tokens: int
    rows: int
    fill: float
    steps_per_epoch: int
    steps: int | None


class StepSize(NamedTuple):
    """Tokens that an optimizer step of the first epoch takes: packed rows count whole, examples with their own."""

    mean: float
    largest: int


_Units = Sequence[Sequence[int]] | np.ndarray  # of an epoch or a step: packed rows of examples, or examples


def shuffled(n: int, *seed: int) -> np.ndarray:
    """int64: 0 to n - 1 in an order that depends on the seed alone.

    Raw output of Philox and SeedSequence is what numpy promises never to change; the methods of Generator may draw
    differently in another version, and a resumed run would see other batches.
    """
    return np.argsort(np.random.Philox(np.random.SeedSequence(seed)).random_raw(n), kind="stable")


class BatchSchedule:
    """The sequence of global batches. Steps are counted from 0.

    Args:
        lengths: int64 [n], tokens of each example, at most `data.seq_len`.
        data: gives seq_len, pack and shuffle.
        train: gives global_batch and seed.
        repeats: float64 [n], how often an epoch sees each example: the whole part for sure, and of the examples with
            the same fraction f, a share f that the seed draws anew each epoch. None: once.
    """

    def __init__(self, lengths: np.ndarray, data: Data, train: Train, *, repeats: np.ndarray | None = None) -> None:
        self.lengths = np.asarray(lengths, np.int64)
        self.packed, self.row_length = data.pack, data.seq_len
        self._repeats = np.ones(len(self.lengths)) if repeats is None else np.asarray(repeats, np.float64)
        self._shuffle, self._size, self._seed = data.shuffle, train.global_batch, train.seed
        self._fractions = [f for f in np.unique(self._repeats % 1.0).tolist() if f > 0]
        # Rows of whole epochs hold the same lengths each time, so only drawn fractions make epochs of different size.
        self._even = self._size.unit == "examples" or not self._fractions
        self._per_step = max(1, self._size.amount // (self.row_length if self._size.unit == "tokens" else 1))
        self._units = lru_cache(maxsize=2)(self._order_units)

    def _order_examples(self, epoch: int) -> np.ndarray:
        """int64: the examples of an epoch in its order."""
        taken = np.repeat(np.arange(len(self._repeats)), np.floor(self._repeats).astype(np.int64))
        for number, fraction in enumerate(self._fractions):
            group = np.flatnonzero(self._repeats % 1.0 == fraction)
            drawn = shuffled(len(group), self._seed, epoch, 2 + number)
            taken = np.concatenate([taken, group[drawn[: round(fraction * len(group))]]])
        if not self._shuffle:
            return np.sort(taken, kind="stable")
        return taken[shuffled(len(taken), self._seed, epoch, 0)]

    def _order_units(self, epoch: int) -> _Units:
        """All units of an epoch in its order; each step takes the next `_per_step`."""
        order = self._order_examples(epoch)
        if self._size.unit == "examples":
            return order
        rows = best_fit_decreasing(self.lengths[order], self.row_length)
        if self._shuffle:
            turn = shuffled(len(rows), self._seed, epoch, 1).tolist()
        else:
            turn = sorted(range(len(rows)), key=lambda r: min(rows[r]))
        return [order[sorted(rows[r])].tolist() for r in turn]

    def steps_per_epoch(self, epoch: int) -> int:
        """Optimizer steps of one epoch; the last may be short."""
        return -(-len(self._units(0 if self._even else epoch)) // self._per_step)

    @property
    def ends_short(self) -> bool:
        """Whether the last step of an epoch may have less than the global batch."""
        return not self._even or len(self._units(0)) % self._per_step > 0

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, step within it) of an optimizer step."""
        if self.steps_per_epoch(0) == 0:
            raise ValueError("there are no examples to take a step on")
        if self._even:
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
        whole, part = int(duration.amount), duration.amount % 1
        full = whole * self.steps_per_epoch(0) if self._even else sum(map(self.steps_per_epoch, range(whole)))
        # Rounded up, so that a part of an epoch is never nothing; the small term removes what binary fractions add.
        return max(1, full + (math.ceil(part * self.steps_per_epoch(whole) - 1e-6) if part else 0))

    def _step(self, step: int) -> _Units:
        epoch, k = self.locate(step)
        return self._units(epoch)[k * self._per_step : (k + 1) * self._per_step]

    def examples(self, step: int) -> list[int]:
        """Indices of the examples that an optimizer step trains on."""
        units = self._step(step)
        return units.tolist() if isinstance(units, np.ndarray) else [i for row in units for i in row]

    def rows(self, step: int) -> list[list[int]]:
        """How the examples of a step share rows of `seq_len` tokens; without packing each has its own."""
        units, members = self._step(step), self.examples(step)
        if not self.packed:
            return [[i] for i in members]
        if not isinstance(units, np.ndarray):
            return [list(row) for row in units]
        rows = best_fit_decreasing(self.lengths[members], self.row_length)
        return [[members[i] for i in sorted(row)] for row in rows]

    def epoch(self, step: int) -> float:
        """Epochs done when this step is done."""
        epoch, k = self.locate(step)
        return epoch + (k + 1) / self.steps_per_epoch(epoch)

    def step_size(self) -> StepSize:
        units = self._units(0)
        if not isinstance(units, np.ndarray):
            whole = min(self._per_step, len(units)) * self.row_length
            return StepSize(whole, whole)
        sums = np.add.reduceat(self.lengths[units], np.arange(0, len(units), self._per_step))
        return StepSize(float(sums.mean()), int(sums.max()))

    def summary(self, duration: Length) -> ScheduleSummary:
        """Examples -> rows -> optimizer steps."""
        examples = tokens = rows = room = 0
        for k in range(self.steps_per_epoch(0)):
            shared = self.rows(k)
            members = self.lengths[[i for row in shared for i in row]]
            examples, tokens, rows = examples + len(members), tokens + int(members.sum()), rows + len(shared)
            room += len(shared) * (self.row_length if self.packed else int(members.max()))
        per_epoch, fill = self.steps_per_epoch(0), tokens / max(1, room)
        return ScheduleSummary(examples, tokens, rows, fill, per_epoch, self.steps(duration))
