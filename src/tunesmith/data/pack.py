"""Best-fit-decreasing bin packing: documents into rows of a fixed length. And bins of like cost, for ranks.

Longest first, each document goes into the fullest bin that still has room; never more than 11/9 OPT + 1 bins
(Johnson et al., SIAM J. Comput. 3, 1974). Ding et al., arXiv:2404.10830, use it for training rows.

Remaining room is a whole number up to the capacity, so bins are kept in stacks by room, and a sorted list of the rooms
that occur answers "the least room >= n" by bisection: O(n log n) with memory moves of at most `capacity` entries.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np


def best_fit_decreasing(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Pack items of `lengths` tokens, each from 1 to `capacity`, into bins of `capacity` tokens.

    Returns:
        Bins of indices into `lengths`; each index occurs once. Equal input gives equal output: of equal lengths the
        earlier comes first.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size == 0:
        return []
    if sizes.max() > capacity or sizes.min() < 1:
        raise ValueError(f"lengths lie in {sizes.min()}..{sizes.max()}, a bin has room for 1..{capacity}")
    order = np.argsort(-sizes, kind="stable")
    bins: list[list[int]] = []
    stacks: dict[int, list[int]] = {}  # room left -> bins with that room
    rooms: list[int] = []  # the keys of `stacks`, sorted
    for item, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        at = bisect_left(rooms, size)
        if at == len(rooms):
            target, room = len(bins), capacity
            bins.append([])
        else:
            room = rooms[at]
            stack = stacks[room]
            target = stack.pop()
            if not stack:
                del stacks[room], rooms[at]
        bins[target].append(item)
        left = room - size
        if left:
            if left not in stacks:
                stacks[left] = []
                insort(rooms, left)
            stacks[left].append(target)
    return bins


def balanced_bins(costs: np.ndarray, lengths: np.ndarray, bins: int, *, room: int, most: int) -> list[list[int]] | None:
    """Deal items of float64 [n] `costs` to `bins` bins: the costliest first, each to the bin of least cost that can take it
    (longest processing time first: Graham, SIAM J. Appl. Math. 17, 1969).

    A bin takes at most `room` of the items' `lengths`, int64 [n], and `most` items. Returns all bins, some perhaps empty,
    of indices into `costs`; None where no bin can take the next item.
    """
    found: list[list[int]] = [[] for _ in range(bins)]
    load, free = np.zeros(bins), np.tile([room, most], (bins, 1))
    for item in np.argsort(-costs, kind="stable").tolist():
        takes = (lengths[item], 1)
        target = int(np.where((free >= takes).all(1), load, np.inf).argmin())
        if (free[target] < takes).any():
            return None
        found[target].append(item)
        load[target] += costs[item]
        free[target] -= takes
    return found
