"""Write safetensors files piece by piece.

safetensors' own `save_file` copies every tensor of a file to the host before it writes the first
one: 36 GiB for the fp32 masters and moments of a 3B model. Here the host holds one piece of one
tensor at a time.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from torch.distributed.tensor import DTensor

from tunesmith.distributed.torch_private import local_slices
from tunesmith.model.safetensors_files import INDEX
from tunesmith.model.weights import STORED

NAMES = {dtype: name for name, dtype in STORED.items()}
PIECE = 64 << 20  # bytes on the host at a time: enough for a disk's full speed
GATHERED = 16 << 20  # bytes of one collective, which may take as much again
SHARD = "5GB"


def save_tensors(
    path: Path | None,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    read: Callable[[str], Tensor] | None = None,
) -> None:
    """Write tensors of any device and strides: the bytes that `safetensors.torch.save_file` writes.

    The host holds at most PIECE bytes of another device's tensor; one that is not contiguous is
    copied on its device. DTensors are gathered some rows at a time, in which all ranks take part.

    Args:
        path: of rank 0; None on the others.
        dtype: to write DTensors in, None for their own; other tensors keep theirs.
        read: the tensors are on meta, and it returns the values of each by its name when its turn
            comes.
    """
    dtypes = {name: _written_dtype(tensor, dtype) for name, tensor in tensors.items()}
    names = sorted(tensors, key=lambda name: (-dtypes[name].itemsize, name))
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = dict(metadata)
    end = 0
    for name in names:
        start = end
        end = start + tensors[name].numel() * dtypes[name].itemsize
        header[name] = {
            "dtype": NAMES[dtypes[name]],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that every tensor is aligned
    with path.open("wb") if path else nullcontext() as file:
        if file is not None:
            file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = read(name) if read else tensors[name].detach()
            parts: Iterable[Tensor] = [tensor]
            if isinstance(tensor, DTensor):
                parts = _gathered_rows(tensor, dtypes[name])
            for part in parts:
                if file is not None:
                    file.writelines(_pieces(part, dtypes[name]))


def _gathered_rows(tensor: DTensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The rows of a tensor in `dtype`, up to GATHERED bytes at a time; on ranks but 0 no values.

    Each piece holds until the next. Not `full_tensor`: with gloo its peak was twice the tensor, on
    every rank. Of the ranks that hold a row one gives it and the others zeros; they are summed as
    bytes, so that no value changes.
    """
    local = tensor.to_local()
    local_rows, *columns = local_slices(tensor)
    row_count, *row_shape = tensor.shape
    # Of all ranks, or for an adapter this rank's tensor group: the others do as this one.
    mesh = tensor.device_mesh
    group = mesh.get_group() if mesh.ndim == 1 else None
    first_rank = int(mesh.mesh.min())
    rows_per_piece = max(1, GATHERED // (math.prod(row_shape) * dtype.itemsize))
    gives = _is_first_replica(tensor)
    buffer = torch.empty(
        min(rows_per_piece, row_count), *row_shape, dtype=dtype, device=local.device
    )
    for begin in range(0, row_count, rows_per_piece):
        rows = buffer[: row_count - begin].zero_()
        start = max(begin, local_rows.start)
        stop = min(begin + len(rows), local_rows.stop)
        if gives and start < stop:
            part = local[start - local_rows.start : stop - local_rows.start]
            rows[(slice(start - begin, stop - begin), *columns)] = part
        dist.reduce(rows.view(torch.uint8), dst=first_rank, group=group)
        yield rows


def _is_first_replica(tensor: DTensor) -> bool:
    """Whether this rank is the first of those that hold its part of a tensor."""
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
            if dist.get_rank():
                place = "meta"
            pieces = _gathered_rows(tensor, tensor.dtype)
            whole[name] = torch.cat([piece.to(place, copy=True) for piece in pieces])
    return whole


def _written_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if dtype and isinstance(tensor, DTensor):
        return dtype
    return tensor.dtype


def _pieces(tensor: Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    """The bytes of a tensor in `dtype`, in its order of elements."""
    for piece in tensor.contiguous().view(-1).split(PIECE // tensor.itemsize):
        yield piece.to(dtype).view(torch.uint8).cpu().numpy().data


def save_sharded(
    folder: Path | None,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    read: Callable[[str], Tensor] | None = None,
) -> None:
    """Write a model's tensors by their Transformers names.

    They go to model.safetensors, or files of up to SHARD and their index. `folder`, `dtype` and
    `read` as `path`, `dtype` and `read` of `save_tensors`.
    """
    shapes = {}
    for name, tensor in tensors.items():
        written_dtype = _written_dtype(tensor, dtype)
        shapes[name] = torch.empty(tensor.shape, dtype=written_dtype, device="meta")
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=SHARD)
    for file, names in split.filename_to_tensors.items():
        path = folder / file if folder else None
        file_tensors = {name: tensors[name] for name in names}
        save_tensors(path, file_tensors, {"format": "pt"}, dtype, read)
    if split.is_sharded and folder:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
