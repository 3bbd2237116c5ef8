"""LoRA on stacks of experts in codes: as on the dense stacks that the codes stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from recipes import built_model, make_run
from shipped_bases import write_fp8, write_mxfp4_gpt_oss, write_nvfp4, write_qwen3_moe
from tunesmith.adapter import lora, peft_files
from tunesmith.formats.base import FrozenStack
from tunesmith.formats.form import ROW, ShippedForm
from tunesmith.formats.fp8_blocks import Fp8Blocks
from tunesmith.formats.linear import has_codes
from tunesmith.formats.stack import ExpertStack
from tunesmith.runtime.recompute import recompute_layers

IDS = torch.arange(5, 35).view(2, 15)
BLOCK = (16, 24)


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
    "fp8": Case("fp8", "as-shipped", BLOCK),
    "fp8 in whole blocks": Case("fp8", "as-shipped", (8, 8)),
    "fp8, a scale a matrix": Case("fp8", "as-shipped"),
    "fp8, a scale a row": Case("rows", "as-shipped"),
    "nf4 of fp8": Case("fp8", "nf4", BLOCK),
    "nvfp4": Case("nvfp4", "as-shipped"),
    "nvfp4 of modelopt": Case("modelopt", "as-shipped"),
    "nf4 of nvfp4": Case("nvfp4", "nf4"),
}


@pytest.fixture(scope="module")
def bases(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    plain = write_qwen3_moe(folder / "qwen3_moe", tiny)
    for block in {case.block for case in CASES.values() if case.base == "fp8"}:
        kept = ("mlp.gate",)
        write_fp8(plain, folder / f"fp8 {block}", block, keep=kept, scales=torch.bfloat16)
    tool = "compressed-tensors"
    write_fp8(plain, folder / "rows", ROW, keep=("mlp.gate",), tool=tool)
    # Groups of 16 in an expert's rows.
    wide = write_qwen3_moe(folder / "wide", tiny, moe_intermediate_size=48)
    for name in ("nvfp4", "modelopt"):
        write_nvfp4(wide, folder / name, modelopt=name == "modelopt", keep=("mlp.gate",))
    write_mxfp4_gpt_oss(folder / "gpt_oss", tiny)
    return folder


def folder_of(bases: Path, case: Case) -> Path:
    return bases / (f"fp8 {case.block}" if case.base == "fp8" else case.base)


def built(folder: Path, place: Path, quantize: str, **model: Any) -> Any:
    run = make_run(folder, place, held=False, model={"quantize": quantize, **model})
    root = built_model(run, folder)
    root.model.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(3)
    for _, layer in lora.low_ranks(root.model):
        # With B = 0 nothing is proved of A.
        nn.init.normal_(layer.lora_B, std=0.05, generator=generator)
    return root


@torch.no_grad()
def copy_dense(model: nn.Module, twin: nn.Module) -> int:
    """Give a model the dense values that another has in codes; returns how many stacks."""
    stacks = 0
    for name, layer in model.named_modules():
        if isinstance(layer, ExpertStack):
            twin.get_parameter(name).copy_(layer.dense())
            stacks += 1
        elif has_codes(layer):
            twin.get_parameter(f"{name}.weight").copy_(layer.dense())
    return stacks


def steps(root: Any) -> list[list[Tensor]]:
    """Of each of five steps the logits, and the gradients of all A and B, recomputed."""
    recompute_layers(root.layers, len(root.layers))
    model = root.model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Not Adam, which divides small gradients by themselves and makes their rounding large.
    optimizer = torch.optim.SGD(trained, lr=0.5)
    records = []
    for _ in range(5):
        optimizer.zero_grad()
        logits = model(IDS, use_cache=False).logits
        logits.square().mean().backward()
        records.append([logits.detach(), *(parameter.grad.clone() for parameter in trained)])
        optimizer.step()
    return records


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_lora_on_codes_is_lora_on_their_dense_twin(case: Case, bases, tmp_path) -> None:
    folder = folder_of(bases, case)
    root = built(folder, tmp_path, case.quantize)
    twin = built(folder, tmp_path, "none")
    before = {n: t.clone() for n, t in root.model.named_parameters() if not t.requires_grad}
    if case.quantize == "nf4":
        assert copy_dense(root.model, twin.model) > 0
    elif case.base == "gpt_oss":
        # A dense stack of MXFP4 lies the other way around in memory: sums have the same order then.
        for name, layer in root.model.named_modules():
            if isinstance(layer, ExpertStack):
                assert torch.equal(twin.model.get_parameter(name), layer.dense())
                twin.model.get_parameter(name).data = layer.dense()
    for ours, theirs in zip(steps(root), steps(twin), strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert other.norm() > 0
            assert (one - other).norm() <= 1e-6 * other.norm()
    for name, parameter in before.items():
        assert torch.equal(root.model.get_parameter(name), parameter), name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [name for name in CASES if "as-shipped" in CASES[name]])
def test_stacks_as_shipped_are_dense_as_the_reader_makes_them(name, dtype, bases, tmp_path) -> None:
    folder = folder_of(bases, CASES[name])
    model = built(folder, tmp_path, "as-shipped", dtype=dtype).model
    twin = built(folder, tmp_path, "none", dtype=dtype).model
    stacks = {n: m for n, m in model.named_modules() if isinstance(m, ExpertStack)}
    assert len(stacks) in (2, 4)
    for stack_name, stack in stacks.items():
        wanted = twin.get_parameter(stack_name)
        assert torch.equal(stack.dense(), wanted)
        frozen = stack.frozen_stack()
        some = frozen.dense(1, 3, wanted.dtype)
        assert torch.equal(some if stack.is_transposed else some.mT, wanted[1:3])


def test_fp8_experts_are_dense_as_in_transformers(bases: Path, tmp_path: Path) -> None:
    # Its own conversion wants whole blocks.
    block = CASES["fp8 in whole blocks"].block
    folder = bases / f"fp8 {block}"
    skipped = ["lm_head", "mlp.gate"]
    config = FineGrainedFP8Config(
        weight_block_size=block, modules_to_not_convert=skipped, dequantize=True
    )
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    model = built(folder, tmp_path, "as-shipped").model
    for key in ("gate_up_proj", "down_proj"):
        name = f"model.layers.0.mlp.experts.{key}"
        wanted = theirs.get_parameter(name)
        assert torch.equal(model.get_submodule(name).dense(), wanted.float())


def test_parts_in_one_piece_are_those_one_by_one() -> None:
    codes = torch.randn(3, 12, 10).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 2, 2, 2) + 0.5  # of 6 rows in blocks of 3, of 10 columns in blocks of 5
    stack = FrozenStack(Fp8Blocks(ShippedForm("fp8", (3, 5))), [codes, scales], (3, 10, 12))
    spread = scales.repeat_interleave(3, 2).repeat_interleave(5, 3).flatten(1, 2)
    assert torch.equal(stack.dense(0, 3, torch.float32).mT, codes.float() * spread)
    # Blocks of 4 rows: the second of each part has 2.
    stack = FrozenStack(Fp8Blocks(ShippedForm("fp8", (4, 5))), [codes, scales], (3, 10, 12))
    spread = scales.repeat_interleave(4, 2)[:, :, :6].repeat_interleave(5, 3).flatten(1, 2)
    assert torch.equal(stack.dense(0, 3, torch.float32).mT, codes.float() * spread)


def test_peft_files_do_not_know_how_the_base_is_stored(bases: Path, tmp_path: Path) -> None:
    folder = folder_of(bases, CASES["mxfp4"])
    models = [built(folder, tmp_path, quantize).model for quantize in ("as-shipped", "none", "nf4")]
    tensors = [peft_files._peft_tensors(model) for model in models]
    assert len({tuple(names) for names in tensors}) == 1
    for name, value in tensors[0].items():
        assert torch.equal(value, tensors[1][name]), name
        assert torch.equal(value, tensors[2][name]), name


@pytest.mark.parametrize(
    "name",
    [
        "mxfp4",
        "fp8",
        "fp8, a scale a matrix",
        "fp8, a scale a row",
        "nvfp4",
        "nvfp4 of modelopt",
        "nf4",
    ],
)
def test_experts_are_drawn_in_their_codes(name: str, bases: Path, tmp_path: Path) -> None:
    case = CASES[name]
    folder = folder_of(bases, case)
    run = make_run(folder, tmp_path, held=False, model={"quantize": case.quantize})
    model = built_model(run, folder, weights="random").model
    for stack_name, stack in model.named_modules():
        if isinstance(stack, ExpertStack):
            assert 0.01 < stack.dense().std() < 0.05, stack_name
