"""Edges of the documents in a packed block, and their grouping by length.

Documents reach attention as a keyword of the model's forward. Some models do not pass keywords on
to their attention (Nemotron, StableLM), and recurrent layers get none: they read the documents of
the batch that is computed now, `current_documents`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tunesmith.model.model_types import BothWays
from tunesmith.model.packed_attention import spans_of

# Queries of a document are computed this many at a time, so that scores are [heads, BLOCK_QUERIES,
# n] and keys that lie in the future of a whole block are never multiplied. On 2 cores 128 is 10 %
# faster than 512 for documents of 75 to 310 tokens.
BLOCK_QUERIES = 128
# Documents up to this length keep their probabilities for the backward; longer ones compute them
# again.
MAX_SAVED_TOKENS = 512
# Documents within one block of queries are padded to a common length and multiplied together, up to
# MAX_GROUP_TOKENS and where they have at least MIN_LENGTH_SHARE of the longest's length: twice as
# fast at 15 to 45 tokens, 10 % at 90 to 130.
MAX_GROUP_TOKENS = 512
MIN_LENGTH_SHARE = 0.8
Members = list[tuple[int, int]]  # documents of a group: length and start of each


def count_saved_probabilities(length: np.ndarray) -> np.ndarray:
    """Count the probabilities a head saves for the backward of documents of these lengths, int64.

    A block of queries has those of all keys up to its end.
    """
    blocks, rest = np.divmod(length, BLOCK_QUERIES)
    # Full blocks have BLOCK_QUERIES rows and once, twice, ... as many keys; the last has `rest`
    # rows and all keys.
    return (length <= MAX_SAVED_TOKENS) * (
        BLOCK_QUERIES**2 * blocks * (blocks + 1) // 2 + rest * length
    )


@dataclass(frozen=True)
class Group:
    """`count` documents of nearly one length, padded to the `length` of the longest."""

    start: int  # the first token of a single document; -1 of several
    count: int
    length: int
    # int64 [tokens], which of the count * length padded places hold a token; None for a single one.
    places: Tensor | None = None
    tokens: Tensor | None = None  # int64 [tokens], which token each of these holds

    def rows_of(self, x: Tensor) -> Tensor:
        """The group's documents of x [n, ...], padded with zeros: [count, length, ...]."""
        if self.places is None or self.tokens is None:
            # A document alone is a run of the block: a view, nothing is gathered.
            return x[self.start : self.start + self.length].unsqueeze(0)
        rows = x.new_zeros(self.count * self.length, *x.shape[1:])
        rows.index_copy_(0, self.places, x.index_select(0, self.tokens))
        return rows.unflatten(0, (self.count, self.length))


class RepeatedTokens(NamedTuple):
    """Documents that have tokens of a block in common, which the block holds once.

    Attributes:
        places: int64 [tokens of all documents], where in the block each token is.
        firsts: int64 [tokens of the block], the first of them at each place.
        seconds: int64 [n], those whose place another one before them has; no place has three.
    """

    places: Tensor
    firsts: Tensor
    seconds: Tensor


