"""Boundaries of the documents in a packed block, and groups of documents of similar length.

Attention layers receive the documents as a keyword argument of the model's forward. Some models
(Nemotron, StableLM) do not pass keyword arguments on to their attention, and recurrent layers
receive none. These layers read the documents of the current batch from `current_documents`.
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

from tunesmith.model.known.model_types import BidirectionalPictures
from tunesmith.model.layers.packed_attention import spans_of
from tunesmith.model.layers.slots import Slots

# Number of queries of a document that are computed at once. The scores are then [heads,
# BLOCK_QUERIES, n], and keys that are in the future of the entire block are skipped. On 2 cores,
# 128 is 10 % faster than 512 for documents of 75 to 310 tokens.
BLOCK_QUERIES = 128
# Maximum document length in tokens for which the attention probabilities are saved for the
# backward. The backward recomputes the probabilities of longer documents.
MAX_SAVED_TOKENS = 512
# Documents of at most BLOCK_QUERIES tokens are computed in padded groups. A group has at most
# MAX_GROUP_TOKENS tokens, including padding. The length of each document must be at least
# MIN_LENGTH_SHARE of the longest document's length. Grouping is twice as fast for documents of 15
# to 45 tokens, and 10 % faster for documents of 90 to 130 tokens.
MAX_GROUP_TOKENS = 512
MIN_LENGTH_SHARE = 0.8


class Member(NamedTuple):
    """A document of a group. Documents are sorted by these fields, in descending order."""

    shared: int  # number of first tokens that an earlier document stores
    length: int  # number of tokens, with the shared ones
    start: int  # index of the first token in the concatenated tokens of all documents
    stored: int  # index in the block of the first token that is not shared


def count_saved_probabilities(length: np.ndarray, shared: np.ndarray | int = 0) -> np.ndarray:
    """Return the number (int64) of probabilities that one head saves for each document length.

    A block of queries saves the probabilities of all keys up to the end of the block.

    Args:
        shared: number of first tokens whose queries an earlier document computes.
    """
    blocks, rest = np.divmod(length - shared, BLOCK_QUERIES)
    # Full block number i (from 1) has BLOCK_QUERIES rows and shared + i * BLOCK_QUERIES keys. The
    # last, partial block has `rest` rows and all keys.
    full = BLOCK_QUERIES * blocks * shared + BLOCK_QUERIES**2 * blocks * (blocks + 1) // 2
    return (length <= MAX_SAVED_TOKENS) * (full + rest * length)


@dataclass(frozen=True)
class Group:
    """`count` documents of similar length, padded to the `length` of the longest one."""

    start: int  # index of the first token if the group has one document, else -1
    count: int
    length: int
    # int64 [tokens], indices of the real tokens in the count * length tokens of the padded group.
    # None if the group has a single document.
    places: Tensor | None = None
    tokens: Tensor | None = None  # int64 [tokens], each token's index in the input of `rows_of`

    def rows_of(self, x: Tensor) -> Tensor:
        """Return the group's rows of x [n, ...] as [count, length, ...], padded with zeros."""
        if self.places is None or self.tokens is None:
            # A single document is contiguous in the block, so a view suffices.
            return x[self.start : self.start + self.length].unsqueeze(0)
        rows = x.new_zeros(self.count * self.length, *x.shape[1:])
        rows.index_copy_(0, self.places, x.index_select(0, self.tokens))
        return rows.unflatten(0, (self.count, self.length))


class AttentionGroup(NamedTuple):
    """Documents of similar length, with the same number of shared first tokens.

    Only the first of the documents that share tokens computes the queries of these tokens.

    Attributes:
        queries: the tokens of the documents without the shared ones, in the block.
        keys: all tokens of the documents, in the concatenated tokens of all documents.
    """

    queries: Group
    keys: Group

    @property
    def shared(self) -> int:
        return self.keys.length - self.queries.length


class RepeatedTokens(NamedTuple):
    """Index tensors for a block in which a token that two documents share is stored only once.

    Attributes:
        places: int64 [tokens of all documents], the position of each token in the block.
        firsts: int64 [tokens of the block], for each position the index of the first document token
            that is stored there.
        seconds: int64 [n] each, indices of document tokens whose position already occurred in one
            earlier document, in two, and so on.
    """

    places: Tensor
    firsts: Tensor
    seconds: tuple[Tensor, ...]


