"""Bases that ship in codes (NVFP4, FP8 stacks, MXFP4): read, and kept, bit for bit.

Products with them: `tests/quant`; torn files: `test_bad_shipped.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from errors import refuses
from recipes import built_model, make_run
from shipped_bases import (
    change_config,
    change_tensors,
    compressed_config,
    fp8_config,
    modelopt_config,
    write_fp8,
    write_fp8_stacks,
    write_mxfp4_gpt_oss,
    write_nvfp4,
    write_qwen3_moe,
)
from tunesmith.errors import ModelError, RecipeError
from tunesmith.formats.base import FrozenWeight
from tunesmith.formats.e2m1 import E2M1_VALUES
from tunesmith.formats.form import MODELOPT, ShippedForm
from tunesmith.formats.linear import FrozenLinear, empty_tensors, has_codes
from tunesmith.formats.mxfp4 import decode_mxfp4
from tunesmith.formats.registry import shipped_format
from tunesmith.formats.stack import ExpertStack
from tunesmith.hub.model_files import read_model_files
from tunesmith.training.run import train


def built(folder: Path, place: Path, quantize: str = "auto", dtype: str = "fp32") -> Any:
    run = make_run(folder, place, held=False, model={"quantize": quantize, "dtype": dtype})
    return built_model(run, folder).model


def layers_of(model: torch.nn.Module) -> dict[str, FrozenLinear]:
    return {n: m for n, m in model.named_modules() if has_codes(m)}


@pytest.fixture(scope="module")
def plain(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3_moe(tmp_path_factory.mktemp("plain"), tiny, moe_intermediate_size=48)


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


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_nvfp4_has_the_bits_of_compressed_tensors(dtype: str, tiny: Path, tmp_path: Path) -> None:
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


def test_nvfp4_has_the_bits_of_modelopt(tiny: Path, tmp_path: Path) -> None:
    """By the words of its `NVFP4QTensor.dequantize`: scales are multiplied in fp32."""
    folder = write_nvfp4(tiny, tmp_path / "base", modelopt=True)
    stored = load_file(folder / "model.safetensors")
    kept = layers_of(built(folder, tmp_path, "as-shipped"))
    dense = dict(built(folder, tmp_path, "none").named_parameters())
    assert len(kept) == 14
    for name, layer in kept.items():
        packed = stored[f"{name}.weight"]
        codes = torch.stack([packed & 15, packed >> 4], dim=2).flatten(1).long()
        values = E2M1_VALUES[codes % 8] * (1 - 2 * (codes >= 8).float())
        scales = stored[f"{name}.weight_scale"].float() * stored[f"{name}.weight_scale_2"]
        wanted = (values.unflatten(1, (-1, 16)) * scales.unsqueeze(2)).flatten(1)
        assert torch.equal(layer.dense(), wanted), name
        assert torch.equal(dense[f"{name}.weight"], wanted), name


@pytest.mark.slow
def test_a_weight_in_pieces_is_the_whole_one(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, name = write_nvfp4(tiny, tmp_path / "base"), "model.layers.0.mlp.up_proj"
    layer = built(folder, tmp_path, "as-shipped").get_submodule(name)
    whole = layer.dense()
    monkeypatch.setattr("tunesmith.formats.nvfp4.MAX_DECODED_WEIGHTS", 64 * 50)
    assert torch.equal(layer.dense(), whole)
    monkeypatch.setattr("tunesmith.model.stored_tensors.MAX_READ_WEIGHTS", 64 * 50)
    assert torch.equal(built(folder, tmp_path, "none").get_submodule(name).weight, whole)


FIRST = "layers.0.self_attn"
OWN_FILE = {
    "producer": {"name": "modelopt", "version": "0.29.0"},
    "quantization": {
        "quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16,
        "exclude_modules": ["lm_head", f"model.{FIRST}*"],
    },
}  # fmt: skip
MLP_ALONE = compressed_config()
MLP_ALONE["config_groups"]["group_0"]["targets"] = ["re:.*mlp.*"]
# Whether ModelOpt wrote it, what config.json says, and the layers that are in codes.
IGNORED: dict[str, tuple[bool, dict[str, Any] | None, str, int]] = {
    "names": (False, compressed_config(*(f"model.{FIRST}.{x}_proj" for x in "qkvo")), FIRST, 10),
    "an expression": (False, compressed_config(f"re:.*{FIRST}.*"), FIRST, 10),
    "targets": (False, MLP_ALONE, "self_attn", 6),
    "a wildcard": (True, modelopt_config(f"*{FIRST}*"), FIRST, 10),
    # As NVIDIA's Qwen3-235B-A22B-NVFP4 does, whose config.json says nothing.
    "a file of its own": (True, None, FIRST, 10),
}


@pytest.mark.parametrize("name", IGNORED)
def test_modules_that_the_file_ignores_stay_dense(name: str, tiny: Path, tmp_path: Path) -> None:
    modelopt, stated, kept, count = IGNORED[name]
    folder = write_nvfp4(tiny, tmp_path / "base", modelopt=modelopt, keep=(kept,))
    change_config(folder, quantization_config=stated)
    if stated is None:
        config = json.loads((folder / "config.json").read_text())
        del config["quantization_config"]
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "hf_quant_config.json").write_text(json.dumps(OWN_FILE))
    model = built(folder, tmp_path)
    assert len(layers_of(model)) == count
    assert not has_codes(model.lm_head)


@pytest.mark.parametrize("modelopt", [False, True])
@pytest.mark.slow
def test_experts_in_nvfp4_are_kept(modelopt: bool, plain: Path, tmp_path: Path) -> None:
    base = write_nvfp4(plain, tmp_path / "base", modelopt=modelopt, keep=("mlp.gate",))
    dense = built(base, tmp_path, "none")
    modules = built(base, tmp_path).named_modules()
    stacks = {n: m for n, m in modules if isinstance(m, ExpertStack)}
    assert len(stacks) == 2
    for name, stack in stacks.items():
        assert torch.equal(stack.dense(), dense.get_parameter(name))
        assert torch.equal(stack.frozen_stack().dense(1, 3, torch.float32).mT, stack.dense()[1:3])


DOWN = "model.layers.0.mlp.experts.down_proj"


@pytest.mark.slow
def test_experts_that_are_not_converted_are_dense(plain: Path, tmp_path: Path) -> None:
    base = write_nvfp4(plain, tmp_path / "nvfp4", keep=("mlp.gate", "mlp.experts"))
    assert built(base, tmp_path).get_parameter(DOWN).dtype == torch.float32
    block, gate = (16, 24), "mlp.gate"
    base = write_fp8(plain, tmp_path / "fp8", block, keep=(gate, "model.layers.0.mlp.experts"))
    assert built(base, tmp_path).get_parameter(DOWN).dtype == torch.float32
    # One alone, while config.json says that all are in codes.
    base = write_fp8(plain, tmp_path / "one", block, keep=(gate, "experts.2.up_proj"))
    change_config(base, quantization_config=fp8_config(block, modules_to_not_convert=["lm_head"]))
    with refuses(ModelError, where="model.layers.0.mlp.experts.2.up_proj.weight"):
        built(base, tmp_path)


def test_experts_in_fp8_are_read_dense_into_their_places(plain: Path, tmp_path: Path) -> None:
    base = write_fp8(plain, tmp_path / "fp8", (16, 24), keep=("mlp.gate",))
    stored = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    up, scale = stored[name].float(), stored[f"{name}_scale_inv"]
    spread = scale.repeat_interleave(16, 0).repeat_interleave(24, 1)[: up.shape[0], : up.shape[1]]
    stack = built(base, tmp_path, "none").get_parameter(DOWN.replace("down", "gate_up"))
    assert torch.equal(stack[3, len(up) :], up * spread)


STACKS = [f"model.layers.0.mlp.experts.{key}" for key in ("gate_up_proj", "down_proj")]


@pytest.mark.slow
def test_stacks_in_fp8_are_kept_and_read_dense(plain: Path, tmp_path: Path) -> None:
    """Mistral Small 4 has one scale an expert, for gate and up together."""
    base = write_fp8_stacks(plain, tmp_path / "fp8", None)
    stored = load_file(base / "model.safetensors")
    kept, dense = built(base, tmp_path), built(base, tmp_path, "none")
    for name in STACKS:
        wanted = stored[name].float() * stored[f"{name}_scale_inv"]
        assert wanted.ndim == 3
        assert torch.equal(dense.get_parameter(name), wanted)
        assert torch.equal(kept.get_submodule(name).dense(), wanted)
    change_tensors(base, {f"{STACKS[0]}_scale_inv": None})
    run = make_run(base, tmp_path, held=False)
    with refuses(ModelError, where="model.safetensors", names=[f"{STACKS[0]}_scale_inv"]):
        read_model_files(base, run.model)
    # A block with rows of both projections, which have 48 each.
    base = write_fp8_stacks(plain, tmp_path / "blocks", (32, 24))
    with refuses(ModelError, where="model.safetensors", names=[STACKS[0]]):
        read_model_files(base, run.model)


def test_each_code_of_mxfp4_with_each_exponent_is_that_of_transformers() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 255, 16, 16)
    exponents = torch.arange(255, dtype=torch.uint8).view(1, 255, 1).expand(1, 255, 16)
    for dtype in (torch.bfloat16, torch.float32):
        wanted = convert_moe_packed_tensors(blocks, exponents.contiguous(), dtype=dtype)
        values = decode_mxfp4(blocks, exponents, dtype).transpose(1, 2)
        assert torch.equal(values, wanted)
        assert torch.equal(values.signbit(), wanted.signbit())


@pytest.mark.slow
def test_mxfp4_is_read_bit_for_bit_and_trained_dense_in_full(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_mxfp4_gpt_oss(tmp_path / "base", tiny)
    theirs = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    )
    # In pieces that are no whole expert.
    monkeypatch.setattr("tunesmith.model.stored_tensors.MAX_READ_WEIGHTS", 64 * 40)
    ours = dict(built(base, tmp_path, "none", "bf16").named_parameters())
    compared = 0
    for name, weight in theirs.named_parameters():
        assert torch.equal(ours[name], weight), name
        compared += name.endswith(("gate_up_proj", "down_proj"))
    assert compared == 4

    in_full = {"adapter": {"kind": "none"}, "train": {"duration": "2 steps"}}
    with refuses(RecipeError, where="model.quantize", fix=["model.quantize=none"]):
        train(make_run(base, tmp_path, held=False, **in_full), quiet=True)
    dense = make_run(base, tmp_path, held=False, model={"quantize": "none"}, **in_full)
    final = Path(train(dense, quiet=True).output_dir) / "final"
    assert "quantization_config" not in json.loads((final / "config.json").read_text())
    stored = load_file(final / "model.safetensors")
    assert not any(name.endswith(("_blocks", "_scales")) for name in stored)
    AutoModelForCausalLM.from_pretrained(final)
