"""Bases that ship in FP8, NVFP4 and MXFP4: read as their own tools read them, and trained as if dense."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from errors import refuses
from recipes import built_model, make_run
from shipped_bases import (
    change_config,
    change_tensors,
    compressed_config,
    compressed_fp8_config,
    fp8_config,
    modelopt_config,
    write_fp8,
    write_fp8_stacks,
    write_mxfp4_gpt_oss,
    write_nvfp4,
    write_qwen3_moe,
)
from tunesmith.adapter import lora
from tunesmith.errors import ModelError, RecipeError
from tunesmith.formats.base import FrozenWeight
from tunesmith.formats.e2m1 import E2M1_VALUES
from tunesmith.formats.form import ROW, ShippedForm
from tunesmith.formats.fp8_blocks import Fp8Blocks
from tunesmith.formats.linear import FrozenLinear, has_codes
from tunesmith.formats.mxfp4 import decode_mxfp4, mxfp4_formula
from tunesmith.formats.stack import ExpertStack
from tunesmith.hub.model_files import read_model_files
from tunesmith.model.known.dtypes import DTYPES
from tunesmith.runtime.recompute import recompute_layers
from tunesmith.start.run import train

IDS = torch.arange(5, 35).view(2, 15)
RAGGED = (48, 40)


def built(
    folder: Path, place: Path, quantize: str = "auto", dtype: str = "fp32", kind: str = "lora"
) -> Any:
    """The parts of a model with a LoRA, whose B is drawn: with B = 0 nothing is proved of A."""
    adapter = {"kind": "lora", "rank": 4} if kind == "lora" else {"kind": kind}
    model = {"quantize": quantize, "dtype": dtype}
    root = built_model(make_run(folder, place, held=False, model=model, adapter=adapter), folder)
    root.model.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(3)
    for _, layer in lora.low_ranks(root.model):
        nn.init.normal_(layer.lora_B, std=0.05, generator=generator)
    return root


def layers_of(model: nn.Module) -> dict[str, FrozenLinear]:
    return {name: m for name, m in model.named_modules() if has_codes(m)}


def stacks_of(model: nn.Module) -> dict[str, ExpertStack]:
    return {name: m for name, m in model.named_modules() if isinstance(m, ExpertStack)}


def assert_dense(folder: Path, place: Path, wanted: dict[str, Tensor], dtype: str = "fp32") -> None:
    """The layers of a base, kept in codes and read dense, have the bits that are wanted."""
    kept = layers_of(built(folder, place, "as-shipped", dtype).model)
    dense = built(folder, place, "none", dtype, kind="none").model
    assert len(kept) == 14
    for name, layer in kept.items():
        assert torch.equal(layer.dense(), wanted[name]), name
        assert torch.equal(dense.get_parameter(f"{name}.weight"), wanted[name]), name


@pytest.mark.parametrize(("block", "dtype"), [((32, 16), "fp32"), (None, "bf16")])
def test_dense_bits_are_those_of_transformers(block, dtype, tiny, tmp_path) -> None:
    folder = write_fp8(tiny, tmp_path, block)
    config = FineGrainedFP8Config(
        weight_block_size=block, modules_to_not_convert=["lm_head"], dequantize=True
    )
    # In fp32 whatever dtype is asked for; rounded once, as ours.
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    weights = theirs.named_parameters()
    wanted = {name.removesuffix(".weight"): p.to(DTYPES[dtype]) for name, p in weights}
    assert_dense(folder, tmp_path, wanted, dtype)


@pytest.mark.parametrize("form", [ROW, RAGGED, "nvfp4"])
@pytest.mark.slow
def test_dense_bits_are_those_of_compressed_tensors(form, tiny, tmp_path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import FloatQuantizationCompressor, NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationScheme

    if form == "nvfp4":
        folder = write_nvfp4(tiny, tmp_path / "base")
        config, tool = compressed_config(), NVFP4PackedCompressor
    else:
        folder = write_fp8(tiny, tmp_path, form, scales=torch.bfloat16, tool="compressed-tensors")
        config, tool = compressed_fp8_config(form), FloatQuantizationCompressor
    [group] = config["config_groups"].values()
    scheme = QuantizationScheme(targets=["Linear"], weights=group["weights"])
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in load_file(folder / "model.safetensors").items():
        layer, _, part = name.rpartition(".")
        parts[layer][part] = tensor
    coded = {layer: stored for layer, stored in parts.items() if len(stored) > 1}
    wanted = {layer: tool.decompress(stored, scheme)["weight"] for layer, stored in coded.items()}
    assert_dense(folder, tmp_path, wanted, "bf16")


@pytest.mark.parametrize("form", ["fp8", "powers of two", "nvfp4"])
def test_dense_bits_are_codes_times_scales(form, tiny, tmp_path) -> None:
    """As ModelOpt's FP8 and `NVFP4QTensor.dequantize`, and with the scales of DeepSeek V3.1."""
    if form == "nvfp4":
        folder = write_nvfp4(tiny, tmp_path / "base", modelopt=True)
    elif form == "fp8":
        folder = write_fp8(tiny, tmp_path, None, tool="modelopt")
    else:
        folder = write_fp8(tiny, tmp_path, (32, 16), scales=torch.float8_e8m0fnu)
    stored = load_file(folder / "model.safetensors")
    wanted = {}
    for layer in (name.removesuffix(".weight") for name in stored if name.endswith("proj.weight")):
        weight = stored[f"{layer}.weight"]
        if form == "nvfp4":
            codes = torch.stack([weight & 15, weight >> 4], dim=2).flatten(1).long()
            weight = E2M1_VALUES[codes % 8] * (1 - 2 * (codes >= 8).float())
            scale = stored[f"{layer}.weight_scale"].float() * stored[f"{layer}.weight_scale_2"]
            scale = scale.repeat_interleave(16, 1)
        elif form == "fp8":
            scale = stored[f"{layer}.weight_scale"]
        else:
            scale = stored[f"{layer}.weight_scale_inv"].float()
            scale = scale.repeat_interleave(32, 0).repeat_interleave(16, 1)
        wanted[layer] = weight.float() * scale
    assert_dense(folder, tmp_path, wanted)


