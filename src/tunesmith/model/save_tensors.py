"""Write safetensors files piece by piece.

safetensors' own `save_file` copies every tensor of a file to the host before it writes the first one: 36 GiB for the
fp32 masters and moments of a 3B model. Here the host holds one piece of one tensor at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from torch.distributed.tensor import DTensor

from tunesmith.model.safetensors_files import INDEX
from tunesmith.model.weights import STORED

NAMES = {dtype: name for name, dtype in STORED.items()}
PIECE = 64 << 20  # bytes on the host at a time: enough for a disk's full speed
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
    DTensors are gathered one at a time, in which all their ranks take part: those that write no file give no `path`.
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
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if file is not None:
                file.writelines(_pieces(whole, kinds[name]))


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
