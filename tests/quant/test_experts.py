"""LoRA on experts is Transformers' own loop over experts with the update added to their weights."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoConfig, PreTrainedModel

from errors import refuses
from pairwise import name_of, pairwise
from tunesmith.adapter import lora
from tunesmith.adapter.expert_lora import expert_updates
from tunesmith.config.schema import Adapter
from tunesmith.errors import RecipeError
from tunesmith.formats import base, nf4
from tunesmith.formats.dense import dense_stack
from tunesmith.formats.linear import FrozenTensors
from tunesmith.formats.nf4 import Nf4
from tunesmith.formats.stack import ExpertStack
from tunesmith.model.layers.experts import LORA_SUFFIX
from tunesmith.model.measuring.tiny_model import VOCAB, build_tiny_model
from tunesmith.quant import expert_matmul, expert_rows, grouped_experts
from tunesmith.quant.expert_rows import ExpertRows
from tunesmith.quant.replace import replace_by_codes

# What a config needs beside the defaults of its type to have experts at all.
OPTIONS: dict[str, dict] = {
    "gemma4_text": {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2,
                    "moe_intermediate_size": 24},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 12, "num_hidden_layers": 24},
    "llama4_text": {"num_experts_per_tok": 2},
}  # fmt: skip
FAMILIES = (
    "qwen3_moe mixtral gpt_oss gemma4_text deepseek_v3 glm4_moe granitemoe lfm2_moe nemotron_h"
    " llama4_text"
).split()
# Parts of Nemotron-H's other layers compute in fp32 in a model of fp64.
FP64 = dict.fromkeys(FAMILIES, 1e-12) | {"nemotron_h": 1e-6}
# The gradients of the residual stream pass through more layers than the logits.
FP32: dict[str, float] = {"gemma4_text": 2e-5}


def twin(model_type: str, dtype: torch.dtype) -> PreTrainedModel:
    config = AutoConfig.for_model(model_type, **OPTIONS.get(model_type, {}))
    return build_tiny_model(config).to(dtype)


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

    reference = twin(model_type, dtype).requires_grad_(False)
    reference.set_experts_implementation("eager")
    folded, factors = {}, {}
    for name, update in expert_updates(model):
        update.zero_grad()
        for key in ("lora_A", "lora_B"):
            factors[f"{name}{LORA_SUFFIX}.{key}"] = getattr(update, key)
        folded[name] = reference.get_parameter(name) + update.update()
    expected_logits, expected_dx = compute(reference, folded)
    found = {"logits": error(logits, expected_logits), "dx": error(dx, expected_dx)}
    for name, parameter in factors.items():
        kind = name.rpartition(".")[2]
        value = error(gradients[name], parameter.grad)
        found[kind] = max(value, found.get(kind, 0.0))
    return found


TIER_1 = ("qwen3_moe", "gpt_oss", "mixtral")


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type",
    [pytest.param(name, marks=() if name in TIER_1 else pytest.mark.nightly) for name in FAMILIES],
)
def test_experts_equal_transformers_over_folded_weights(model_type: str) -> None:
    found = errors(model_type, torch.float64)
    assert max(found.values()) < FP64[model_type], found
    found = errors(model_type, torch.float32)
    assert max(found.values()) < FP32.get(model_type, 2e-6), found


COVERED_PRODUCTS = pairwise({
    "option": ["none", "gathers", "sums"], "dtype": ["float32", "bfloat16"],
    "dense_columns": [256, 0], "has_lora": [True, False],
})  # fmt: skip


@pytest.mark.parametrize("product", COVERED_PRODUCTS, ids=name_of)
def test_one_kernel_for_all_experts_equals_one_after_the_other(product, monkeypatch):
    """What a GPU runs; one expert has no rows, and one token chooses an expert twice."""
    dtype, has_lora = getattr(torch, product["dtype"]), product["has_lora"]
    options = {} if product["option"] == "none" else {product["option"]: True}
    monkeypatch.setattr(grouped_experts, "DENSE_COLUMNS", product["dense_columns"])
    counts = torch.tensor([5, 0, 9, 2])
    torch.manual_seed(0)
    chosen = torch.arange(4).repeat_interleave(counts)[torch.randperm(16)].view(8, 2)
    assert (chosen[:, 0] == chosen[:, 1]).any()
    stack = dense_stack(torch.randn(4, 24, 16).to(dtype), is_transposed=False)
    shapes = ((8 if "gathers" in options else 16, 16), (4, 3, 16), (4, 3, 24))
    leaves = [torch.randn(shape).to(dtype) for shape in shapes]
    results = []
    for is_grouped in (False, True):
        monkeypatch.setattr(expert_rows, "uses_grouped_mm", lambda *_, answer=is_grouped: answer)
        rows = ExpertRows.of(chosen, 4, dtype)
        assert rows.row_index.offsets.tolist() == [5, 5, 14, 16]
        assert (rows.row_index.ends is None) == is_grouped
        x, *factors = [leaf.clone().requires_grad_(True) for leaf in leaves]
        given = factors if has_lora else ()
        y = expert_matmul.expert_matmul(x, stack, rows.row_index, *given, **options)
        assert len(y) == (8 if "sums" in options else 16)
        (y.float() ** 2).sum().backward()
        results.append([y, x.grad, *(factor.grad for factor in factors if has_lora)])
    for one, other in zip(*results, strict=True):
        tolerance = 1e-6 if dtype == torch.float32 else 2e-2
        assert error(one.float(), other.float()) < tolerance


def test_llama4_experts_may_train_in_full_beside_an_adapter() -> None:
    """Their gradients are those of Transformers."""
    model = twin("llama4_text", torch.float32)
    reference = twin("llama4_text", torch.float32)
    adapter = Adapter(rank=2, target=("q_proj",), modules_to_save=("experts", "router"))
    lora.attach_lora(model, adapter, seed=0)
    compute(model, {})
    compute(reference, {})
    for key in ("experts.gate_up_proj", "experts.down_proj", "router.weight"):
        name = f"model.layers.0.feed_forward.{key}"
        gradient = model.get_parameter(name).grad
        assert error(gradient, reference.get_parameter(name).grad) < 2e-6, name


@pytest.mark.parametrize("limit", [1 << 30, 1])
@pytest.mark.slow
def test_one_kernel_over_codes_equals_one_expert_after_the_other(limit, monkeypatch):
    """Over stacks that are dense all at once, or one by one."""
    results = []
    for on_gpu in (False, True):
        model = twin("qwen3_moe", torch.float32)
        dense = dict(model.named_parameters())
        replace_by_codes(model, Nf4(torch.float32), torch.float32)
        for name, stack in model.named_modules():
            if isinstance(stack, FrozenTensors):
                key = name if isinstance(stack, ExpertStack) else f"{name}.weight"
                stack.allocate(torch.device("cpu"))
                stack.load({"": dense[key].detach()}, name)
        lora.attach_lora(model, Adapter(rank=4, alpha=8), seed=0)
        draw(model, torch.float32)
        monkeypatch.setattr(base, "DENSE_BYTES", limit)
        monkeypatch.setattr(expert_rows, "uses_grouped_mm", lambda *_, answer=on_gpu: answer)
        logits, dx = compute(model, {})
        results.append([logits, dx, *(p.grad for p in model.parameters() if p.requires_grad)])
    for one, other in zip(*results, strict=True):
        assert error(one, other) < 2e-6


@pytest.mark.parametrize(
    ("adapter", "name"),
    [
        (Adapter(target=("gate",)), "'gate'"),
        (Adapter(target=("experts.gate_up_proj",)), "'down_proj'"),
        (Adapter(dropout=0.1), "dropout"),
        (
            Adapter(modules_to_save=("experts",), target=("experts",)),
            "'model.layers.0.mlp.experts'",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(adapter: Adapter, name: str) -> None:
    with refuses(RecipeError, names=[name]):
        lora.attach_lora(twin("qwen3_moe", torch.float32), adapter, seed=0)


def test_names_of_targets() -> None:
    model = twin("deepseek_v3", torch.float32)

    def targets(*names: str) -> list[str]:
        return lora.target_names(model, Adapter(target=names))

    stacks = ["model.layers.1.mlp.experts"]
    assert targets("experts") == stacks
    assert targets("gate_up_proj", "experts.down_proj") == stacks
    assert stacks[0] not in targets("down_proj"), "linear layers of that name are meant"


@pytest.mark.parametrize("model_type", ["granitemoe", "llama4_text", "zaya"])
def test_a_router_that_is_linear_or_an_mlp_stays_frozen(model_type: str) -> None:
    model = twin(model_type, torch.float32)
    names = lora.attach_lora(model, Adapter(), seed=0)
    assert any(name.endswith("experts") for name in names)
    assert not any("router" in name or ".gate." in name for name in names)
    assert lora.find_unreached(model).has_routers


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


@pytest.mark.slow
def test_a_compiled_layer_is_one_graph_with_the_same_bits(monkeypatch):
    monkeypatch.setattr(expert_rows, "uses_grouped_mm", lambda *_: True)
    torch.compiler.reset()
    model = twin("qwen3_moe", torch.float32)
    lora.attach_lora(model, Adapter(rank=4, alpha=8), seed=0)
    draw(model, torch.float32)
    results = []
    for is_compiled in (False, True):
        for layer in model.model.layers if is_compiled else ():
            layer.forward = torch.compile(layer.forward, backend="aot_eager", fullgraph=True)
        model.zero_grad()
        found = compute(model, {})
        trained = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        results.append([*found, *trained])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("capability", [(9, 0), (10, 3), (12, 1)])
def test_kernels_run_on_gpus_that_have_been_measured(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    device = torch.device("cuda", 0)
    assert expert_rows.uses_grouped_mm(device, torch.bfloat16) == (capability != (12, 1))
    assert not expert_rows.uses_grouped_mm(device, torch.float32)
    # Our own kernels were measured on Hopper alone.
    rows = Mock(is_cuda=True, dtype=torch.bfloat16)
    assert expert_rows._has_kernels(rows) == nf4._has_kernel(rows) == (capability == (9, 0))
