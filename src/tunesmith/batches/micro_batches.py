"""Division of a global batch into micro batches, and their assignment to ranks.

The division depends only on the lengths of the examples, so each rank can compute the micro batches
of all ranks. Ranks that share a model (FSDP) wait for each other in every micro batch. Therefore
the micro batches that run at the same time, which are called a micro step, have similar costs.

In this module, a group is the list of the example indices of one micro batch.
"""

import math
from dataclasses import dataclass

from tunesmith.batches.pack import balanced_bins, best_fit_decreasing, groups_of_like_length
from tunesmith.batches.schedule import BatchSchedule
from tunesmith.units import Size, ceil_div


@dataclass(frozen=True)
class MicroBatches:
    """Computation of the micro batches of each optimizer step. `Loader` describes the fields."""

    schedule: BatchSchedule
    micro_batch: Size
    row_length: int | None
    multiple: int
    data_ranks: int
    attention_weight: float

    def micro_steps(self, step: int) -> list[list[list[int]]]:
        """Return the micro steps of an optimizer step. Each has one micro batch per data rank.

        A micro batch is a list of example indices. With several data ranks, the most expensive
        micro batches come first.
        """
        groups = self._groups_of_one_rank(step)
        count = ceil_div(len(groups), self.data_ranks) * self.data_ranks
        if self.data_ranks > 1:
            groups = self._balance(groups, self.schedule.examples(step), count)
            groups = sorted(groups, key=self.cost, reverse=True)
            # Add empty groups, because every rank must run the same number of micro batches.
            while len(groups) < count:
                groups.append([])
        firsts = range(0, count, self.data_ranks)
        micro_steps = [groups[first : first + self.data_ranks] for first in firsts]
        # In each micro step, the groups are sorted from the most to the least expensive. Reverse
        # every second micro step, so that the first rank does not always get the most expensive
        # group.
        for micro_step in micro_steps[1::2]:
            micro_step.reverse()
        return micro_steps

    def idle_share(self, micro_steps: list[list[list[int]]]) -> float:
        """Return the fraction of the data ranks' time in which they wait for the slowest rank."""
        cost = 0.0
        slowest = 0.0
        for groups in micro_steps:
            costs = [self.cost(group) for group in groups]
            cost += sum(costs)
            slowest += max(costs)
        return max(0.0, 1 - cost / (self.data_ranks * slowest))

    def cost(self, group: list[int]) -> float:
        """Return the cost of a micro batch: its tokens with padding, plus the cost of attention.

        The unit is the cost of the matmuls of one token. The cost of an empty group is 0.
        """
        if not group:
            return 0.0
        lengths = self.schedule.row_lengths[group]
        rows, length = self.shape(group)
        # Number of (query, key) pairs: with causal attention, query i sees the keys 0 to i.
        pairs = float((lengths * (lengths + 1)).sum()) / 2
        return rows * length + self.attention_weight * pairs

    def shape(self, group: list[int]) -> tuple[int, int]:
        """Return the number of rows of a micro batch, and the length of each row including
        padding.
        """
        schedule = self.schedule
        # A packed micro batch always has one row.
        rows = 1 if schedule.packed else max(1, len(group) * schedule.sequences)
        if self.row_length is None:
            if schedule.packed:
                longest = int(schedule.row_lengths[group].sum())
            else:
                longest = int(schedule.sequence_lengths[group].max(initial=0))
            # Round up, because the ranks of a tensor parallel group divide the tokens equally.
            return rows, ceil_div(max(1, longest), self.multiple) * self.multiple
        if not schedule.packed:
            # If the shape is fixed, every micro batch has the number of rows of a full one.
            full_rows = self.micro_batch.amount // self.row_length
            if self.micro_batch.unit == "examples":
                full_rows = self.micro_batch.amount * schedule.sequences
            rows = max(rows, full_rows, schedule.sequences)
        return rows, self.row_length

    def _groups_of_one_rank(self, step: int) -> list[list[int]]:
        """Return the micro batches of a step in a run with only one data rank.

        A micro batch is a list of example indices.
        """
        examples = self.schedule.examples(step)
        if not self.schedule.packed:
            return self._group_by_length(examples)
        if self.micro_batch.unit == "examples":
            return self._group_in_order(examples)
        lengths = self.schedule.row_lengths
        own_lengths = lengths[examples]
        capacity = self.row_length or max(self.micro_batch.amount, int(own_lengths.max()))
        bins = best_fit_decreasing(own_lengths, capacity)
        groups = [[examples[i] for i in bin_] for bin_ in bins]
        rows = self.schedule.rows(step)
        row_lengths = [int(lengths[row].sum()) for row in rows]
        if max(row_lengths) > capacity:
            return groups
        # Try also to put entire rows of the schedule into micro batches, because this can need
        # fewer micro batches than packing single documents.
        bins = best_fit_decreasing(row_lengths, capacity)
        groups_of_rows = [[example for r in bin_ for example in rows[r]] for bin_ in bins]
        # If both need the same number of micro batches, `min` returns the first.
        return min(groups, groups_of_rows, key=len)

    def _group_in_order(self, examples: list[int]) -> list[list[int]]:
        """Group consecutive examples into micro batches.

        A group has at most `micro_batch` examples. If `row_length` is set, a group also has at most
        `row_length` tokens.
        """
        lengths = self.schedule.row_lengths
        groups: list[list[int]] = [[]]
        for example in examples:
            group = groups[-1]
            is_full = len(group) == self.micro_batch.amount
            # If rows have a fixed length, a group can be full before it has `micro_batch` examples.
            if self.row_length is not None:
                is_full = is_full or lengths[[*group, example]].sum() > self.row_length
            if group and is_full:
                groups.append([])
            groups[-1].append(example)
        return groups

    def _group_by_length(self, examples: list[int], max_cost: float = math.inf) -> list[list[int]]:
        """Group examples of similar length, which reduces padding.

        The size of a group is at most `micro_batch` and its cost is at most `max_cost`. However,
        each group has at least one example. The order of the examples can change. This does not
        change the result of a step, which is a sum over all examples.
        """
        lengths = self.schedule.sequence_lengths[examples]

        def max_items(i: int) -> int:
            count = self.micro_batch.amount
            if self.micro_batch.unit == "tokens":
                # Example i is the longest of its group, so it defines the length of all rows of the
                # group.
                width = self.row_length or int(lengths[i])
                count = count // (width * self.schedule.sequences)
            return int(min(count, max_cost / self.cost([examples[i]])))

        groups = groups_of_like_length(lengths, max_items)
        return [[examples[i] for i in group] for group in groups]

    def _balance(self, groups: list[list[int]], examples: list[int], count: int) -> list[list[int]]:
        """Divide the examples of a step into at most `count` groups of similar cost.

        Args:
            groups: the groups that a run with one data rank would use. They are returned unchanged
                if no balanced division is possible.
            examples: the examples of the step.
            count: maximum number of groups.
        """
        if not self.schedule.packed:
            return self._balance_by_length(examples, count)
        lengths = self.schedule.row_lengths[examples]
        pairs = lengths * (lengths + 1) / 2
        costs = lengths + self.attention_weight * pairs
        if self.row_length is not None:
            # Micro batches with a fixed shape have the same number of tokens, so only attention
            # makes their costs different.
            costs = pairs
        # To limit the memory, a group must not have more tokens than the largest group in `groups`.
        capacity = max(int(self.schedule.row_lengths[group].sum()) for group in groups)
        max_items = len(examples)
        if self.micro_batch.unit == "examples":
            max_items = self.micro_batch.amount
        bins = balanced_bins(costs, lengths, count, capacity=capacity, max_items=max_items)
        if bins is None:
            return groups
        return [[examples[i] for i in bin_] for bin_ in bins]

    def _balance_by_length(self, examples: list[int], count: int) -> list[list[int]]:
        """Group examples of similar length, with the smallest `max_cost` that gives at most `count`
        groups.

        The smallest `max_cost` is found by bisection.
        """
        low = 0
        largest = max(self.cost([example]) for example in examples)
        # Upper limit of the bisection. With this `max_cost`, one group can contain all examples.
        high = math.ceil(len(examples) * largest)
        while low < high:
            max_cost = (low + high) // 2
            if len(self._group_by_length(examples, max_cost)) <= count:
                high = max_cost
            else:
                low = max_cost + 1
        return self._group_by_length(examples, low)
