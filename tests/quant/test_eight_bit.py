"""Weights in fp8: what rounding costs, which layers stay dense, and a fall-back that says why."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from devices import cpu_and_gpu
from tunesmith.adapter import lora, peft_files
from tunesmith.config.schema import Adapter
from tunesmith.distributed.torch_private import scaled_mm
from tunesmith.errors import ModelError
from tunesmith.formats import fp8, scaled_matmul
from tunesmith.formats.fp8 import Fp8
from tunesmith.formats.linear import FrozenLinear, has_codes
from tunesmith.formats.nf4 import Nf4
from tunesmith.formats.scaled_matmul import (
    MIN_ROWS,
    ROW_WISE,
    SCALING_RECIPES,
    TENSOR_WISE,
    quantize,
)
from tunesmith.quant.linear_layers import parameter_count
from tunesmith.quant.replace import convert_to_eight_bit, replace_by_codes

CPU = torch.device("cpu")


def rounded(base: nn.Linear, kind: Fp8) -> FrozenLinear:
    """A layer in 8 bits with the weight of another."""
    sizes = (base.in_features, base.out_features)
    layer = FrozenLinear(kind, *sizes, base.bias, torch.bfloat16, "cpu")
    layer.load({"": base.weight}, "w")
    return layer


def test_quantizing_keeps_every_element_within_half_a_step_of_e4m3():
    x = torch.randn(64, 96) * torch.logspace(-3, 3, 64).unsqueeze(1)
    for per_tensor in (False, True):
        codes, scale = quantize(TENSOR_WISE if per_tensor else ROW_WISE, x)
        assert codes.dtype is torch.float8_e4m3fn
        assert scale.shape == ((1, 1) if per_tensor else (64, 1))
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


def test_row_wise_is_nearer_than_tensor_wise_where_rows_differ():
    x = torch.randn(64, 96) * torch.logspace(-4, 2, 64).unsqueeze(1)

    def error(per_tensor: bool) -> float:
        codes, scale = quantize(TENSOR_WISE if per_tensor else ROW_WISE, x)
        return float(((codes.float() * scale - x).norm(dim=1) / x.norm(dim=1)).mean())

    assert error(False) < 0.5 * error(True)


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
        # torch's own, and the one of torch 2.11 on a CPU
        (
            scaled_mm,
            TENSOR_WISE,
            "this device supports",
        ),
        (
            refuse_row_wise,
            TENSOR_WISE,
            "fp8 row-wise fails for 1 row times [32, 48]: row-wise scaling is not supported",
        ),
        (refuse_few_rows, ROW_WISE, "this device supports fp8 row-wise matmuls"),
        (
            refuse_large_k,
            TENSOR_WISE,
            "fp8 row-wise fails for 1 row times [1024, 48]: CUBLAS_STATUS_NOT_SUPPORTED",
        ),
        (swap_scales, TENSOR_WISE, "fp8 row-wise fails for 1 row times [32, 48]: a wrong result"),
        (zeros, None, "this device has no fp8 matmuls: fp8 row-wise fails for 1 row"),
        (refuse, None, "not supported"),
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


# in_features, then measured on an H200: the loss of signed, of one-signed numbers, of powers.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("k", "signed", "one_sign", "powers"),
    [(4096, 0.0021, 0.075, 0.036), (14336, 0.0033, 0.216, 0.273)],
)
def test_the_sums_of_a_hopper_are_right_and_a_wrong_scale_beside_them_is_not(
    k, signed, one_sign, powers, monkeypatch
):
    """The stand-in loses what the chip was seen to lose: within a tenth of it for sums of one sign,
    below it for signed numbers, where the chip's figure holds the rounding to bf16 as well.
    """
    torch.manual_seed(0)

    def lost(left, right):
        (a, a_scale), (b, b_scale) = quantize(ROW_WISE, left), quantize(ROW_WISE, right)
        got = hopper_sums(a, b.T, scale_a=a_scale, scale_b=b_scale.T).double()
        exact = (a.double() * a_scale) @ (b.double() * b_scale).T
        return float((got - exact).norm() / exact.norm())

    assert lost(torch.randn(16, k), torch.randn(32, k)) < 1.2 * signed
    assert lost(torch.rand(16, k), torch.rand(32, k)) == pytest.approx(one_sign, rel=0.1)
    columns = torch.arange(k).remainder(3).exp2().expand(32, -1)
    assert lost(torch.ones(16, k), columns) == pytest.approx(powers, rel=0.1)

    monkeypatch.setattr(scaled_matmul, "scaled_mm", hopper_sums)
    assert fp8.matmul_fault(ROW_WISE, CPU, (16, k), 16) == ""

    # Few of the many elements of a large product may lose more, as on the chip.
    def few_far_off(a, b, *, scale_a, scale_b, **rest):
        y = hopper_sums(a, b, scale_a=scale_a, scale_b=scale_b)
        y[0, 0] += 0.15 * (7 * a.shape[1]) ** 0.5  # the usual size of a sum of 1, 2 and 4
        return y

    monkeypatch.setattr(scaled_matmul, "scaled_mm", few_far_off)
    assert fp8.matmul_fault(ROW_WISE, CPU, (16, k), 16) == ""

    def of_next_row(a, b, *, scale_a, scale_b, **rest):
        return hopper_sums(a, b, scale_a=scale_a.roll(1, 0), scale_b=scale_b)

    monkeypatch.setattr(scaled_matmul, "scaled_mm", of_next_row)
    assert fp8.matmul_fault(ROW_WISE, CPU, (16, k), 16) != ""


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
        layer = rounded(base, Fp8(ROW_WISE, fast_sums))
        layer(x.requires_grad_()).sum().backward()
        assert taken == [fast_sums, False]
        taken.clear()


@pytest.mark.parametrize("n", [1, 7, 15, 16, 17, 31, 33, 257, 300])
@pytest.mark.parametrize("kind", SCALING_RECIPES)
def test_few_rows_are_padded_and_cut_again(kind, n, monkeypatch):
    """Each row as if it was multiplied with others: rows do not see each other (unless they share a
    scale).
    """

    def product(a, b, **rest):
        assert len(a) >= MIN_ROWS[kind]
        return dequantized(a, b, rest["scale_a"], rest["scale_b"])

    monkeypatch.setattr(scaled_matmul, "scaled_mm", product)
    weight = Fp8(kind).round(torch.randn(48, 64, dtype=torch.bfloat16))
    x = torch.randn(400, 64, dtype=torch.bfloat16)
    x[0] = 4 * x.abs().max()  # the scale of the tensor
    quantized = weight.format.quantize_input(x)
    got = weight.format.forward_matmul(weight, x[:n], weight.format.quantize_input(x[:n]), None)
    assert torch.equal(got, weight.format.forward_matmul(weight, x, quantized, None)[:n])


def test_a_matmul_is_that_of_its_rounded_factors():
    """Beside float64 on the same 8-bit numbers only the sum (fp32) and the result (bf16: 2^-9) are
    rounded.
    """
    kind = fp8.select_scaling(CPU).recipe
    assert kind is not None
    x, w = torch.randn(48, 64, dtype=torch.bfloat16), torch.randn(32, 64, dtype=torch.bfloat16)
    dy, weight = torch.randn(48, 32, dtype=torch.bfloat16), Fp8(kind).round(w)

    def plain(left: list[torch.Tensor], right: list[torch.Tensor]) -> torch.Tensor:
        (a, a_scale), (b, b_scale) = left, right
        return (a.double() * a_scale.double()) @ (b.double() * b_scale.double()).T

    x8 = weight.format.quantize_input(x)
    quantized = weight.format.quantize_gradients([weight], [dy])
    dy8 = [quantized[0].view(torch.float8_e4m3fn), quantized[1]]
    # The scales of W are in those of dy.
    transposed = [weight.tensors[0].float().T, torch.ones(1, 1)]
    for got, left, right in (
        (weight.format.forward_matmul(weight, x, x8, None), x8, weight.tensors),
        (weight.format.backward_matmul([weight], [dy], quantized, None), dy8, transposed),
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
    assert convert_to_eight_bit(model, ROW_WISE) == 1
    assert has_codes(model["fits"])
    assert type(model["odd"]) is type(model["trained"]) is nn.Linear


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


def test_a_layer_that_will_be_trained_in_full_stays_dense():
    model = nn.ModuleDict(
        {name: nn.Linear(32, 32, device="meta") for name in ("frozen", "trained")}
    )
    model.requires_grad_(False)
    assert convert_to_eight_bit(model, ROW_WISE, skip=[model["trained"]]) == 1
    assert type(model["trained"]) is nn.Linear


def test_an_adapter_keeps_its_very_parameters_and_the_head_its_weight(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    lora.attach_lora(model, Adapter(rank=2, target=("q_proj", "down_proj")), seed=1)
    before = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert convert_to_eight_bit(model, ROW_WISE) == 14
    after = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert list(before) == list(after)
    assert all(after[name] is parameter for name, parameter in before.items())
    assert has_codes(model.get_submodule("model.layers.0.mlp.gate_proj"))
    assert model.lm_head.weight.dtype is torch.bfloat16
    assert not any("scale" in name for name in model.state_dict())


@pytest.mark.parametrize("base", ["nf4", "fp8"])
def test_a_quantized_weight_counts_as_the_dense_one_and_is_in_no_adapter_file(base, tiny):
    """fp8 stores a code a byte, nf4 two."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    count = sum(p.numel() for p in model.parameters())
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
        replace_by_codes(model, Nf4(torch.bfloat16), torch.bfloat16)
        assert parameter_count(model) == count
    lora.attach_lora(model, Adapter(rank=2), seed=1)
    if base == "fp8":
        convert_to_eight_bit(model, ROW_WISE)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert parameter_count(model) == count + trained
    written, _ = peft_files.adapter_files(model, Adapter(rank=2), "base", None)
    assert sum(tensor.numel() for tensor in written.values()) == trained


