"""LoRA layers: the formula, what is targeted, how parameters start, and switching the adapter off."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from errors import refuses
from tunesmith.adapter import lora
from tunesmith.config.schema import Adapter
from tunesmith.errors import RecipeError


@pytest.fixture
def model(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny)


def randomise(model: nn.Module) -> None:
    torch.manual_seed(9)
    for _, layer in lora.loras(model):
        nn.init.normal_(layer.lora_B, std=0.1)


def layers(count: int, *, bias: bool, dropout: float = 0.0) -> list[lora.LoraLinear]:
    torch.manual_seed(0)
    made = []
    for i in range(count):
        base = nn.Linear(6, 4 + 3 * i, bias=bias, dtype=torch.float64).requires_grad_(False)
        layer = lora.LoraLinear(
            base, Adapter(rank=2 + i, alpha=5.0, dropout=dropout, rslora=i == 1)
        ).double()
        nn.init.normal_(layer.lora_A)
        nn.init.normal_(layer.lora_B)
        made.append(layer)
    return made


@pytest.mark.parametrize(("count", "bias"), [(1, True), (3, False)])
def test_fused_products_equal_the_formula_in_value_and_gradient(count, bias):
    group = layers(count, bias=bias)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(p for m in group for p in (m.lora_A, m.lora_B))]

    def formula(m):
        return F.linear(x, m.weight, m.bias) + m.scaling * (x @ m.lora_A.T @ m.lora_B.T)

    ours, theirs = lora.project(x, group), [formula(m) for m in group]
    weights = [torch.randn_like(y) for y in theirs]
    sums = [sum((y * w).sum() for y, w in zip(ys, weights, strict=True)) for ys in (ours, theirs)]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(sums[0], leaves), torch.autograd.grad(sums[1], leaves), strict=True
    ):
        assert b.abs().max() > 1e-3, "a zero reference proves nothing"
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert group[0].scaling == 5.0 / 2
    assert count == 1 or group[1].scaling == 5.0 / math.sqrt(3)


def test_a_trained_base_gets_its_gradient():
    (layer,) = layers(1, bias=True)
    layer.weight.requires_grad_()
    layer(torch.randn(3, 6, dtype=torch.float64)).sum().backward()
    assert layer.weight.grad.abs().max() > 0


def test_dropout_falls_on_the_input_of_a_while_training_only():
    (layer,) = layers(1, bias=False, dropout=0.5)
    x = torch.randn(7, 6, dtype=torch.float64)
    torch.manual_seed(3)
    got = layer(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5, training=True)
    expected = F.linear(x, layer.weight) + layer.scaling * (
        dropped @ layer.lora_A.T @ layer.lora_B.T
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    layer.eval()
    torch.testing.assert_close(layer(x), layer(x), rtol=0, atol=0)


def test_all_linear_is_every_linear_layer_but_the_head(model):
    names = lora.attach_lora(model, Adapter(), seed=1)
    assert len(names) == 2 * 7
    assert "lm_head" not in names
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{n}.lora_{x}" for n in names for x in "AB"}
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("adapter", "fact"),
    [
        (Adapter(target=("qproj",)), "q_proj, k_proj"),
        (Adapter(target=("proj",)), "'proj'"),
        (Adapter(modules_to_save=("wte",)), "embed_tokens"),
        (Adapter(target=("lm_head",), modules_to_save=("lm_head",)), "lm_head"),
    ],
)
def test_names_that_do_not_fit_are_refused_with_what_there_is(model, adapter, fact):
    with refuses(RecipeError) as caught:
        lora.attach_lora(model, adapter, seed=1)
    assert fact in caught.value.text()


def test_the_start_depends_on_seed_and_name_alone(tiny):
    def start(seed, target):
        model = AutoModelForCausalLM.from_pretrained(tiny)
        torch.rand(3)  # the global generator has no say
        lora.attach_lora(model, Adapter(target=target), seed=seed)
        return dict(lora.loras(model))

    a, b, c = start(1, "all-linear"), start(1, ("down_proj",)), start(2, ("down_proj",))
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(a[name].lora_A, b[name].lora_A)
    assert not torch.equal(b[name].lora_A, c[name].lora_A)
    assert not torch.equal(b[name].lora_A, b[name.replace("1", "0")].lora_A)
    assert all(m.lora_B.abs().max() == 0 for m in a.values())
    bound = 1 / math.sqrt(128)
    assert 0.9 * bound < a[name].lora_A.abs().max() <= bound


def test_disabled_is_the_base_model_and_comes_back(model, tiny):
    base = AutoModelForCausalLM.from_pretrained(tiny)
    ids = torch.randint(0, 250, (1, 11))
    expected = base(ids).logits
    lora.attach_lora(model, Adapter(modules_to_save=("norm", "embed_tokens")), seed=1)
    randomise(model)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
        model.model.embed_tokens.weight[3:].mul_(0.7)
    tuned = model(ids).logits
    assert (tuned - expected).abs().max() > 0.1
    with lora.disabled(model):
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)
    assert torch.equal(model(ids).logits, tuned)


def test_a_trained_embedding_leaves_a_tied_head_as_it_was(model):
    lora.attach_lora(model, Adapter(modules_to_save=("embed_tokens",)), seed=1)
    head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
    assert embedding.requires_grad
    assert not head.requires_grad
    assert torch.equal(head, embedding)
    assert head.data_ptr() != embedding.data_ptr()
