"""Bases that ship in NVFP4, by compressed-tensors and by ModelOpt: read, and kept, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recipes import built_model, make_run
from shipped_bases import (
    change_config,
    compressed_config,
    modelopt_config,
    write_nvfp4,
    write_qwen3_moe,
)
from tunesmith.formats.base import FrozenWeight
from tunesmith.formats.e2m1 import E2M1_VALUES
from tunesmith.formats.form import MODELOPT, ShippedForm
from tunesmith.formats.linear import FrozenLinear, empty_tensors, has_codes
from tunesmith.formats.registry import shipped_format
from tunesmith.formats.stack import ExpertStack
from tunesmith.hub.model_files import read_model_files

UP = "model.layers.0.mlp.up_proj"


def built(folder: Path, place: Path, quantize: str, dtype: str = "fp32"):
    run = make_run(folder, place, held=False, model={"quantize": quantize, "dtype": dtype})
    return built_model(run, folder).model


@pytest.mark.parametrize("form", ["fp8", "mxfp4", "nvfp4"])
def test_drawn_weights_are_small_numbers(form: str) -> None:
    """Of a base in codes whose speed is measured."""
    kind = shipped_format(ShippedForm(form, (32, 64), names=MODELOPT))
    forms = kind.matrix_forms(64, 128)
    tensors = empty_tensors(forms, torch.device("cpu"))
    kind.draw(tensors)
    read = [t.view(f.read_as or t.dtype) for t, f in zip(tensors, forms.values(), strict=True)]
    dense = FrozenWeight(kind, read, (64, 128)).dense(torch.float32)
    assert 0.01 < dense.std() < 0.05
    assert len(dense.unique()) > 8


def layers_of(model: torch.nn.Module) -> dict[str, FrozenLinear]:
    return {n: m for n, m in model.named_modules() if has_codes(m)}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_dense_bits_are_those_of_compressed_tensors(dtype: str, tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    folder = write_nvfp4(tiny, tmp_path / "base")
    [group] = compressed_config()["config_groups"].values()
    weights = QuantizationArgs(**group["weights"])
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    stored = load_file(folder / "model.safetensors")
    kept = layers_of(built(folder, tmp_path, "as-shipped", dtype))
    dense = dict(built(folder, tmp_path, "none", dtype).named_parameters())
    assert len(kept) == 14
    for name, layer in kept.items():
        parts = ("weight_packed", "weight_scale", "weight_global_scale")
        of_layer = {part: stored[f"{name}.{part}"] for part in parts}
        wanted = NVFP4PackedCompressor.decompress(of_layer, scheme)["weight"]
        assert wanted.dtype == torch.bfloat16
        if dtype == "fp32":
            # The same without its rounding to bf16.
            ones = of_layer | {
                "weight_scale": torch.ones_like(of_layer["weight_scale"]),
                "weight_global_scale": torch.ones(1),
            }
            wanted = dequantize(
                NVFP4PackedCompressor.decompress(ones, scheme)["weight"].float(),
                of_layer["weight_scale"].float(),
                args=weights,
                global_scale=of_layer["weight_global_scale"],
                dtype=torch.float32,
            )
        assert torch.equal(layer.dense(), wanted), name
        assert torch.equal(dense[f"{name}.weight"], wanted), name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_dense_bits_of_modelopt(dtype: str, tiny: Path, tmp_path: Path) -> None:
    """By the words of its `NVFP4QTensor.dequantize`: scales are multiplied in fp32."""
    folder = write_nvfp4(tiny, tmp_path / "base", modelopt=True)
    stored = load_file(folder / "model.safetensors")
    kept = layers_of(built(folder, tmp_path, "as-shipped", dtype))
    dense = dict(built(folder, tmp_path, "none", dtype).named_parameters())
    assert len(kept) == 14
    for name, layer in kept.items():
        packed = stored[f"{name}.weight"]
        codes = torch.stack([packed & 15, packed >> 4], dim=2).flatten(1).long()
        values = E2M1_VALUES[codes % 8] * (1 - 2 * (codes >= 8).float())
        scales = stored[f"{name}.weight_scale"].float() * stored[f"{name}.weight_scale_2"]
        wanted = (values.unflatten(1, (-1, 16)) * scales.unsqueeze(2)).flatten(1)
        assert torch.equal(layer.dense(), wanted.to(layer.compute_dtype)), name
        assert torch.equal(dense[f"{name}.weight"], wanted.to(layer.compute_dtype)), name


def test_modelopt_may_say_it_in_a_file_of_its_own(tiny: Path, tmp_path: Path) -> None:
    """As NVIDIA's Qwen3-235B-A22B-NVFP4 does, whose config.json says nothing."""
    folder = write_nvfp4(tiny, tmp_path / "base", modelopt=True, keep=("layers.0.self_attn",))
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    stated = {
        "producer": {"name": "modelopt", "version": "0.29.0"},
        "quantization": {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": "FP8",
            "group_size": 16,
            "exclude_modules": ["lm_head", "model.layers.0.self_attn*"],
        },
    }
    (folder / "hf_quant_config.json").write_text(json.dumps(stated))
    files = read_model_files(folder, make_run(folder, tmp_path, held=False).model)
    assert files.spec.quantized == "nvfp4"
    kept = layers_of(built(folder, tmp_path, "auto"))
    assert len(kept) == 10
    assert not any("layers.0.self_attn" in name for name in kept)


