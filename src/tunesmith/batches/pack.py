"""Bin packing: documents into rows of a fixed length, and examples into bins of similar cost.

`best_fit_decreasing` starts with the longest document. Each document goes into the fullest bin that
has enough space. If the optimal solution has n bins, the algorithm needs at most 11/9 n + 4 bins
(Johnson et al., SIAM J. Comput. 3, 1974). Ding et al., arXiv:2404.10830, use it for training rows.

Bins with the same free space are in one list, and the sizes of free space that occur are in a
sorted list. Bisection in the sorted list finds the smallest sufficient space. Therefore the
algorithm needs O(n log n) time.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence

import numpy as np


def best_fit_decreasing(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Pack items into bins of `capacity` tokens.

    Args:
        lengths: number of tokens of each item, from 1 to `capacity`.
        capacity: number of tokens of a bin.

    Returns:
        The bins, as lists of indices into `lengths`. Each index occurs once. The result is
        deterministic: items of equal length are packed in their order.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size == 0:
        return []
    if sizes.max() > capacity or sizes.min() < 1:
        raise ValueError(
            f"each example must have 1 to {capacity} tokens, but the examples have "
            f"{sizes.min()} to {sizes.max()}"
        )
    # A stable sort keeps the order of items of equal length, so the packing is deterministic.
    order = np.argsort(-sizes, kind="stable")
    bins: list[list[int]] = []
    bins_by_space: dict[int, list[int]] = {}
    # Sorted keys of `bins_by_space`, which are the sizes of free space.
    spaces: list[int] = []
    for item, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        # Find the smallest free space that is large enough for the item.
        at = bisect_left(spaces, size)
        if at == len(spaces):
            # No bin has enough space: add an empty bin.
            target = len(bins)
            space = capacity
            bins.append([])
        else:
            space = spaces[at]
            target = bins_by_space[space].pop()
            # If no bin with this free space is left, remove the size from `spaces`.
            if not bins_by_space[space]:
                del bins_by_space[space], spaces[at]
        bins[target].append(item)
        space_left = space - size
        # A full bin is not listed, because no item fits into it.
        if space_left:
            if space_left not in bins_by_space:
                bins_by_space[space_left] = []
                insort(spaces, space_left)
            bins_by_space[space_left].append(target)
    return bins


def groups_of_like_length(lengths: np.ndarray, max_items: Callable[[int], int]) -> list[list[int]]:
    """Group items of similar length, so that padding to the longest item of a group is short.

    Args:
        lengths: int64 [n].
        max_items: function that takes the index of a group's longest item, and returns the maximum
            number of items of the group. A group always has at least one item.

    Returns:
        Groups of indices into `lengths`, the longest items first.
    """
    order = np.argsort(-lengths, kind="stable").tolist()
    groups = []
    first = 0
    while first < len(order):
        stop = first + max(1, max_items(order[first]))
        groups.append(order[first:stop])
        first = stop
    return groups


def balanced_bins(
    costs: np.ndarray, lengths: np.ndarray, bins: int, *, capacity: int, max_items: int
) -> list[list[int]] | None:
    """Distribute items to bins so that all bins have similar costs.

    The items are processed from the most to the least expensive. Each item is added to the bin with
    the lowest total cost that has space for the item (longest processing time first: Graham, SIAM
    J. Appl. Math. 17, 1969).

    Args:
        costs: float64 [n], the cost of each item.
        lengths: int64 [n], the number of tokens of each item.
        bins: number of bins.
        capacity: maximum number of tokens of a bin.
        max_items: maximum number of items of a bin.

    Returns:
        The bins, as lists of indices into `costs`. A bin can be empty. None if an item does not fit
        into any bin.
    """
    items: list[list[int]] = [[] for _ in range(bins)]
    loads = np.zeros(bins)
    space_left = np.full(bins, capacity)
    items_left = np.full(bins, max_items)
    # Assign the most expensive item first.
    for item in np.argsort(-costs, kind="stable").tolist():
        can_take = (space_left >= lengths[item]) & (items_left >= 1)
        if not can_take.any():
            return None
        target = int(np.where(can_take, loads, np.inf).argmin())
        items[target].append(item)
        loads[target] += costs[item]
        space_left[target] -= lengths[item]
        items_left[target] -= 1
    return items
