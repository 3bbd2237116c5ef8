"""Stacks of experts in nf4: each expert as the linear layer with its weight."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, Qwen3MoeForCausalLM

from errors import holds, refuses
from recipes import built_model, make_run
from shipped_bases import write_qwen3_moe
from tunesmith.adapter import lora
from tunesmith.config.schema import Adapter, Run
from tunesmith.errors import ModelError, RecipeError
from tunesmith.formats import nf4
from tunesmith.formats.linear import FrozenLinear
from tunesmith.formats.nf4 import Nf4
from tunesmith.formats.stack import ExpertStack
from tunesmith.model.stored_tensors import JoinedTensor
from tunesmith.presentation.start import unreached_lines
from tunesmith.quant.linear_layers import parameter_count
from tunesmith.quant.replace import replace_by_codes
from tunesmith.training.run import train
from tunesmith.units import Length

functional = pytest.importorskip("bitsandbytes.functional")
BF16 = torch.bfloat16
TWO_STEPS = {"duration": "2 steps"}


def quantized(
    stack: Tensor, *, is_transposed: bool = False, dtype: torch.dtype = BF16
) -> ExpertStack:
    kind = Nf4(dtype)
    layer = ExpertStack(kind, stack.shape, is_transposed=is_transposed, compute_dtype=dtype)
    layer.allocate(torch.device("cpu"))
    layer.store(stack)
    return layer


# The last one has blocks that are not whole, and both more than one group of scales.
@pytest.mark.slow
@pytest.mark.parametrize("matrix", [(48, 64), (160, 128), (33, 41), (130, 129)])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_an_expert_has_the_bits_of_a_linear_layer(matrix, is_transposed, monkeypatch) -> None:
    stack = torch.randn(3, *matrix).to(BF16)
    layer = quantized(stack, is_transposed=is_transposed)
    monkeypatch.setattr(nf4, "MAX_NF4_ROUNDED_WEIGHTS", 64 * 5)
    in_pieces = quantized(stack, is_transposed=is_transposed)
    for expert, weight in enumerate(stack):
        rows, columns = matrix
        linear = FrozenLinear(Nf4(BF16), columns, rows, None, BF16, "cpu")
        linear.load({"": weight}, "w")
        count = linear.weight.numel()
        for one in (layer, in_pieces, quantized(stack[expert : expert + 1])):
            own = 0 if one.stored_shape[0] == 1 else expert
            # Of an odd number of weights the last byte has half of a code.
            whole = rows * columns // 2
            assert torch.equal(one.weight[own, :whole], linear.weight.view(-1)[:whole])
            assert count - whole <= 1
            assert torch.equal(one.absmax[own], linear.absmax)
            assert torch.equal(one.nested_absmax[own], linear.nested_absmax)
            assert torch.equal(one.nested_offset[own], linear.nested_offset)
            assert torch.equal(one.nested_code, linear.nested_code)
            assert torch.equal(one.dense()[own], linear.dense())


def test_the_codes_are_bitsandbytes_of_the_stack() -> None:
    """It quantizes a stack as one array; blocks of 64 end where an expert does."""
    stack = torch.randn(4, 32, 48).to(BF16)
    codes, state = functional.quantize_4bit(stack, blocksize=nf4.NF4_BLOCK, quant_type="nf4")
    layer = quantized(stack)
    assert torch.equal(layer.weight.view(-1), codes.view(-1))
    scales = layer.format.scales_of_experts(layer.read_tensors(), slice(0, 4))
    # In 8 bits: a hundredth of the largest.
    torch.testing.assert_close(scales.flatten(), state.absmax, atol=0.03, rtol=0)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_some_experts_at_a_time_are_those_of_the_stack(is_transposed: bool) -> None:
    layer = quantized(torch.randn(5, 40, 24).to(BF16), is_transposed=is_transposed)
    stack = layer.frozen_stack()
    whole = stack.dense(0, 5, BF16)
    assert whole.shape == stack.shape == layer.shape
    assert torch.equal(stack.dense(1, 4, BF16), whole[1:4])
    assert torch.equal(whole if is_transposed else whole.mT, layer.dense())
    assert stack.dense(2, 3, torch.float32).dtype == torch.float32


@pytest.fixture(scope="module")
def base(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3_moe(tmp_path_factory.mktemp("qwen3-moe"), tiny)


def run_of(base: Path, folder: Path, **adapter: Any) -> Run:
    model = {"quantize": "nf4", "dtype": "bf16"}
    return make_run(base, folder, held=False, model=model, adapter=adapter, train=TWO_STEPS)


def test_a_stack_is_read_one_expert_at_a_time(base: Path, tmp_path: Path, monkeypatch) -> None:
    largest = 0
    original = JoinedTensor.__getitem__

    def getitem(self: JoinedTensor, slices: tuple[slice, ...]) -> Tensor:
        nonlocal largest
        part = original(self, slices)
        largest = max(largest, part.numel())
        return part

    monkeypatch.setattr(JoinedTensor, "__getitem__", getitem)
    model = built_model(run_of(base, tmp_path), base).model
    stack = model.get_submodule("model.layers.0.mlp.experts.gate_up_proj")
    assert largest == stack.stored_shape.numel() // 4
    plain = Qwen3MoeForCausalLM.from_pretrained(base, dtype=BF16)
    dense = plain.get_parameter("model.layers.0.mlp.experts.gate_up_proj")
    assert torch.equal(stack.dense(), quantized(dense).dense())
    assert parameter_count(model) - lora.count_adapter_parameters(model, Adapter(rank=4)) == sum(
        parameter.numel() for parameter in plain.parameters()
    )


@pytest.mark.slow
def test_a_run_on_nf4_experts_merges_and_resumes(base: Path, tmp_path: Path) -> None:
    merge = pytest.importorskip("tunesmith.tools.export.merge").merge
    run = run_of(base, tmp_path, rank=4)
    train(run, quiet=True)
    final = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
    assert any("experts.base_layer.lora_A" in name for name in final)
    longer = replace(run, train=replace(run.train, duration=Length.parse("3 steps")))
    assert train(longer, quiet=True).steps == 3
    merged = merge(tmp_path / "run", tmp_path / "merged")
    assert holds(merged.note, "nf4")
    assert merged.merge_check.passed


SAVED = {
    "experts": Adapter(target=("q_proj",), modules_to_save=("experts",)),
    "a stack": Adapter(target=("q_proj",), modules_to_save=("gate_up_proj",)),
}


@pytest.mark.parametrize("adapter", SAVED.values(), ids=SAVED)
def test_codes_are_not_trained_in_full(adapter: Adapter, base: Path) -> None:
    model = Qwen3MoeForCausalLM(AutoConfig.from_pretrained(base)).to("meta")
    replace_by_codes(model, Nf4(BF16), BF16)
    fix = ["adapter.target", "model.quantize=none"]
    with refuses(RecipeError, where="adapter.modules_to_save", names=["nf4"], fix=fix):
        lora.attach_lora(model, adapter, seed=0)


def test_all_linear_leaves_out_the_routers_alone(base: Path) -> None:
    model = Qwen3MoeForCausalLM(AutoConfig.from_pretrained(base)).to("meta")
    replace_by_codes(model, Nf4(BF16), BF16)
    lora.attach_lora(model, Adapter(), seed=0)
    assert list(unreached_lines(lora.find_unreached(model))) == ["the adapter excludes the routers"]


def test_a_stack_that_does_not_fit_is_refused() -> None:
    shape = torch.Size((4, 8, 8))
    layer = ExpertStack(Nf4(BF16), shape, is_transposed=False, compute_dtype=BF16)
    with refuses(ModelError, where="experts.down_proj", names=["[4, 8, 9]", "[4, 8, 8]"]):
        layer.load({"": torch.zeros(4, 8, 9)}, "experts.down_proj")
    with refuses(
        ModelError, where="experts.down_proj", names=["absmax"], fix=["model.quantize: nf4"]
    ):
        layer.load({"": torch.zeros(1), "absmax": torch.zeros(1)}, "experts.down_proj")
