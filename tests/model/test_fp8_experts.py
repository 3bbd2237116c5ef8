"""Experts that a checkpoint holds one by one in FP8."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recipes import built_model, make_run
from shipped_bases import write_fp8, write_qwen3_moe
from tunesmith.errors import ModelError
from tunesmith.hub.model_files import read_model_files

BLOCK = (16, 24)


def test_each_is_read_dense_into_its_place(tiny: Path, tmp_path: Path) -> None:
    plain = write_qwen3_moe(tmp_path / "plain", tiny)
    base = write_fp8(plain, tmp_path / "fp8", BLOCK, keep=("mlp.gate",))
    stored = load_file(base / "model.safetensors")
    prefix = "model.layers.0.mlp.experts"
    up = stored[f"{prefix}.3.up_proj.weight"]
    assert up.dtype == torch.float8_e4m3fn
    run = make_run(base, tmp_path, held=False)
    assert read_model_files(base, run.model).model.quantize == "none"
    model = built_model(run, base).model
    scale = stored[f"{prefix}.3.up_proj.weight_scale_inv"]
    spread = scale.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)
    wanted = up.float() * spread[: up.shape[0], : up.shape[1]]
    stack = model.get_parameter(f"{prefix}.gate_up_proj")
    assert torch.equal(stack[3, up.shape[0] :], wanted)


def test_they_are_not_kept_as_they_ship(tiny: Path, tmp_path: Path) -> None:
    plain = write_qwen3_moe(tmp_path / "plain", tiny)
    base = write_fp8(plain, tmp_path / "fp8", BLOCK, keep=("mlp.gate",))
    run = make_run(base, tmp_path, held=False, model={"quantize": "as-shipped"})
    with pytest.raises(ModelError, match="experts of this qwen3_moe cannot be kept") as caught:
        read_model_files(base, run.model)
    assert "model.quantize=none" in caught.value.fix
