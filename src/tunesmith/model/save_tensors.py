"""Write safetensors files piece by piece.

safetensors' own `save_file` copies every tensor of a file to the host before it writes the first one: 36 GiB for the
fp32 masters and moments of a 3B model. Here the host holds one piece of one tensor at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from tunesmith.model.safetensors_files import INDEX
from tunesmith.model.weights import STORED

NAMES = {dtype: name for name, dtype in STORED.items()}
PIECE = 64 << 20  # bytes on the host at a time: enough for a disk's full speed
SHARD = "5GB"


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors of any device and strides: byte for byte the file that `safetensors.torch.save_file` writes.

    The host holds at most PIECE bytes of another device's tensor; one that is not contiguous is copied on its device.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    names, end = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)), 0
    for name in names:
        tensor, start = tensors[name], end
        end = start + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that every tensor is aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.writelines(_pieces(tensors[name].detach()))


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, in its order of elements."""
    for piece in tensor.contiguous().view(-1).view(torch.uint8).split(PIECE):
        yield piece.cpu().numpy().data


def save_sharded(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a model's tensors by their Transformers names: model.safetensors, or files of up to SHARD and their index."""
    split = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=SHARD)
    for file, names in split.filename_to_tensors.items():
        save_tensors(folder / file, {name: tensors[name] for name in names}, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
