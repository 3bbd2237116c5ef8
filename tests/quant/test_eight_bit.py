"""Weights in fp8: what rounding costs, which layers stay dense, and when a base stays in bf16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from errors import holds, refuses
from logged import logged_lines
from recipes import make_run
from tunesmith.distributed.torch_private import scaled_mm
from tunesmith.errors import ModelError
from tunesmith.formats import fp8, scaled_matmul
from tunesmith.formats.fp8 import Fp8
from tunesmith.formats.linear import FrozenLinear, has_codes
from tunesmith.formats.scaled_matmul import (
    MIN_ROWS,
    ROW_WISE,
    SCALING_RECIPES,
    TENSOR_WISE,
    quantize,
)
from tunesmith.planning import compare_eight_bit
from tunesmith.quant.replace import convert_to_eight_bit
from tunesmith.start.build import build
from tunesmith.start.request import Request
from tunesmith.start.session import first_batches
from tunesmith.training.session import Session

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", SCALING_RECIPES)
def test_quantizing_keeps_every_element_within_half_a_step_of_e4m3(kind):
    x = torch.randn(64, 96) * torch.logspace(-3, 3, 64).unsqueeze(1)
    codes, scale = quantize(kind, x)
    assert codes.dtype is torch.float8_e4m3fn
    assert scale.shape == ((1, 1) if kind == TENSOR_WISE else (64, 1))
    error = (codes.float() * scale - x).abs()
    # 3 bits of mantissa; below 2^-6 of the scale's unit the steps are 2^-9 apart.
    assert bool((error <= torch.maximum(x.abs() * 2**-4, scale * 2**-10) * 1.001).all())


def test_rows_of_zeros_and_rows_that_are_not_finite():
    x = torch.ones(3, 16)
    x[0], x[1, 3] = 0, float("inf")
    codes, scale = quantize(ROW_WISE, x)
    back = codes.float() * scale
    assert bool((back[0] == 0).all())
    assert bool(back[1].isnan().any())
    assert torch.equal(back[2], x[2])


def refuse_row_wise(a, b, *, scale_a, scale_b, **rest):
    """As sm_120 and sm_121."""
    if scale_b.numel() > 1:
        raise RuntimeError("row-wise scaling is not supported\non this chip")
    return dequantized(a, b, scale_a, scale_b)


def swap_scales(a, b, *, scale_a, scale_b, **rest):
    """Each factor's scales on the other's side, for as many as fit."""
    n, m = len(a), b.shape[1]
    left, right = (
        s.flatten().repeat(-(-k // s.numel()))[:k] for s, k in ((scale_b, n), (scale_a, m))
    )
    return dequantized(a, b, left.view(-1, 1), right.view(1, -1))


def refuse(a, b, **rest):
    raise RuntimeError("not supported\non this chip")


def dequantized(a, b, scale_a, scale_b):
    return ((a.float() * scale_a) @ (b.float() * scale_b)).bfloat16()


@pytest.mark.parametrize(
    ("product", "kind", "why"),
    [
        (scaled_mm, TENSOR_WISE, ""),  # torch's own; that of torch 2.11 on a CPU has no rows
        (refuse_row_wise, TENSOR_WISE, "[32, 48]"),
        (swap_scales, TENSOR_WISE, "[32, 48]"),
        (refuse, None, "[32, 48]"),
    ],
)
def test_the_scaling_is_found_by_trying_the_models_shapes(product, kind, why, monkeypatch):
    monkeypatch.setattr(scaled_matmul, "scaled_mm", product)
    found = fp8.select_scaling(CPU, ((48, 32), (48, 1024)), (1, 16, 300))
    assert found.recipe == kind or (product is scaled_mm and found.recipe == ROW_WISE)
    assert why in found.why


def hopper_sums(a, b, *, scale_a, scale_b, **rest):
    """As an H200 with fast accumulation: every 32 products are cut to the 13 bits below the largest."""
    left, right = a.float(), b.float()
    total = torch.zeros(len(left), right.shape[1])
    for k in range(0, left.shape[1], 32):
        terms = left[:, None, k : k + 32] * right.T[None, :, k : k + 32]
        largest = torch.maximum(total.abs(), torch.linalg.vector_norm(terms, torch.inf, dim=-1))
        unit = torch.exp2(largest.log2().floor() - 13).nan_to_num(posinf=1.0).clamp(min=1e-30)
        cut = terms.div_(unit[..., None]).trunc_().sum(-1)
        total = (cut + (total / unit).trunc()) * unit
    return (total * scale_a * scale_b).bfloat16()


@pytest.mark.slow
def test_the_sums_of_a_hopper_are_right_and_a_wrong_scale_beside_them_is_not(monkeypatch):
    """The stand-in loses what an H200 was seen to lose with 4096 products of one sign."""
    torch.manual_seed(0)
    k = 4096
    (a, a_scale), (b, b_scale) = (quantize(ROW_WISE, torch.rand(rows, k)) for rows in (16, 32))
    got = hopper_sums(a, b.T, scale_a=a_scale, scale_b=b_scale.T).double()
    exact = (a.double() * a_scale) @ (b.double() * b_scale).T
    assert float((got - exact).norm() / exact.norm()) == pytest.approx(0.075, rel=0.1)

    def of_next_row(a, b, *, scale_a, scale_b, **rest):
        return hopper_sums(a, b, scale_a=scale_a.roll(1, 0), scale_b=scale_b)

    for product, is_right in ((hopper_sums, True), (of_next_row, False)):
        monkeypatch.setattr(scaled_matmul, "scaled_mm", product)
        assert (fp8.matmul_fault(ROW_WISE, CPU, (16, k), 16) == "") == is_right


def test_a_forward_takes_fast_sums_and_a_backward_full_ones(monkeypatch):
    taken = []

    def product(a, b, *, scale_a, scale_b, use_fast_accum, **rest):
        taken.append(use_fast_accum)
        return dequantized(a, b, scale_a, scale_b)

    monkeypatch.setattr(scaled_matmul, "scaled_mm", product)
    x = torch.randn(16, 32, dtype=torch.bfloat16)
    for fast_sums in (False, True):
        layer = FrozenLinear(Fp8(ROW_WISE, fast_sums), 32, 32, None, torch.bfloat16, "cpu")
        layer.load({"": torch.randn(32, 32)}, "w")
        layer(x.requires_grad_()).sum().backward()
    assert taken == [False, False, True, False]


@pytest.mark.parametrize("kind", SCALING_RECIPES)
def test_few_rows_are_padded_and_cut_again(kind, monkeypatch):
    """Rows do not see each other, unless they share a scale."""

    def product(a, b, **rest):
        assert len(a) >= MIN_ROWS[kind]
        return dequantized(a, b, rest["scale_a"], rest["scale_b"])

    monkeypatch.setattr(scaled_matmul, "scaled_mm", product)
    weight = Fp8(kind).round(torch.randn(48, 64, dtype=torch.bfloat16))
    x = torch.randn(400, 64, dtype=torch.bfloat16)
    x[0] = 4 * x.abs().max()  # the scale of the tensor

    def multiply(x):
        return weight.format.forward_matmul(weight, x, weight.format.quantize_input(x), None)

    for n in (1, 15, 16, 17, 257):
        assert torch.equal(multiply(x[:n]), multiply(x)[:n]), n


def test_only_frozen_layers_of_fitting_widths_go_into_fp8():
    layers = {"fits": nn.Linear(32, 48, bias=False), "odd": nn.Linear(32, 40, bias=False)}
    layers |= {name: nn.Linear(32, 32, bias=False) for name in ("trained", "skipped")}
    model = nn.ModuleDict({**layers, "norm": nn.LayerNorm(32)}).bfloat16()
    model.requires_grad_(False)
    model["trained"].requires_grad_(True)
    assert convert_to_eight_bit(model, ROW_WISE, skip=[model["skipped"]]) == 1
    assert has_codes(model["fits"])
    assert {type(model[name]) for name in ("odd", "trained", "skipped")} == {nn.Linear}


@pytest.mark.parametrize("kind", SCALING_RECIPES)
def test_an_empty_layer_takes_a_weight_piece_by_piece(kind, monkeypatch):
    weight = torch.randn(48, 32) * torch.logspace(-2, 2, 48).unsqueeze(1)
    layer = FrozenLinear(Fp8(kind), 32, 48, None, torch.bfloat16)
    layer.allocate(CPU)
    monkeypatch.setattr(fp8, "MAX_FP8_ROUNDED_WEIGHTS", 7 * 32)
    layer.load({"": weight}, "w")
    whole = Fp8(kind).round(weight.bfloat16())
    assert torch.equal(layer.dense(), whole.dense(torch.bfloat16))
    assert torch.equal(layer.scale, whole.tensors[1])
    # FSDP shards parameters, and leaves buffers whole on every rank.
    assert [(p.dtype, tuple(p.shape)) for p in layer.parameters()] == [(torch.uint8, (48, 32))]
    assert [tuple(b.shape) for b in layer.buffers()] == [(48, 1) if kind == ROW_WISE else (1, 1)]
    parts = {"": torch.zeros(768, 1, dtype=torch.uint8), "absmax": torch.zeros(8)}
    with refuses(ModelError, where="layer.weight", fix=["model.quantize=none"]):
        layer.load(parts, "layer.weight")


def begin(tiny: Path, folder: Path) -> tuple[Session, list[str]]:
    model = {"dtype": "bf16", "quantize": "fp8"}
    run = make_run(tiny, folder, held=False, model=model, train={"global_batch": "4 examples"})
    Path(run.output_dir).mkdir(parents=True, exist_ok=True)
    with logged_lines() as said:
        return build(Request(run)), said


def count_layers(session: Session) -> int:
    return len(list(compare_eight_bit.eight_bit_layers(session.model)))


@pytest.mark.slow
def test_the_base_is_quantized_and_the_loss_is_told(tiny, tmp_path):
    session, said = begin(tiny, tmp_path)
    taken = session.plan.base
    assert taken == fp8.select_scaling(CPU).recipe
    assert count_layers(session) == 14
    assert holds(session.plan.why["base"], 14)
    assert any(f"base: {taken}" in line for line in said)
    weights = {id(p): p for p in session.model.parameters()}
    held = sum(p.numel() * p.itemsize for p in weights.values())
    assert held == session.plan.memory.weights, "a byte a weight of the layers"


@pytest.mark.slow
def test_where_the_loss_moves_too_far_the_base_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(compare_eight_bit, "MAX_LOSS_CHANGE", -1.0)
    with refuses(ModelError, where="model.quantize", fix=["model.quantize=none"]):
        begin(tiny, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "taken"), [(0.0, "fast"), (1.5, "full")])
def test_fast_sums_are_taken_where_the_loss_stays(loss, taken, tiny, tmp_path, monkeypatch):
    """loss: the share that the stand-in's sums lose."""
    monkeypatch.setattr(compare_eight_bit, "MAX_LOSS_CHANGE_BY_SUMS", 1e-4)
    session, _ = begin(tiny, tmp_path)
    layers = list(compare_eight_bit.eight_bit_layers(session.model))
    batches = first_batches(session.loader(0), session.device, 200)
    product = scaled_matmul.scaled_mm

    def short(a, b, *, use_fast_accum, **rest):
        return product(a, b, use_fast_accum=False, **rest) * (1 - loss * use_fast_accum)

    monkeypatch.setattr(scaled_matmul, "scaled_mm", short)
    change = compare_eight_bit.choose_sums(session.model, batches, session.ranks)
    assert change.is_tolerable == (taken == "fast"), change
    assert {layer.format.fast_sums for layer in layers} == {taken == "fast"}


@pytest.mark.slow
def test_a_machine_without_fp8_matmuls_trains_in_bf16(tiny, tmp_path, monkeypatch):
    refused = fp8.Scaling(None, "this chip has no fp8 matmuls: too old")
    monkeypatch.setattr(fp8, "select_scaling", lambda *tried, **options: refused)
    session, said = begin(tiny, tmp_path)
    assert (session.plan.base, session.plan.why["base"]) == ("bf16", refused.why)
    assert count_layers(session) == 0
    assert any(refused.why in line for line in said)
