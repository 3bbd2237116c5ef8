"""Weights in fp8: what rounding costs, which layers stay dense, and when a base stays in bf16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from devices import cpu_and_gpu
from errors import holds, refuses
from logged import logged_lines
from recipes import make_run, write_rows
from tunesmith.adapter import lora, peft_files
from tunesmith.config.schema import Adapter
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
from tunesmith.quant.linear_layers import parameter_count
from tunesmith.quant.replace import convert_to_eight_bit
from tunesmith.stages.request import Request
from tunesmith.training.build import build
from tunesmith.training.session import Session, first_batches

CPU = torch.device("cpu")


def rounded(base: nn.Linear, kind: Fp8) -> FrozenLinear:
    """A layer in 8 bits with the weight of another."""
    sizes = (base.in_features, base.out_features)
    layer = FrozenLinear(kind, *sizes, base.bias, torch.bfloat16, "cpu")
    layer.load({"": base.weight}, "w")
    return layer


@pytest.mark.parametrize("kind", SCALING_RECIPES)
def test_quantizing_keeps_every_element_within_half_a_step_of_e4m3(kind):
    x = torch.randn(64, 96) * torch.logspace(-3, 3, 64).unsqueeze(1)
    codes, scale = quantize(kind, x)
    assert codes.dtype is torch.float8_e4m3fn
    assert scale.shape == ((1, 1) if kind == TENSOR_WISE else (64, 1))
    error = (codes.float() * scale - x).abs()
    # 3 bits of mantissa: 2^-4 of the element; below 2^-6 of the scale's unit the steps are 2^-9
    # apart.
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


def refuse_few_rows(a, b, *, scale_a, scale_b, **rest):
    """As cuBLASLt on Hopper, row-wise, for a large K."""
    if len(a) < 257 and len(a[0]) > 1000 and scale_b.numel() > 1:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")
    return dequantized(a, b, scale_a, scale_b)


def refuse_large_k(a, b, *, scale_a, scale_b, **rest):
    if len(a[0]) > 1000 and scale_b.numel() > 1:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")
    return dequantized(a, b, scale_a, scale_b)


def swap_scales(a, b, *, scale_a, scale_b, **rest):
    """Each factor's scales on the other's side, for as many as fit."""
    n, m = len(a), b.shape[1]
    left, right = (
        s.flatten().repeat(-(-k // s.numel()))[:k] for s, k in ((scale_b, n), (scale_a, m))
    )
    return dequantized(a, b, left.view(-1, 1), right.view(1, -1))


def zeros(a, b, **rest):
    return torch.zeros(len(a), b.shape[1], dtype=torch.bfloat16)


def refuse(a, b, **rest):
    raise RuntimeError("not supported\non this chip")


def dequantized(a, b, scale_a, scale_b):
    return ((a.float() * scale_a) @ (b.float() * scale_b)).bfloat16()


@pytest.mark.parametrize(
    ("product", "kind", "why"),
    [
        (scaled_mm, TENSOR_WISE, ""),  # torch's own; that of torch 2.11 on a CPU has no rows
        (refuse_row_wise, TENSOR_WISE, "[32, 48]"),
        (refuse_few_rows, ROW_WISE, ""),
        (refuse_large_k, TENSOR_WISE, "[1024, 48]"),
        (swap_scales, TENSOR_WISE, "[32, 48]"),
        (zeros, None, "[32, 48]"),
        (refuse, None, "[32, 48]"),
    ],
)
def test_the_scaling_is_found_by_trying_the_models_shapes(product, kind, why, monkeypatch):
    monkeypatch.setattr(scaled_matmul, "scaled_mm", product)
    found = fp8.select_scaling(CPU, ((48, 32), (48, 1024)), (1, 16, 300))
    assert found.recipe == kind or (product is scaled_mm and found.recipe == ROW_WISE)
    assert why in found.why


def hopper_sums(a, b, *, scale_a, scale_b, **rest):
    """As an H200 with fast accumulation: every 32 products are cut to the 13 bits below the largest
    of them and of the running sum, and added to that.
    """
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

    # Few of the many elements of a large product may lose more, as on the chip.
    def few_far_off(a, b, *, scale_a, scale_b, **rest):
        y = hopper_sums(a, b, scale_a=scale_a, scale_b=scale_b)
        y[0, 0] += 0.15 * (7 * a.shape[1]) ** 0.5  # the usual size of a sum of 1, 2 and 4
        return y

    def of_next_row(a, b, *, scale_a, scale_b, **rest):
        return hopper_sums(a, b, scale_a=scale_a.roll(1, 0), scale_b=scale_b)

    for product, is_right in ((hopper_sums, True), (few_far_off, True), (of_next_row, False)):
        monkeypatch.setattr(scaled_matmul, "scaled_mm", product)
        assert (fp8.matmul_fault(ROW_WISE, CPU, (16, k), 16) == "") == is_right


def test_a_sum_that_is_zero_is_no_wrong_result():
    """With one row a column is one sum of signed numbers, of which some are exactly zero."""
    assert fp8.matmul_fault(ROW_WISE, CPU, (256, 512), 1) == ""


def test_a_forward_takes_fast_sums_and_a_backward_full_ones(monkeypatch):
    taken = []

    def product(a, b, *, scale_a, scale_b, use_fast_accum, **rest):
        taken.append(use_fast_accum)
        return dequantized(a, b, scale_a, scale_b)

    monkeypatch.setattr(scaled_matmul, "scaled_mm", product)
    x = torch.randn(16, 32, dtype=torch.bfloat16)
    for fast_sums in (False, True):
        base = nn.Linear(32, 32, bias=False, dtype=torch.bfloat16).requires_grad_(False)
        rounded(base, Fp8(ROW_WISE, fast_sums))(x.requires_grad_()).sum().backward()
        assert taken == [fast_sums, False]
        taken.clear()


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
    whole = weight.format.forward_matmul(weight, x, weight.format.quantize_input(x), None)
    for n in (1, 15, 16, 17, 257):
        some = weight.format.forward_matmul(
            weight, x[:n], weight.format.quantize_input(x[:n]), None
        )
        assert torch.equal(some, whole[:n]), n


@cpu_and_gpu
def test_a_product_is_that_of_its_rounded_factors(device):
    """Beside float64 on the same 8-bit numbers only the sum and the result (bf16: 2^-9) are rounded;
    a GPU's fast accumulation keeps fewer bits of partial sums.
    """
    kind = fp8.select_scaling(device).recipe
    if kind is None:
        pytest.skip("this device has no fp8 matmuls")
    x, w, dy = (
        torch.randn(shape).to(device, torch.bfloat16)
        for shape in ((256, 512), (384, 512), (256, 384))
    )
    weight = Fp8(kind).round(w)

    def plain(left: list[torch.Tensor], right: list[torch.Tensor]) -> torch.Tensor:
        (a, a_scale), (b, b_scale) = left, right
        return (a.double() * a_scale.double()) @ (b.double() * b_scale.double()).T

    x8 = weight.format.quantize_input(x)
    quantized = weight.format.quantize_gradients([weight], [dy])
    dy8 = [quantized[0].view(torch.float8_e4m3fn), quantized[1]]
    # The scales of W are in those of dy.
    transposed = [weight.tensors[0].float().T, torch.ones(1, 1, device=device)]
    for got, left, right in (
        (weight.format.forward_matmul(weight, x, x8, None), x8, weight.tensors),
        (weight.format.backward_matmul([weight], [dy], quantized, None), dy8, transposed),
    ):
        expected = plain(left, right)
        bound = 2**-8 if device.type == "cpu" else 0.01
        assert (got.double() - expected).norm() / expected.norm() < bound


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
    assert all(tensor.is_meta for tensor in (layer.weight, layer.scale))
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
    with refuses(ModelError, where="layer.weight", fix=["model.quantize=none"]) as caught:
        layer.load(parts, "layer.weight")
    assert "layer.weight.absmax" in caught.value.text()


def test_an_adapter_keeps_its_very_parameters_and_its_files_have_no_other(tiny):
    """A weight in 8 bits counts as the dense one, and the head stays dense."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    count = sum(p.numel() for p in model.parameters())
    adapter = Adapter(rank=2, target=("q_proj", "down_proj"))
    lora.attach_lora(model, adapter, seed=1)
    before = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert convert_to_eight_bit(model, ROW_WISE) == 14
    after = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert list(before) == list(after)
    assert all(after[name] is parameter for name, parameter in before.items())
    trained = sum(parameter.numel() for parameter in after.values())
    assert parameter_count(model) == count + trained
    assert has_codes(model.get_submodule("model.layers.0.mlp.gate_proj"))
    assert model.lm_head.weight.dtype is torch.bfloat16
    assert not any("scale" in name for name in model.state_dict())
    written, _ = peft_files.adapter_files(model, adapter, "base", None)
    assert sum(tensor.numel() for tensor in written.values()) == trained