@pytest.mark.parametrize("most", [None, 50 * 40, 1])
def test_a_weight_in_pieces_is_the_whole_one(most, monkeypatch) -> None:
    if most:
        monkeypatch.setattr("tunesmith.formats.fp8_blocks.MAX_DECODED_WEIGHTS", most)
    codes = torch.randn(70, 50).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 3) + 0.5
    rows, one = scales.repeat_interleave(32, 0)[:70, :1], scales[:1, :1]
    spread = scales.repeat_interleave(32, 0).repeat_interleave(20, 1)[:70, :50]
    for block, given, by in (((32, 20), scales, spread), (ROW, rows, rows), (None, one, one)):
        form = Fp8Blocks(ShippedForm("fp8", block))
        weight = FrozenWeight(form, [codes, given], (70, 50))
        assert torch.equal(weight.dense(torch.float32), codes.float() * by)


FIRST = "layers.0.self_attn"
OWN_FILE = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16}
OWN_FILE["exclude_modules"] = ["lm_head", f"model.{FIRST}*"]
MLP_ALONE = compressed_config()
MLP_ALONE["config_groups"]["group_0"]["targets"] = ["re:.*mlp.*"]
# Whether ModelOpt wrote it, what config.json says, and the layers that are in codes.
IGNORED: dict[str, tuple[bool, dict[str, Any] | None, str, int]] = {
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
        stated = {"producer": {"name": "modelopt"}, "quantization": OWN_FILE}
        (folder / "hf_quant_config.json").write_text(json.dumps(stated))
    model = built(folder, tmp_path).model
    assert len(layers_of(model)) == count
    assert not has_codes(model.lm_head)


def steps(root: Any) -> list[list[Tensor]]:
    """Of each of three steps the logits, and the gradients of all A and B, recomputed."""
    recompute_layers(root.layers, len(root.layers))
    model = root.model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Not Adam, which divides small gradients by themselves and makes their rounding large.
    optimizer = torch.optim.SGD(trained, lr=0.5)
    records = []
    for _ in range(3):
        optimizer.zero_grad()
        logits = model(IDS, use_cache=False).logits
        logits.square().mean().backward()
        records.append([logits.detach(), *(parameter.grad.clone() for parameter in trained)])
        optimizer.step()
    return records


def assert_learns_as(root: Any, twin: Any) -> None:
    """Within 1e-6: the products are the same, and only their order of sums may differ."""
    before = {n: t.clone() for n, t in root.model.named_parameters() if not t.requires_grad}
    for ours, theirs in zip(steps(root), steps(twin), strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert other.norm() > 0
            assert (one - other).norm() <= 1e-6 * other.norm()
    for name, parameter in before.items():
        assert torch.equal(root.model.get_parameter(name), parameter), name


@pytest.mark.slow
def test_a_base_in_codes_is_quantized_to_nf4_as_its_dense_one(tiny, tmp_path) -> None:
    pytest.importorskip("bitsandbytes")
    shipped, dense = write_nvfp4(tiny, tmp_path / "shipped"), tmp_path / "dense"
    shutil.copytree(tiny, dense)
    built(shipped, tmp_path, "none", "bf16", kind="none").model.save_pretrained(dense)
    models = [built(folder, tmp_path, "nf4", "bf16").model for folder in (shipped, dense)]
    ours, theirs = map(layers_of, models)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].dense(), theirs[name].dense()) for name in ours)


