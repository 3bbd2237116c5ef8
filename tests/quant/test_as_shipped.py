"""Bases that ship in FP8, NVFP4 and MXFP4: read as their own tools read them, and trained as if dense."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from recipes import built_model, make_run
from shipped_bases import (
    compressed_fp8_config,
    write_fp8,
    write_mxfp4_gpt_oss,
    write_nvfp4,
    write_qwen3_moe,
)
from tunesmith.adapter import lora, peft_files
from tunesmith.formats.base import FrozenStack, FrozenWeight
from tunesmith.formats.form import ROW, ShippedForm
from tunesmith.formats.fp8_blocks import Fp8Blocks
from tunesmith.formats.linear import FrozenLinear, has_codes
from tunesmith.formats.stack import ExpertStack
from tunesmith.runtime.recompute import recompute_layers

IDS = torch.arange(5, 35).view(2, 15)
# Both divide the tiny model's matrices, as Transformers wants it.
BLOCKS = {"blocks": (32, 16), "one scale": None}
RAGGED = (48, 40)
Write = Callable[[Path, Path], Path]


def built(folder: Path, place: Path, quantize: str, dtype: str = "fp32", kind: str = "lora") -> Any:
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


@pytest.mark.parametrize(("name", "dtype"), [("blocks", "fp32"), ("one scale", "bf16")])
def test_dense_bits_are_those_of_transformers(tiny, tmp_path, name, dtype) -> None:
    folder = write_fp8(tiny, tmp_path, BLOCKS[name])
    config = FineGrainedFP8Config(
        weight_block_size=BLOCKS[name], modules_to_not_convert=["lm_head"], dequantize=True
    )
    # In fp32 whatever dtype is asked for; rounded once, as ours.
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    wanted = dict(theirs.named_parameters())
    dense = built(folder, tmp_path, "none", dtype, kind="none").model
    for name_, weight in dense.named_parameters():
        assert torch.equal(weight, wanted[name_].to(weight.dtype)), name_
    kept = layers_of(built(folder, tmp_path, "as-shipped", dtype).model)
    assert len(kept) == 14
    for name_, layer in kept.items():
        weight = layer.dense()
        assert torch.equal(weight, wanted[f"{name_}.weight"].to(weight.dtype)), name_


# Of its scales, in which it computes.
STRATEGIES = {
    "tensor": (None, torch.float32),
    "channel": (ROW, torch.bfloat16),
    "block": (RAGGED, torch.bfloat16),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.slow
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
    kept = layers_of(built(folder, tmp_path, "as-shipped", dtype).model)
    dense = dict(built(folder, tmp_path, "none", dtype, kind="none").model.named_parameters())
    assert len(kept) == 14
    for name, layer in kept.items():
        parts = {part: stored[f"{name}.{part}"] for part in ("weight", "weight_scale")}
        wanted = FloatQuantizationCompressor.decompress(parts, scheme)["weight"]
        assert torch.equal(layer.dense(), wanted), name
        assert torch.equal(dense[f"{name}.weight"], wanted), name


@pytest.mark.parametrize("tool", ["modelopt", "autofp8", "power of two"])
def test_dense_bits_are_codes_times_scales(tool, tiny, tmp_path) -> None:
    """Scales of DeepSeek V3.1 are powers of two."""
    if tool == "power of two":
        folder = write_fp8(tiny, tmp_path, (32, 16), scales=torch.float8_e8m0fnu)
    else:
        folder = write_fp8(tiny, tmp_path, None, tool=tool)
    stored = load_file(folder / "model.safetensors")
    kept = layers_of(built(folder, tmp_path, "as-shipped").model)
    assert len(kept) == 14
    for name, layer in kept.items():
        codes = stored[f"{name}.weight"].float()
        if tool == "power of two":
            scale = stored[f"{name}.weight_scale_inv"].float()
            assert torch.equal(layer.scale.log2(), layer.scale.log2().round())
            scale = scale.repeat_interleave(32, 0).repeat_interleave(16, 1)
        else:
            scale = stored[f"{name}.weight_scale"]
        assert torch.equal(layer.dense(), codes * scale), name


def fp8_of(block: tuple[int, int] | None) -> Write:
    return lambda tiny, folder: write_fp8(tiny, folder, block, scales=torch.bfloat16)


FORMS: dict[str, Write] = {
    "fp8, ragged blocks": fp8_of(RAGGED),
    "fp8": fp8_of((32, 16)),
    "fp8, one block": fp8_of((200, 300)),
    "fp8, one scale": fp8_of(None),
    "fp8, a scale a row": partial(write_fp8, block=ROW, tool="compressed-tensors"),
    "nvfp4": write_nvfp4,
    "nvfp4 of modelopt": partial(write_nvfp4, modelopt=True),
}
TIER_1 = ("fp8, ragged blocks", "nvfp4")


@torch.no_grad()
def copy_dense(model: nn.Module, twin: nn.Module) -> None:
    """Give a model the dense values that another has in codes."""
    for name, layer in (stacks_of(model) | layers_of(model)).items():
        key = name if isinstance(layer, ExpertStack) else f"{name}.weight"
        twin.get_parameter(key).copy_(layer.dense())


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
@pytest.mark.parametrize(
    "form", [pytest.param(f, marks=() if f in TIER_1 else pytest.mark.nightly) for f in FORMS]
)
def test_lora_as_shipped_learns_as_on_its_dense_twin(tiny, tmp_path, form) -> None:
    folder = FORMS[form](tiny, tmp_path)
    assert_learns_as(*(built(folder, tmp_path, quantize) for quantize in ("as-shipped", "none")))


def test_it_holds_what_is_on_the_disk(tiny, tmp_path) -> None:
    folder = write_fp8(tiny, tmp_path, (32, 16))
    layer = layers_of(built(folder, tmp_path, "as-shipped").model)["model.layers.0.mlp.up_proj"]
    assert (layer.weight.dtype, layer.weight.shape) == (torch.uint8, (128, 64))
    assert layer.scale.shape == (4, 4)


@pytest.mark.parametrize("tool", ["transformers", "compressed-tensors", "modelopt"])
def test_modules_that_are_not_converted_stay_dense(tool, tiny, tmp_path) -> None:
    keep = ("model.layers.0.self_attn", "down_proj")
    folder = write_fp8(tiny, tmp_path, None, keep=keep, tool=tool)
    model = built(folder, tmp_path, "as-shipped").model
    kept = layers_of(model)
    assert len(kept) == 14 - 4 - 2
    assert not any("layers.0.self_attn" in name or "down_proj" in name for name in kept)
    assert not has_codes(model.lm_head)


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


@pytest.mark.slow
@pytest.mark.parametrize("form", ["fp8", "nvfp4"])
def test_a_base_in_codes_is_quantized_to_nf4_as_its_dense_one(form, tiny, tmp_path) -> None:
    pytest.importorskip("bitsandbytes")
    shipped = FORMS[form](tiny, tmp_path / "shipped")
    dense = built(shipped, tmp_path, "none", "bf16", kind="none").model
    dense.save_pretrained(tmp_path / "dense")
    for file in tiny.glob("*token*"):
        (tmp_path / "dense" / file.name).write_bytes(file.read_bytes())
    ours, theirs = (
        layers_of(built(folder, tmp_path, "nf4", "bf16").model)
        for folder in (shipped, tmp_path / "dense")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].dense(), theirs[name].dense()) for name in ours)


class Case(NamedTuple):
    """base: of the fixture below; block: of an FP8 base, None: a scale a matrix."""

    base: str
    quantize: str
    block: tuple[int, int] | None = None


CASES = {
    "nf4": Case("qwen3_moe", "nf4"),
    "nf4 of gpt-oss": Case("gpt_oss", "nf4"),
    "mxfp4": Case("gpt_oss", "as-shipped"),
    # The expert's 40 rows are no whole blocks; then they are.
    "fp8": Case("fp8", "as-shipped", (16, 24)),
    "fp8 in whole blocks": Case("fp8", "as-shipped", (8, 8)),
    "fp8, a scale a matrix": Case("fp8", "as-shipped"),
    "fp8, a scale a row": Case("rows", "as-shipped"),
    "nf4 of fp8": Case("fp8", "nf4", (16, 24)),
    "nvfp4": Case("nvfp4", "as-shipped"),
    "nvfp4 of modelopt": Case("modelopt", "as-shipped"),
    "nf4 of nvfp4": Case("nvfp4", "nf4"),
}
TIER_1_CASES = ("nf4", "mxfp4", "fp8")


@pytest.fixture(scope="module")
def bases(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """Write the mixture of a case once."""
    root = tmp_path_factory.mktemp("bases")

    def write(case: Case) -> Path:
        folder = root / (f"fp8 {case.block}" if case.base == "fp8" else case.base)
        if folder.exists():
            return folder
        if case.base == "gpt_oss":
            return write_mxfp4_gpt_oss(folder, tiny)
        if case.base == "qwen3_moe":
            return write_qwen3_moe(folder, tiny)
        if case.base in ("nvfp4", "modelopt"):  # groups of 16 in an expert's rows
            wide = write_qwen3_moe(root / f"{case.base} wide", tiny, moe_intermediate_size=48)
            return write_nvfp4(wide, folder, modelopt=case.base == "modelopt", keep=("mlp.gate",))
        plain = write(CASES["nf4"])
        if case.base == "rows":
            return write_fp8(plain, folder, ROW, keep=("mlp.gate",), tool="compressed-tensors")
        return write_fp8(plain, folder, case.block, keep=("mlp.gate",), scales=torch.bfloat16)

    return write


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in TIER_1_CASES else pytest.mark.nightly) for n in CASES]
)
def test_lora_on_codes_of_experts_is_lora_on_their_dense_twin(name: str, bases, tmp_path) -> None:
    case = CASES[name]
    folder = bases(case)
    root = built(folder, tmp_path, case.quantize)
    twin = built(folder, tmp_path, "none")
    if case.quantize == "nf4":
        assert stacks_of(root.model)
        copy_dense(root.model, twin.model)
    elif case.base == "gpt_oss":
        # A dense stack of MXFP4 lies the other way around in memory: sums have the same order then.
        for stack_name, stack in stacks_of(root.model).items():
            assert torch.equal(twin.model.get_parameter(stack_name), stack.dense())
            twin.model.get_parameter(stack_name).data = stack.dense()
    assert_learns_as(root, twin)


@pytest.mark.parametrize("name", [name for name in CASES if "as-shipped" in CASES[name]])
def test_stacks_as_shipped_are_dense_as_the_reader_makes_them(name, bases, tmp_path) -> None:
    folder = bases(CASES[name])
    dtype = "bf16" if name == "mxfp4" else "fp32"
    twin = built(folder, tmp_path, "none", dtype).model
    stacks = stacks_of(built(folder, tmp_path, "as-shipped", dtype).model)
    assert len(stacks) in (2, 4)
    for stack_name, stack in stacks.items():
        wanted = twin.get_parameter(stack_name)
        assert torch.equal(stack.dense(), wanted)
        some = stack.frozen_stack().dense(1, 3, wanted.dtype)
        assert torch.equal(some if stack.is_transposed else some.mT, wanted[1:3])


def test_fp8_experts_are_dense_as_in_transformers(bases, tmp_path: Path) -> None:
    # Its own conversion wants whole blocks.
    case = CASES["fp8 in whole blocks"]
    folder = bases(case)
    skipped = ["lm_head", "mlp.gate"]
    config = FineGrainedFP8Config(
        weight_block_size=case.block, modules_to_not_convert=skipped, dequantize=True
    )
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    for name, stack in stacks_of(built(folder, tmp_path, "as-shipped").model).items():
        assert torch.equal(stack.dense(), theirs.get_parameter(name).float())


@pytest.mark.parametrize("rows", [3, 4])
def test_parts_in_one_piece_are_those_one_by_one(rows: int) -> None:
    """Of 6 rows in blocks of 3 or 4: the second of each part has 2. Of 10 columns in blocks of 5."""
    codes = torch.randn(3, 12, 10).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 2, 2, 2) + 0.5
    stack = FrozenStack(Fp8Blocks(ShippedForm("fp8", (rows, 5))), [codes, scales], (3, 10, 12))
    spread = scales.repeat_interleave(rows, 2)[:, :, :6].repeat_interleave(5, 3).flatten(1, 2)
    assert torch.equal(stack.dense(0, 3, torch.float32).mT, codes.float() * spread)


@pytest.mark.slow
def test_peft_files_do_not_know_how_the_base_is_stored(bases, tmp_path: Path) -> None:
    folder = bases(CASES["mxfp4"])
    models = [built(folder, tmp_path, quantize).model for quantize in ("as-shipped", "none", "nf4")]
    first, *others = [peft_files._peft_tensors(model) for model in models]
    for tensors in others:
        assert [*tensors] == [*first]
        assert all(torch.equal(tensors[name], first[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["fp8", "nvfp4", "nf4", "mxfp4", "fp8, a scale a row"])
def test_a_base_is_drawn_in_its_codes(form: str, bases, tiny: Path, tmp_path: Path) -> None:
    """Experts and linear layers of a random base have the deviation of a new model."""
    quantize = CASES[form].quantize
    folders = [bases(CASES[form])]
    if form in FORMS:
        folders.append(FORMS[form](tiny, tmp_path / "base"))
    for folder in folders:
        run = make_run(folder, tmp_path, held=False, model={"quantize": quantize})
        model = built_model(run, folder, weights="random").model
        coded = stacks_of(model) | layers_of(model)
        assert coded
        for name, layer in coded.items():
            assert 0.01 < layer.dense().std() < 0.05, name
