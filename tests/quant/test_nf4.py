"""NF4 layers against Transformers with bitsandbytes on the same weights."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from errors import refuses
from recipes import built_model
from tunesmith.adapter import lora
from tunesmith.config.schema import Adapter, Data, Model, Run, Source, Train
from tunesmith.errors import MachineError, ModelError
from tunesmith.formats import nf4
from tunesmith.formats.linear import FrozenLinear, has_codes
from tunesmith.formats.matmul import grouped_matmul
from tunesmith.formats.nf4 import MAX_FUSED_ROWS, Nf4, nf4_functions
from tunesmith.host.chips import Chip
from tunesmith.stages.plan import check_machine

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


def test_quantised_while_loading_equals_transformers_with_bitsandbytes(tiny):
    expected = logits(theirs(tiny)).detach()
    plain = logits(AutoModelForCausalLM.from_pretrained(tiny)).detach()
    assert (expected - plain).abs().max() > 100 * TOLERANCE, "quantising must matter"
    torch.testing.assert_close(
        logits(generating(ours(tiny))).detach(), expected, rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_a_ready_made_checkpoint_equals_transformers_with_bitsandbytes(tiny, tmp_path, double):
    model = theirs(tiny, double=double)
    expected = logits(model).detach()
    model.save_pretrained(tmp_path)
    for file in tiny.glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.testing.assert_close(
        logits(generating(ours(tmp_path))).detach(), expected, rtol=0, atol=TOLERANCE
    )


def test_lora_on_nf4_has_the_gradient_of_the_dense_weight(tiny):
    quantised = generating(ours(tiny, rank=4))
    dense = AutoModelForCausalLM.from_pretrained(tiny)
    lora.attach_lora(dense, Adapter(rank=4), seed=42)
    pairs = list(zip(lora.loras(quantised), lora.loras(dense), strict=True))
    torch.manual_seed(0)
    for (name, a), (other, b) in pairs:
        assert name == other
        assert torch.equal(a.lora_A, b.lora_A)
        nn.init.normal_(a.lora_B, std=0.1)
        b.lora_B.data.copy_(a.lora_B)
        b.weight = nn.Parameter(a.dense(), requires_grad=False)
    for model in (quantised, dense):
        logits(model).square().sum().backward()
    for (name, a), (_, b) in pairs:
        for x, y in ((a.lora_A.grad, b.lora_A.grad), (a.lora_B.grad, b.lora_B.grad)):
            assert y.norm() > 0
            assert (x - y).norm() / y.norm() < 1e-5, name


def test_the_packed_weight_is_never_written_to(tiny):
    model = generating(ours(tiny)).eval()
    before = {n: t.clone() for n, t in (*model.named_parameters(), *model.named_buffers())}
    first = logits(model)
    logits(model.train()).sum().backward()
    torch.testing.assert_close(logits(model.eval()), first, rtol=0, atol=0)
    after = dict((*model.named_parameters(), *model.named_buffers()))
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_it_is_small(tiny):
    layer = ours(tiny).get_submodule("model.layers.0.mlp.up_proj")
    stored = sum(
        t.numel() * t.element_size() for t in (layer.weight, layer.absmax, layer.nested_absmax)
    )
    # 4 bits, and 8 bits a block of 64 with 32 a block of 256
    assert stored / layer.dense().numel() <= 0.52


def test_the_head_the_embedding_and_the_norms_stay_dense(tiny):
    model = ours(tiny)
    assert not has_codes(model.lm_head)
    assert {p.dtype for n, p in model.named_parameters() if "norm" in n or "embed" in n} == {
        torch.float32
    }
    assert sum(has_codes(m) for m in model.modules()) == 14


def test_gradient_of_a_layer_without_an_adapter():
    torch.manual_seed(0)
    layer = FrozenLinear(Nf4(torch.float32), 64, 32, None, torch.float32, "cpu")
    layer.load({"": torch.randn(32, 64)}, "w")
    layer.bias = nn.Parameter(torch.randn(32))
    x = torch.randn(3, 64, requires_grad=True)
    y = torch.nn.functional.linear(x, layer.dense(), layer.bias)
    torch.testing.assert_close(layer(x), y)
    weight = torch.randn_like(y)
    (got,) = torch.autograd.grad((layer(x) * weight).sum(), x)
    (wanted,) = torch.autograd.grad((y * weight).sum(), x)
    torch.testing.assert_close(got, wanted)


def test_parts_of_a_packed_weight_that_do_not_fit_are_refused():
    kind = Nf4(torch.float32)
    layer = FrozenLinear(kind, 64, 32, None, torch.float32, "cpu")
    with refuses(ModelError, where="w", names=["bitsandbytes"]) as caught:
        kind.load_quantized(
            layer,
            {"": torch.zeros(1024, 1, dtype=torch.uint8), "absmax": torch.zeros(32)},
            where="w",
        )
    assert "fetch" in caught.value.fix
    packed, state = nf4.nf4_functions().quantize_4bit(torch.randn(16, 64), quant_type="nf4")
    with pytest.raises(ModelError, match=r"shape \(16, 64\)") as caught:
        kind.load_quantized(layer, {"": packed, **state.as_dict(packed=True)}, where="w")
    assert caught.value.fix
    packed, state = nf4.nf4_functions().quantize_4bit(torch.randn(32, 64), quant_type="fp4")
    with refuses(ModelError, where="w", names=["fp4", "nf4"]):
        kind.load_quantized(layer, {"": packed, **state.as_dict(packed=True)}, where="w")


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(MachineError, match=r"pip install 'bitsandbytes>=0.50'"):
        nf4.nf4_functions()


def test_a_bitsandbytes_that_cannot_pack_here_is_refused_before_anything_is_read(
    monkeypatch, tmp_path
):
    """As with a wheel that was not built for this machine's CUDA."""

    def refuse(*_, **__):
        raise RuntimeError(
            "Attempted to use bitsandbytes native library functionality\nbut it's not available."
        )

    run = Run(
        model=Model(name=str(tmp_path / "nowhere"), quantize="nf4"),
        adapter=Adapter(),
        data=Data(train=(Source(source="x"),)),
        train=Train(),
        output_dir=str(tmp_path),
    )
    check_machine(run, torch.device("cpu"), Chip("cpu", 8.0))
    monkeypatch.setattr(nf4.nf4_functions(), "quantize_4bit", refuse)
    with pytest.raises(MachineError) as caught:
        check_machine(run, torch.device("cpu"), Chip("cpu", 8.0))
    assert caught.value.where == "model.quantize"
    assert caught.value.why == "Attempted to use bitsandbytes native library functionality"


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("rows", [1, 3, MAX_FUSED_ROWS])
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