IGNORED = {
    "names": (compressed_config, [f"model.layers.0.self_attn.{x}_proj" for x in "qkvo"]),
    "an expression": (compressed_config, ["re:.*layers.0.self_attn.*"]),
    "a wildcard": (modelopt_config, ["*layers.0.self_attn*"]),
}


@pytest.mark.parametrize("name", IGNORED)
def test_modules_that_the_file_ignores_stay_dense(name: str, tiny: Path, tmp_path: Path) -> None:
    stated, ignored = IGNORED[name]
    modelopt = stated is modelopt_config
    folder = write_nvfp4(tiny, tmp_path / "base", modelopt=modelopt, keep=("layers.0.self_attn",))
    change_config(folder, quantization_config=stated(*ignored))
    model = built(folder, tmp_path, "as-shipped")
    assert len(layers_of(model)) == 10
    assert not has_codes(model.lm_head)


def test_only_the_targets_of_a_group_are_in_codes(tiny: Path, tmp_path: Path) -> None:
    folder = write_nvfp4(tiny, tmp_path / "base", keep=("self_attn",))
    config = compressed_config()
    config["config_groups"]["group_0"]["targets"] = ["re:.*mlp.*"]
    change_config(folder, quantization_config=config)
    assert len(layers_of(built(folder, tmp_path, "as-shipped"))) == 6


@pytest.mark.parametrize("modelopt", [False, True])
def test_experts_are_kept_as_they_ship(modelopt: bool, tiny: Path, tmp_path: Path) -> None:
    plain = write_qwen3_moe(tmp_path / "plain", tiny, moe_intermediate_size=48)
    base = write_nvfp4(plain, tmp_path / "base", modelopt=modelopt, keep=("mlp.gate",))
    model = built(base, tmp_path, "auto")
    dense = built(base, tmp_path, "none")
    stacks = {n: m for n, m in model.named_modules() if isinstance(m, ExpertStack)}
    assert len(stacks) == 2
    for name, stack in stacks.items():
        assert torch.equal(stack.dense(), dense.get_parameter(name))
        assert torch.equal(stack.frozen_stack().dense(1, 3, torch.float32).mT, stack.dense()[1:3])


def test_a_layer_whose_experts_are_ignored_one_by_one_has_them_dense(
    tiny: Path, tmp_path: Path
) -> None:
    plain = write_qwen3_moe(tmp_path / "plain", tiny, moe_intermediate_size=48)
    base = write_nvfp4(plain, tmp_path / "base", keep=("mlp.gate", "mlp.experts"))
    stated = json.loads((base / "config.json").read_text())["quantization_config"]
    assert "model.layers.0.mlp.experts.0.up_proj" in stated["ignore"]
    model = built(base, tmp_path, "auto")
    assert isinstance(model.get_parameter("model.layers.0.mlp.experts.down_proj"), torch.Tensor)


def test_it_holds_what_is_on_the_disk(tiny: Path, tmp_path: Path) -> None:
    folder = write_nvfp4(tiny, tmp_path / "base")
    layer = built(folder, tmp_path, "as-shipped", "bf16").get_submodule(UP)
    assert layer.weight.shape == (128, 32)
    assert layer.weight_scales.shape == (128, 4)
    assert {layer.weight.dtype, layer.weight_scales.dtype} == {torch.uint8}
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(layer.weight, stored[f"{UP}.weight_packed"])
    scales = stored[f"{UP}.weight_scale"].view(torch.uint8)
    assert torch.equal(layer.weight_scales, scales)


def test_a_weight_in_pieces_is_the_whole_one(tiny: Path, tmp_path: Path, monkeypatch) -> None:
    folder = write_nvfp4(tiny, tmp_path / "base")
    layer = built(folder, tmp_path, "as-shipped").get_submodule(UP)
    whole = layer.dense()
    monkeypatch.setattr("tunesmith.formats.nvfp4.MAX_DECODED_WEIGHTS", 64 * 50)
    assert torch.equal(layer.dense(), whole)
    monkeypatch.setattr("tunesmith.model.stored_tensors.MAX_READ_WEIGHTS", 64 * 50)
    assert torch.equal(built(folder, tmp_path, "none").get_submodule(UP).weight, whole)
