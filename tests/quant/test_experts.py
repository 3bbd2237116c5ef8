"""LoRA on experts: equal to Transformers' own loop over the experts with the update added to their
weights, in logits and in every gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoConfig, PreTrainedModel

from tunesmith.adapter import lora
from tunesmith.adapter.expert_lora import expert_updates
from tunesmith.config.schema import Adapter
from tunesmith.errors import RecipeError
from tunesmith.model.twin import VOCAB, build_twin
from tunesmith.quant import expert_matmul, experts
from tunesmith.quant.expert_matmul import ExpertRows
from tunesmith.quant.experts import UPDATE
from tunesmith.quant.frozen_stack import DenseStack

# What a config needs beside the defaults of its type to have experts at all.
OPTIONS: dict[str, dict] = {
    "gemma4_text": {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2,
                    "moe_intermediate_size": 24},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 12, "num_hidden_layers": 24},
}  # fmt: skip
FAMILIES = (
    "qwen3_moe mixtral gpt_oss qwen3_5_moe_text gemma4_text deepseek_v3 glm4_moe glm4_moe_lite"
    " granitemoe granitemoehybrid olmoe lfm2_moe qwen2_moe nemotron_h"
).split()
# Parts of Nemotron-H's other layers compute in fp32 in a model of fp64.
FP64 = dict.fromkeys(FAMILIES, 1e-12) | {"nemotron_h": 1e-6}
# The gradients of the residual stream pass through more layers than the logits.
FP32: dict[str, float] = {"gemma4_text": 2e-5}


def twin(model_type: str, dtype: torch.dtype) -> PreTrainedModel:
    config = AutoConfig.for_model(model_type, **OPTIONS.get(model_type, {}))
    return build_twin(config).to(dtype)


def draw(model: nn.Module, dtype: torch.dtype) -> None:
    """Values for A and B in the dtype of the model: with B = 0 nothing is proved."""
    generator = torch.Generator().manual_seed(5)
    for _, layer in lora.low_ranks(model):
        for key in ("lora_A", "lora_B"):
            shape = getattr(layer, key).shape
            values = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.2
            setattr(layer, key, nn.Parameter(values.to(dtype)))


def compute(model: PreTrainedModel, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of their inputs; the gradients of parameters stay on these."""
    torch.manual_seed(3)
    embedded = torch.randn(2, 9, model.config.hidden_size).to(next(model.parameters()).dtype)
    embedded.requires_grad_(True)
    options = {"inputs_embeds": embedded, "use_cache": False}
    if model.config.model_type == "gemma4_text":
        # It looks up more by the ids.
        options = {"input_ids": torch.arange(18).view(2, 9) + 3, "use_cache": False}
        embedded = model.get_input_embeddings().weight.requires_grad_(True)
    logits = functional_call(model, tensors, kwargs=options).logits
    weights = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)).to(logits.dtype)
    (logits * weights).sum().backward()
    assert embedded.grad is not None
    return logits.detach(), embedded.grad


def error(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-6))


def errors(model_type: str, dtype: torch.dtype) -> dict[str, float]:
    """Largest differences from the reference, by what differs."""
    model = twin(model_type, dtype)
    lora.attach_lora(model, Adapter(rank=4, alpha=8, target=("experts",)), seed=0)
    draw(model, dtype)
    logits, dx = compute(model, {})
    gradients = {n: p.grad for n, p in model.named_parameters() if lora.is_adapter_weight(n)}
    assert all(gradient is not None for gradient in gradients.values())

    reference = twin(model_type, dtype).requires_grad_(False)
    reference.set_experts_implementation("eager")
    folded = {}
    factors = {}
    for name, update in expert_updates(model):
        update.zero_grad()
        for key in ("lora_A", "lora_B"):
            factors[f"{name}{UPDATE}.{key}"] = getattr(update, key)
        folded[name] = reference.get_parameter(name) + update.update()
    expected_logits, expected_dx = compute(reference, folded)
    found = {"logits": error(logits, expected_logits), "dx": error(dx, expected_dx)}
    for name, parameter in factors.items():
        kind = name.rpartition(".")[2]
        value = error(gradients[name], parameter.grad)
        found[kind] = max(value, found.get(kind, 0.0))
    return found


@pytest.mark.parametrize("model_type", FAMILIES)
def test_experts_equal_transformers_over_folded_weights(model_type: str) -> None:
    found = errors(model_type, torch.float64)
    assert max(found.values()) < FP64[model_type], found
    found = errors(model_type, torch.float32)
    assert max(found.values()) < FP32.get(model_type, 2e-6), found


