"""Grouped matmuls with frozen weights are the plain formula, for every kind of weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch import config as functorch_config

from tunesmith.adapter import lora
from tunesmith.config.schema import Adapter
from tunesmith.distributed.torch_private import scaled_mm
from tunesmith.formats import fp8, matmul, scaled_matmul
from tunesmith.formats.base import FrozenWeight
from tunesmith.formats.dense import Dense
from tunesmith.formats.fp8 import Fp8
from tunesmith.formats.linear import FrozenLinear
from tunesmith.formats.nf4 import Nf4
from tunesmith.formats.scaled_matmul import TENSOR_WISE

# torch 2.11 has no fp8 matmuls scaled by row on a CPU.
FP8 = sorted({TENSOR_WISE, fp8.select_scaling(torch.device("cpu")).recipe or TENSOR_WISE})
WIDTHS = (48, 16, 16)  # like q, k and v
ADAPTER = Adapter(rank=4, alpha=8)


def dense_layers(dtype: torch.dtype, *, bias: bool = False) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(64, width, bias=bias, dtype=dtype).requires_grad_(False) for width in WIDTHS]


def adapted(layers: list[nn.Linear]) -> list[lora.LoraLinear]:
    made = [lora.LoraLinear(layer, ADAPTER) for layer in layers]
    for number, layer in enumerate(made):
        torch.manual_seed(number)
        nn.init.normal_(layer.lora_A, std=0.2)
        # With B = 0 the gradient of A is zero and proves nothing
        nn.init.normal_(layer.lora_B, std=0.2)
        if layer.weight.dtype is torch.float64:
            layer.double()
    return made


def plain(x: Tensor, layers: list[lora.LoraLinear], weights: list[Tensor]) -> list[Tensor]:
    return [
        F.linear(x, w, m.bias)
        + F.linear(F.linear(x, m.lora_A.to(x.dtype)), m.lora_B.to(x.dtype)) * m.scaling
        for m, w in zip(layers, weights, strict=True)
    ]


def gradients(outputs: list[Tensor], x: Tensor, layers: list[lora.LoraLinear]) -> dict[str, Tensor]:
    torch.manual_seed(9)
    leaves = {"x": x}
    for i, layer in enumerate(layers):
        parameters = layer.named_parameters()
        leaves |= {f"{i}.{name}": p for name, p in parameters if p.requires_grad}
    loss = sum((y * torch.randn_like(y)).sum() for y in outputs)
    found = torch.autograd.grad(loss, list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


def distance(a: Tensor, b: Tensor) -> float:
    assert b.norm() > 0
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


@pytest.mark.parametrize(
    ("dtype", "tolerance", "bias"), [(torch.float64, 1e-12, True), (torch.float32, 1e-5, False)]
)
def test_gradients_are_those_of_plain_lora(dtype, tolerance, bias):
    """fp32: both add the same products in another order, 64 terms of one size."""
    layers = adapted(dense_layers(dtype, bias=bias))
    x = torch.randn(2, 30, 64, dtype=dtype, requires_grad=True)
    ours, theirs = lora.project(x, layers), plain(x, layers, [m.weight for m in layers])
    assert [y.shape for y in ours] == [(2, 30, width) for width in WIDTHS]
    for a, b in zip(ours, theirs, strict=True):
        assert distance(a, b) < tolerance
    expected = gradients(theirs, x, layers)
    got = gradients(ours, x, layers)
    for name, gradient in expected.items():
        assert distance(got[name], gradient) < tolerance, name


def coded(layer: FrozenLinear | nn.Linear, kind: Nf4 | Fp8) -> FrozenLinear:
    """A layer in codes with the weight of a dense one."""
    frozen = FrozenLinear(kind, 64, layer.out_features, None, torch.bfloat16, "cpu")
    frozen.load({"": layer.weight}, "w")
    return frozen


KINDS = ["dense", "nf4", *FP8]


def layers_in(kind: str) -> list[lora.LoraLinear]:
    """The same three layers with adapters, in a kind of weight."""
    layers = adapted(dense_layers(torch.bfloat16))
    if kind == "dense":
        return layers
    storage = Nf4(torch.bfloat16) if kind == "nf4" else Fp8(kind)
    made = []
    for layer in layers:
        made.append(lora.LoraLinear(coded(layer, storage), ADAPTER))
        made[-1].lora_A, made[-1].lora_B = layer.lora_A, layer.lora_B
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_answers_as_the_weight_it_stands_for(kind):
    """bf16 keeps 8 bits: 2^-9 a rounding. fp8 rounds the input (and each output's gradient) to 3
    bits of mantissa: up to 2^-4 an element, about 3 % of a product's length, with a scale a tensor
    somewhat more.
    """
    layers = layers_in(kind)
    tolerance = 0.01 if kind in ("dense", "nf4") else 0.05
    x = torch.randn(40, 64, dtype=torch.bfloat16, requires_grad=True)
    ours, theirs = lora.project(x, layers), plain(x, layers, [m.dense() for m in layers])
    expected, got = gradients(theirs, x, layers), gradients(ours, x, layers)
    for a, b in zip(ours, theirs, strict=True):
        assert distance(a, b) < tolerance
    for name, gradient in expected.items():
        # The adapter's own gradients see no rounded input, only what the output's rounding left:
        # nothing.
        assert distance(got[name], gradient) < (tolerance if name == "x" else 0.01), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_compiled_operator_gives_the_same_numbers(kind):
    layers = layers_in(kind)
    x = torch.randn(40, 64, dtype=torch.bfloat16, requires_grad=True)
    torch.compiler.reset()

    def step(x: Tensor) -> list[Tensor]:
        return list(lora.project(x, layers))

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    expected, got = step(x), compiled(x)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    there, here = gradients(expected, x, layers), gradients(got, x, layers)
    for name, gradient in there.items():
        assert torch.equal(here[name], gradient), name
    torch.compiler.reset()


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_compiler_is_told_of_the_operators_is_what_they_do(kind):
    """Shapes, types and strides of the outputs, no output that shares memory with an input, and
    gradients in a graph: a compiler lays out memory by these promises, and a broken one shows on a
    GPU only.
    """
    layers = layers_in(kind)
    weights = [m.frozen_weight() for m in layers]
    x = torch.randn(40, 64, dtype=torch.bfloat16)
    lora_AB = [
        torch.cat([m.lora_A for m in layers]).bfloat16(),
        *((m.lora_B * 2).bfloat16() for m in layers),
    ]
    lora_AB = [t.detach() for t in lora_AB]
    weight, tensors, widths = weights[0], [t for w in weights for t in w.tensors], list(WIDTHS)
    # The check for writes to an input compares sums, which fp8 does not have.
    tests = (
        "test_autograd_registration",
        "test_faketensor",
        *(() if kind in FP8 else ("test_schema",)),
    )
    for factors in (lora_AB, []):
        leaves = [t.clone().requires_grad_() for t in factors]
        xa = [x @ factors[0].T] if factors else []
        given = (
            x.clone().requires_grad_(),
            xa,
            weight.format.quantize_input(x),
            leaves,
            tensors,
            weight.format.encoding,
            widths,
        )
        torch.library.opcheck(matmul.frozen_matmul, given, test_utils=tests)
        dys = [torch.randn(40, width, dtype=torch.bfloat16) for width in widths]
        saved = [x, *xa] if factors else []
        for needs_dx in (True, False):
            quantized = weight.format.quantize_gradients(weights, dys) if needs_dx else []
            given = (dys, quantized, saved, factors, tensors, weight.format.encoding, 64, needs_dx)
            torch.library.opcheck(matmul.frozen_matmul_backward, given, test_utils=tests)


@pytest.mark.parametrize(("of_dk", "of_wk"), [(1.0, 1.0), (1e-3, 1.0), (1.0, 1e-3)])
@pytest.mark.parametrize("kind", FP8)
def test_layers_of_one_input_share_a_product_in_fp8(kind, of_dk, of_wk, monkeypatch):
    """Beside float64 only dy is rounded: to 3 bits of mantissa, 2.6 % of a product's length. A
    layer alone rounds otherwise, as it has a scale of its own: the difference of two such errors.

    What is a thousand times smaller is still 0.4 of the 448 that e4m3 holds, in steps of 2^-9.
    Only k reads the first half of the input, so that its part of dx stands alone.
    """
    torch.manual_seed(0)
    dense = [torch.randn(width, 256) for width in (512, 128, 128)]
    dense[1] *= of_wk
    dense[0][:, :128] = dense[2][:, :128] = 0
    dys = [torch.randn(64, len(w)).bfloat16() for w in dense]
    dys[1] *= of_dk
    weights = [Fp8(kind).round(w.bfloat16()) for w in dense]
    depths = []

    def product(a: Tensor, b: Tensor, **rest: object) -> Tensor:
        depths.append(a.shape[1])
        return scaled_mm(a, b, **rest)

    monkeypatch.setattr(scaled_matmul, "scaled_mm", product)

    def multiply(weights: list[FrozenWeight], dys: list[Tensor]) -> Tensor:
        quantized = weights[0].format.quantize_gradients(weights, dys)
        return weights[0].format.backward_matmul(weights, dys, quantized, None)

    dx = multiply(weights, dys)
    assert depths == [512 + 128 + 128]
    alone = sum(multiply([w], [dy]).double() for w, dy in zip(weights, dys, strict=True))
    exact = sum(dy.double() @ w.dense(torch.float64) for w, dy in zip(weights, dys, strict=True))
    for half in (slice(128), slice(128, None)):
        assert distance(dx[:, half], exact[:, half]) < 0.035
        assert distance(dx[:, half], alone[:, half]) < 0.05


@pytest.mark.nightly
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", FP8)
def test_inductor_gives_an_8_bit_product_its_factors_row_by_row(kind, count, monkeypatch):
    """A GPU refuses others, a CPU takes them: the compiler may pass a view on in their place.

    Inductor may fuse a product and a sum, and so round a few gradients to their other neighbor.
    """
    layers = layers_in(kind)[:count]

    def product(a: Tensor, b: Tensor, **rest: object) -> Tensor:
        assert a.is_contiguous()
        assert b.t().is_contiguous()
        return scaled_mm(a, b, **rest)

    monkeypatch.setattr(scaled_matmul, "scaled_mm", product)
    x = torch.randn(300, 64, dtype=torch.bfloat16, requires_grad=True)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: list(lora.project(x, layers)), fullgraph=True)
    expected = gradients(lora.project(x, layers), x, layers)
    # Its key is the graph of the forward alone: it would give the backward of other source.
    with functorch_config.patch(enable_autograd_cache=False):
        got = gradients(compiled(x), x, layers)
    for name, gradient in expected.items():
        assert distance(got[name], gradient) < 0.01, name
    torch.compiler.reset()


@pytest.mark.parametrize("kind", ["nf4", *FP8])
def test_a_frozen_layer_without_an_adapter_passes_its_gradient_on(kind):
    adapter = layers_in(kind)[0]
    layer = coded(dense_layers(torch.bfloat16)[0], Fp8(kind)) if kind in FP8 else adapter
    x = torch.randn(40, 64, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x) if kind in FP8 else matmul.grouped_matmul(x, [layer.frozen_weight()], [None])[0]
    d = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, d)
    tolerance = 0.05 if kind in FP8 else 0.01
    assert distance(y, F.linear(x, layer.dense())) < tolerance
    assert distance(dx, d @ layer.dense()) < tolerance


def test_an_output_that_nobody_uses_has_no_part_in_the_gradient():
    layers = adapted(dense_layers(torch.float64))
    x = torch.randn(10, 64, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(lora.project(x, layers)[1].sum(), x)
    (expected,) = torch.autograd.grad(plain(x, layers, [m.weight for m in layers])[1].sum(), x)
    assert distance(dx, expected) < 1e-12


@pytest.mark.parametrize(("kind", "storage"), [("dense", Dense), *((kind, Fp8) for kind in FP8)])
def test_an_input_without_gradient_costs_no_matmul(kind, storage, monkeypatch):
    layers = layers_in(kind)
    called: list[str] = []
    for name in ("quantize_gradients", "backward_matmul"):
        monkeypatch.setattr(storage, name, lambda *_, name=name: called.append(name))
    x = torch.randn(10, 64, dtype=torch.bfloat16)
    sum(y.sum() for y in lora.project(x, layers)).backward()
    assert not called
    assert all(m.lora_A.grad is not None and m.lora_A.grad.norm() > 0 for m in layers)


def test_layers_of_unlike_kinds_are_computed_one_by_one():
    layers = [layers_in("dense")[0], layers_in(TENSOR_WISE)[1]]
    x = torch.randn(40, 64, dtype=torch.bfloat16)
    expected = plain(x, layers, [m.dense() for m in layers])
    for a, b in zip(lora.project(x, layers), expected, strict=True):
        assert distance(a, b) < 0.05
