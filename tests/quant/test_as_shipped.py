"""Bases that ship in FP8: read as Transformers dequantizes them, and kept as they ship, as those in
NVFP4 are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from recipes import built_model, make_run
from shipped_bases import compressed_fp8_config, write_fp8, write_nvfp4
from tunesmith.adapter import lora
from tunesmith.config.schema import Adapter, Data, Model, Run, Source, Train
from tunesmith.formats.base import FrozenWeight
from tunesmith.formats.form import ROW, ShippedForm
from tunesmith.formats.fp8_blocks import Fp8Blocks
from tunesmith.formats.linear import FrozenLinear, has_codes

IDS = torch.arange(5, 35).view(2, 15)
# Both divide the tiny model's matrices, as Transformers wants it.
BLOCKS = {"blocks": (32, 16), "one scale": None}
RAGGED = (48, 40)
Write = Callable[[Path, Path], Path]


def built(folder: Path, quantize: str, dtype: str = "fp32", **adapter: Any) -> Any:
    run = Run(
        model=Model(name=str(folder), dtype=dtype, quantize=quantize),
        adapter=Adapter(**adapter),
        data=Data(train=(Source(source="x"),)),
        train=Train(recompute="none", compile="off"),
        output_dir="x",
    )
    model = built_model(run, folder).model
    model.set_attn_implementation("sdpa")
    return model


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_dense_bits_are_those_of_transformers(tiny, tmp_path, name, dtype) -> None:
    folder = write_fp8(tiny, tmp_path, BLOCKS[name])
    config = FineGrainedFP8Config(
        weight_block_size=BLOCKS[name], modules_to_not_convert=["lm_head"], dequantize=True
    )
    # In fp32 whatever dtype is asked for; rounded once, as ours.
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    wanted = dict(theirs.named_parameters())
    dense = built(folder, "none", dtype, kind="none")
    kept = built(folder, "as-shipped", dtype, rank=4)
    compared = 0
    for name_, weight in dense.named_parameters():
        assert torch.equal(weight, wanted[name_].to(weight.dtype)), name_
    for name_, layer in kept.named_modules():
        if has_codes(layer):
            weight = layer.dense()
            assert torch.equal(weight, wanted[f"{name_}.weight"].to(weight.dtype)), name_
            compared += 1
    assert compared == 14


# Of its scales, in which it computes.
STRATEGIES = {
    "tensor": (None, torch.float32),
    "channel": (ROW, torch.bfloat16),
    "channel in fp32": (ROW, torch.float32),
    "block": (RAGGED, torch.bfloat16),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_dense_bits_are_those_of_compressed_tensors(strategy, tiny, tmp_path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import FloatQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    block, scales = STRATEGIES[strategy]
    folder = write_fp8(tiny, tmp_path, block, scales=scales, tool="compressed-tensors")
    [group] = compressed_fp8_config(block)["config_groups"].values()
    scheme = QuantizationScheme(targets=["Linear"], weights=group["weights"])
    stored = load_file(folder / "model.safetensors")
    dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}[scales]
    kept = layers_of(built(folder, "as-shipped", dtype, rank=4))
    dense = dict(built(folder, "none", dtype, kind="none").named_parameters())
    assert len(kept) == 14
    for name, layer in kept.items():
        parts = {part: stored[f"{name}.{part}"] for part in ("weight", "weight_scale")}
        wanted = FloatQuantizationCompressor.decompress(parts, scheme)["weight"]
        assert torch.equal(layer.dense(), wanted), name
        assert torch.equal(dense[f"{name}.weight"], wanted), name


@pytest.mark.parametrize("tool", ["modelopt", "autofp8"])
def test_dense_bits_are_codes_times_the_scale_of_all(tool, tiny, tmp_path) -> None:
    folder = write_fp8(tiny, tmp_path, None, tool=tool)
    stored = load_file(folder / "model.safetensors")
    kept = layers_of(built(folder, "as-shipped", rank=4))
    assert len(kept) == 14
    for name, layer in kept.items():
        codes, scale = stored[f"{name}.weight"], stored[f"{name}.weight_scale"]
        assert torch.equal(layer.dense(), codes.float() * scale), name


def layers_of(model: nn.Module) -> dict[str, FrozenLinear]:
    return {name: m for name, m in model.named_modules() if has_codes(m)}


def fp8_of(block: tuple[int, int] | None) -> Write:
    return lambda tiny, folder: write_fp8(tiny, folder, block, scales=torch.bfloat16)


FORMS: dict[str, Write] = {
    "fp8": fp8_of((32, 16)),
    "fp8, ragged blocks": fp8_of(RAGGED),
    "fp8, one block": fp8_of((200, 300)),
    "fp8, one scale": fp8_of(None),
    "fp8, a scale a row": partial(write_fp8, block=ROW, tool="compressed-tensors"),
    "nvfp4": write_nvfp4,
    "nvfp4 of modelopt": partial(write_nvfp4, modelopt=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_lora_as_shipped_learns_as_on_its_dense_twin(tiny, tmp_path, form) -> None:
    """Three steps, 1e-6: the products are the same, and only their order of sums may differ."""
    folder = FORMS[form](tiny, tmp_path)
    models = [built(folder, quantize, rank=4) for quantize in ("as-shipped", "none")]
    for model in models:
        for name, layer in lora.loras(model):
            torch.manual_seed(len(name))
            nn.init.normal_(layer.lora_B, std=0.1)
    optimizers = []
    for model in models:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizers.append(torch.optim.SGD(trained, lr=1e-3))
    for _ in range(3):
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            logits = model(IDS).logits
            logits.square().mean().backward()
            losses.append(logits.detach())
        torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
        for (name, a), (_, b) in zip(*(lora.loras(model) for model in models), strict=True):
            for x, y in ((a.lora_A.grad, b.lora_A.grad), (a.lora_B.grad, b.lora_B.grad)):
                assert y.norm() > 0
                assert (x - y).norm() <= 1e-6 * y.norm(), name
        for optimizer in optimizers:
            optimizer.step()


def test_scales_that_are_powers_of_two_are_read(tiny, tmp_path) -> None:
    """As DeepSeek V3.1 has them."""
    folder = write_fp8(tiny, tmp_path, (32, 16), scales=torch.float8_e8m0fnu)
    model = built(folder, "as-shipped", rank=4)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert torch.equal(layer.scale.log2(), layer.scale.log2().round())
    dense = built(folder, "none", rank=4)
    assert torch.equal(layer.dense(), dense.get_parameter("model.layers.0.mlp.up_proj.weight"))


def test_it_holds_what_is_on_the_disk(tiny, tmp_path) -> None:
    model = built(write_fp8(tiny, tmp_path, (32, 16)), "as-shipped", "bf16", rank=4)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert layer.weight.dtype == torch.uint8
    assert layer.weight.shape == (128, 64)
    assert layer.scale.shape == (4, 4)
    before = {n: t.clone() for n, t in (*model.named_parameters(), *model.named_buffers())}
    model(IDS).logits.sum().backward()
    after = dict((*model.named_parameters(), *model.named_buffers()))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("tool", ["transformers", "compressed-tensors", "modelopt"])
def test_modules_that_are_not_converted_stay_dense(tool, tiny, tmp_path) -> None:
    keep = ("model.layers.0.self_attn", "down_proj")
    model = built(write_fp8(tiny, tmp_path, None, keep=keep, tool=tool), "as-shipped", rank=4)
    kept = layers_of(model)
    assert len(kept) == 14 - 4 - 2
    assert not any("layers.0.self_attn" in name or "down_proj" in name for name in kept)
    assert not has_codes(model.lm_head)


def test_a_weight_in_pieces_is_the_whole_one(monkeypatch) -> None:
    codes = torch.randn(70, 50).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 3) + 0.5
    for block, tensors in {
        (32, 20): [codes, scales],
        (1, 0): [codes, scales.repeat_interleave(32, 0)[:70, :1]],
        (0, 0): [codes, scales[:1, :1]],
    }.items():
        weight = FrozenWeight(
            Fp8Blocks(ShippedForm("fp8", block if block[0] else None)), tensors, (70, 50)
        )
        spread = scales.repeat_interleave(32, 0).repeat_interleave(20, 1)[:70, :50]
        wanted = codes.float() * (spread if block == (32, 20) else tensors[1])
        assert torch.equal(weight.dense(torch.float32), wanted)
        monkeypatch.setattr("tunesmith.formats.fp8_blocks.MAX_DECODED_WEIGHTS", 50 * 40)
        assert torch.equal(weight.dense(torch.float32), wanted)
        monkeypatch.setattr("tunesmith.formats.fp8_blocks.MAX_DECODED_WEIGHTS", 1)
        assert torch.equal(weight.dense(torch.float32), wanted)
        monkeypatch.undo()


@pytest.mark.parametrize("form", ["fp8", "nvfp4"])
def test_a_base_in_codes_is_quantized_to_nf4_as_its_dense_one(form, tiny, tmp_path) -> None:
    pytest.importorskip("bitsandbytes")
    shipped = FORMS[form](tiny, tmp_path / "shipped")
    built(shipped, "none", "bf16", kind="none").save_pretrained(tmp_path / "dense")
    for file in tiny.glob("*token*"):
        (tmp_path / "dense" / file.name).write_bytes(file.read_bytes())
    ours = built(shipped, "nf4", "bf16", rank=4)
    dense = built(tmp_path / "dense", "nf4", "bf16", rank=4)
    for (name, a), (_, b) in zip(lora.loras(ours), lora.loras(dense), strict=True):
        assert torch.equal(a.dense(), b.dense()), name


@pytest.mark.slow
@pytest.mark.parametrize("form", ["fp8", "fp8, a scale a row", "nvfp4", "nvfp4 of modelopt"])
def test_a_base_is_drawn_in_its_codes(form: str, tiny, tmp_path) -> None:
    folder = FORMS[form](tiny, tmp_path / "base")
    run = make_run(folder, tmp_path, held=False, model={"quantize": "as-shipped"})
    layers = layers_of(built_model(run, folder, weights="random").model)
    assert len(layers) == 14
    for name, layer in layers.items():
        assert 0.01 < layer.dense().std() < 0.05, name
