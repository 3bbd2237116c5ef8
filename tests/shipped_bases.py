"""Tiny checkpoints whose weights ship in FP8 or MXFP4, made of plain ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


def rounded(weight: torch.Tensor, block: tuple[int, int] | None) -> tuple[torch.Tensor, ...]:
    """e4m3 codes of a weight, and their scales: one for each block, or one of all."""
    if block is None:
        scale = weight.abs().max() / 448
        return (weight / scale).to(torch.float8_e4m3fn), scale
    parts = [row.split(block[1], 1) for row in weight.split(block[0])]
    scale = torch.stack([torch.stack([part.abs().max() / 448 for part in row]) for row in parts])
    spread = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    spread = spread[: weight.shape[0], : weight.shape[1]]
    return (weight / spread).to(torch.float8_e4m3fn), scale


def fp8_config(block: tuple[int, int] | None, **more: Any) -> dict[str, Any]:
    static = "dynamic" if block else "static"
    sizes = list(block) if block else None
    return {"quant_method": "fp8", "weight_block_size": sizes, "activation_scheme": static, **more}


def write_fp8(
    plain: Path,
    folder: Path,
    block: tuple[int, int] | None,
    *,
    scales: torch.dtype = torch.float32,
    keep: tuple[str, ...] = (),
) -> Path:
    """A copy of a checkpoint with its layers' matrices in FP8, but those named in `keep`."""
    shutil.copytree(plain, folder, dirs_exist_ok=True)
    tensors: Tensors = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        skipped = any(word in name for word in ("embed", "lm_head", "vision", "projector", *keep))
        if weight.ndim != 2 or skipped:
            tensors[name] = weight
            continue
        codes, scale = rounded(weight.float(), block)
        stem = name.removesuffix("weight")
        tensors |= {name: codes, f"{stem}weight_scale_inv": scale.to(scales)}
        if block is None:
            tensors[f"{stem}activation_scale"] = torch.tensor(0.5)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    skip = ["lm_head", *keep]
    return change_config(folder, quantization_config=fp8_config(block, modules_to_not_convert=skip))


def change_config(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def change_tensors(folder: Path, changes: dict[str, torch.Tensor | None]) -> Path:
    """Write tensors of a checkpoint anew, or leave them out."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
    return folder
