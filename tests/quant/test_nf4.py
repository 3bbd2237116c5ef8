"""NF4 layers and stacks of experts against Transformers with bitsandbytes on the same weights."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeForCausalLM,
)

from errors import holds, refuses
from recipes import built_model, make_run
from shipped_bases import write_qwen3_moe
from tunesmith.adapter import lora
from tunesmith.adapter.expert_lora import expert_updates
from tunesmith.config.schema import Adapter, Data, Model, Run, Source, Train
from tunesmith.errors import MachineError, ModelError, RecipeError
from tunesmith.formats import nf4
from tunesmith.formats.linear import FrozenLinear, has_codes
from tunesmith.formats.matmul import grouped_matmul
from tunesmith.formats.nf4 import MAX_FUSED_ROWS, Nf4, nf4_functions
from tunesmith.formats.stack import ExpertStack
from tunesmith.host.chips import Chip
from tunesmith.model.experts import find_experts
from tunesmith.model.stored_tensors import JoinedTensor
from tunesmith.model.tiny_model import build_tiny_model
from tunesmith.quant.linear_layers import parameter_count
from tunesmith.quant.replace import replace_by_codes
from tunesmith.stages.plan import check_machine
from tunesmith.training.run import train
from tunesmith.units import Length

pytest.importorskip("bitsandbytes")

TOLERANCE = 1e-5  # fp32 compute; logits are of order 1


def theirs(folder, *, double: bool = True):
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    # Train mode: in eval mode bitsandbytes repacks its weights on some CPUs and answers
    # differently.
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32
    ).train()


def ours(folder, **adapter):
    run = Run(
        model=Model(name=str(folder), dtype="fp32", quantize="nf4"),
        adapter=Adapter(**adapter),
        data=Data(train=(Source(source="x"),)),
        train=Train(recompute="none", compile="off"),
        output_dir="x",
    )
    return built_model(run, folder).model


def logits(model):
    return model(torch.arange(5, 35).view(2, 15)).logits


def generating(model):
    model.set_attn_implementation("sdpa")
    return model


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
        model.save_pretrained(tmp_path)
        for file in tiny.glob("*token*"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    found = generating(ours(tiny if stored == "dense" else tmp_path))
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


def test_a_bitsandbytes_that_cannot_pack_here_is_refused_before_anything_is_read(
    monkeypatch, tmp_path
):
    """As with a wheel that was not built for this machine's CUDA."""

    def refuse(*_, **__):
        raise RuntimeError("Attempted to use the native library\nbut it's not available.")

    run = Run(
        model=Model(name=str(tmp_path / "nowhere"), quantize="nf4"),
        adapter=Adapter(),
        data=Data(train=(Source(source="x"),)),
        train=Train(),
        output_dir=str(tmp_path),
    )
    check_machine(run, torch.device("cpu"), Chip("cpu", 8.0))
    monkeypatch.setattr(nf4.nf4_functions(), "quantize_4bit", refuse)
    with refuses(MachineError, where="model.quantize") as caught:
        check_machine(run, torch.device("cpu"), Chip("cpu", 8.0))
    assert caught.value.why == "Attempted to use the native library"


@pytest.mark.parametrize(("rows", "double"), [(1, True), (MAX_FUSED_ROWS, False)])
def test_a_few_rows_are_multiplied_with_the_weight_in_4_bits(rows, double, monkeypatch):
    """What decoding asks of a layer: the same numbers as of the dense weight, which is not made.
    fp32, but for the order of 128 sums.
    """
    layer = layer_of(double)
    factors = torch.randn(8, 128), torch.randn(192, 8)
    x = torch.randn(rows, 128)
    expected = x @ layer.dense().T + x @ factors[0].T @ factors[1].T
    monkeypatch.setattr(Nf4, "decode", lambda *_: pytest.fail("the weight was made dense"))
    with torch.no_grad():
        (y,) = grouped_matmul(x, [layer.frozen_weight()], [None], [factors[0]], [factors[1]])
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-5)


def test_more_rows_and_steps_make_the_weight_dense(monkeypatch):
    layer, made = layer_of(double=True), []
    dense = Nf4.decode
    monkeypatch.setattr(Nf4, "decode", lambda *given: made.append(1) or dense(*given))
    with torch.no_grad():
        layer(torch.randn(MAX_FUSED_ROWS + 1, 128))
    layer(torch.randn(1, 128))
    assert len(made) == 2


def layer_of(double: bool) -> FrozenLinear:
    torch.manual_seed(0)
    layer = FrozenLinear(Nf4(torch.float32), 128, 192, None, torch.float32, "cpu")
    layer.load({"": torch.randn(192, 128)}, "w")
    if not double:
        tensors = layer.frozen_weight().tensors
        functional = nf4_functions()
        nested = functional.QuantState(
            tensors[3], blocksize=256, code=tensors[4], dtype=torch.float32
        )
        absmax = functional.dequantize_blockwise(tensors[1], nested) + tensors[5]
        layer.store(Nf4(torch.float32, nested_block=0), [layer.weight, absmax, tensors[2]])
    return layer


BF16 = torch.bfloat16


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
@pytest.mark.parametrize(
    ("matrix", "is_transposed"), [((48, 64), True), ((33, 41), False), ((130, 129), True)]
)
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
    functional = nf4_functions()
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
    steps = {"duration": "2 steps"}
    return make_run(base, folder, held=False, model=model, adapter=adapter, train=steps)


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


def meta_model(base: Path) -> Qwen3MoeForCausalLM:
    model = Qwen3MoeForCausalLM(AutoConfig.from_pretrained(base)).to("meta")
    replace_by_codes(model, Nf4(BF16), BF16)
    return model


@pytest.mark.parametrize("saved", ["experts", "gate_up_proj"])
def test_codes_are_not_trained_in_full(saved: str, base: Path) -> None:
    adapter = Adapter(target=("q_proj",), modules_to_save=(saved,))
    fix = ["adapter.target", "model.quantize=none"]
    with refuses(RecipeError, where="adapter.modules_to_save", names=["nf4"], fix=fix):
        lora.attach_lora(meta_model(base), adapter, seed=0)


def test_all_linear_leaves_out_the_routers_alone(base: Path) -> None:
    model = meta_model(base)
    lora.attach_lora(model, Adapter(), seed=0)
    found = lora.find_unreached(model)
    assert found.has_routers
    assert not found.matrices


def test_a_stack_that_does_not_fit_is_refused() -> None:
    shape, name = torch.Size((4, 8, 8)), "experts.down_proj"
    layer = ExpertStack(Nf4(BF16), shape, is_transposed=False, compute_dtype=BF16)
    with refuses(ModelError, where=name, names=["[4, 8, 9]", "[4, 8, 8]"]):
        layer.load({"": torch.zeros(4, 8, 9)}, name)
    with refuses(ModelError, where=name, names=["absmax"], fix=["model.quantize: nf4"]):
        layer.load({"": torch.zeros(1), "absmax": torch.zeros(1)}, name)


@pytest.mark.slow
def test_stacks_of_llama4_are_quantized_and_have_their_adapter(tmp_path: Path) -> None:
    base = tmp_path / "base"
    build_tiny_model(AutoConfig.for_model("llama4_text")).save_pretrained(base)
    words = Tokenizer(WordLevel({f"t{i}": i for i in range(60)}, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t1", pad_token="t2")
    tokenizer.save_pretrained(base)
    model = built_model(run_of(base, tmp_path), base).model
    found = find_experts(model)
    assert found
    assert all(experts.codes(name) for experts in found.values() for name in experts.stack_names)
    assert len([*expert_updates(model)]) == 2 * len(found)
