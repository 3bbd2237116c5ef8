"""Bin packing: documents into rows of a fixed length, best fit first; bins of like cost for ranks.

Longest first, each document goes into the fullest bin that still has room; never more than
11/9 OPT + 1 bins (Johnson et al., SIAM J. Comput. 3, 1974). Ding et al., arXiv:2404.10830, use it
for training rows.

Remaining room is a whole number up to the capacity, so bins are in stacks by room, and a
sorted list of the rooms that occur answers "the least room >= n" by bisection: O(n log n) with
memory moves of at most `capacity` entries.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence

import numpy as np


def best_fit_decreasing(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Pack items of `lengths` tokens, each from 1 to `capacity`, into bins of `capacity` tokens.

    Returns:
        Bins of indices into `lengths`; each index occurs once. Equal input gives equal output: of
        equal lengths the earlier comes first.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size == 0:
        return []
    if sizes.max() > capacity or sizes.min() < 1:
        raise ValueError(
            f"lengths lie in {sizes.min()}..{sizes.max()}, a bin has room for 1..{capacity}"
        )
    # Stable: examples of one length keep their order, so the packing is the same at each start.
    order = np.argsort(-sizes, kind="stable")
    bins: list[list[int]] = []
    bins_by_room: dict[int, list[int]] = {}
    # The keys of `bins_by_room`, sorted.
    rooms: list[int] = []
    for item, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        # The bin with the least room in which the item fits.
        at = bisect_left(rooms, size)
        if at == len(rooms):
            target = len(bins)
            room = capacity
            bins.append([])
        else:
            room = rooms[at]
            target = bins_by_room[room].pop()
            # No empty list may stay: `rooms` would offer a bin that is not there.
            if not bins_by_room[room]:
                del bins_by_room[room], rooms[at]
        bins[target].append(item)
        room_left = room - size
        if room_left:
            if room_left not in bins_by_room:
                bins_by_room[room_left] = []
                insort(rooms, room_left)
            bins_by_room[room_left].append(target)
    return bins


def groups_of_like_length(lengths: np.ndarray, most: Callable[[int], int]) -> list[list[int]]:
    """Group items of similar length, so that rows as long as the longest of a group pad little.

    Args:
        lengths: int64 [n].
        most: how many items a group has, by the index of its longest; it has one at least.

    Returns:
        Groups of indices into `lengths`, the longest first.
    """
    order = np.argsort(-lengths, kind="stable").tolist()
    groups = []
    first = 0
    while first < len(order):
        stop = first + max(1, most(order[first]))
        groups.append(order[first:stop])
        first = stop
    return groups


def balanced_bins(
    costs: np.ndarray, lengths: np.ndarray, bins: int, *, room: int, most: int
) -> list[list[int]] | None:
    """Deal items to `bins` bins of like cost.

    The costliest item comes first, and each goes to the bin of least cost that can take it (longest
    processing time first: Graham, SIAM J. Appl. Math. 17, 1969).

    Args:
        costs: float64 [n].
        lengths: int64 [n]; a bin takes items of at most `room` in all.
        most: how many items a bin takes.

    Returns:
        All bins, some perhaps empty, of indices into `costs`; None where no bin can take the next
        item.
    """
    items: list[list[int]] = [[] for _ in range(bins)]
    loads = np.zeros(bins)
    room_left = np.full(bins, room)
    places_left = np.full(bins, most)
    # The most expensive first, each to the bin with the least cost that has room.
    for item in np.argsort(-costs, kind="stable").tolist():
        can_take = (room_left >= lengths[item]) & (places_left >= 1)
        target = int(np.where(can_take, loads, np.inf).argmin())
        # `argmin` of nothing but infinities: no bin can take the item.
        if not can_take[target]:
            return None
        items[target].append(item)
        loads[target] += costs[item]
        room_left[target] -= lengths[item]
        places_left[target] -= 1
    return items