# What a faulty change would do: each must show in the comparison above.
MUTATIONS: dict[str, tuple[object, str, Callable]] = {
    "the update of the next expert": (
        expert_matmul, "multiply_by_expert",
        lambda original: lambda x, weights, rows: original(x, weights.roll(1, 0), rows),
    ),
    "gradients of A and B for one expert": (
        expert_matmul, "_products_of_columns",
        lambda original: lambda left, right, rows: original(left, right, rows).roll(1, 0),
    ),
    "the sum of other copies": (
        experts, "_sum_of_copies",
        lambda original: lambda x, places, k: original(x, places.roll(1), k),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_shows(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name, change = MUTATIONS[mutation]
    monkeypatch.setattr(module, name, change(getattr(module, name)))
    assert max(errors("qwen3_moe", torch.float64).values()) > 1e-3


@pytest.mark.parametrize("has_lora", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_kernel_for_all_experts_equals_one_after_the_other(
    dtype: torch.dtype, has_lora: bool
) -> None:
    """What a GPU runs: of a rank that its kernel does not take, and with an expert without rows."""
    counts = torch.tensor([5, 0, 9, 2])
    chosen = torch.arange(4).repeat_interleave(counts)
    rows = ExpertRows.of(chosen, 4, dtype)
    assert rows.spans == ((0, 0, 5), (2, 5, 14), (3, 14, 16))
    torch.manual_seed(0)
    stack = DenseStack.of(torch.randn(4, 24, 16).to(dtype), is_transposed=False)
    leaves = [torch.randn(shape).to(dtype) for shape in ((16, 16), (4, 3, 16), (4, 24, 3))]
    results = []
    for kind in (rows, rows._replace(spans=None)):
        x, *factors = [leaf.clone().requires_grad_(True) for leaf in leaves]
        y = expert_matmul.expert_matmul(x, stack, kind, *(factors if has_lora else ()))
        (y.float() ** 2).sum().backward()
        results.append([y, x.grad, *(factor.grad for factor in factors if has_lora)])
    for one, other in zip(*results, strict=True):
        tolerance = 1e-6 if dtype == torch.float32 else 2e-2
        assert error(one.float(), other.float()) < tolerance


def test_two_passes_have_the_same_bits() -> None:
    first = gradients_of(torch.bfloat16)
    second = gradients_of(torch.bfloat16)
    assert all(map(torch.equal, first, second))


def gradients_of(dtype: torch.dtype) -> list[Tensor]:
    model = twin("qwen3_moe", dtype)
    lora.attach_lora(model, Adapter(rank=4, alpha=8), seed=0)
    _, dx = compute(model, {})
    return [dx, *(p.grad for _, p in model.named_parameters() if p.requires_grad)]


REFUSALS = {
    "router": (Adapter(target=("gate",)), "'gate' is a router"),
    "one stack": (Adapter(target=("experts.gate_up_proj",)), "and not 'down_proj'"),
    "dropout": (Adapter(dropout=0.1), "dropout is not computed for experts"),
    "both": (Adapter(modules_to_save=("experts",), target=("experts",)), "and a module to save"),
    "no such name": (Adapter(target=("w1",)), "experts named 'w1'"),
}


@pytest.mark.parametrize(("adapter", "what"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_trained_is_refused(adapter: Adapter, what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        lora.attach_lora(twin("qwen3_moe", torch.float32), adapter, seed=0)


def test_names_of_targets() -> None:
    model = twin("deepseek_v3", torch.float32)

    def targets(*names: str) -> list[str]:
        return lora.target_names(model, Adapter(target=names))

    stacks = ["model.layers.1.mlp.experts"]
    assert targets("experts") == stacks
    assert targets("gate_up_proj", "experts.down_proj") == stacks
    assert stacks[0] not in targets("down_proj"), "linear layers of that name are meant"
    everything = lora.target_names(model, Adapter())
    assert everything[-1:] == stacks
    assert "model.layers.1.mlp.shared_experts.down_proj" in everything


@pytest.mark.parametrize("model_type", ["gemma4_text", "granitemoe"])
def test_a_router_that_is_a_linear_layer_stays_frozen(model_type: str) -> None:
    model = twin(model_type, torch.float32)
    names = lora.attach_lora(model, Adapter(), seed=0)
    assert not any("router" in name for name in names)
    assert lora.describe_left_out(model) == "the adapter leaves out the routers"


def test_a_router_that_is_an_mlp_stays_frozen() -> None:
    model = twin("zaya", torch.float32)
    names = lora.attach_lora(model, Adapter(), seed=0)
    assert any(name.endswith("mlp.experts") for name in names)
    assert not any(".gate." in name for name in names)


def test_a_layer_with_as_many_outputs_as_experts_has_an_adapter() -> None:
    """Gemma 4's experts stand beside its attention."""
    model = twin("gemma4_text", torch.float32)
    layer = next(iter(experts.expert_modules(model).values()))
    name, attention = next(
        (name, module) for name, module in model.named_modules() if name.endswith("k_proj")
    )
    layer.num_experts = attention.out_features
    assert name in lora.attach_lora(model, Adapter(), seed=0)


def test_experts_may_train_in_full_beside_an_adapter() -> None:
    """As Transformers computes them."""
    model = twin("qwen3_moe", torch.float32)
    adapter = Adapter(rank=2, target=("q_proj",), modules_to_save=("experts",))
    lora.attach_lora(model, adapter, seed=0)
    compute(model, {})
    stack = model.get_parameter("model.layers.0.mlp.experts.down_proj")
    assert stack.grad is not None
    assert stack.grad.any()


def test_an_adapter_can_be_disabled() -> None:
    model = twin("qwen3_moe", torch.float32)
    before, _ = compute(model, {})
    lora.attach_lora(model, Adapter(rank=2), seed=0)
    draw(model, torch.float32)
    with lora.disabled(model):
        without, _ = compute(model, {})
    with_adapter, _ = compute(model, {})
    assert error(without, before) < 2e-6
    assert error(with_adapter, before) > 1e-2
