"""Examples that are there twice, by a hash of their tokens: 8 bytes an example, whatever its length."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise

import numpy as np

from tunesmith.data.tokens import TokenSet

_BLOCK = 1 << 16  # examples hashed at once


@dataclass(frozen=True)
class Repeats:
    """How many examples are there before, token for token, and the places of the first such and of the earlier one."""

    count: int = 0
    where: str = ""
    earlier: str = ""


def find_repeats(tokens: TokenSet, among: TokenSet | None = None) -> Repeats:
    """Examples of `tokens` that are also in `among`; or None, earlier in `tokens`."""
    own = _hashes(tokens)
    other = own if among is None else _hashes(among)
    if not len(own) or not len(other):
        return Repeats()
    order = np.argsort(other, kind="stable")
    # Of equal hashes the first in the sorted order is the earliest example.
    found = order[np.minimum(np.searchsorted(other, own, sorter=order), len(other) - 1)]
    same = other[found] == own if among is not None else found < np.arange(len(own))
    at = np.flatnonzero(same)
    if not len(at):
        return Repeats()
    return Repeats(len(at), tokens.where(int(at[0])), (among or tokens).where(int(found[at[0]])))


def _hashes(tokens: TokenSet) -> np.ndarray:
    """uint64 [n]; two different examples have the same one in 1 of 2^64 cases."""
    digests = [b""]
    for part in tokens.parts:
        ids = np.ascontiguousarray(part.arrays.ids).view(np.uint8).data
        for start in range(0, len(part), _BLOCK):
            edges = (part.arrays.offsets[start : start + _BLOCK + 1] * part.arrays.ids.itemsize).tolist()
            digests.append(b"".join(blake2b(ids[a:b], digest_size=8).digest() for a, b in pairwise(edges)))
    return np.frombuffer(b"".join(digests), np.uint64)
