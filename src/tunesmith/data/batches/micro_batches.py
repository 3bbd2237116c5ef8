"""The micro batches of a global batch: the examples of each, and which rank runs it when.

Lengths alone decide, so that each rank knows the groups of all. Sharded ranks meet at every micro
batch: those that run at the same time, a micro step, cost much the same.

A group is a list of examples, by their indices in the schedule, that makes one micro batch.
"""

import math
from dataclasses import dataclass

from tunesmith.data.batches.pack import balanced_bins, best_fit_decreasing, groups_of_like_length
from tunesmith.data.batches.schedule import BatchSchedule
from tunesmith.units import Size, ceil_div


@dataclass(frozen=True)
class MicroBatches:
    """The micro batches of each optimizer step; its fields are explained in `Loader`."""

    schedule: BatchSchedule
    micro_batch: Size
    row_length: int | None
    multiple: int
    data_ranks: int
    attention_weight: float

    def micro_steps(self, step: int) -> list[list[list[int]]]:
        """The groups of a step, the costliest first: one for each data rank, in each micro step."""
        groups = self._groups_of_one_rank(step)
        count = ceil_div(len(groups), self.data_ranks) * self.data_ranks
        if self.data_ranks > 1:
            groups = self._balance(groups, self.schedule.examples(step), count)
            groups = sorted(groups, key=self.cost, reverse=True)
            while len(groups) < count:
                groups.append([])
        micro_steps = []
        for first in range(0, count, self.data_ranks):
            micro_steps.append(groups[first : first + self.data_ranks])
        # Costs fall along the list: turning every second micro step around keeps one rank from
        # getting the costliest group each time.
        for micro_step in micro_steps[1::2]:
            micro_step.reverse()
        return micro_steps

    def idle_share(self, micro_steps: list[list[list[int]]]) -> float:
        """Share of the data ranks' time that they wait for the costliest group of a micro step."""
        costs = [[self.cost(group) for group in groups] for groups in micro_steps]
        cost = sum(sum(costs_of_step) for costs_of_step in costs)
        slowest = sum(max(costs_of_step) for costs_of_step in costs)
        return max(0.0, 1 - cost / (self.data_ranks * slowest))

    def cost(self, group: list[int]) -> float:
        """Cost of a micro batch, padding and attention counted, in tokens; 0 without examples."""
        if not group:
            return 0.0
        lengths = self.schedule.row_lengths[group]
        rows, length = self.shape(group)
        # A query sees its own key and those before it.
        pairs = float((lengths * (lengths + 1)).sum()) / 2
        return rows * length + self.attention_weight * pairs

    def shape(self, group: list[int]) -> tuple[int, int]:
        """Rows and tokens a row of a micro batch, padding counted; both at least 1."""
        schedule = self.schedule
        packed = schedule.packed
        # A packed micro batch is one row, however many examples are in it.
        rows = 1 if packed else max(1, len(group) * schedule.sequences)
        if self.row_length is None:
            if packed:
                longest = int(schedule.row_lengths[group].sum())
            else:
                longest = int(schedule.sequence_lengths[group].max(initial=0))
            # Rounded up to the ranks of a tensor group, which cut the tokens among them.
            return rows, ceil_div(max(1, longest), self.multiple) * self.multiple
        if packed:
            return 1, self.row_length
        if self.micro_batch.unit == "examples":
            fixed_rows = self.micro_batch.amount * schedule.sequences
        else:
            fixed_rows = max(schedule.sequences, self.micro_batch.amount // self.row_length)
        return max(rows, fixed_rows), self.row_length

    def _groups_of_one_rank(self, step: int) -> list[list[int]]:
        """The groups of a step, in order, as a single rank runs them."""
        examples = self.schedule.examples(step)
        if not self.schedule.packed:
            return self._group_by_length(examples)
        if self.micro_batch.unit == "examples":
            return self._group_in_order(examples)
        lengths = self.schedule.row_lengths
        room = self.row_length or max(self.micro_batch.amount, int(lengths[examples].max()))
        groups = []
        for bin_ in best_fit_decreasing(lengths[examples], room):
            groups.append([examples[i] for i in bin_])
        rows = self.schedule.rows(step)
        row_lengths = [int(lengths[row].sum()) for row in rows]
        if max(row_lengths) > room:
            return groups
        # Full rows side by side can need fewer micro batches than best fit over the documents.
        groups_of_rows = []
        for bin_ in best_fit_decreasing(row_lengths, room):
            groups_of_rows.append([example for r in bin_ for example in rows[r]])
        return groups_of_rows if len(groups_of_rows) < len(groups) else groups

    def _group_in_order(self, examples: list[int]) -> list[list[int]]:
        """At most the micro batch's examples in each, and no more tokens than a fixed shape has."""
        lengths = self.schedule.row_lengths
        groups: list[list[int]] = [[]]
        for example in examples:
            group = groups[-1]
            is_full = len(group) == self.micro_batch.amount
            # A fixed shape may be full before it has its count of examples.
            if self.row_length is not None and lengths[[*group, example]].sum() > self.row_length:
                is_full = True
            if group and is_full:
                groups.append([])
            groups[-1].append(example)
        return groups

    def _group_by_length(self, examples: list[int], max_cost: float = math.inf) -> list[list[int]]:
        """Examples of similar length together, so that their rows pad little.

        A group has the micro batch's examples, or as many as fit into its tokens, and costs
        `max_cost` at most; but at least one example. The sum over the step does not depend on the
        order.
        """
        lengths = self.schedule.sequence_lengths[examples]

        def most(i: int) -> int:
            count = self.micro_batch.amount
            if self.micro_batch.unit == "tokens":
                # Each row of the group is as wide as its longest.
                width = self.row_length or int(lengths[i])
                count = count // (width * self.schedule.sequences)
            return int(min(count, max_cost / self.cost([examples[i]])))

        groups = groups_of_like_length(lengths, most)
        return [[examples[i] for i in group] for group in groups]

    def _balance(self, groups: list[list[int]], examples: list[int], count: int) -> list[list[int]]:
        """The examples of `groups`, at most `count`, in at most `count` groups of like cost."""
        if not self.schedule.packed:
            return self._balance_by_length(examples, count)
        lengths = self.schedule.row_lengths[examples]
        pairs = lengths * (lengths + 1) / 2
        costs = lengths + self.attention_weight * pairs
        if self.row_length is not None:
            # Micro batches of one fixed shape differ in attention alone.
            costs = pairs
        # None larger than the largest of one rank: that is what memory holds.
        room = max(int(self.schedule.row_lengths[group].sum()) for group in groups)
        by_examples = self.micro_batch.unit == "examples"
        most = self.micro_batch.amount if by_examples else len(examples)
        bins = balanced_bins(costs, lengths, count, room=room, most=most)
        if bins is None:
            return groups
        return [[examples[i] for i in bin_] for bin_ in bins]

    def _balance_by_length(self, examples: list[int], count: int) -> list[list[int]]:
        """Groups of rows of similar length under the least cost that needs at most `count`."""
        low = 0
        high = math.ceil(len(examples) * max(self.cost([example]) for example in examples))
        while low < high:
            max_cost = (low + high) // 2
            if len(self._group_by_length(examples, max_cost)) <= count:
                high = max_cost
            else:
                low = max_cost + 1
        return self._group_by_length(examples, low)
