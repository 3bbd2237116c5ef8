"""The one shape in which tokens reach the model.

A `Batch` is a block of rows. Each row holds one document (unpacked) or several (packed), then
padding. Attention takes documents, padding counted as documents of its own, so packed and unpacked
rows go the same path.

Targets are shifted here, document by document. No later code shifts, so no label leaks over the
edge of a document.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    # Processes that only tokenize do without torch; it is imported where tensors are made.
    import torch

IGNORE = -100


class Example(NamedTuple):
    """One tokenized example: one sequence, or several that a method needs side by side.

    Attributes:
        ids: int32 [n], n >= 2.
        trained: bool [n]; `trained[i]` says that token i is supervised: predicted from position i -
            1 with loss. The first token of a sequence has none before it and carries no loss.
        sequences: length of each sequence (the two of a preference pair), n in all; empty for one
            of n tokens. Each is a document of its own.
    """

    ids: np.ndarray
    trained: np.ndarray
    sequences: tuple[int, ...] = ()

    @property
    def supervised(self) -> int:
        """Positions that carry loss, as `collate` counts them."""
        starts = [0, *np.cumsum(self.sequences[:-1], dtype=np.int64)]
        return int(self.trained.sum() - self.trained[starts].sum())


@dataclass(frozen=True)
class Batch:
    """One micro batch, local to a rank.

    Attributes:
        input_ids: int64 [rows, length].
        position_ids: int64 [rows, length]; each document counts from 0.
        targets: int64 [rows, length]; the next token, or IGNORE.
        cu_seqlens: int32 [documents + 1]; edges of documents in the flattened block, from 0 to
            rows * length.
        max_seqlen: longest document in tokens, or a bound of it that all batches of a run share.
        tokens: non-padding tokens.
        supervised: positions whose target is not IGNORE.
        examples: real examples (padding documents are none).
        edges: `cu_seqlens` on the host, whichever device the tensors are on; empty where the host
            does not know them, and has to read them from there.
        row_tokens: non-padding tokens of each row, on the host.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    tokens: int
    supervised: int
    examples: int
    edges: tuple[int, ...] = ()
    row_tokens: tuple[int, ...] = ()

    def is_token(self) -> torch.Tensor:
        """bool [rows * length]: False for padding; made on the device without a copy to it."""
        import torch

        is_token = torch.zeros_like(self.input_ids, dtype=torch.bool)
        for row, count in zip(is_token, self.row_tokens, strict=True):
            row[:count] = True
        return is_token.flatten()

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`: not copied if there already, without blocking if pinned."""
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "targets": self.targets,
            "cu_seqlens": self.cu_seqlens,
        }

    def map_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return replace(
            self,
            input_ids=change(self.input_ids),
            position_ids=change(self.position_ids),
            targets=change(self.targets),
            cu_seqlens=change(self.cu_seqlens),
        )


def collate(
    rows: Sequence[Sequence[Example]], *, length: int, pad_id: int, bound: int | None = None
) -> Batch:
    """Lay rows of examples into one Batch.

    Args:
        rows: each row is the list of examples that share it; their tokens together must fit
            `length`.
        length: tokens of every row, padding counted.
        pad_id: the token that fills the end of a row; it is never attended to nor trained.
        bound: no document is longer; it becomes `max_seqlen`, and padding is cut into documents of
            that length.
    """
    import torch

    # Everything is padding until a token is laid over it.
    shape = (len(rows), length)
    ids = np.full(shape, pad_id, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    targets = np.full(shape, IGNORE, dtype=np.int64)
    edges = [0]
    longest = 0
    tokens = 0
    examples = 0
    row_tokens = []
    for r, row in enumerate(rows):
        row_start = r * length
        at = 0
        for example in row:
            examples += 1
            start = 0
            for n in example.sequences or (len(example.ids),):
                sequence_ids = example.ids[start : start + n]
                sequence_trained = example.trained[start : start + n]
                ids[r, at : at + n] = sequence_ids
                # Each document counts its positions from 0, so that packed and alone are the same.
                positions[r, at : at + n] = np.arange(n)
                # The target of a token is the next one; the last of a document has none, as what
                # follows is another document.
                targets[r, at : at + n - 1] = np.where(
                    sequence_trained[1:], sequence_ids[1:], IGNORE
                )
                start += n
                at += n
                # Borders of documents over the whole batch: rows stand behind each other.
                edges.append(row_start + at)
                longest = max(longest, n)
                tokens += n
        row_tokens.append(at)
        if at > length:
            raise ValueError(f"row {r} holds {at} tokens and has room for {length}")
        if at < length:
            padding = length - at
            # Padding is cut into documents too: none may be longer than what attention was told.
            document = bound or length
            positions[r, at:] = np.arange(padding) % document
            edges += range(row_start + at + document, row_start + length, document)
            edges.append(row_start + length)
            longest = max(longest, min(padding, document))
    return Batch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        targets=torch.from_numpy(targets),
        cu_seqlens=torch.tensor(edges, dtype=torch.int32),
        max_seqlen=bound or longest,
        tokens=tokens,
        supervised=int((targets != IGNORE).sum()),
        examples=examples,
        edges=tuple(edges),
        row_tokens=tuple(row_tokens),
    )
