"""Experts that a checkpoint holds in FP8, one by one or as stacks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from errors import refuses
from recipes import built_model, make_run
from shipped_bases import (
    change_config,
    change_tensors,
    fp8_config,
    write_fp8,
    write_fp8_stacks,
    write_qwen3_moe,
)
from tunesmith.errors import ModelError
from tunesmith.formats.linear import has_codes
from tunesmith.hub.model_files import read_model_files
from tunesmith.model.gguf_writers import describe_gguf_export
from tunesmith.presentation.start import model_files_lines

BLOCK = (16, 24)


def test_each_is_read_dense_into_its_place(tiny: Path, tmp_path: Path) -> None:
    plain = write_qwen3_moe(tmp_path / "plain", tiny)
    base = write_fp8(plain, tmp_path / "fp8", BLOCK, keep=("mlp.gate",))
    stored = load_file(base / "model.safetensors")
    prefix = "model.layers.0.mlp.experts"
    up = stored[f"{prefix}.3.up_proj.weight"]
    assert up.dtype == torch.float8_e4m3fn
    run = make_run(base, tmp_path, held=False, model={"quantize": "none"})
    model = built_model(run, base).model
    scale = stored[f"{prefix}.3.up_proj.weight_scale_inv"]
    spread = scale.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)
    wanted = up.float() * spread[: up.shape[0], : up.shape[1]]
    stack = model.get_parameter(f"{prefix}.gate_up_proj")
    assert torch.equal(stack[3, up.shape[0] :], wanted)


def test_they_are_kept_as_they_ship_by_default(tiny: Path, tmp_path: Path) -> None:
    plain = write_qwen3_moe(tmp_path / "plain", tiny)
    base = write_fp8(plain, tmp_path / "fp8", BLOCK, keep=("mlp.gate",))
    run = make_run(base, tmp_path, held=False)
    files = read_model_files(base, run.model)
    assert files.model.quantize == "as-shipped"
    assert f"GGUF: {describe_gguf_export('qwen3_moe')}" in list(model_files_lines(files))
    model = built_model(run, base).model
    assert has_codes(model.get_submodule("model.layers.0.mlp.experts.down_proj"))


def test_one_that_has_no_scales_is_refused(tiny: Path, tmp_path: Path) -> None:
    """As config.json says that all are in codes."""
    plain = write_qwen3_moe(tmp_path / "plain", tiny)
    base = write_fp8(plain, tmp_path / "fp8", BLOCK, keep=("mlp.gate", "experts.2.up_proj"))
    change_config(base, quantization_config=fp8_config(BLOCK, modules_to_not_convert=["lm_head"]))
    with refuses(ModelError, where="model.layers.0.mlp.experts.2.up_proj.weight"):
        built_model(make_run(base, tmp_path, held=False), base)


def test_layers_whose_experts_are_not_converted_have_them_dense(tiny: Path, tmp_path: Path) -> None:
    plain = write_qwen3_moe(tmp_path / "plain", tiny)
    base = write_fp8(
        plain, tmp_path / "fp8", BLOCK, keep=("mlp.gate", "model.layers.0.mlp.experts")
    )
    model = built_model(make_run(base, tmp_path, held=False), base).model
    weight = model.get_parameter("model.layers.0.mlp.experts.down_proj")
    assert weight.dtype == torch.float32


STACKS = [f"model.layers.0.mlp.experts.{key}" for key in ("gate_up_proj", "down_proj")]


@pytest.mark.parametrize("block", [None, (8, 24)])
def test_stacks_are_kept_as_they_ship_and_read_dense(
    block: tuple[int, int] | None, tiny: Path, tmp_path: Path
) -> None:
    """Mistral Small 4 has one scale an expert, for gate and up together."""
    plain = write_qwen3_moe(tmp_path / "plain", tiny)
    base = write_fp8_stacks(plain, tmp_path / "fp8", block)
    stored = load_file(base / "model.safetensors")
    kept = built_model(make_run(base, tmp_path, held=False), base).model
    run = make_run(base, tmp_path, held=False, model={"quantize": "none"})
    dense = built_model(run, base).model
    for name in STACKS:
        wanted = stored[name].float()
        assert wanted.ndim == 3
        scale = stored[f"{name}_scale_inv"]
        if block:
            scale = scale.repeat_interleave(block[0], 1).repeat_interleave(block[1], 2)
            scale = scale[:, : wanted.shape[1], : wanted.shape[2]]
        wanted *= scale
        assert torch.equal(dense.get_parameter(name), wanted)
        stack = kept.get_submodule(name)
        assert has_codes(stack)
        assert torch.equal(stack.dense(), wanted)
    in_nf4 = make_run(base, tmp_path, held=False, model={"quantize": "nf4"})
    # The widest gap between levels of nf4, -1 and -0.696, is 0.304 of the largest of 64 weights;
    # the scales are rounded too.
    stack = built_model(in_nf4, base).model.get_submodule(STACKS[1])
    assert (stack.dense() - wanted).abs().max() < 0.16 * wanted.abs().max()


def test_stacks_whose_blocks_have_rows_of_both_projections_are_refused(
    tiny: Path, tmp_path: Path
) -> None:
    """Each of the two has 40 rows."""
    plain = write_qwen3_moe(tmp_path / "plain", tiny)
    base = write_fp8_stacks(plain, tmp_path / "fp8", (16, 24))
    with refuses(ModelError, where="model.safetensors", names=[STACKS[0]]):
        read_model_files(base, make_run(base, tmp_path, held=False).model)


def test_a_stack_without_scales_is_refused(tiny: Path, tmp_path: Path) -> None:
    plain = write_qwen3_moe(tmp_path / "plain", tiny)
    base = write_fp8_stacks(plain, tmp_path / "fp8", None)
    change_tensors(base, {f"{STACKS[0]}_scale_inv": None})
    with refuses(ModelError, where="model.safetensors", names=[f"{STACKS[0]}_scale_inv"]):
        read_model_files(base, make_run(base, tmp_path, held=False).model)
