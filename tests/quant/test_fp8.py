"""Weights in fp8: what rounding costs, which layers stay dense, and a fall-back that says why."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tunesmith.adapter import lora, peft_files
from tunesmith.config.schema import Adapter
from tunesmith.quant import fp8, nf4
from tunesmith.quant.fp8 import Fp8Linear
from tunesmith.quant.frozen_matmul import parameter_count
from tunesmith.quant.frozen_weight import ROW_WISE, TENSOR_WISE, Fp8Weight, quantize_fp8

CPU = torch.device("cpu")


def test_quantizing_keeps_every_element_within_half_a_step_of_e4m3():
    x = torch.randn(64, 96) * torch.logspace(-3, 3, 64).unsqueeze(1)
    for per_tensor in (False, True):
        codes, scale = quantize_fp8(x, per_tensor=per_tensor)
        assert codes.dtype is torch.float8_e4m3fn
        assert scale.shape == ((1, 1) if per_tensor else (64, 1))
        error = (codes.float() * scale - x).abs()
        # 3 bits of mantissa: 2^-4 of the element; below 2^-6 of the scale's unit the steps are 2^-9 apart.
        assert bool((error <= torch.maximum(x.abs() * 2**-4, scale * 2**-10) * 1.001).all())


def test_rows_of_zeros_and_rows_that_are_not_finite():
    x = torch.ones(3, 16)
    x[0], x[1, 3] = 0, float("inf")
    codes, scale = quantize_fp8(x, per_tensor=False)
    back = codes.float() * scale
    assert bool((back[0] == 0).all())
    assert bool(back[1].isnan().any())
    assert torch.equal(back[2], x[2])


def test_row_wise_is_nearer_than_tensor_wise_where_rows_differ():
    x = torch.randn(64, 96) * torch.logspace(-4, 2, 64).unsqueeze(1)

    def error(per_tensor: bool) -> float:
        codes, scale = quantize_fp8(x, per_tensor=per_tensor)
        return float(((codes.float() * scale - x).norm(dim=1) / x.norm(dim=1)).mean())

    assert error(False) < 0.5 * error(True)


def ones(weight: Fp8Weight, x: torch.Tensor, *_) -> torch.Tensor:
    """What a device that multiplies gives for the matrices of ones that `select_scaling` tries."""
    return torch.full((32, 32), 32.0, dtype=x.dtype)


def zeros(weight: Fp8Weight, x: torch.Tensor, *_) -> torch.Tensor:
    return ones(weight, x) * 0


def refuse(weight: Fp8Weight, *_) -> torch.Tensor:
    raise RuntimeError(f"{weight.kind} scaling is not supported\non this chip")


@pytest.mark.parametrize(
    ("row_wise", "tensor_wise", "kind", "why"),
    [
        ((ones, ones), (ones, ones), ROW_WISE, "fp8 row-wise matmuls run here"),
        ((ones, zeros), (ones, ones), TENSOR_WISE, "run here"),  # one that runs and gives nonsense is none
        ((refuse, ones), (ones, ones), TENSOR_WISE, "run here"),
        ((refuse, ones), (refuse, ones), None, "fp8 row-wise scaling is not supported"),
    ],
)
def test_the_scaling_is_found_by_trying(row_wise, tensor_wise, kind, why, monkeypatch):
    for at, name in enumerate(("forward_matmul", "backward_matmul")):
        given = {ROW_WISE: row_wise[at], TENSOR_WISE: tensor_wise[at]}
        monkeypatch.setattr(Fp8Weight, name, lambda weight, *args, given=given: given[weight.kind](weight, *args))
    found = fp8.select_scaling.__wrapped__(CPU)
    assert found.kind == kind
    assert found.why.endswith(why)


def test_a_cpu_has_fp8_matmuls_tensor_wise_at_least(monkeypatch):
    assert fp8.select_scaling.__wrapped__(CPU).kind in fp8.KINDS
    multiply = Fp8Weight.forward_matmul
    monkeypatch.setattr(
        Fp8Weight, "forward_matmul", lambda w, *args: (refuse if w.kind == ROW_WISE else multiply)(w, *args)
    )
    assert fp8.select_scaling.__wrapped__(CPU).kind == TENSOR_WISE


def test_a_matmul_is_that_of_its_rounded_factors():
    """Beside float64 on the same e4m3 numbers only the sum (fp32) and the result (bf16: 2^-9) are rounded."""
    kind = fp8.select_scaling(CPU).kind
    assert kind is not None
    x, w = torch.randn(48, 64, dtype=torch.bfloat16), torch.randn(32, 64, dtype=torch.bfloat16)
    dy, weight = torch.randn(48, 32, dtype=torch.bfloat16), Fp8Weight.from_dense(kind, w)

    def plain(left: list[torch.Tensor], right: list[torch.Tensor]) -> torch.Tensor:
        (a, a_scale), (b, b_scale) = left, right
        return (a.double() * a_scale.double()) @ (b.double() * b_scale.double()).T

    x8, dy8 = weight.quantize_input(x), weight.quantize_input(dy)
    for got, left, right in (
        (weight.forward_matmul(x, x8, None), x8, weight.tensors[:2]),
        (weight.backward_matmul(dy, dy8, None), dy8, weight.tensors[2:]),
    ):
        expected = plain(left, right)
        assert (got.double() - expected).norm() / expected.norm() < 2**-8


def test_only_frozen_layers_of_fitting_widths_go_into_fp8():
    model = nn.ModuleDict(
        {
            "fits": nn.Linear(32, 48, bias=False),
            "odd": nn.Linear(32, 40, bias=False),
            "trained": nn.Linear(32, 32, bias=False),
            "norm": nn.LayerNorm(32),
        }
    ).bfloat16()
    model.requires_grad_(False)
    model["trained"].requires_grad_(True)
    assert lora.convert_to_fp8(model, ROW_WISE) == 1
    assert isinstance(model["fits"], Fp8Linear)
    assert type(model["odd"]) is type(model["trained"]) is nn.Linear


def test_an_adapter_keeps_its_very_parameters_and_the_head_its_weight(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    lora.attach_lora(model, Adapter(rank=2, target=("q_proj", "down_proj")), seed=1)
    before = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert lora.convert_to_fp8(model, ROW_WISE) == 14
    after = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert list(before) == list(after)
    assert all(after[name] is parameter for name, parameter in before.items())
    assert isinstance(model.get_submodule("model.layers.0.mlp.gate_proj"), Fp8Linear)
    assert model.lm_head.weight.dtype is torch.bfloat16
    assert not any("scale" in name for name in model.state_dict())


@pytest.mark.parametrize("base", ["nf4", "fp8"])
def test_a_quantized_weight_counts_as_the_dense_one_and_is_in_no_adapter_file(base, tiny):
    """fp8 stores a weight twice, nf4 two codes a byte."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    count = sum(p.numel() for p in model.parameters())
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
        nf4.replace_linears(model, torch.bfloat16)
        assert parameter_count(model) == count
    lora.attach_lora(model, Adapter(rank=2), seed=1)
    if base == "fp8":
        lora.convert_to_fp8(model, ROW_WISE)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert parameter_count(model) == count + trained
    written, _ = peft_files.adapter_files(model, Adapter(rank=2), "base", None)
    assert sum(tensor.numel() for tensor in written.values()) == trained


