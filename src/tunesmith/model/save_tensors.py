"""Write safetensors files piece by piece.

safetensors' own `save_file` copies every tensor of a file to the host before it writes the first one: 36 GiB for the
fp32 masters and moments of a 3B model. Here the host holds one piece of one tensor at a time.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from torch.distributed.tensor import DTensor

from tunesmith.model.safetensors_files import INDEX
from tunesmith.model.weights import STORED
from tunesmith.private import local_slices

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
    """Write tensors of any device and strides: byte for byte the file that `safetensors.torch.save_file` writes.

    The host holds at most PIECE bytes of another device's tensor; one that is not contiguous is copied on its device.
    DTensors are gathered some rows at a time, in which all ranks take part: rank 0 gives `path`, and the others None.
    `dtype`: to write DTensors in, None for their own; other tensors keep theirs. With `read` the tensors are on meta, and it
    returns the values of each by its name when its turn comes.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    kinds = {name: _written_dtype(tensor, dtype) for name, tensor in tensors.items()}
    names, end = sorted(tensors, key=lambda name: (-kinds[name].itemsize, name)), 0
    for name in names:
        shape, start = list(tensors[name].shape), end
        end = start + tensors[name].numel() * kinds[name].itemsize
        header[name] = {"dtype": NAMES[kinds[name]], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that every tensor is aligned
    with path.open("wb") if path else nullcontext() as file:
        if file is not None:
            file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = read(name) if read else tensors[name].detach()
            for part in _gathered_rows(tensor, kinds[name]) if isinstance(tensor, DTensor) else [tensor]:
                if file is not None:
                    file.writelines(_pieces(part, kinds[name]))


def _gathered_rows(tensor: DTensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The rows of a tensor in `dtype`, up to GATHERED bytes at a time, on rank 0 and until the next; on other ranks no values.

    Not `full_tensor`: with gloo its peak was twice the tensor, on every rank. Of the ranks that hold a row one gives it and the
    others zeros; they are summed as bytes, so that no value changes.
    """
    local, (own, *columns), shape = tensor.to_local(), local_slices(tensor), tensor.shape
    mesh = tensor.device_mesh  # of all ranks, or for an adapter this rank's tensor group: the others do as this one
    group, first = mesh.get_group() if mesh.ndim == 1 else None, int(mesh.mesh.min())
    at, step = mesh.get_coordinate(), max(1, GATHERED // (math.prod(shape[1:]) * dtype.itemsize))
    gives = not any(index and p.is_replicate() for index, p in zip(at or (), tensor.placements, strict=True))
    buffer = torch.empty(min(step, shape[0]), *shape[1:], dtype=dtype, device=local.device)
    for begin in range(0, shape[0], step):
        rows = buffer[: shape[0] - begin].zero_()
        start, stop = max(begin, own.start), min(begin + len(rows), own.stop)
        if gives and start < stop:
            rows[(slice(start - begin, stop - begin), *columns)] = local[start - own.start : stop - own.start]
        dist.reduce(rows.view(torch.uint8), dst=first, group=group)
        yield rows


@torch.no_grad()
def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The DTensors among them, one after the other: whole in host memory on rank 0, without values on others. A collective
    call."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            place = "meta" if dist.get_rank() else "cpu"
            found[name] = torch.cat([r.to(place, copy=True) for r in _gathered_rows(tensor, tensor.dtype)])
    return found


def _written_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype and isinstance(tensor, DTensor) else tensor.dtype


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
    """Write a model's tensors by their Transformers names: model.safetensors, or files of up to SHARD and their index.

    `folder`, `dtype` and `read` as `path`, `dtype` and `read` of `save_tensors`.
    """
    shapes = {n: torch.empty(t.shape, dtype=_written_dtype(t, dtype), device="meta") for n, t in tensors.items()}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=SHARD)
    for file, names in split.filename_to_tensors.items():
        path = folder / file if folder else None
        save_tensors(path, {name: tensors[name] for name in names}, {"format": "pt"}, dtype, read)
    if split.is_sharded and folder:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