# Powers of ten by which rows of W, columns of W and rows of dy differ.
SPREADS = {"even": (0, 0, 0), "rows of W": (3, 0, 0), "columns": (0, 3, 0), "dy": (0, 0, 6)}


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("kind", SCALING_RECIPES)
def test_one_copy_of_the_weight_makes_dx_as_well_as_two(kind: str, spread: str) -> None:
    """The second copy is quantized as W^T, whose scales are those of W's columns.

    Each rounds both factors to 3 bits of mantissa: some 4 %. Gradients are small: here of 1e-7.
    """
    if kind == ROW_WISE and fp8.select_scaling(CPU).recipe != ROW_WISE:
        pytest.skip("torch 2.11 multiplies no factors that are scaled by row on a CPU")
    rows, columns, batch = SPREADS[spread]
    torch.manual_seed(0)
    w = torch.randn(96, 192) * torch.logspace(-rows, 0, 96).unsqueeze(1)
    w *= torch.logspace(-columns, 0, 192)
    dy = 1e-7 * torch.randn(64, 96) * torch.logspace(-batch, 0, 64).unsqueeze(1)
    w, dy = w.bfloat16(), dy.bfloat16()
    weight = Fp8(kind).round(w)
    expected = dy.double() @ w.double()

    def error(dx: torch.Tensor) -> float:
        return float(((dx.double() - expected).norm(dim=1) / expected.norm(dim=1)).median())

    quantized = weight.format.quantize_gradients([weight], [dy])
    one = error(weight.format.backward_matmul([weight], [dy], quantized, None))
    second = quantize(kind, dy), quantize(kind, w.T.contiguous())
    assert one < 1.1 * error(scaled_matmul.scaled_matmul(kind, *second, dy.dtype))
    assert one < 0.045 or kind == TENSOR_WISE


