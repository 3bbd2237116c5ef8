"""NF4 layers and stacks of experts against Transformers with bitsandbytes on the same weights."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen3MoeForCausalLM

from errors import holds, refuses
from recipes import built_model, make_run
from shipped_bases import write_qwen3_moe
from tunesmith.config.schema import Run
from tunesmith.errors import MachineError, ModelError
from tunesmith.formats import nf4
from tunesmith.formats.linear import FrozenLinear, has_codes
from tunesmith.formats.matmul import grouped_matmul
from tunesmith.formats.nf4 import MAX_FUSED_ROWS, Nf4, nf4_functions
from tunesmith.formats.stack import ExpertStack
from tunesmith.start.run import train
from tunesmith.tools.export.merge import merge
from tunesmith.units import Length

pytest.importorskip("bitsandbytes")

TOLERANCE = 1e-5  # fp32 compute; logits are of order 1


def theirs(folder, *, double: bool = True):
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    # In eval mode bitsandbytes repacks its weights on some CPUs and answers differently.
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32
    ).train()


def ours(folder, place):
    run = make_run(folder, place, held=False, model={"dtype": "fp32", "quantize": "nf4"})
    return built_model(run, folder).model


def logits(model):
    return model(torch.arange(5, 35).view(2, 15)).logits


@pytest.mark.parametrize("stored", ["dense", "double", "single"])
@pytest.mark.slow
def test_logits_are_those_of_transformers_with_bitsandbytes(tiny, tmp_path, stored):
    """Quantized while it is loaded, and from a checkpoint that is quantized already."""
    model = theirs(tiny, double=stored != "single")
    expected = logits(model).detach()
    if stored == "dense":
        plain = logits(AutoModelForCausalLM.from_pretrained(tiny)).detach()
        assert (expected - plain).abs().max() > 100 * TOLERANCE, "quantizing must matter"
    else:
        shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
        model.save_pretrained(tmp_path)
    found = ours(tiny if stored == "dense" else tmp_path, tmp_path)
    found.set_attn_implementation("sdpa")
    assert sum(has_codes(m) for m in found.modules()) == 14
    assert not has_codes(found.lm_head)
    torch.testing.assert_close(logits(found).detach(), expected, rtol=0, atol=TOLERANCE)


def test_parts_of_a_packed_weight_that_do_not_fit_are_refused():
    kind = Nf4(torch.float32)
    layer = FrozenLinear(kind, 64, 32, None, torch.float32, "cpu")
    parts = {"": torch.zeros(1024, 1, dtype=torch.uint8), "absmax": torch.zeros(32)}
    with refuses(ModelError, where="w", names=["bitsandbytes"], fix=["fetch"]):
        kind.load_quantized(layer, parts, where="w")
    for shape, quant_type, names in (((16, 64), "nf4", ["(16, 64)"]), ((32, 64), "fp4", ["fp4"])):
        packed, state = nf4_functions().quantize_4bit(torch.randn(shape), quant_type=quant_type)
        with refuses(ModelError, where="w", names=names) as caught:
            kind.load_quantized(layer, {"": packed, **state.as_dict(packed=True)}, where="w")
        assert caught.value.fix


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with refuses(MachineError, fix=["pip install 'bitsandbytes>=0.50'"]):
        nf4.nf4_functions()


@pytest.mark.parametrize("rows", [1, MAX_FUSED_ROWS])
def test_a_few_rows_are_multiplied_with_the_weight_in_4_bits(rows, monkeypatch):
    """What decoding asks of a layer: the same numbers as of the dense weight, which is not made."""
    layer = FrozenLinear(Nf4(torch.float32), 128, 192, None, torch.float32, "cpu")
    layer.load({"": torch.randn(192, 128)}, "w")
    factors = torch.randn(8, 128), torch.randn(192, 8)
    x = torch.randn(rows, 128)
    expected = x @ layer.dense().T + x @ factors[0].T @ factors[1].T
    monkeypatch.setattr(Nf4, "decode", lambda *_: pytest.fail("the weight was made dense"))
    with torch.no_grad():
        (y,) = grouped_matmul(x, [layer.frozen_weight()], [None], [factors[0]], [factors[1]])
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-5)


BF16 = torch.bfloat16


def quantized(stack: Tensor, *, is_transposed: bool = False) -> ExpertStack:
    layer = ExpertStack(Nf4(BF16), stack.shape, is_transposed=is_transposed, compute_dtype=BF16)
    layer.allocate(torch.device("cpu"))
    layer.store(stack)
    return layer


# The last one has blocks that are not whole, and both more than one group of scales.
@pytest.mark.slow
@pytest.mark.parametrize(("matrix", "is_transposed"), [((33, 41), False), ((130, 129), True)])
def test_an_expert_has_the_bits_of_a_linear_layer(matrix, is_transposed, monkeypatch) -> None:
    stack = torch.randn(3, *matrix).to(BF16)
    layer = quantized(stack, is_transposed=is_transposed)
    monkeypatch.setattr(nf4, "MAX_NF4_ROUNDED_WEIGHTS", 64 * 5)
    in_pieces = quantized(stack, is_transposed=is_transposed)
    for expert, weight in enumerate(stack):
        rows, columns = matrix
        linear = FrozenLinear(Nf4(BF16), columns, rows, None, BF16, "cpu")
        linear.load({"": weight}, "w")
        for one in (layer, in_pieces, quantized(stack[expert : expert + 1])):
            own = 0 if one.stored_shape[0] == 1 else expert
            # Of an odd number of weights the last byte has half of a code.
            count = rows * columns // 2
            assert torch.equal(one.weight[own, :count], linear.weight.view(-1)[:count])
            for scales in ("absmax", "nested_absmax", "nested_offset"):
                assert torch.equal(getattr(one, scales)[own], getattr(linear, scales)), scales
            assert torch.equal(one.dense()[own], linear.dense())


@pytest.fixture(scope="module")
def base(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3_moe(tmp_path_factory.mktemp("qwen3-moe"), tiny)


def run_of(base: Path, folder: Path, **adapter: Any) -> Run:
    model = {"quantize": "nf4", "dtype": "bf16"}
    steps = {"duration": "2 steps"}
    return make_run(base, folder, held=False, model=model, adapter=adapter, train=steps)


def test_a_stack_has_the_codes_of_its_dense_weights(base: Path, tmp_path: Path) -> None:
    model = built_model(run_of(base, tmp_path), base).model
    stack = model.get_submodule("model.layers.0.mlp.experts.gate_up_proj")
    plain = Qwen3MoeForCausalLM.from_pretrained(base, dtype=BF16)
    dense = plain.get_parameter("model.layers.0.mlp.experts.gate_up_proj")
    assert torch.equal(stack.dense(), quantized(dense).dense())


@pytest.mark.slow
def test_a_run_on_nf4_experts_merges_and_resumes(base: Path, tmp_path: Path) -> None:
    run = run_of(base, tmp_path, rank=4)
    train(run, quiet=True)
    final = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
    assert any("experts.base_layer.lora_A" in name for name in final)
    longer = replace(run, train=replace(run.train, duration=Length.parse("3 steps")))
    assert train(longer, quiet=True).steps == 3
    merged = merge(tmp_path / "run", tmp_path / "merged")
    assert holds(merged.note, "nf4")
    assert merged.merge_check.passed


def test_a_stack_that_does_not_fit_is_refused() -> None:
    shape, name = torch.Size((4, 8, 8)), "experts.down_proj"
    layer = ExpertStack(Nf4(BF16), shape, is_transposed=False, compute_dtype=BF16)
    with refuses(ModelError, where=name, names=["[4, 8, 9]", "[4, 8, 8]"]):
        layer.load({"": torch.zeros(4, 8, 9)}, name)
    with refuses(ModelError, where=name, names=["absmax"], fix=["model.quantize: nf4"]):
        layer.load({"": torch.zeros(1), "absmax": torch.zeros(1)}, name)
