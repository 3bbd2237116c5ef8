"""The tensors of a checkpoint, which are read from safetensors files one at a time.

A tensor is read directly into its target if the target is on the CPU and has the stored dtype.
Otherwise it is read through a buffer. The pages are dropped from the page cache immediately,
because with unified memory the page cache uses the GPU's memory.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from io import BufferedReader
from pathlib import Path

import torch
from torch import Tensor

from tunesmith.errors import ModelError
from tunesmith.formats.as_shipped import not_finite
from tunesmith.formats.base import row_pieces
from tunesmith.formats.registry import shipped_format
from tunesmith.formats.stored import SLICE, Region, StoredTensor, whole_slices
from tunesmith.host.memory import drop_pages, open_uncached
from tunesmith.model.known.dtypes import FP8_CODES, SAFETENSORS_DTYPES
from tunesmith.model.weights.names import Pieces
from tunesmith.model.weights.safetensors_files import Entry, read_header, read_into
from tunesmith.model.weights.shipped_entries import CodedEntry, StoredEntry
from tunesmith.units import count_of

# Dtypes whose values can be NaN or infinite.
CHECKED_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
MAX_READ_WEIGHTS = 1 << 20  # maximum weights that are dequantized to fp32 at once


class FileTensor(StoredTensor):
    """A stored tensor that is one entry of a safetensors file.

    If no file is passed or the file is closed, each read opens the file. `check` records the values
    that are read.
    """

    def __init__(
        self, entry: Entry, file: BufferedReader | None = None, check: "FiniteCheck | None" = None
    ) -> None:
        dtype = torch.uint8 if entry.dtype == FP8_CODES else SAFETENSORS_DTYPES[entry.dtype]
        super().__init__(entry.name, entry.shape, dtype)
        self._entry = entry
        self._file = file
        self._check = check

    def with_shape(self, shape: torch.Size) -> "FileTensor":
        """Return a tensor of another shape with the same elements in the same order."""
        return FileTensor(replace(self._entry, shape=tuple(shape)), self._file, self._check)

    def read_into(self, target: Tensor, region: Region) -> None:
        if not region:  # a scalar
            self._read_elements(target, 0)
            return
        rows, *columns = region
        row_shape = self.shape[1:]
        # `target` can have additional rows for new tokens. `_read_parameter` fills them.
        stop = min(rows.stop, self.shape[0])
        target = target[: max(stop - rows.start, 0)]
        # Entire rows are contiguous in the file. Parts of rows are read as bands and sliced in
        # memory.
        if tuple(columns) == whole_slices(row_shape):
            self._read_elements(target, rows.start * math.prod(row_shape))
            return
        for start, band in self.bands(rows.start, stop):
            target_band = target[start - rows.start :][: len(band)]
            target_band.copy_(band[(slice(None), *columns)])

    def _read_elements(self, target: Tensor, begin: int) -> None:
        """Read consecutive elements from index `begin` into the contiguous `target`."""
        if self._file is None or self._file.closed:
            with open_uncached(self._entry.file) as file:
                FileTensor(self._entry, file, self._check)._read_elements(target, begin)
            return
        flat = target.view(-1)
        itemsize = self.dtype.itemsize
        if target.device.type == "cpu" and target.dtype == self.dtype:
            self._read_bytes(self._file, flat, begin * itemsize)
        else:
            # Read through a buffer of at most SLICE bytes, and convert its values.
            size = min(len(flat), SLICE // itemsize)
            buffer = torch.empty(size, dtype=self.dtype)
            for start in range(0, len(flat), max(1, size)):
                piece = buffer[: len(flat) - start]
                self._read_bytes(self._file, piece, (begin + start) * itemsize)
                flat[start : start + len(piece)].copy_(piece)
        # Drop the pages from the page cache, which uses the GPU's memory on machines with unified
        # memory.
        drop_pages(self._file.fileno(), self._entry.start, self._entry.size)
        if self._check is not None and len(flat):
            self._check.note(self._entry, flat)

    def _read_bytes(self, file: BufferedReader, flat: Tensor, offset: int) -> None:
        if flat.numel():
            # View the memory as bytes, because numpy has no bf16.
            read_into(file, self._entry, flat.view(torch.uint8).numpy().data, offset)


class FiniteCheck:
    """Detection of NaN and infinity in the values that are read, with only one synchronization."""

    def __init__(self) -> None:
        self._probes: dict[torch.device, list[tuple[Entry, Tensor]]] = {}

    def note(self, entry: Entry, values: Tensor) -> None:
        """Record an fp64 scalar, on the device of the values, that is finite only if they are."""
        if entry.dtype == FP8_CODES:
            # The bytes 127 and 255 are NaN, and there is no infinity.
            has_positive_nan = values.view(torch.int8).max() == 127
            has_negative_nan = values.view(torch.uint8).max() == 255
            probe = torch.where(has_positive_nan | has_negative_nan, math.nan, 0.0).double()
        elif SAFETENSORS_DTYPES[entry.dtype] in CHECKED_DTYPES:
            low, high = torch.aminmax(values)
            probe = low.double() + high.double()
        else:
            return  # the dtype has no NaN and no infinity
        self._probes.setdefault(probe.device, []).append((entry, probe))

    def require_finite(self) -> None:
        """Raise ModelError if a tensor has a value that is not finite.

        This waits for the devices.
        """
        for probes in self._probes.values():
            numbers = torch.stack([probe for _, probe in probes]).cpu()
            for i in (~numbers.isfinite()).nonzero().flatten().tolist():
                entry, _ = probes[i]
                raise ModelError(
                    f"{entry.name} has values that are not finite",
                    where=entry.file,
                    why="NaN or infinity in a weight makes every loss NaN: the file is damaged, or "
                    "the model was broken when it was saved",
                    fix="restore the file from a copy, or fetch the model again: "
                    "tunesmith fetch MODEL",
                )


class JoinedTensor(StoredTensor):
    """A tensor of the model that is stored in several pieces.

    Only one piece is in memory at a time, or only SLICE bytes of a piece if it is converted.
    """

    def __init__(
        self,
        pieces: Pieces,
        files: Mapping[Path, BufferedReader],
        check: FiniteCheck | None = None,
    ) -> None:
        super().__init__(pieces.name, pieces.shape, SAFETENSORS_DTYPES[pieces.dtype])
        self._pieces = [
            (piece, stored_tensor(piece.entry, files, check)) for piece in pieces.pieces
        ]

    def pieces(self, rows: slice) -> Iterator[tuple[Region, StoredTensor]]:
        for piece, stored in self._pieces:
            region = piece.region[0]
            if region.start < rows.stop and rows.start < region.stop:
                yield piece.region, stored

    def read_into(self, target: Tensor, region: Region) -> None:
        for piece, stored in self._pieces:
            in_target = []
            in_piece = []
            # Compute the overlap of the piece and the region, as positions in both of them.
            for span, piece_span in zip(region, piece.region, strict=True):
                start = max(span.start, piece_span.start)
                stop = min(span.stop, piece_span.stop)
                in_target.append(slice(start - span.start, stop - span.start))
                in_piece.append(slice(start - piece_span.start, stop - piece_span.start))
            # Skip the piece if there is no overlap.
            if any(span.stop <= span.start for span in in_target):
                continue
            part = target[tuple(in_target)]
            # A piece of a stack is stored without the first dimension.
            if piece.stacked:
                part = part.squeeze(0)
                in_piece = in_piece[1:]
            if part.is_contiguous():
                stored.read_into(part, tuple(in_piece))
            else:
                part.copy_(stored[tuple(in_piece)])


class DecodedTensor(StoredTensor):
    """A quantized weight that is dequantized to fp32 in pieces while it is read."""

    def __init__(
        self,
        entry: CodedEntry,
        files: Mapping[Path, BufferedReader],
        check: FiniteCheck | None = None,
    ) -> None:
        super().__init__(entry.name, entry.shape, SAFETENSORS_DTYPES[entry.dtype])
        self.shipped = shipped_format(entry.form)
        self.format_name = self.shipped.name
        first, *others = entry.codes
        self.codes = [stored_tensor(first, files, check)]
        self.codes += [stored_tensor(part, files) for part in others]
        self._scale: StoredTensor | None = None
        if entry.scale is not None:
            self._scale = stored_tensor(entry.scale, files)

    @cached_property
    def scale(self) -> Tensor | None:
        """Scale of the entire weight. Raise ModelError if a value is not finite."""
        if self._scale is None:
            return None
        return self.shipped.read_scale(self._scale, self.name)

    def check_rows(self, codes: Sequence[Tensor], expert: int | None = None) -> None:
        """Raise ModelError if a stored scale of these rows is NaN."""
        if self.shipped.has_nan_scale(codes):
            if expert is None:
                raise not_finite(self.name, self.codes[-1].name)
            raise not_finite(self.name, self.name, f": that of expert {expert}")

    def read_into(self, target: Tensor, region: Region) -> None:
        if len(region) == 2:
            self._read_matrix(target, *region)
            return
        experts, rows, columns = region
        if self.shipped.is_output_major:
            # The codes of an expert are [out, in], but its dequantized weight is [in, out].
            target = target.mT
            rows, columns = columns, rows
        for expert in range(experts.start, min(experts.stop, self.shape[0])):
            self._read_matrix(target[expert - experts.start], rows, columns, expert)

    def _read_matrix(
        self, target: Tensor, rows: slice, columns: slice, expert: int | None = None
    ) -> None:
        """Read a region of a matrix and dequantize it, MAX_READ_WEIGHTS weights at a time."""
        # The codes of a matrix are [rows, ...], and those of a stack are [experts, rows, ...].
        stored_rows = self.codes[0].shape[0 if expert is None else 1]
        scale = self.scale
        if scale is not None and expert is not None:
            scale = scale[expert]
        last = min(rows.stop, stored_rows)
        for band in row_pieces(rows.start, last, self.shape[1], MAX_READ_WEIGHTS):
            codes = [_rows_of(stored, band, expert) for stored in self.codes]
            self.check_rows(codes, expert)
            values = self.shipped.decode_rows(codes, scale, band.start)
            target[band.start - rows.start : band.stop - rows.start].copy_(values[:, columns])


def _rows_of(stored: StoredTensor, rows: slice, expert: int | None) -> Tensor:
    """Return rows of a matrix, or of one expert's matrix in a stack."""
    if expert is None:
        return stored[(rows, *whole_slices(stored.shape[1:]))]
    expert_rows = stored[(slice(expert, expert + 1), rows, *whole_slices(stored.shape[2:]))]
    return expert_rows[0]