def begin(tiny: Path, folder: Path) -> tuple[Session, list[str]]:
    for name, rows in (("train", 24), ("held", 8)):
        write_rows(folder / f"{name}.jsonl", rows)
    run = make_run(tiny, folder, held=False, train={"global_batch": "4 examples"})
    run = replace(run, model=replace(run.model, dtype="bf16", quantize="fp8"))
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
    assert not any(line.startswith("warning: ") and holds(line, "base") for line in said)
    weights = {id(p): p for p in session.model.parameters()}
    held = sum(p.numel() * p.itemsize for p in weights.values())
    assert held == session.plan.memory.weights, "a byte a weight of the layers"
    for least in (1, 200, 3000):
        found = first_batches(session.loader(0), session.device, least)
        assert sum(b.tokens for b in found) >= least > sum(b.tokens for b in found[:-1])
        micro = session.loader(0).batch(0).micro
        assert any(torch.equal(found[0].input_ids, b.input_ids) for b in micro)
        assert found[0].input_ids.numel() == max(b.input_ids.numel() for b in micro)


@pytest.mark.slow
def test_where_the_loss_moves_too_far_the_base_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(compare_eight_bit, "MAX_LOSS_CHANGE", -1.0)
    with refuses(ModelError, where="model.quantize", fix=["model.quantize=none"]):
        begin(tiny, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "taken"), [(0.0, "fast"), (1.5, "full")])
def test_fast_sums_are_taken_where_the_loss_stays(loss, taken, tiny, tmp_path, monkeypatch):
    """loss: the share that the stand-in's sums lose. It moves the loss of a model that knows
    nothing, near log(vocabulary), by 0.05 %.
    """
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
