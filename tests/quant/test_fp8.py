"""Weights in fp8: what rounding costs, what is left out, and a fall-back that says why."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tunesmith.adapter import lora
from tunesmith.config.schema import Adapter
from tunesmith.quant import fp8, frozen_matmul
from tunesmith.quant.fp8 import Fp8Linear

CPU = torch.device("cpu")


def test_quantising_keeps_every_element_within_half_a_step_of_e4m3():
    x = torch.randn(64, 96) * torch.logspace(-3, 3, 64).unsqueeze(1)
    for whole in (False, True):
        form, scale = fp8.quantise(x, whole=whole)
        assert form.dtype is torch.float8_e4m3fn
        assert scale.shape == ((1, 1) if whole else (64, 1))
        error = (form.float() * scale - x).abs()
        # 3 bits of mantissa: 2^-4 of the element; below 2^-6 of the scale's unit the steps are 2^-9 apart.
        assert bool((error <= torch.maximum(x.abs() * 2**-4, scale * 2**-10) * 1.001).all())


def test_rows_of_zeros_and_rows_that_are_not_finite():
    x = torch.ones(3, 16)
    x[0], x[1, 3] = 0, float("inf")
    form, scale = fp8.quantise(x, whole=False)
    back = form.float() * scale
    assert bool((back[0] == 0).all())
    assert bool(back[1].isnan().any())
    assert torch.equal(back[2], x[2])


def test_row_wise_is_nearer_than_tensor_wise_where_rows_differ():
    x = torch.randn(64, 96) * torch.logspace(-4, 2, 64).unsqueeze(1)

    def error(whole: bool) -> float:
        form, scale = fp8.quantise(x, whole=whole)
        return float(((form.float() * scale - x).norm(dim=1) / x.norm(dim=1)).mean())

    assert error(False) < 0.5 * error(True)


def test_the_way_is_found_by_trying(monkeypatch):
    def chosen() -> fp8.ScalingRecipe:
        fp8.select_scaling.cache_clear()
        return fp8.select_scaling(CPU)

    def refuse(*_, **__):
        raise RuntimeError("row-wise scaling is not supported\non this chip")

    def multiply(self, x, *_):
        return torch.full((32, 32), 32.0, dtype=x.dtype)

    def nonsense(self, x, *_):
        return torch.zeros(32, 32, dtype=x.dtype)

    ways = type(frozen_matmul.KINDS[fp8.ROW])
    with monkeypatch.context() as changed:  # torch 2.11 has no products scaled by rows on a CPU
        changed.setattr(ways, "times", multiply)
        changed.setattr(ways, "back", multiply)
        assert chosen().kind == fp8.ROW
        changed.setattr(frozen_matmul.KINDS[fp8.ROW], "back", lambda *given: nonsense(None, *given))
        assert chosen().kind == fp8.TENSOR  # a way that runs and computes nonsense is no way
        changed.setattr(frozen_matmul.KINDS[fp8.ROW], "times", refuse)
        assert chosen().kind == fp8.TENSOR
        changed.setattr(frozen_matmul.KINDS[fp8.TENSOR], "times", refuse)
        way = chosen()
        assert way.kind is None
        assert way.why.endswith("row-wise scaling is not supported")
    assert chosen().kind in fp8.KINDS  # in earnest
    monkeypatch.setattr(frozen_matmul.KINDS[fp8.ROW], "times", refuse)
    assert chosen().kind == fp8.TENSOR
    monkeypatch.undo()
    fp8.select_scaling.cache_clear()


def test_a_product_is_that_of_its_rounded_factors():
    """Beside float64 on the same e4m3 numbers only the sum (fp32) and the result (bf16: 2^-9) are rounded."""
    kind = fp8.select_scaling(CPU).kind
    assert kind is not None
    way = frozen_matmul.KINDS[kind]
    x, w = torch.randn(48, 64, dtype=torch.bfloat16), torch.randn(32, 64, dtype=torch.bfloat16)
    dy, held = torch.randn(48, 32, dtype=torch.bfloat16), fp8._hold(w, kind)

    def plain(left: list[torch.Tensor], right: list[torch.Tensor]) -> torch.Tensor:
        (a, a_scale), (b, b_scale) = left, right
        return (a.double() * a_scale.double()) @ (b.double() * b_scale.double()).T

    for got, left, right in (
        (way.times(x, way.quantise(x), held, None), way.quantise(x), held[:2]),
        (way.back(dy, way.quantise(dy), held, None), way.quantise(dy), held[2:]),
    ):
        expected = plain(left, right)
        assert (got.double() - expected).norm() / expected.norm() < 2**-8


def test_only_frozen_layers_of_fitting_widths_are_held_in_fp8():
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
    assert lora.convert_to_fp8(model, fp8.ROW) == 1
    assert isinstance(model["fits"], Fp8Linear)
    assert type(model["odd"]) is type(model["trained"]) is nn.Linear


def test_an_adapter_keeps_its_very_parameters_and_the_head_its_weight(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    lora.attach_lora(model, Adapter(rank=2, target=("q_proj", "down_proj")), seed=1)
    before = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert lora.convert_to_fp8(model, fp8.ROW) == 14
    after = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert list(before) == list(after)
    assert all(after[name] is parameter for name, parameter in before.items())
    assert isinstance(model.get_submodule("model.layers.0.mlp.gate_proj"), Fp8Linear)
    assert model.lm_head.weight.dtype is torch.bfloat16
    assert not any("turned" in name or "scale" in name for name in model.state_dict())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_the_gpu_multiplies_as_the_cpu_does():
    x, w = torch.randn(256, 512, dtype=torch.bfloat16), torch.randn(384, 512, dtype=torch.bfloat16)
    kind = fp8.select_scaling(torch.device("cuda")).kind
    if kind is None:
        pytest.skip("this GPU has no fp8 products")
    way, results = frozen_matmul.KINDS[kind], []
    for device in ("cpu", "cuda"):
        held = fp8._hold(w.to(device), kind)
        results.append(way.times(x.to(device), way.quantise(x.to(device)), held, None).cpu().double())
    # Fast accumulation on the chip keeps fewer bits between partial sums.
    assert (results[1] - results[0]).norm() / results[0].norm() < 0.01
