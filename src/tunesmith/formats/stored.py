"""The weights that a format loads: the interface of a checkpoint's tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from tunesmith.distributed.torch_private import local_slices
from tunesmith.distributed.vocab_parallel import local_part

SLICE = 16 << 20  # bytes of the buffer for tensors that are converted
Region: TypeAlias = tuple[slice, ...]  # one slice with start and stop for each dimension


class StoredTensor:
    """A tensor of the checkpoint that is not yet read. Hooks of `load_weights` receive it.

    Shape and dtype are those of the file.

    Attributes:
        format_name: the storage format of a quantized weight; None: the weight is not quantized.
        codes: the stored tensors that have values for each row of a quantized weight.
        scale: the scale of an entire quantized weight.
    """

    format_name: str | None = None
    codes: Sequence[StoredTensor] = ()

    def __init__(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.name = name
        self.shape = torch.Size(shape)
        self.dtype = dtype

    def read_into(self, target: Tensor, region: Region) -> None:
        """Read a region into `target`, converted to its dtype and device.

        `target` must be contiguous. It may have more rows than the stored tensor, for new tokens.
        """
        raise NotImplementedError

    @property
    def scale(self) -> Tensor | None:
        return None

    def read(self) -> Tensor:
        """Return the entire tensor, on the CPU, in its stored dtype."""
        return self[whole_slices(self.shape)]

    def pieces(self, rows: slice) -> Iterator[tuple[Region, StoredTensor]]:
        """Yield the regions of the pieces that contain some of these rows, and the pieces.

        A tensor that is stored as a single tensor has no pieces.
        """
        return iter(())

    def check_rows(self, codes: Sequence[Tensor], expert: int | None = None) -> None:
        """Raise ModelError if a stored scale of these rows is not finite.

        Args:
            expert: the index in the file of the expert that has these rows, for the message.
        """

    def into_part(self, target: Tensor) -> None:
        """Fill this rank's shard of `target`, which may have more rows than the stored tensor."""
        self.read_into(local_part(target), local_slices(target))

    def __getitem__(self, region: Region) -> Tensor:
        """Read only a region. The result is on the CPU in the stored dtype."""
        part = torch.empty([span.stop - span.start for span in region], dtype=self.dtype)
        self.read_into(part, region)
        return part

    def bands(self, first: int = 0, last: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """Yield the rows from `first` up to `last` in bands of about SLICE bytes.

        Yields:
            The index of the band's first row, and its rows.
        """
        if last is None:
            last = self.shape[0]
        row_shape = self.shape[1:]
        # Read at least one row, even if it is larger than SLICE.
        step = max(1, SLICE // max(1, math.prod(row_shape) * self.dtype.itemsize))
        for start in range(first, last, step):
            rows = slice(start, min(start + step, last))
            yield start, self[(rows, *whole_slices(row_shape))]


def whole_slices(shape: Sequence[int]) -> Region:
    """Return slices that cover each dimension entirely."""
    return tuple(slice(0, size) for size in shape)


# A weight of a checkpoint, or random values.
Stored: TypeAlias = StoredTensor | Tensor
StoredParts: TypeAlias = Mapping[str, Stored]  # the weight under "", its scales by suffix