@dataclass(frozen=True)
class Documents:
    """Boundaries of the documents in a flattened block of n tokens."""

    # int32 [documents + 1], from 0 to n, on the device of the tokens. Two equal neighboring values
    # mean an empty document. If `repeated` is set, the boundaries refer to the concatenated tokens
    # of all documents, which are more than the tokens of the block.
    cu_seqlens: Tensor
    max_seqlen: int  # upper bound of the document length in tokens
    # Attention backend from `attention.select_attention_backend`. None: the backend is selected at
    # each call.
    backend: str | None = None
    # Documents for layers with chunked attention, from `cut`. None if the model has no such layers.
    chunks: "Documents | None" = None
    repeated: RepeatedTokens | None = None
    # Result of `packed_attention.spans_of`. None if other attention kernels are used.
    spans: Tensor | None = None
    # Layers in which the tokens of a picture attend to all tokens of the same picture.
    bidirectional_pictures: BidirectionalPictures = ""
    # Keys and values of answers that are being sampled. None in training.
    slots: Slots | None = None

    @cached_property
    def edges(self) -> list[int]:
        """Values of `cu_seqlens` as a list.

        Reading them synchronizes with the device, unless `set_edges` was called.
        """
        return self.cu_seqlens.tolist()

    def set_edges(self, edges: Sequence[int]) -> None:
        """Store the values of `cu_seqlens` on the host.

        The values are not stored in a dataclass field, because torch.compile reads all fields and
        would recompile a layer for each batch.
        """
        vars(self)["edges"] = [*edges]

    @property
    def pictures(self) -> tuple[tuple[int, int], ...]:
        """Token range of each picture: index of its first token, and index after its last token."""
        return vars(self).get("_pictures", ())

    def set_pictures(self, spans: Sequence[tuple[int, int]]) -> None:
        """Store the token ranges of the pictures, not in a dataclass field (see `set_edges`)."""
        vars(self)["_pictures"] = tuple(spans)

    @property
    def shared(self) -> Sequence[int]:
        """Number of first tokens of each document that an earlier document stores."""
        if self.repeated is None:
            return [0] * (len(self.edges) - 1)
        counts: list[int] = vars(self)["_shared"]
        return counts

    def set_shared(self, counts: Sequence[int]) -> None:
        """Store the numbers of shared tokens, not in a dataclass field (see `set_edges`)."""
        vars(self)["_shared"] = [*counts]

    def with_chunks(self, size: int) -> "Documents":
        """Return a copy whose `chunks` have this size, for layers with chunked attention."""
        documents = replace(self, chunks=self.cut(size))
        documents.set_edges(self.edges)
        documents.set_pictures(self.pictures)
        documents.set_shared(self.shared)
        return documents

    def cut(self, size: int) -> "Documents":
        """Split each document into parts of `size` tokens. The last part can be shorter."""
        edges = [0]
        shared = []
        for (start, end), count in zip(pairwise(self.edges), self.shared, strict=True):
            # `range` excludes `end`, so `end` is appended separately. A document whose length is a
            # multiple of `size` therefore gives no duplicate edge.
            first = len(edges)
            edges += range(start + size, end, size)
            edges.append(end)
            shared += [
                min(max(start + count - a, 0), b - a) for a, b in pairwise(edges[first - 1 :])
            ]
        cu_seqlens = torch.tensor(edges, dtype=torch.int32)
        cu_seqlens = copy_to_device(cu_seqlens, self.cu_seqlens.device)
        longest = min(size, self.max_seqlen)
        spans = spans_of(cu_seqlens, self.spans.shape[1]) if self.spans is not None else None
        chunks = replace(self, cu_seqlens=cu_seqlens, max_seqlen=longest, chunks=None, spans=spans)
        chunks.set_edges(edges)
        chunks.set_shared(shared)
        return chunks

    @cached_property
    def groups(self) -> list[AttentionGroup]:
        """Groups of documents for the backend `batched_matmul`.

        Computed once per batch for all layers.
        """
        device = self.cu_seqlens.device
        groups = []
        for members in self._group_by_length(_fits_products):
            keys = _pad_together([(m.length, m.start) for m in members], device)
            queries = keys
            if self.repeated is not None:
                own = [(m.length - m.shared, m.stored) for m in members]
                queries = _pad_together(own, device)
            groups.append(AttentionGroup(queries, keys))
        return groups

    @cached_property
    def rows(self) -> list[Group]:
        """Groups for layers that require one document per row. Computed once per batch."""
        return [
            _pad_together([(m.length, m.start) for m in members], self.cu_seqlens.device)
            for members in self._group_by_length(_is_alike)
        ]

    @cached_property
    def places_in_rows(self) -> Tensor:
        """Index of each token in the concatenated groups of `rows`, int64 [n]."""
        parts = []
        for group in self.rows:
            if group.tokens is None:
                end = group.start + group.length
                parts.append(torch.arange(group.start, end, device=self.cu_seqlens.device))
            else:
                parts.append(group.tokens)
        # `argsort` inverts the permutation, so that the result maps each token to its place.
        return torch.cat(parts).argsort()

    def _group_by_length(self, fits: Callable[[Member, list[Member]], bool]) -> list[list[Member]]:
        """Group the documents by length.

        Args:
            fits: returns whether a document can join a group.
        """
        members = []
        stored = 0
        for (start, end), shared in zip(pairwise(self.edges), self.shared, strict=True):
            own = end - start - shared
            # A chunk of a document can consist of shared tokens only.
            if own:
                members.append(Member(shared, end - start, start, stored))
            stored += own
        # Sort by descending length, because the first document of a group determines the padded
        # length.
        members.sort(reverse=True)
        groups: list[list[Member]] = []
        for member in members:
            if groups and groups[-1][0].shared == member.shared and fits(member, groups[-1]):
                groups[-1].append(member)
            else:
                groups.append([member])
        return groups


