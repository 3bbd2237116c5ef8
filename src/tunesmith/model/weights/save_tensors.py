"""Writing of safetensors files with little host memory.

The safetensors function `save_file` copies all tensors of a file to the host before it writes the
first one: 36 GiB for the fp32 master weights and moments of a 3B model. This module copies only a
piece of one tensor at a time.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from torch.distributed.tensor import DTensor

from tunesmith.distributed.torch_private import local_slices
from tunesmith.host.memory import drop_pages, open_uncached
from tunesmith.model.known.dtypes import SAFETENSORS_NAMES
from tunesmith.model.weights.safetensors_files import INDEX, Entry, read_into

MAX_PIECE_BYTES = 64 << 20  # bytes of a piece on the host; larger pieces are not written faster
MAX_GATHERED_BYTES = 16 << 20  # bytes per collective, which may allocate as much again
MAX_FILE_SIZE = "5GB"
# Function that returns the values of the given rows of a meta tensor, as bands (consecutive rows)
# in ascending order.
Read = Callable[[Tensor, slice], Iterable[Tensor]]


@dataclass(frozen=True)
class TensorPart:
    """A part of a tensor that is written as a separate tensor, for example one expert of a stack.

    Attributes:
        region: one slice with start and stop for each dimension.
        stacked: whether to remove the first dimension. `region` then has only one index of that
            dimension.
    """

    tensor: Tensor
    region: tuple[slice, ...]
    stacked: bool

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = tuple(span.stop - span.start for span in self.region)
        if self.stacked:
            return sizes[1:]
        return sizes


@dataclass(frozen=True)
class JoinedRows:
    """Tensors of one dtype whose rows are concatenated and written as one tensor."""

    tensors: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(len(tensor) for tensor in self.tensors), *self.tensors[0].shape[1:])


# A source of a written tensor. The bytes of an `Entry` are copied from its file.
Source = Tensor | TensorPart | JoinedRows | Entry


def save_tensors(
    path: Path | None,
    tensors: Mapping[str, Source],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    read: Read | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Write tensors of any device and strides, in the format of `safetensors.torch.save_file`.

    The host holds at most MAX_PIECE_BYTES of a tensor of another device. A non-contiguous tensor is
    copied on its device first. DTensors are gathered in slices of rows by collective calls, in
    which all ranks must participate.

    Args:
        path: the file on rank 0, None on other ranks.
        tensors: the sources by name.
        dtype: dtype in which DTensors are written; None: the dtype that they have. Other tensors
            keep their dtype.
        read: given if the tensors are on meta. It returns the values of a tensor as bands of rows.
        shapes: other shapes to write in the header, with the same number of elements.
    """
    shapes = shapes or {}
    written = {name: _written_form(source, dtype) for name, source in tensors.items()}
    # Sort like safetensors: the largest dtypes first, so that all tensors are aligned.
    names = sorted(tensors, key=lambda name: (-written[name].itemsize, name))
    header: dict[str, object] = {}
    if metadata:
        header["__metadata__"] = dict(metadata)
    end = 0
    for name in names:
        form = written[name]
        start = end
        end += form.size
        header[name] = {
            "dtype": form.dtype,
            "shape": list(shapes.get(name, form.shape)),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that every tensor is aligned
    with path.open("wb") if path else nullcontext() as file:
        if file is not None:
            file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            source = tensors[name]
            if isinstance(source, Entry):
                if file is not None:
                    file.writelines(_file_pieces(source))
                continue
            written_dtype = _written_dtype(source, dtype)
            for part in written_bands(source, written_dtype, read):
                if file is not None:
                    file.writelines(_pieces(part, written_dtype))


def written_bytes(tensors: Iterable[Source]) -> int:
    """Return the number of bytes that `save_tensors` writes for meta tensors."""
    return sum(_written_form(source, None).size for source in tensors)


@dataclass(frozen=True)
class _Form:
    """Properties of a written tensor. `dtype` is the name in safetensors. `size` is in bytes."""

    dtype: str
    shape: tuple[int, ...]
    itemsize: int
    size: int


def _written_form(source: Source, dtype: torch.dtype | None) -> _Form:
    if isinstance(source, Entry):
        itemsize = source.size // max(1, math.prod(source.shape))
        return _Form(source.dtype, source.shape, itemsize, source.size)
    written_dtype = _written_dtype(source, dtype)
    shape = tuple(source.shape)
    itemsize = written_dtype.itemsize
    size = math.prod(shape) * itemsize
    return _Form(SAFETENSORS_NAMES[written_dtype], shape, itemsize, size)


def written_bands(
    source: Tensor | TensorPart | JoinedRows, dtype: torch.dtype, read: Read | None
) -> Iterator[Tensor]:
    """Yield the values to write.

    DTensors, and tensors that `read` returns, are yielded in slices of rows.
    """
    if isinstance(source, JoinedRows):
        for tensor in source.tensors:
            yield from written_bands(tensor, dtype, read)
        return
    if isinstance(source, TensorPart):
        tensor = source.tensor
        rows, *columns = source.region
    else:
        tensor = source
        # Treat a 0-d tensor as one row.
        rows = slice(0, len(tensor) if tensor.ndim else 1)
        columns = []
    bands: Iterable[Tensor]
    if read:
        bands = read(tensor, rows)
    elif isinstance(tensor, DTensor):
        bands = _gathered_rows(tensor, dtype, rows)
    elif isinstance(source, TensorPart):
        bands = [tensor.detach()[rows]]
    else:
        bands = [tensor.detach()]
    # The bands contain entire rows. Select the region's other dimensions.
    for band in bands:
        yield band[(slice(None), *columns)] if columns else band


def _file_pieces(entry: Entry) -> Iterator[memoryview]:
    """Yield the bytes of a stored tensor."""
    with open_uncached(entry.file) as file:
        for offset in range(0, entry.size, MAX_PIECE_BYTES):
            size = min(MAX_PIECE_BYTES, entry.size - offset)
            piece = memoryview(bytearray(size))
            read_into(file, entry, piece, offset)
            yield piece
        drop_pages(file.fileno(), entry.start, entry.size)


def _gathered_rows(tensor: DTensor, dtype: torch.dtype, span: slice) -> Iterator[Tensor]:
    """Yield the rows `span` of a DTensor in `dtype`, at most MAX_GATHERED_BYTES at a time.

    Only the first rank of the mesh gets valid values. Each yielded tensor is overwritten by the
    next. `full_tensor` is not used, because with gloo its peak memory was twice the tensor on every
    rank. For each row, only the first rank that has it contributes its bytes, and all other ranks
    contribute zeros. The bytes are summed, so that no value changes.
    """
    local = tensor.to_local().detach()
    local_rows, *columns = local_slices(tensor)
    row_shape = tensor.shape[1:]
    row_count = span.stop - span.start
    # A mesh with one dimension is the tensor-parallel group of an adapter: gather within this
    # group. Otherwise gather over all ranks.
    mesh = tensor.device_mesh
    group = mesh.get_group() if mesh.ndim == 1 else None
    first_rank = int(mesh.mesh.min())
    row_bytes = math.prod(row_shape) * dtype.itemsize
    rows_per_piece = max(1, MAX_GATHERED_BYTES // row_bytes)
    # Only the first rank that has a shard gives it.
    coordinate = tensor.device_mesh.get_coordinate() or ()
    gives = all(
        index == 0 or not placement.is_replicate()
        for index, placement in zip(coordinate, tensor.placements, strict=True)
    )
    shape = (min(rows_per_piece, row_count), *row_shape)
    buffer = torch.empty(shape, dtype=dtype, device=local.device)
    for begin in range(span.start, span.stop, rows_per_piece):
        # The last piece can be shorter. Rows that this rank does not contribute stay zero.
        rows = buffer[: span.stop - begin].zero_()
        start = max(begin, local_rows.start)
        stop = min(begin + len(rows), local_rows.stop)
        if gives and start < stop:
            part = local[start - local_rows.start : stop - local_rows.start]
            rows[(slice(start - begin, stop - begin), *columns)] = part
        dist.reduce(rows.view(torch.uint8), dst=first_rank, group=group)
        yield rows


@torch.no_grad()
def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the DTensors of `tensors`, gathered one after the other on the CPU of rank 0.

    Other ranks get meta tensors. This is a collective call.
    """
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            # Other ranks need only the shapes, because their pieces contain no valid values.
            place = "meta" if dist.get_rank() else "cpu"
            pieces = _gathered_rows(tensor, tensor.dtype, slice(0, len(tensor)))
            # Copy each piece, because the next one overwrites it.
            whole[name] = torch.cat([piece.to(place, copy=True) for piece in pieces])
    return whole


def _written_dtype(
    source: Tensor | TensorPart | JoinedRows, dtype: torch.dtype | None
) -> torch.dtype:
    if isinstance(source, JoinedRows):
        source = source.tensors[0]
    if isinstance(source, TensorPart):
        source = source.tensor
    if dtype and isinstance(source, DTensor):
        return dtype
    return source.dtype


def _pieces(tensor: Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in `dtype`, in row-major order."""
    for piece in tensor.contiguous().view(-1).split(MAX_PIECE_BYTES // tensor.itemsize):
        yield piece.to(dtype).view(torch.uint8).cpu().numpy().data


def save_sharded(
    folder: Path | None,
    tensors: Mapping[str, Source],
    dtype: torch.dtype | None = None,
    read: Read | None = None,
) -> None:
    """Write a model's tensors to model.safetensors, or to several files with an index.

    The files have at most MAX_FILE_SIZE. `save_tensors` describes the other arguments.
    """
    shapes = {}
    # Replace each source by a meta tensor with the same number of bytes, because the function that
    # splits the tensors over files does not support all types of sources.
    for name, source in tensors.items():
        size = _written_form(source, dtype).size
        shapes[name] = torch.empty(size, dtype=torch.uint8, device="meta")
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=MAX_FILE_SIZE)
    for file, names in split.filename_to_tensors.items():
        path = folder / file if folder else None
        file_tensors = {name: tensors[name] for name in names}
        save_tensors(path, file_tensors, {"format": "pt"}, dtype, read)
    if split.is_sharded and folder:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
