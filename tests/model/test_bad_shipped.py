"""Bases in codes that are torn, or in a form that is not read: where, and the fix, at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from errors import holds, refuses
from recipes import built_model, make_run
from shipped_bases import (
    change_config,
    change_tensors,
    fp8_config,
    write_fp8,
    write_mxfp4_gpt_oss,
)
from tunesmith.errors import ModelError, RecipeError, TunesmithError
from tunesmith.hub.model_files import read_model_files
from tunesmith.parallel.mesh import check_mesh
from tunesmith.parallel.mesh_shape import MeshShape
from tunesmith.training.run import train

SECONDS = 0.5
BLOCK = (32, 16)
UP = "model.layers.0.mlp.up_proj.weight"
SCALE = f"{UP}_scale_inv"
EXPERTS = "model.layers.0.mlp.experts.down_proj"

Fault = Callable[[Path], Any]


def config_of(**more: Any) -> Fault:
    return lambda folder: change_config(folder, quantization_config=fp8_config(BLOCK, **more))


def tensors_of(**changes: torch.Tensor | None) -> Fault:
    names = {"up": UP, "scale": SCALE}
    return lambda folder: change_tensors(folder, {names[key]: t for key, t in changes.items()})


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape).to(dtype)


# name -> what is done to a checkpoint in FP8, words of the error, of its place, and of its fix
FP8: dict[str, tuple[Fault, str, str, str]] = {
    "another method": (
        config_of(quant_method="gptq"), "quantized with gptq", "config.json", "unquantized"),
    "no mapping": (
        lambda folder: change_config(folder, quantization_config="fp8"),
        "it must be a mapping", "config.json", "tunesmith fetch"),
    "a block of one size": (
        config_of(weight_block_size=[128]), "two whole numbers", "config.json", "fetch"),
    "a block of nothing": (
        config_of(weight_block_size=[0, 128]), "two whole numbers", "config.json", "fetch"),
    "a block in words": (
        config_of(weight_block_size="128x128"), "two whole numbers", "config.json", "fetch"),
    "names that are none": (
        config_of(modules_to_not_convert=[3]), "must be a list of names", "config.json", "fetch"),
    "one name as text": (
        config_of(modules_to_not_convert="lm_head"), "must be a list of names", "config.json",
        "fetch"),
    "experts in FP4": (
        config_of(expert_dtype="fp4"), "expert_dtype is 'fp4'", "config.json", "unquantized"),
    "an embedding in FP8": (
        config_of(modules_to_convert=["embed_tokens"]), "modules_to_convert", "config.json",
        "unquantized"),
    "no scales": (
        tensors_of(scale=None), f"the scales of {UP} are missing", "safetensors", "fetch"),
    "no weight": (tensors_of(up=None), f"no weight for {SCALE}", "safetensors", "fetch"),
    "scales of another shape": (
        tensors_of(scale=ones(4, 3)), "up_proj.weight_scale_inv is [4, 3]", "safetensors", "fetch"),
    "one scale where there are blocks": (
        tensors_of(scale=torch.tensor(1.0)), "weight_scale_inv is []", "safetensors", "fetch"),
    "scales that are integers": (
        tensors_of(scale=ones(4, 4, dtype=torch.int32)), "hold integers", "safetensors",
        "unquantized"),
    "scales in e5m2": (
        tensors_of(scale=ones(4, 4, dtype=torch.float8_e5m2)), "stored as F8_E5M2",
        "safetensors", "fetch"),
    "codes in e5m2": (
        tensors_of(up=ones(128, 64, dtype=torch.float8_e5m2)), "stored as F8_E5M2", "safetensors",
        "fetch"),
    "a plain weight beside scales": (
        tensors_of(up=ones(128, 64)), "is stored as F32", "safetensors", "fetch"),
    "codes that are no matrix": (
        tensors_of(up=ones(2, 64, 64, dtype=torch.float8_e4m3fn)), "is [2, 64, 64]", "safetensors",
        "fetch"),
    "codes of another shape": (
        tensors_of(up=ones(128, 32, dtype=torch.float8_e4m3fn), scale=ones(4, 2)),
        "it is stored as [128, 32]", UP, "fetch"),
    "a scale that is no number": (
        tensors_of(scale=ones(4, 4) * torch.inf), "is not finite", SCALE, "fetch"),
    "a plain weight that should be in codes": (
        tensors_of(up=ones(128, 64), scale=None), "stored without scales", UP,
        "modules_to_not_convert"),
}  # fmt: skip


def assert_refused(folder: Path, runs: Path, what: str, where: str, fix: str, **model: Any) -> None:
    """As a start reads it: config and headers, then the weights."""
    run = make_run(folder, runs, held=False, model=model)
    start = time.perf_counter()
    with pytest.raises(ModelError) as caught:
        built_model(run, folder)
    assert time.perf_counter() - start < SECONDS
    assert what in caught.value.what
    assert where in caught.value.where
    assert fix in caught.value.fix


@pytest.mark.parametrize("name", FP8)
def test_fp8(tiny: Path, tmp_path: Path, name: str) -> None:
    fault, what, where, fix = FP8[name]
    folder = write_fp8(tiny, tmp_path / "base", BLOCK)
    fault(folder)
    assert_refused(folder, tmp_path, what, where, fix)


def test_a_file_that_is_cut_off(tiny: Path, tmp_path: Path) -> None:
    folder = write_fp8(tiny, tmp_path / "base", BLOCK)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert_refused(folder, tmp_path, "is damaged", "model.safetensors", "copy the file again")


MXFP4_FAULTS: dict[str, tuple[str, torch.Tensor | None, str]] = {
    "no scales": ("_scales", None, f"the scales of {EXPERTS}_blocks are missing"),
    "no blocks": ("_blocks", None, f"there are no blocks for {EXPERTS}_scales"),
    "torn blocks": ("_blocks", ones(4, 64, 3, 15, dtype=torch.uint8), "is [4, 64, 3, 15]"),
    "scales of another shape": ("_scales", ones(4, 64, 2, dtype=torch.uint8), "is [4, 64, 2]"),
    "scales that are no bytes": ("_scales", ones(4, 64, 3), "stored as F32"),
    "an expert too few": ("", None, "it is stored as [3, 96, 64]"),
}


@pytest.mark.parametrize("name", MXFP4_FAULTS)
def test_mxfp4(tiny: Path, tmp_path: Path, name: str) -> None:
    suffix, tensor, what = MXFP4_FAULTS[name]
    folder = write_mxfp4_gpt_oss(tmp_path / "base", tiny)
    if suffix:
        change_tensors(folder, {f"{EXPERTS}{suffix}": tensor})
    else:
        stored = load_file(folder / "model.safetensors")
        names = (f"{EXPERTS}_blocks", f"{EXPERTS}_scales")
        change_tensors(folder, {part: stored[part][:3].clone() for part in names})
    run = make_run(folder, tmp_path, held=False)
    with pytest.raises(ModelError) as caught:
        built_model(run, folder)
    assert what in caught.value.what
    assert "fetch" in caught.value.fix


def test_as_shipped_of_a_plain_base(tiny: Path, tmp_path: Path) -> None:
    what = "ships nothing that can be kept so"
    assert_refused(
        tiny, tmp_path, what, "config.json", "model.quantize=none", quantize="as-shipped"
    )


def test_as_shipped_trained_in_full(tiny: Path, tmp_path: Path) -> None:
    with refuses(RecipeError, names=["model.quantize", "as-shipped"]) as caught:
        make_run(tiny, tmp_path, model={"quantize": "as-shipped"}, adapter={"kind": "none"})
    assert holds(caught.value.fix, "model.quantize: none", "16-bit")


@pytest.mark.parametrize("quantize", ["as-shipped", "nf4"])
def test_a_layer_in_codes_is_not_saved_in_full(tiny: Path, tmp_path: Path, quantize: str) -> None:
    """It was an internal error."""
    if quantize == "nf4":
        pytest.importorskip("bitsandbytes")
    folder = write_fp8(tiny, tmp_path / "base", BLOCK)
    saved = {"modules_to_save": ["down_proj"]}
    run = make_run(folder, tmp_path, model={"quantize": quantize}, adapter=saved)
    with refuses(RecipeError, where="adapter.modules_to_save") as caught:
        built_model(run, folder)
    assert caught.value.where == "adapter.modules_to_save"
    assert "model.quantize=none" in caught.value.fix


def test_a_layer_as_it_ships_is_not_cut_over_ranks(tiny: Path, tmp_path: Path) -> None:
    folder = write_fp8(tiny, tmp_path / "base", BLOCK)
    run = make_run(folder, tmp_path, model={"quantize": "as-shipped"})
    spec = read_model_files(folder, run.model).spec
    with refuses(RecipeError, names=["replicate 1 x shard 1 x tensor 2"]) as caught:
        check_mesh(run, spec, MeshShape(1, 1, 2), 2)
    assert caught.value.fix == "model.quantize=none"
    check_mesh(run, spec, MeshShape(1, 2, 1), 2)


def test_a_form_that_config_json_does_not_name(tiny: Path, tmp_path: Path) -> None:
    """Codes without the config's word for them."""
    folder = write_fp8(tiny, tmp_path / "base", BLOCK)
    change_config(folder, quantization_config=None)
    run = make_run(folder, tmp_path, held=False)
    with pytest.raises(TunesmithError) as caught:
        train(run, quiet=True)
    assert "tensors" in caught.value.what