def _pad_together(documents: Sequence[tuple[int, int]], device: torch.device) -> Group:
    """Return the group of documents with the given lengths and first tokens."""
    longest, start = max(documents)
    if len(documents) == 1:
        return Group(start=start, count=1, length=longest)
    # Both have the shape [documents, 1], so that `column` broadcasts to all documents.
    lengths, starts = torch.tensor(documents).unsqueeze(2).unbind(1)
    # [longest]
    column = torch.arange(longest)
    is_token = column < lengths
    # Indices of the real tokens in the flattened [documents, longest].
    places = is_token.flatten().nonzero().squeeze(1)
    # Boolean indexing returns the tokens in the same row-major order as `places`.
    tokens = (starts + column)[is_token]
    return Group(
        -1, len(documents), longest, copy_to_device(places, device), copy_to_device(tokens, device)
    )


def copy_to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to the device without waiting for the copy to finish."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


# Stack of the documents in use, innermost last. It is a module variable, because autograd
# recomputes layers in its own thread, which does not see a context variable, and because
# torch.compile can read it in a layer's graph. Batches are never computed by two threads at once.
_in_use: list[Documents | None] = []


def current_documents() -> Documents | None:
    """Return the documents of the current packed batch, or None outside of `use_documents`."""
    if _in_use:
        return _in_use[-1]
    return None


@contextmanager
def use_documents(documents: Documents | None) -> Iterator[None]:
    """Make layers use these documents inside the `with` block. None means that rows are not packed.

    The backward must also run inside the block, because with recomputation it runs the layers
    again.
    """
    _in_use.append(documents)
    try:
        yield
    finally:
        _in_use.pop()


def _is_alike(member: Member, group: list[Member]) -> bool:
    return member.length >= MIN_LENGTH_SHARE * group[0].length


def _fits_products(member: Member, group: list[Member]) -> bool:
    """Return whether a document can join the group for a batched matmul.

    Documents are added by descending length, so no document of the group is shorter.
    """
    longest = group[0].length
    if longest - member.shared > BLOCK_QUERIES or not _is_alike(member, group):
        return False
    return (len(group) + 1) * longest <= MAX_GROUP_TOKENS
