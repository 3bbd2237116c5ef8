"""The one shape in which tokens reach the model.

A `Batch` is a block of rows. Each row holds one document (unpacked) or several (packed), then padding. Attention takes
documents, padding counted as documents of its own, so packed and unpacked rows go the same path.

Targets are shifted here, document by document. No later code shifts, so no label leaks over the edge of a document.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch  # imported where tensors are made: processes that tokenise need none

IGNORE = -100


class Example(NamedTuple):
    """One tokenised example: one sequence, or several that a method needs side by side (the two of a preference pair)."""

    ids: np.ndarray  # int32 [n], n >= 2
    # bool [n]; `trained[i]` says that token i is supervised: predicted from position i - 1 with loss. The first token of
    # a sequence has none before it and carries no loss.
    trained: np.ndarray
    # Length of each sequence, n in all; empty for one of n tokens. Each is a document of its own.
    sequences: tuple[int, ...] = ()

    @property
    def supervised(self) -> int:
        """Positions that carry loss, as `collate` counts them."""
        first = [0, *np.cumsum(self.sequences[:-1], dtype=np.int64)]
        return int(self.trained.sum() - self.trained[first].sum())


@dataclass(frozen=True)
class Batch:
    """One micro batch, local to a rank."""

    input_ids: torch.Tensor  # int64 [rows, length]
    position_ids: torch.Tensor  # int64 [rows, length]; each document counts from 0
    targets: torch.Tensor  # int64 [rows, length]; the next token, or IGNORE
    cu_seqlens: torch.Tensor  # int32 [documents + 1]; edges of documents in the flattened block, 0 to rows * length
    max_seqlen: int  # longest document, in tokens, or a bound of it that all batches of a run share
    tokens: int  # non-padding tokens
    supervised: int  # positions whose target is not IGNORE
    examples: int  # real examples (padding documents are none)

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`: not copied if there already, without blocking if pinned."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def tensors(self) -> dict[str, torch.Tensor]:
        import torch

        return {name: value for name, value in self.__dict__.items() if isinstance(value, torch.Tensor)}

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return Batch(**{**self.__dict__, **{name: change(tensor) for name, tensor in self.tensors().items()}})


def collate(rows: Sequence[Sequence[Example]], *, length: int, pad_id: int, bound: int | None = None) -> Batch:
    """Lay rows of examples into one Batch.

    Args:
        rows: each row is the list of examples that share it; their tokens together must fit `length`.
        length: tokens of every row, padding counted.
        pad_id: the token that fills the end of a row; it is never attended to nor trained.
        bound: no document is longer; it becomes `max_seqlen`, and padding is cut into documents of that length.
    """
    import torch

    shape = (len(rows), length)
    ids = np.full(shape, pad_id, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    targets = np.full(shape, IGNORE, dtype=np.int64)
    edges, longest, tokens, examples = [0], 0, 0, 0
    for r, row in enumerate(rows):
        at = 0
        for example in row:
            first, examples = at, examples + 1
            for n in example.sequences or (len(example.ids),):
                part = slice(at - first, at - first + n)
                ids[r, at : at + n] = example.ids[part]
                positions[r, at : at + n] = np.arange(n)
                targets[r, at : at + n - 1] = np.where(example.trained[part][1:], example.ids[part][1:], IGNORE)
                at += n
                edges.append(r * length + at)
                longest, tokens = max(longest, n), tokens + n
        if at > length:
            raise ValueError(f"row {r} holds {at} tokens and has room for {length}")
        if at < length:
            piece = bound or length
            positions[r, at:] = np.arange(length - at) % piece
            edges += range(r * length + at + piece, (r + 1) * length, piece)
            edges.append((r + 1) * length)
            longest = max(longest, min(length - at, piece))
    return Batch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        targets=torch.from_numpy(targets),
        cu_seqlens=torch.tensor(edges, dtype=torch.int32),
        max_seqlen=bound or longest,
        tokens=tokens,
        supervised=int((targets != IGNORE).sum()),
        examples=examples,
    )