@dataclass(frozen=True)
class Documents:
    """Edges of the documents in a flattened block of n tokens."""

    # int32 [documents + 1], 0 to n, on the tokens' device; equal neighbors are empty documents.
    # With `repeated` they go to the tokens of all documents, of which the block has fewer.
    cu_seqlens: Tensor
    max_seqlen: int  # an upper bound of the longest document, in tokens
    # Of attention, by `attention.select_attention_backend`; None: selected at the call.
    backend: str | None = None
    # Those of layers with chunked attention, by `cut`; None: the model has no such layers.
    chunks: "Documents | None" = None
    repeated: RepeatedTokens | None = None
    # Of `packed_attention.spans_of`; None: other kernels compute attention.
    spans: Tensor | None = None
    # In which layers the tokens of `pictures` see all others of their picture.
    both_ways: BothWays = ""

    @cached_property
    def edges(self) -> list[int]:
        """`cu_seqlens` on the host; waits for the device where `set_edges` did not state them."""
        return self.cu_seqlens.tolist()

    def set_edges(self, edges: Sequence[int]) -> None:
        """State what `cu_seqlens` holds.

        A field would make torch.compile compile a layer again for each batch: it reads all fields.
        """
        vars(self)["edges"] = [*edges]

    @property
    def pictures(self) -> tuple[tuple[int, int], ...]:
        """The places of each picture's tokens: the first, and the one after the last."""
        return vars(self).get("_pictures", ())

    def set_pictures(self, spans: Sequence[tuple[int, int]]) -> None:
        """State where pictures are; no field, as in `set_edges`."""
        vars(self)["_pictures"] = tuple(spans)

    def with_chunks(self, size: int) -> "Documents":
        """The same documents, with those of layers with chunked attention beside them."""
        documents = replace(self, chunks=self.cut(size))
        documents.set_edges(self.edges)
        documents.set_pictures(self.pictures)
        return documents

    def cut(self, size: int) -> "Documents":
        """The same tokens, with each document cut at multiples of `size` from its own start."""
        edges = [0]
        for start, end in pairwise(self.edges):
            # The document's own end is added after its cuts: a multiple of `size` is no second
            # edge.
            edges += range(start + size, end, size)
            edges.append(end)
        cu_seqlens = self._on_device(torch.tensor(edges, dtype=torch.int32))
        longest = min(size, self.max_seqlen)
        spans = None
        if self.spans is not None:
            spans = spans_of(cu_seqlens, self.spans.shape[1])
        chunks = replace(self, cu_seqlens=cu_seqlens, max_seqlen=longest, chunks=None, spans=spans)
        chunks.set_edges(edges)
        return chunks

    @cached_property
    def groups(self) -> list[Group]:
        """Documents grouped for `products`, computed once a batch and used by every layer."""
        return self._group_by_length(_fits_products)

    @cached_property
    def rows(self) -> list[Group]:
        """Documents grouped for layers that run on one row a document, computed once a batch."""
        return self._group_by_length(_is_alike)

    @cached_property
    def places_in_rows(self) -> Tensor:
        """int64 [n]: which token of all `rows`, one after another, each token of the block is."""
        parts = []
        for group in self.rows:
            if group.tokens is None:
                end = group.start + group.length
                parts.append(torch.arange(group.start, end, device=self.cu_seqlens.device))
            else:
                parts.append(group.tokens)
        # argsort of a permutation is its inverse: token -> place.
        return torch.cat(parts).argsort()

    def _group_by_length(self, fits: Callable[[int, Members], bool]) -> list[Group]:
        """`fits` says of a document's length whether it joins a group of (length, start)s."""
        documents = []  # (length, start) of each
        for start, end in pairwise(self.edges):
            if end > start:
                documents.append((end - start, start))
        # Longest first: the first of a group sets its padded length.
        documents.sort(reverse=True)
        groups: list[Members] = []
        for length, start in documents:
            if groups and fits(length, groups[-1]):
                groups[-1].append((length, start))
            else:
                groups.append([(length, start)])
        return [self._group(members) for members in groups]

    def _group(self, members: Members) -> Group:
        longest, start = members[0]
        if len(members) == 1:
            return Group(start=start, count=1, length=longest)
        # [documents, 1] each, to broadcast with the columns.
        lengths, starts = torch.tensor(members).unsqueeze(2).unbind(1)
        # [longest]
        column = torch.arange(longest)
        is_token = column < lengths
        # Of the padded [documents, longest], flattened: where tokens go, and which they are.
        places = is_token.flatten().nonzero().squeeze(1)
        # In the same order: both walk the padded rows from left to right.
        tokens = (starts + column)[is_token]
        return Group(-1, len(members), longest, self._on_device(places), self._on_device(tokens))

    def _on_device(self, tensor: Tensor) -> Tensor:
        """A tensor of the host beside the tokens, without waiting for the device."""
        device = self.cu_seqlens.device
        if device.type != "cuda":
            return tensor.to(device)
        return tensor.pin_memory().to(device, non_blocking=True)


# The innermost last. A plain variable of the module: in the backward autograd runs layers again on
# a thread of its own, which would not see a context variable, and torch.compile reads it in the
# graph of a layer. No two threads compute batches at a time.
_in_use: list[Documents | None] = []


def current_documents() -> Documents | None:
    """Documents of the packed batch that is computed now; None outside of `use_documents`."""
    return _in_use[-1] if _in_use else None


@contextmanager
def use_documents(documents: Documents | None) -> Iterator[None]:
    """Let layers compute these documents; None: rows are not packed.

    The backward needs it too: layers that recompute run again there.
    """
    _in_use.append(documents)
    try:
        yield
    finally:
        _in_use.pop()


def _is_alike(length: int, group: Members) -> bool:
    longest, _ = group[0]
    return length >= MIN_LENGTH_SHARE * longest


def _fits_products(length: int, group: Members) -> bool:
    """Tell whether a document of no more tokens than those of the group is multiplied together with
    them.
    """
    longest, _ = group[0]
    if longest > BLOCK_QUERIES or not _is_alike(length, group):
        return False
    return (len(group) + 1) * longest <= MAX_GROUP_TOKENS
