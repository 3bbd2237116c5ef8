"""Grouped matmuls with frozen weights are the plain formula, for every kind of weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.adapter import lora
from tunesmith.config.schema import Adapter
from tunesmith.formats import fp8, matmul
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
    """fp8 rounds the input, and each output's gradient, to 3 bits of mantissa: 3 % of a product."""
    layers = layers_in(kind)
    tolerance = 0.01 if kind in ("dense", "nf4") else 0.05
    x = torch.randn(40, 64, dtype=torch.bfloat16, requires_grad=True)
    ours, theirs = lora.project(x, layers), plain(x, layers, [m.dense() for m in layers])
    expected, got = gradients(theirs, x, layers), gradients(ours, x, layers)
    for a, b in zip(ours, theirs, strict=True):
        assert distance(a, b) < tolerance
    for name, gradient in expected.items():
        # The adapter's own gradients see no rounded input.
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
    """A compiler lays out memory by these promises, and a broken one shows on a GPU only."""
    layers = layers_in(kind)
    weights = [m.frozen_weight() for m in layers]
    x = torch.randn(40, 64, dtype=torch.bfloat16)
    lora_AB = [torch.cat([m.lora_A for m in layers]), *(m.lora_B * 2 for m in layers)]
    lora_AB = [t.detach().bfloat16() for t in lora_AB]
    weight, tensors, widths = weights[0], [t for w in weights for t in w.tensors], list(WIDTHS)
    # The check for writes to an input compares sums, which fp8 does not have.
    tests = ["test_autograd_registration", "test_faketensor", *["test_schema"] * (kind not in FP8)]
    for factors in (lora_AB, []):
        leaves = [t.clone().requires_grad_() for t in factors]
        xa = [x @ factors[0].T] if factors else []
        x8, encoding = weight.format.quantize_input(x), weight.format.encoding
        given = (x.clone().requires_grad_(), xa, x8, leaves, tensors, encoding, widths)
        torch.library.opcheck(matmul.frozen_matmul, given, test_utils=tests)
        dys = [torch.randn(40, width, dtype=torch.bfloat16) for width in widths]
        saved = [x, *xa] if factors else []
        for needs_dx in (True, False):
            quantized = weight.format.quantize_gradients(weights, dys) if needs_dx else []
            given = (dys, quantized, saved, factors, tensors, encoding, 64, needs_dx)
            torch.library.opcheck(matmul.frozen_matmul_backward, given, test_utils=tests)


def test_an_output_that_nobody_uses_has_no_part_in_the_gradient():
    layers = adapted(dense_layers(torch.float64))
    x = torch.randn(10, 64, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(lora.project(x, layers)[1].sum(), x)
    (expected,) = torch.autograd.grad(plain(x, layers, [m.weight for m in layers])[1].sum(), x)
    assert distance(dx, expected) < 1e-12


def test_layers_of_unlike_kinds_are_computed_one_by_one():
    layers = [layers_in("dense")[0], layers_in(TENSOR_WISE)[1]]
    x = torch.randn(40, 64, dtype=torch.bfloat16)
    expected = plain(x, layers, [m.dense() for m in layers])
    for a, b in zip(lora.project(x, layers), expected, strict=True):
        assert distance(a, b) < 0.05
