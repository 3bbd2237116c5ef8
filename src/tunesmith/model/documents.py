"""Edges of the documents in a packed block, and their grouping by length for batched products."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

# Queries of a document are taken this many at a time, so that scores are [heads, QUERIES, n] and keys that lie in the
# future of a whole block are never multiplied. On 2 cores 128 is 10 % faster than 512 for documents of 75 to 310 tokens.
QUERIES = 128
# Documents up to this length keep their probabilities for the backward; longer ones compute them again.
KEEP = 512
# Documents within one block of queries are padded to a common length and multiplied together, up to GROUP_TOKENS and
# where they have at least ALIKE of the longest's length: twice as fast at 15 to 45 tokens, 10 % at 90 to 130.
GROUP_TOKENS = 512
ALIKE = 0.8


def kept_probabilities(length: np.ndarray) -> np.ndarray:
    """How many a head keeps for the backward of documents of these lengths: a block of queries has those of all keys up
    to its end. int64, as `length`."""
    blocks, rest = np.divmod(length, QUERIES)
    return (length <= KEEP) * (QUERIES**2 * blocks * (blocks + 1) // 2 + rest * length)


@dataclass(frozen=True)
class Group:
    """`count` documents of nearly one length, padded to the `length` of the longest; a single one begins at `start`."""

    start: int
    count: int
    length: int
    places: Tensor | None = None  # int64 [tokens], which of the count * length padded places hold a token; None of one
    tokens: Tensor | None = None  # int64 [tokens], which token each of these holds


@dataclass(frozen=True)
class Documents:
    """Edges of the documents in a flattened block of n tokens."""

    cu_seqlens: Tensor  # int32 [documents + 1], 0 to n, on the tokens' device; equal neighbours are empty documents
    max_seqlen: int  # an upper bound of the longest document, in tokens
    backend: str | None = None  # of attention, by `attention.select_attention_backend`; None: selected at the call

    @cached_property
    def edges(self) -> list[int]:
        """`cu_seqlens` on the host; waits for the device, so varlen does not ask for it."""
        return self.cu_seqlens.tolist()

    @cached_property
    def groups(self) -> list[Group]:
        """Documents grouped for `products`, made once a batch and used by every layer."""
        spans = sorted(((b - a, a) for a, b in zip(self.edges, self.edges[1:], strict=False) if b > a), reverse=True)
        groups: list[list[tuple[int, int]]] = []
        for length, start in spans:
            longest, count = (groups[-1][0][0], len(groups[-1])) if groups else (0, 0)
            if ALIKE * longest <= length and 0 < longest <= QUERIES and (count + 1) * longest <= GROUP_TOKENS:
                groups[-1].append((length, start))
            else:
                groups.append([(length, start)])
        return [self._group(members) for members in groups]

    def _group(self, members: list[tuple[int, int]]) -> Group:
        longest, start = members[0]
        if len(members) == 1:
            return Group(start=start, count=1, length=longest)
        lengths, starts = torch.tensor(members).unsqueeze(2).unbind(1)
        column = torch.arange(longest)
        real = column < lengths
        places, tokens = real.flatten().nonzero().squeeze(1), (starts + column)[real]
        device = self.cu_seqlens.device
        return Group(start=-1, count=len(members), length=longest, places=places.to(device), tokens=tokens.to(device))
