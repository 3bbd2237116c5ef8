"""The one shape in which tokens reach the model.

A `Batch` is a block of rows. Each row holds one document (unpacked) or several (packed), then
padding. Attention takes documents, padding counted as documents of its own, so packed and unpacked
rows go the same path.

Targets are shifted here, document by document. No later code shifts, so no label leaks over the
edge of a document.

A packed row may hold the prompt of a pair once: the rejected sequence is laid without the tokens
that it shares with the chosen one. Whatever works token by token computes them once; attention
alone sees whole documents, by `WholeDocuments`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tunesmith.data.batches.positions import mrope_positions, picture_spans
from tunesmith.data.text.example import Example, Pixels

if TYPE_CHECKING:
    # Processes that only tokenize do without torch; it is imported where tensors are created.
    import torch

IGNORE = -100


class Sequences(NamedTuple):
    """The answers of a micro batch in the order of its rows, for methods that compare whole ones.

    Attributes:
        total: sequences of real examples; of pairs the chosen and the rejected one, in turn.
        of_target: int64 [supervised], the sequence of each position that has a target.
        lengths: int64 [total], supervised tokens of each.
        labels: bool [total], whether the answer is a good one; of pairs that of the chosen.
        reference: fp64 [total], see `Example.reference`; None where unknown.
    """

    total: int
    of_target: torch.Tensor
    lengths: torch.Tensor
    labels: torch.Tensor
    reference: torch.Tensor | None = None


class WholeDocuments(NamedTuple):
    """The indices that join whole documents from a block with some of their tokens once for two.

    Attributes:
        places: int64 [tokens of all documents], where in the flattened block each token is, of one
            document after another.
        firsts: int64 [rows * length], the first token that is at each place.
        seconds: int64 [n], the tokens whose place is that of another one before them.
    """

    places: torch.Tensor
    firsts: torch.Tensor
    seconds: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """One micro batch, local to a rank.

    Attributes:
        input_ids: int64 [rows, length].
        position_ids: int64 [rows, length]; each document counts from 0. With pictures of a model
            whose positions have rows and columns, [3, rows, length].
        targets: int64 [rows, length]; the next token, or IGNORE.
        cu_seqlens: int32 [documents + 1]; edges of documents in the flattened block, from 0 to
            rows * length; with `whole` those of the documents that it makes.
        max_seqlen: longest document in tokens, or a bound of it that all batches of a run share.
        tokens: of all sequences, without padding; those that a row holds once for two count twice.
        supervised: positions whose target is not IGNORE.
        examples: real examples (padding documents are none).
        edges: `cu_seqlens` on the host, whichever device the tensors are on; empty where the host
            does not know them, and has to read them from there.
        sequences: None where each example is one sequence without a label.
        chosen_tokens: supervised tokens of the chosen answers of pairs.
        whole: None where the block holds each document whole.
        pictures: name of an argument of the model's vision part -> its tensor, of all pictures in
            the order of their placeholders; empty without any.
        spans: of the flattened block, the first place of each picture's tokens and the one after
            its last, on the host.
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
    sequences: Sequences | None = None
    chosen_tokens: int = 0
    whole: WholeDocuments | None = None
    pictures: dict[str, torch.Tensor] = field(default_factory=dict)
    spans: tuple[tuple[int, int], ...] = ()

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`. Tensors in pinned memory are copied without blocking.

        Pictures stay on the host, because they may take gigabytes: the model copies those of a
        micro batch when it needs them.
        """
        texts = replace(self, pictures={})
        placed = texts.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))
        return replace(placed, pictures=self.pictures)

    def tensors(self) -> dict[str, torch.Tensor]:
        import torch

        values = vars(self)
        for group in (self.sequences, self.whole):
            values = values | (group._asdict() if group else {})
        values = values | self.pictures
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def map_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        import torch

        def map_value(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return change(value)
            if isinstance(value, Sequences | WholeDocuments):
                return type(value)(*map(map_value, value))
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
    """Lay rows of examples into one Batch.

    Args:
        rows: each row is the list of examples that share it; their tokens together must fit
            `length`.
        length: tokens of every row, padding counted.
        pad_id: the token that fills the end of a row; it is never attended to nor trained.
        max_document: no document is longer; it becomes `max_seqlen`, and padding is cut into
            documents of that length.
        sequence_rows: give each sequence a row of its own, and make at least so many rows; None:
            all of `rows[i]` shares a row.
    """
    import torch

    examples = [example for row in rows for example in row]
    parts = [[part for example in row for part in example.parts()] for row in rows]
    if sequence_rows is not None:
        parts = [[part._replace(shared=0)] for row in parts for part in row]
        parts += [[] for _ in range(sequence_rows - len(parts))]
    pixels = [part.pictures.pixels() if part.pictures else None for row in parts for part in row]
    has_grids = any(of is not None and len(of.grids) for of in pixels)
    flat = _FlatRows(len(parts) * length, pad_id, axes=3 if has_grids else 1)
    pixels_of_next = iter(pixels)
    for r, row in enumerate(parts):
        row_start = r * length
        at = row_start
        previous = row_start
        for part in row:
            end = at + len(part.ids) - part.shared
            if end > row_start + length:
                raise ValueError(f"row {r} has room for {length} tokens, and more are to go there")
            flat.add_sequence(part, at, previous, next(pixels_of_next))
            previous = at
            at = end
        # No document may be longer than the length that attention has.
        flat.add_padding(at, row_start + length, max_document or length)
    shape = (len(parts), length)
    return Batch(
        input_ids=torch.from_numpy(flat.ids.reshape(shape)),
        position_ids=torch.from_numpy(flat.positions.reshape((3, *shape) if has_grids else shape)),
        targets=torch.from_numpy(flat.targets.reshape(shape)),
        cu_seqlens=torch.tensor(flat.edges, dtype=torch.int32),
        max_seqlen=max_document or int(np.diff(flat.edges).max()),
        tokens=sum(len(example.ids) for example in examples),
        supervised=int((flat.targets != IGNORE).sum()),
        examples=len(examples),
        edges=tuple(flat.edges),
        sequences=_sequences(examples),
        chosen_tokens=sum(example.chosen_tokens for example in examples),
        whole=flat.whole_documents(),
        pictures=join_pixels([of for of in pixels if of is not None]),
        spans=_spans(flat, examples),
    )


def _spans(flat: _FlatRows, examples: Sequence[Example]) -> tuple[tuple[int, int], ...]:
    """Find the tokens of the examples' pictures; a row that holds tokens twice has none."""
    handles = [example.pictures for example in examples if example.pictures is not None]
    if not handles or flat.edges[-1] != len(flat.ids):
        return ()
    return picture_spans(flat.ids, handles[0].token_id, flat.edges)


def join_pixels(pixels: Sequence[Pixels]) -> dict[str, torch.Tensor]:
    """The inputs of all pictures, one behind another.

    Those that the processor pads to the largest of a call are padded with zeros to the largest of
    all, as it would have done for all of them at once.
    """
    import torch

    joined = {}
    for name in pixels[0].inputs if pixels else ():
        arrays = [of.inputs[name] for of in pixels]
        largest = np.max([array.shape[1:] for array in arrays], axis=0).astype(int)
        padded = []
        for array in arrays:
            widths = [
                (0, int(to - size)) for size, to in zip(array.shape[1:], largest, strict=True)
            ]
            padded.append(np.pad(array, [(0, 0), *widths]) if any(map(sum, widths)) else array)
        joined[name] = torch.from_numpy(np.concatenate(padded))
    return joined


class _FlatRows:
    """The flattened rows of a batch, document by document.

    Attributes:
        ids, targets: int64 [places].
        positions: int64 [axes, places]; a text has the same on each of several.
        edges: of the documents so far.
        runs: of places that make them: the first, and the one after the last.
    """

    def __init__(self, places: int, pad_id: int, axes: int) -> None:
        # Everything is padding until a token is laid over it.
        self.ids = np.full(places, pad_id, dtype=np.int64)
        self.positions = np.zeros((axes, places), dtype=np.int64)
        self.targets = np.full(places, IGNORE, dtype=np.int64)
        self.edges = [0]
        self.runs: list[tuple[int, int]] = []

    def add_sequence(self, part: Example, at: int, previous: int, pixels: Pixels | None) -> None:
        """Lay a sequence from place `at` on; the one before it in the row begins at `previous`.

        pixels: of its pictures.
        """
        n = len(part.ids)
        span = slice(at, at + n - part.shared)
        self.ids[span] = part.ids[part.shared :]
        # Each document counts its positions from 0, so that packed and alone are the same.
        self.positions[:, span] = np.arange(part.shared, n)
        if pixels is not None and len(pixels.grids):
            assert part.pictures is not None
            self.positions[:, span] = mrope_positions(
                part.ids, part.pictures.token_id, pixels.grids
            )
        # The target of a token is the next one; the last of a document has none, as what follows
        # is another document.
        targets = np.append(np.where(part.trained[1:], part.ids[1:], IGNORE), IGNORE)
        self.targets[span] = targets[part.shared :]
        if part.shared:
            self.runs.append((previous, previous + part.shared))
        self.runs.append((span.start, span.stop))
        self.edges.append(self.edges[-1] + n)

    def add_padding(self, at: int, end: int, longest: int) -> None:
        """Padding from place `at` to `end`, cut into documents of at most `longest` tokens."""
        padding = end - at
        if not padding:
            return
        self.positions[:, at:end] = np.arange(padding) % longest
        self.runs.append((at, end))
        start = self.edges[-1]
        self.edges += range(start + longest, start + padding, longest)
        self.edges.append(start + padding)

    def whole_documents(self) -> WholeDocuments | None:
        """Index the whole documents; None where they are the block as it is."""
        import torch

        if self.edges[-1] == len(self.ids):
            return None
        places = np.concatenate([np.arange(first, stop) for first, stop in self.runs])
        # Where numpy finds a value first.
        _, firsts = np.unique(places, return_index=True)
        is_second = np.ones(len(places), dtype=bool)
        is_second[firsts] = False
        seconds = np.flatnonzero(is_second)
        return WholeDocuments(*map(torch.from_numpy, (places, firsts, seconds)))


def _sequences(examples: Sequence[Example]) -> Sequences | None:
    """Join the sequences of a batch's examples; None where they are single and have no label."""
    import torch

    has_any = any(example.sequences or example.label is not None for example in examples)
    if not has_any:
        return None
    lengths = []
    labels = []
    reference: list[float] = []
    for example in examples:
        for number, part in enumerate(example.parts()):
            lengths.append(part.supervised)
            labels.append(number == 0 if example.label is None else example.label)
        reference += example.reference
    return Sequences(
        total=len(lengths),
        of_target=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        lengths=torch.tensor(lengths, dtype=torch.int64),
        labels=torch.tensor(labels, dtype=torch.bool),
        reference=torch.tensor(reference, dtype=torch.float64) if reference else None,
    )