def test_all_that_grows_with_the_weight_is_a_parameter():
    """FSDP shards parameters, and leaves buffers whole on every rank."""
    base = nn.Linear(64, 32, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    layer = rounded(base, Fp8(ROW_WISE))
    assert {n: (p.dtype, tuple(p.shape)) for n, p in layer.named_parameters()} == {
        "weight": (torch.uint8, (32, 64))
    }
    assert [tuple(b.shape) for b in layer.buffers()] == [(32, 1)]  # a scale a row
    assert torch.equal(layer.weight, quantize(ROW_WISE, layer.dense())[0].view(torch.uint8))


def two_copies(kind: str, w: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """dy W by a second copy of W that is quantized as W^T, whose scales are then those of W's
    columns.
    """
    return scaled_matmul.scaled_matmul(
        kind, quantize(kind, dy), quantize(kind, w.T.contiguous()), dy.dtype
    )


SPREADS = {
    "even": (0, 0, 0),
    "rows of W": (3, 0, 0),
    "columns of W": (0, 3, 0),
    "rows of dy": (0, 0, 6),
}


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("kind", SCALING_RECIPES)
def test_one_copy_of_the_weight_makes_dx_as_well_as_two(kind: str, spread: str) -> None:
    """Each rounds both factors to 3 bits of mantissa: some 4 %.

    Gradients are small: here of 1e-7 and less.
    """
    if kind == ROW_WISE and fp8.select_scaling(CPU).recipe != ROW_WISE:
        pytest.skip("torch 2.11 multiplies no factors that are scaled by row on a CPU")
    rows, columns, batch = SPREADS[spread]
    torch.manual_seed(0)
    w = (
        torch.randn(96, 192)
        * torch.logspace(-rows, 0, 96).unsqueeze(1)
        * torch.logspace(-columns, 0, 192)
    )
    dy = 1e-7 * torch.randn(64, 96) * torch.logspace(-batch, 0, 64).unsqueeze(1)
    w, dy = w.bfloat16(), dy.bfloat16()
    weight = Fp8(kind).round(w)
    expected = dy.double() @ w.double()

    def error(dx: torch.Tensor) -> float:
        return float(((dx.double() - expected).norm(dim=1) / expected.norm(dim=1)).median())

    quantized = weight.format.quantize_gradients([weight], [dy])
    one = error(weight.format.backward_matmul([weight], [dy], quantized, None))
    assert one < 1.1 * error(two_copies(kind, w, dy))
    assert one < 0.045 or kind == TENSOR_WISE


@cpu_and_gpu
def test_a_product_is_that_of_the_rounded_factors(device):
    """In float64; torch 2.11 multiplies factors that are scaled by row on a GPU alone."""
    x, w = (
        torch.randn(256, 512).to(device, torch.bfloat16),
        torch.randn(384, 512).to(device, torch.bfloat16),
    )
    kind = fp8.select_scaling(device).recipe
    if kind is None:
        pytest.skip("this device has no fp8 matmuls")
    weight = Fp8(kind).round(w)
    ready = weight.format.quantize_input(x)
    left, right = (codes.double() * scale.double() for codes, scale in (ready, weight.tensors))
    got, expected = weight.format.forward_matmul(weight, x, ready, None).double(), left @ right.T
    assert (
        got - expected
    ).norm() < 0.01 * expected.norm()  # a GPU's fast accumulation keeps fewer bits of partial sums


def test_a_weight_that_is_stored_in_parts_is_refused_with_the_way_on() -> None:
    layer = FrozenLinear(Fp8(TENSOR_WISE), 32, 16, None, torch.bfloat16)
    parts = {"": torch.zeros(256, 1, dtype=torch.uint8), "absmax": torch.zeros(8)}
    with pytest.raises(ModelError, match=r"layer\.weight\.absmax") as caught:
        layer.load(parts, "layer.weight")
    assert caught.value.where == "layer.weight"
    assert "model.quantize=none" in caught.value.fix