@pytest.fixture(scope="module")
def plain(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture whose experts have rows of 48, in groups of 16."""
    return write_qwen3_moe(tmp_path_factory.mktemp("plain"), tiny, moe_intermediate_size=48)


FP8 = partial(write_fp8, keep=("mlp.gate",), scales=torch.bfloat16)
NVFP4 = partial(write_nvfp4, keep=("mlp.gate",))
# What writes a mixture of experts in codes, and the codes that are kept.
CASES: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "nf4": (lambda plain, folder: plain, "nf4"),
    "mxfp4": (lambda plain, folder: write_mxfp4_gpt_oss(folder, plain), "as-shipped"),
    "fp8, ragged blocks": (partial(FP8, block=(20, 24)), "as-shipped"),
    "fp8, a scale a matrix": (partial(FP8, block=None), "as-shipped"),
    "fp8, a scale a row": (partial(FP8, block=ROW, tool="compressed-tensors"), "as-shipped"),
    "nvfp4": (NVFP4, "as-shipped"),
    "nvfp4 of modelopt": (partial(NVFP4, modelopt=True), "as-shipped"),
}
TIER_1 = ("nf4", "mxfp4", "fp8, ragged blocks", "nvfp4")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in TIER_1 else pytest.mark.nightly) for n in CASES]
)
def test_lora_on_codes_is_lora_on_their_dense_twin(name: str, plain: Path, tmp_path: Path) -> None:
    write, quantize = CASES[name]
    folder = write(plain, tmp_path / "base")
    root, twin = built(folder, tmp_path, quantize), built(folder, tmp_path, "none")
    coded = stacks_of(root.model) | layers_of(root.model)
    assert stacks_of(root.model)
    for part, layer in coded.items():
        dense = twin.model.get_parameter(
            part if part in stacks_of(root.model) else f"{part}.weight"
        )
        assert quantize == "nf4" or torch.equal(dense, layer.dense())
        # A dense stack of MXFP4 lies the other way around in memory: sums have the same order then.
        dense.data = layer.dense()
    assert_learns_as(root, twin)


@pytest.mark.parametrize("name", [name for name in CASES if name != "nf4"])
def test_stacks_as_shipped_are_dense_as_the_reader_makes_them(name, plain, tmp_path) -> None:
    folder = CASES[name][0](plain, tmp_path / "base")
    dtype = "bf16" if name == "mxfp4" else "fp32"
    twin = built(folder, tmp_path, "none", dtype).model
    stacks = stacks_of(built(folder, tmp_path, "as-shipped", dtype).model)
    assert len(stacks) in (2, 4)
    for stack_name, stack in stacks.items():
        wanted = twin.get_parameter(stack_name)
        assert torch.equal(stack.dense(), wanted)
        some = stack.frozen_stack().dense(1, 3, wanted.dtype)
        assert torch.equal(some if stack.is_transposed else some.mT, wanted[1:3])


def test_fp8_experts_are_dense_as_in_transformers(plain: Path, tmp_path: Path) -> None:
    # Its own conversion wants whole blocks.
    folder = FP8(plain, tmp_path / "base", block=(8, 8))
    skipped = ["lm_head", "mlp.gate"]
    config = FineGrainedFP8Config(
        weight_block_size=(8, 8), modules_to_not_convert=skipped, dequantize=True
    )
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    for name, stack in stacks_of(built(folder, tmp_path).model).items():
        assert torch.equal(stack.dense(), theirs.get_parameter(name).float())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp8, ragged blocks", "nvfp4", "nf4", "mxfp4"])
def test_a_base_is_drawn_in_its_codes(name: str, plain: Path, tmp_path: Path) -> None:
    """Experts and linear layers of a random base have the deviation of a new model."""
    write, quantize = CASES[name]
    folder = write(plain, tmp_path / "base")
    run = make_run(folder, tmp_path, held=False, model={"quantize": quantize})
    model = built_model(run, folder, weights="random").model
    for part, layer in (stacks_of(model) | layers_of(model)).items():
        assert 0.01 < layer.dense().std() < 0.05, part


DOWN = "model.layers.0.mlp.experts.down_proj"


@pytest.mark.slow
def test_experts_that_are_not_converted_are_dense(plain: Path, tmp_path: Path) -> None:
    base = write_nvfp4(plain, tmp_path / "nvfp4", keep=("mlp.gate", "mlp.experts"))
    assert built(base, tmp_path).model.get_parameter(DOWN).dtype == torch.float32
    block, gate = (16, 24), "mlp.gate"
    base = write_fp8(plain, tmp_path / "fp8", block, keep=(gate, "model.layers.0.mlp.experts"))
    assert built(base, tmp_path).model.get_parameter(DOWN).dtype == torch.float32
    # One alone, while config.json says that all are in codes.
    base = write_fp8(plain, tmp_path / "one", block, keep=(gate, "experts.2.up_proj"))
    change_config(base, quantization_config=fp8_config(block, modules_to_not_convert=["lm_head"]))
    with refuses(ModelError, where="model.layers.0.mlp.experts.2.up_proj.weight"):
        built(base, tmp_path)


STACKS = [f"model.layers.0.mlp.experts.{key}" for key in ("gate_up_proj", "down_proj")]


@pytest.mark.slow
def test_stacks_in_fp8_are_kept_and_read_dense(plain: Path, tmp_path: Path) -> None:
    """Mistral Small 4 has one scale an expert, for gate and up together."""
    base = write_fp8_stacks(plain, tmp_path / "fp8", None)
    stored = load_file(base / "model.safetensors")
    kept, dense = (built(base, tmp_path, how).model for how in ("as-shipped", "none"))
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
        for decode in (decode_mxfp4, mxfp4_formula):
            values = decode(blocks, exponents, dtype).transpose(1, 2)
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
    monkeypatch.setattr("tunesmith.model.weights.stored_tensors.MAX_READ_WEIGHTS", 64 * 40)
    ours = dict(built(base, tmp_path, "none", "bf16").model.named_parameters())
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