def test_all_that_grows_with_the_weight_is_a_parameter():
    """FSDP shards parameters, and leaves buffers whole on every rank."""
    layer = fp8.Fp8Linear(nn.Linear(64, 32, bias=False, dtype=torch.bfloat16).requires_grad_(False), ROW_WISE)
    assert {n: tuple(p.shape) for n, p in layer.named_parameters()} == {
        "weight": (32, 64),
        "transposed_weight": (64, 32),
    }
    assert all(b.numel() == b.shape[0] for b in layer.buffers())  # a scale a row
    assert torch.equal(layer.weight, quantize_fp8(layer.dense(), per_tensor=False)[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_the_gpu_multiplies_as_the_cpu_does():
    x, w = torch.randn(256, 512, dtype=torch.bfloat16), torch.randn(384, 512, dtype=torch.bfloat16)
    kind = fp8.select_scaling(torch.device("cuda")).kind
    if kind is None:
        pytest.skip("this GPU has no fp8 matmuls")
    results = []
    for device in ("cpu", "cuda"):
        weight, there = Fp8Weight.from_dense(kind, w.to(device)), x.to(device)
        results.append(weight.forward_matmul(there, weight.quantize_input(there), None).cpu().double())
    # Fast accumulation on the chip keeps fewer bits between partial sums.
    assert (results[1] - results[0]).norm() / results[0].norm() < 0.01