def stored_tensor(
    entry: StoredEntry | Pieces,
    files: Mapping[Path, BufferedReader] | None = None,
    check: FiniteCheck | None = None,
) -> StoredTensor:
    """Return the stored tensor of an entry. It is read from `files` if they are open.

    Args:
        check: receives the floating-point values and fp8 codes that are read.
    """
    files = files or {}
    if isinstance(entry, Pieces):
        return JoinedTensor(entry, files, check)
    if isinstance(entry, CodedEntry):
        return DecodedTensor(entry, files, check)
    return FileTensor(entry, files.get(entry.file), check)


@contextmanager
def stored_tensors(file: Path) -> Iterator[dict[str, FileTensor]]:
    """Yield the tensors of a safetensors file by name. The file is open inside the `with` block. A
    tensor that is read later opens it again.

    Raise ModelError if the file is damaged.
    """
    entries = read_header(file)
    unreadable = [
        f"{entry.name} ({entry.dtype})"
        for entry in entries
        if entry.dtype not in SAFETENSORS_DTYPES
    ]
    if unreadable:
        what = name_tensors(unreadable, "of an unsupported dtype")
        raise ModelError(what, where=file)
    with open_uncached(file) as opened:
        yield {entry.name: FileTensor(entry, opened) for entry in entries}


def name_tensors(names: Sequence[str], problem: str) -> str:
    """Return text for the user: the number of tensors with the problem, and the first names."""
    shown = ", ".join(names[:3])
    if len(names) > 3:
        shown += ", ..."
    return f"{count_of(len(names), 'tensor')} {problem}: {shown}"
