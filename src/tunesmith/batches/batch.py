"""The data class `Batch`, which holds the model's input, and its construction from examples.

A `Batch` is a block of rows. Each row holds one document (unpacked) or several documents (packed),
followed by padding. Tokens attend only to tokens of the same document, and padding is treated as a
document, too. Therefore the same code handles packed and unpacked rows.

Targets are shifted in this module, separately for each document. No other code shifts them, so the
last token of a document never predicts the first token of the next document.

A packed row can contain the common prompt of a preference pair once. In this case the rejected
sequence has only the tokens that it does not share with the chosen sequence. Layers that process
each token independently compute the shared tokens once. Only attention needs the complete
documents. `WholeDocuments` contains the indices that build them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tunesmith.batches.positions import mrope_positions, picture_spans
from tunesmith.tokens.text.example import Example, Pixels

if TYPE_CHECKING:
    # Import torch only where tensors are created: processes that only tokenize do not need it.
    import torch

# Target of positions without a loss. It is the default `ignore_index` of PyTorch's cross-entropy.
IGNORE = -100


class Sequences(NamedTuple):
    """The sequences of a micro batch, for methods that compare entire answers, such as DPO.

    The sequences are in the order of the rows. A preference pair has two sequences: chosen and
    rejected.

    Attributes:
        total: number of sequences, without padding.
        sequence_indices: int64 [supervised], the index of the sequence that each supervised
            position belongs to.
        lengths: int64 [total], the number of supervised tokens of each sequence.
        labels: bool [total], whether the answer is good. True for chosen, False for rejected.
        reference: fp64 [total], the log-probability of each sequence under the reference model, see
            `Example.reference`. None if it was not computed.
        weights: fp64 [total], see `Example.weights`. None for methods that sample no answers.
        sampled: fp32 [supervised], see `Example.sampled`. None for the same methods.
    """

    total: int
    sequence_indices: torch.Tensor
    lengths: torch.Tensor
    labels: torch.Tensor
    reference: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    sampled: torch.Tensor | None = None


class WholeDocuments(NamedTuple):
    """Indices that gather the complete documents from a block that stores shared tokens only once.

    Attributes:
        places: int64 [tokens of all documents], the position in the flattened block of each token
            of the concatenated documents.
        firsts: int64 [rows * length], for each position in the block, the index of the first token
            of the concatenated documents that is stored at this position.
        seconds: int64 [n] each, the indices of the tokens of the concatenated documents that are
            not in `firsts`, because an earlier token is stored at the same position. The first
            tensor has the tokens with one earlier token, the second those with two, and so on.
    """

    places: torch.Tensor
    firsts: torch.Tensor
    seconds: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Batch:
    """One micro batch of one rank.

    Attributes:
        input_ids: int64 [rows, length].
        position_ids: int64 [rows, length]. The positions of each document start at 0. The shape is
            [3, rows, length] if the batch has pictures and the model uses M-RoPE.
        targets: int64 [rows, length]. The next token, or IGNORE.
        cu_seqlens: int32 [documents + 1]. Boundaries of the documents in the flattened block, from
            0 to rows * length. If `whole` is set, these are the boundaries of the complete
            documents instead.
        max_seqlen: length of the longest document in tokens, or an upper bound that is the same in
            all batches of a run.
        tokens: number of tokens of all sequences, without padding. Shared tokens count twice.
        supervised: number of positions with a loss. Their target is not IGNORE.
        examples: number of examples. Padding documents are not counted.
        edges: the values of `cu_seqlens` in host memory. Empty if only the device has them.
        shared: for each document the number of its first tokens that an earlier document stores.
        sequences: the sequences of the batch. None if each example is one sequence without a label.
        chosen_tokens: number of supervised tokens of the chosen answers of pairs.
        whole: indices of the complete documents. None if no documents share tokens.
        pictures: arguments of the model's vision tower, as name -> tensor of all pictures in the
            order of their placeholders. Empty if there are no pictures.
        spans: start and end of each picture's tokens in the flattened block, in host memory.
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
    shared: tuple[int, ...] = ()
    sequences: Sequences | None = None
    chosen_tokens: int = 0
    whole: WholeDocuments | None = None
    pictures: dict[str, torch.Tensor] = field(default_factory=dict)
    spans: tuple[tuple[int, int], ...] = ()

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`. Tensors in pinned memory are copied without blocking.

        Pictures remain in host memory, because they can have gigabytes. The model copies the
        pictures of a micro batch to the device when it needs them.
        """
        texts = replace(self, pictures={})
        placed = texts.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))
        return replace(placed, pictures=self.pictures)

    def tensors(self) -> dict[str, torch.Tensor]:
        import torch

        values = {**vars(self), **self.pictures}
        for group in (self.sequences, self.whole):
            if group is not None:
                values |= group._asdict()
        seconds = self.whole.seconds if self.whole is not None else ()
        values |= {f"seconds.{i}": tensor for i, tensor in enumerate(seconds)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def map_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        import torch

        def map_value(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return change(value)
            if isinstance(value, Sequences | WholeDocuments):
                return type(value)(*map(map_value, value))
            if isinstance(value, tuple) and value and isinstance(value[0], torch.Tensor):
                return tuple(map(change, value))
            if isinstance(value, dict):
                return {name: change(tensor) for name, tensor in value.items()}
            return value

        return replace(self, **{name: map_value(value) for name, value in vars(self).items()})


def collate(
    rows: Sequence[Sequence[Example]],
    *,
    length: int,
    pad_id: int,
    max_document: int | None = None,
    sequence_rows: int | None = None,
) -> Batch:
    """Build a Batch from rows of examples.

    Args:
        rows: the examples of each row. Together they must have at most `length` tokens.
        length: number of tokens of every row, including padding.
        pad_id: id of the padding token at the end of a row. Tokens of examples do not attend to
            padding, and padding is not supervised.
        max_document: upper bound of the document length, which becomes `max_seqlen`. Padding is
            split into documents of at most this length.
        sequence_rows: if given, each sequence gets a separate row, and the batch has at least this
            number of rows. If None, all examples of `rows[i]` share one row.
    """
    import torch

    examples = list(chain.from_iterable(rows))
    parts = [[part for example in row for part in example.parts()] for row in rows]
    if sequence_rows is not None:
        # Each sequence gets a separate row. It must store all its tokens there, including the
        # tokens that it shares with another sequence.
        parts = [[part._replace(shared=0)] for part in chain.from_iterable(parts)]
        # Add empty rows, so that the shape of the batch is the same for every group of examples.
        parts += [[] for _ in range(sequence_rows - len(parts))]
    pixels = [part.pictures.pixels() for part in chain.from_iterable(parts) if part.pictures]
    next_pixels = iter(pixels)
    has_grids = any(len(item.grids) for item in pixels)
    # M-RoPE positions have three axes (time, row, column), and other positions have one.
    axes = 3 if has_grids else 1
    flat = _FlatRows(len(parts) * length, pad_id, axes)
    for r, sequences in enumerate(parts):
        at = previous = r * length
        row_end = at + length
        for part in sequences:
            end = at + len(part.ids) - part.shared
            if end > row_end:
                raise ValueError(
                    f"the sequences of row {r} have more than {length} tokens in total"
                )
            flat.add_sequence(part, at, previous, next(next_pixels) if part.pictures else None)
            # All later sequences of an example take the shared tokens from its first sequence.
            if not part.shared:
                previous = at
            at = end
        # Split the padding into several documents, because no document can be longer than
        # `max_seqlen`.
        flat.add_padding(at, row_end, max_document or length)
    spans: tuple[tuple[int, int], ...] = ()
    token_ids = {example.pictures.token_id for example in examples if example.pictures}
    if token_ids:
        spans = picture_spans(flat.ids, token_ids.pop(), flat.edges)
    shape = (len(parts), length)
    positions = flat.positions.reshape(axes, *shape)
    return Batch(
        input_ids=torch.from_numpy(flat.ids.reshape(shape)),
        position_ids=torch.from_numpy(positions if has_grids else positions[0]),
        targets=torch.from_numpy(flat.targets.reshape(shape)),
        cu_seqlens=torch.tensor(flat.edges, dtype=torch.int32),
        max_seqlen=max_document or int(np.diff(flat.edges).max()),
        tokens=sum(len(example.ids) for example in examples),
        supervised=int((flat.targets != IGNORE).sum()),
        examples=len(examples),
        edges=tuple(flat.edges),
        shared=tuple(flat.shared),
        sequences=_sequences(examples),
        chosen_tokens=sum(example.chosen_tokens for example in examples),
        whole=flat.whole_documents(),
        pictures=join_pixels(pixels),
        spans=spans,
    )


def join_pixels(pixels: Sequence[Pixels]) -> dict[str, torch.Tensor]:
    """Concatenate the model inputs of all pictures.

    The processor pads the arrays of one call to the largest picture of this call. This function
    pads all arrays with zeros to the largest picture of all calls, so that the result is the same
    as that of a single call.
    """
    import torch

    joined: dict[str, torch.Tensor] = {}
    if not pixels:
        return joined
    for name in pixels[0].inputs:
        arrays = [item.inputs[name] for item in pixels]
        largest = np.max([array.shape[1:] for array in arrays], axis=0)
        for i, array in enumerate(arrays):
            missing = largest - array.shape[1:]
            # Do not copy arrays that already have the largest size.
            if missing.any():
                arrays[i] = np.pad(array, [(0, count) for count in (0, *missing.tolist())])
        joined[name] = torch.from_numpy(np.concatenate(arrays))
    return joined


class _FlatRows:
    """Builder of the flattened rows of a batch, to which documents and padding are added one by
    one.

    A place is a position in the flattened rows.

    Attributes:
        ids, targets: int64 [places].
        positions: int64 [axes, places]. Positions of text tokens are equal on all axes.
        edges: boundaries of the documents that were added.
        shared: number of first tokens of each document that an earlier document stores.
        runs: ranges (start, end) of places. Concatenated, the ranges give all documents in order. A
            document with shared tokens has two ranges.
    """

    def __init__(self, places: int, pad_id: int, axes: int) -> None:
        # Fill the rows with the padding token. `add_sequence` overwrites it with tokens of a
        # sequence.
        self.ids = np.full(places, pad_id, dtype=np.int64)
        self.positions = np.zeros((axes, places), dtype=np.int64)
        self.targets = np.full(places, IGNORE, dtype=np.int64)
        self.edges = [0]
        self.shared: list[int] = []
        self.runs: list[tuple[int, int]] = []

    def add_sequence(self, part: Example, at: int, previous: int, pixels: Pixels | None) -> None:
        """Add the tokens, positions and targets of one sequence.

        Args:
            part: the sequence, as an example.
            at: the first place of the sequence.
            previous: the first place of the previous sequence in the row. The tokens that both
                sequences share are stored there.
            pixels: the pixels of the sequence's pictures, or None.
        """
        n = len(part.ids)
        span = slice(at, at + n - part.shared)
        self.ids[span] = part.ids[part.shared :]
        # Count positions from the start of the document, not of the row. The first `shared` tokens
        # are stored only once, in the previous sequence, so their positions are set already.
        positions = np.arange(part.shared, n)
        if pixels is not None and len(pixels.grids):
            assert part.pictures is not None
            positions = mrope_positions(part.ids, part.pictures.token_id, pixels.grids)
        self.positions[:, span] = positions
        # The target of a token is the next token. The last token of a document has no target,
        # because another document follows.
        next_ids = np.where(part.trained[1:], part.ids[1:], IGNORE)
        self.targets[span] = np.append(next_ids, IGNORE)[part.shared :]
        # The document begins with the shared tokens, which are stored at the start of the previous
        # sequence.
        if part.shared:
            self.runs.append((previous, previous + part.shared))
        self.runs.append((span.start, span.stop))
        self.edges.append(self.edges[-1] + n)
        self.shared.append(part.shared)

    def add_padding(self, at: int, end: int, longest: int) -> None:
        """Add padding from position `at` to `end`, as documents of at most `longest` tokens."""
        padding = end - at
        if not padding:
            return
        self.positions[:, at:end] = np.arange(padding) % longest
        self.runs.append((at, end))
        start = self.edges[-1]
        stop = start + padding
        self.edges += range(start + longest, stop, longest)
        self.edges.append(stop)
        self.shared += [0] * (len(self.edges) - 1 - len(self.shared))

    def whole_documents(self) -> WholeDocuments | None:
        """Return the indices that gather the complete documents.

        Return None if no documents share tokens.
        """
        import torch

        if self.edges[-1] == len(self.ids):
            return None
        places = np.concatenate([np.arange(*run) for run in self.runs])
        # For each place, np.unique returns the index of the first token that is stored at it.
        _, firsts, counts = np.unique(places, return_index=True, return_counts=True)
        # Number of earlier tokens at the place of each token.
        earlier = np.zeros(len(places), np.int64)
        order = np.argsort(places, kind="stable")
        earlier[order] = np.arange(len(places)) - np.repeat(np.cumsum(counts) - counts, counts)
        seconds = [np.flatnonzero(earlier == count) for count in range(1, earlier.max() + 1)]
        return WholeDocuments(
            torch.from_numpy(places),
            torch.from_numpy(firsts),
            tuple(map(torch.from_numpy, seconds)),
        )


def _sequences(examples: Sequence[Example]) -> Sequences | None:
    """Return the sequences of the examples, or None if each example is one sequence without a
    label.
    """
    import torch

    if not any(example.sequences or example.label is not None for example in examples):
        return None
    lengths = []
    labels = []
    reference: list[float] = []
    weights: list[float] = []
    sampled: list[np.ndarray] = []
    for example in examples:
        weights += example.weights
        if example.sampled is not None:
            sampled.append(example.sampled)
        for number, part in enumerate(example.parts()):
            is_good = example.label
            if is_good is None:
                is_good = number == 0  # The first sequence of a pair is the chosen answer.
            lengths.append(part.supervised)
            labels.append(is_good)
        reference += example.reference
    return Sequences(
        total=len(lengths),
        sequence_indices=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        lengths=torch.tensor(lengths, dtype=torch.int64),
        labels=torch.tensor(labels, dtype=torch.bool),
        reference=torch.tensor(reference, dtype=torch.float64) if reference else None,
        weights=torch.tensor(weights, dtype=torch.float64) if weights else None,
        sampled=torch.from_numpy(np.concatenate(sampled)) if sampled else None,
    )
