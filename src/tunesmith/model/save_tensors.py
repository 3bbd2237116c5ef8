"""Write safetensors files piece by piece.

safetensors' own `save_file` copies every tensor of a file to the host before it writes the first
one: 36 GiB for the fp32 masters and moments of a 3B model. Here the host holds one piece of one
tensor at a time.
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
from tunesmith.model.safetensors_files import INDEX, Entry, read_into
from tunesmith.model.weights import STORED

SAFETENSORS_DTYPE_NAMES = {dtype: name for name, dtype in STORED.items()}
# Written alone: read as it stands it would lack its scales.
SAFETENSORS_DTYPE_NAMES[torch.float8_e4m3fn] = "F8_E4M3"
MAX_PIECE_BYTES = 64 << 20  # bytes on the host at a time: enough for a disk's full speed
MAX_GATHERED_BYTES = 16 << 20  # bytes of one collective, which may take as much again
MAX_FILE_SIZE = "5GB"
# The values of some rows of a tensor on meta, in bands from first to last.
Read = Callable[[Tensor, slice], Iterable[Tensor]]


@dataclass(frozen=True)
class TensorPart:
    """A part of a tensor that is written as a tensor of its own: an expert of a stack.

    Attributes:
        region: a slice of each dimension, with both ends.
        stacked: the first dimension, of which `region` has one index, is not written.
    """

    tensor: Tensor
    region: tuple[slice, ...]
    stacked: bool

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = tuple(span.stop - span.start for span in self.region)
        return sizes[1:] if self.stacked else sizes


@dataclass(frozen=True)
class JoinedRows:
    """Tensors of one dtype whose rows are written as one tensor, one after the other."""

    tensors: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(len(tensor) for tensor in self.tensors), *self.tensors[0].shape[1:])


# What is written as a tensor; an `Entry` is copied from its file, byte for byte.
Source = Tensor | TensorPart | JoinedRows | Entry


def save_tensors(
    path: Path | None,
    tensors: Mapping[str, Source],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    read: Read | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Write tensors of any device and strides: the bytes that `safetensors.torch.save_file` writes.

    The host holds at most MAX_PIECE_BYTES of another device's tensor; one that is not contiguous is
    copied on its device. DTensors are gathered some rows at a time, in which all ranks take part.

    Args:
        path: of rank 0; None on the others.
        tensors: by their names; parts of tensors, and tensors of other files, among them.
        dtype: to write DTensors in, None for their own; other tensors keep theirs.
        read: the tensors are on meta, and it returns the values of each when its turn comes, band
            by band.
        shapes: what the file says of tensors in place of their own, with as many elements.
    """
    shapes = shapes or {}
    written = {name: _written_form(source, dtype) for name, source in tensors.items()}
    # As safetensors sorts: the widest dtype first, so that no tensor is unaligned.
    names = sorted(tensors, key=lambda name: (-written[name].itemsize, name))
    header: dict[str, object] = {}
    if metadata:
        header["__metadata__"] = dict(metadata)
    end = 0
    for name in names:
        start = end
        end = start + written[name].size
        header[name] = {
            "dtype": written[name].dtype,
            "shape": list(shapes.get(name, written[name].shape)),
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
            for part in _parts(source, written_dtype, read):
                if file is not None:
                    file.writelines(_pieces(part, written_dtype))


def written_bytes(tensors: Iterable[Source]) -> int:
    """Bytes that `save_tensors` writes of tensors on meta."""
    return sum(_written_form(source, None).size for source in tensors)


@dataclass(frozen=True)
class _Form:
    """The stored form of a tensor: its dtype as safetensors names it, its shape, and the bytes of
    an element and of all.
    """

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
    return _Form(
        SAFETENSORS_DTYPE_NAMES[written_dtype], shape, itemsize, math.prod(shape) * itemsize
    )


def _parts(
    source: Tensor | TensorPart | JoinedRows, dtype: torch.dtype, read: Read | None
) -> Iterator[Tensor]:
    """Yield what is written of a tensor; where it is gathered or read, some rows at a time."""
    if isinstance(source, JoinedRows):
        for rows_of_it in source.tensors:
            yield from _parts(rows_of_it, dtype, read)
        return
    tensor = source.tensor if isinstance(source, TensorPart) else source
    region = source.region if isinstance(source, TensorPart) else ()
    # A 0-d tensor is one row here.
    rows = region[0] if region else slice(0, len(tensor) if tensor.ndim else 1)
    bands: Iterable[Tensor]
    if read:
        bands = read(tensor, rows)
    elif isinstance(tensor, DTensor):
        bands = _gathered_rows(tensor, dtype, rows)
    else:
        yield tensor.detach()[region] if region else tensor.detach()
        return
    # The band has the region's rows; its other dimensions are cut now.
    for band in bands:
        yield band[(slice(None), *region[1:])] if region else band


def _file_pieces(entry: Entry) -> Iterator[memoryview]:
    """The bytes of a stored tensor."""
    with open_uncached(entry.file) as file:
        for offset in range(0, entry.size, MAX_PIECE_BYTES):
            piece = memoryview(bytearray(min(MAX_PIECE_BYTES, entry.size - offset)))
            read_into(file, entry, piece, offset)
            yield piece
        drop_pages(file.fileno(), entry.start, entry.size)


def _gathered_rows(tensor: DTensor, dtype: torch.dtype, span: slice) -> Iterator[Tensor]:
    """The rows `span` of a tensor in `dtype`, up to MAX_GATHERED_BYTES at a time; on ranks but 0 no
    values.

    Each piece holds until the next. Not `full_tensor`: with gloo its peak was twice the tensor, on
    every rank. Of the ranks that hold a row one gives it and the others zeros; they are summed as
    bytes, so that no value changes.
    """
    local = tensor.to_local().detach()
    local_rows, *columns = local_slices(tensor)
    row_shape = tensor.shape[1:]
    row_count = span.stop - span.start
    # Of all ranks, or for an adapter this rank's tensor group: the others do as this one.
    mesh = tensor.device_mesh
    group = mesh.get_group() if mesh.ndim == 1 else None
    first_rank = int(mesh.mesh.min())
    rows_per_piece = max(1, MAX_GATHERED_BYTES // (math.prod(row_shape) * dtype.itemsize))
    gives = _is_first_replica(tensor)
    buffer = torch.empty(
        min(rows_per_piece, row_count), *row_shape, dtype=dtype, device=local.device
    )
    for begin in range(span.start, span.stop, rows_per_piece):
        # The last piece is shorter; zeros are what this rank does not have or does not give.
        rows = buffer[: span.stop - begin].zero_()
        start = max(begin, local_rows.start)
        stop = min(begin + len(rows), local_rows.stop)
        if gives and start < stop:
            part = local[start - local_rows.start : stop - local_rows.start]
            rows[(slice(start - begin, stop - begin), *columns)] = part
        dist.reduce(rows.view(torch.uint8), dst=first_rank, group=group)
        yield rows


def _is_first_replica(tensor: DTensor) -> bool:
    """Tell whether this rank is the first of those that hold its part of a tensor."""
    coordinate = tensor.device_mesh.get_coordinate() or ()
    for index, placement in zip(coordinate, tensor.placements, strict=True):
        if index > 0 and placement.is_replicate():
            return False
    return True


@torch.no_grad()
def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The DTensors among them, one after the other: whole on rank 0's host, no values on others.

    It is a collective call.
    """
    place = "cpu"
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            # On other ranks the pieces hold zeros or parts of sums: shapes are all that is needed.
            if dist.get_rank():
                place = "meta"
            pieces = _gathered_rows(tensor, tensor.dtype, slice(0, len(tensor)))
            whole[name] = torch.cat([piece.to(place, copy=True) for piece in pieces])
    return whole


def _written_dtype(
    source: Tensor | TensorPart | JoinedRows, dtype: torch.dtype | None
) -> torch.dtype:
    if isinstance(source, JoinedRows):
        source = source.tensors[0]
    tensor = source.tensor if isinstance(source, TensorPart) else source
    if dtype and isinstance(tensor, DTensor):
        return dtype
    return tensor.dtype


def _pieces(tensor: Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    """The bytes of a tensor in `dtype`, in its order of elements."""
    for piece in tensor.contiguous().view(-1).split(MAX_PIECE_BYTES // tensor.itemsize):
        yield piece.to(dtype).view(torch.uint8).cpu().numpy().data


def save_sharded(
    folder: Path | None,
    tensors: Mapping[str, Source],
    dtype: torch.dtype | None = None,
    read: Read | None = None,
) -> None:
    """Write a model's tensors by their names.

    They go to model.safetensors, or files of up to MAX_FILE_SIZE and their index. `folder`, `dtype`
    and `read` as `path`, `dtype` and `read` of `save_tensors`.
    """
    shapes = {}
    # Bytes only: DTensors and other files' tensors count as what is written of them.
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
