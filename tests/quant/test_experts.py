"""LoRA on experts is Transformers' own loop over experts with the update added to their weights."""

from __future__ import annotations

import weakref

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
from tunesmith.formats import base
from tunesmith.formats.base import FrozenStack
from tunesmith.formats.dense import dense_stack
from tunesmith.formats.linear import FrozenTensors
from tunesmith.formats.nf4 import Nf4
from tunesmith.formats.stack import ExpertStack
from tunesmith.model.experts import LORA_SUFFIX, find_experts
from tunesmith.model.tiny_model import VOCAB, build_tiny_model
from tunesmith.quant import expert_matmul, expert_rows, experts, grouped_experts
from tunesmith.quant.expert_rows import ExpertRows, RowIndex
from tunesmith.quant.replace import replace_by_codes

# What a config needs beside the defaults of its type to have experts at all.
OPTIONS: dict[str, dict] = {
    "gemma4_text": {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2,
                    "moe_intermediate_size": 24},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 12, "num_hidden_layers": 24},
    "llama4_text": {"num_experts_per_tok": 2},
}  # fmt: skip
FAMILIES = (
    "qwen3_moe mixtral gpt_oss qwen3_5_moe_text gemma4_text deepseek_v3 glm4_moe glm4_moe_lite"
    " granitemoe granitemoehybrid olmoe lfm2_moe qwen2_moe nemotron_h llama4_text"
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
    assert all(gradient is not None for gradient in gradients.values())

    reference = twin(model_type, dtype).requires_grad_(False)
    reference.set_experts_implementation("eager")
    folded = {}
    factors = {}
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


def test_the_norm_of_each_experts_output_comes_before_its_weight() -> None:
    """As Transformers' own loop; its release 5.17 has no such experts."""
    muse = pytest.importorskip("transformers.models.muse_spark.modeling_muse_spark")
    sizes = {"moe_hidden_size": 16, "moe_intermediate_size": 8, "num_local_experts": 4}
    module = muse.MuseSparkExperts(muse.MuseSparkTextConfig(**sizes)).double()
    generator = torch.Generator().manual_seed(7)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.requires_grad_(False)
    hidden = torch.randn(9, 16, generator=generator, dtype=torch.float64)
    index = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(9)])
    weights = torch.rand(9, 2, generator=generator, dtype=torch.float64)
    module.config._experts_implementation = "eager"
    expected = module(hidden, index, weights)
    # The norm of Transformers computes in fp32, whatever it is given.
    [in_groups] = find_experts(module).values()
    found = experts.experts_forward(in_groups, hidden, index, weights)
    assert error(found, expected) < 1e-6


@pytest.mark.parametrize(
    ("of_rows", "of_weights", "trains_router"),
    [
        (torch.bfloat16, torch.float32, True),
        (torch.bfloat16, torch.bfloat16, False),
        (torch.float16, torch.float16, True),
    ],
)
def test_the_weighted_activation_in_16_bits(of_rows, of_weights, trains_router):
    """Beside fp32; what is saved are its two inputs."""
    torch.manual_seed(0)
    x = torch.randn(33, 40).to(of_rows).requires_grad_()
    weight = torch.rand(33, 1).to(of_weights).requires_grad_(trains_router)
    gradient = torch.randn(33, 20).to(of_rows)

    def activation(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    saved: list[torch.Tensor] = []

    def save(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        output = experts._WeightedActivation.apply(x, weight, activation)
    leaves = (x, weight) if trains_router else (x,)
    results = (output, *torch.autograd.grad(output, leaves, gradient))

    wide_x = x.detach().float().requires_grad_()
    wide_weight = weight.detach().float().requires_grad_(trains_router)
    expected = activation(wide_x) * wide_weight
    wide_leaves = (wide_x, wide_weight) if trains_router else (wide_x,)
    wide_results = (expected, *torch.autograd.grad(expected, wide_leaves, gradient.float()))
    # Half a step of the 16 bits is 2^-9 of a number; sums of 20 products add up some of them.
    for one, other, leaf in zip(results, wide_results, (x, *leaves), strict=True):
        assert one.dtype == leaf.dtype
        assert (one.float() - other).abs().max() < 2**-7 * other.abs().max()
    assert [tensor.shape for tensor in saved] == [x.shape, weight.shape]


COVERED_PRODUCTS = pairwise(
    {
        "option": ["none", "gathers", "sums"],
        "dtype": ["float32", "bfloat16"],
        "dense_columns": [256, 0],
        "has_lora": [True, False],
    },
    tier_1={
        "option": ["none", "gathers", "sums"],
        "dtype": ["float32"],
        "dense_columns": [256, 0],
        "has_lora": [True],
    },
)


@pytest.mark.parametrize("product", COVERED_PRODUCTS, ids=name_of)
def test_one_kernel_for_all_experts_equals_one_after_the_other(product, monkeypatch):
    """What a GPU runs: of a rank that its kernel does not take, and with an expert without rows.

    One token chooses an expert twice.
    """
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


def test_llama4_computes_the_chosen_experts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers multiplies all of them, most by zeros."""
    per_token = 2
    config = AutoConfig.for_model("llama4_text", num_experts_per_tok=per_token)
    model = build_tiny_model(config)
    expected, _ = compute(model, {})
    product = experts.expert_matmul
    rows = []

    def watched(
        x: Tensor, stack: object, index: RowIndex, *args: object, **options: bool
    ) -> Tensor:
        rows.append(len(index.tokens))
        return product(x, stack, index, *args, **options)

    monkeypatch.setattr(experts, "expert_matmul", watched)
    lora.attach_lora(model, Adapter(target=("q_proj",)), seed=0)
    logits, _ = compute(model, {})
    assert error(logits, expected) < 2e-6
    assert set(rows) == {18 * per_token}
    assert len(rows) == 2 * len(find_experts(model))


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


@pytest.mark.parametrize(("experts_per_step", "has_lora"), [(1, True), (2, True), (3, False)])
def test_groups_of_experts_equal_all_at_once(experts_per_step, has_lora, monkeypatch):
    """What a GPU runs where a stack in codes is large; the first and third experts have no rows."""
    chosen = torch.arange(5).repeat_interleave(torch.tensor([0, 5, 0, 9, 2]))
    monkeypatch.setattr(expert_rows, "uses_grouped_mm", lambda device, dtype: True)
    torch.manual_seed(0)
    stack = dense_stack(torch.randn(5, 24, 16), is_transposed=False)
    leaves = [torch.randn(shape) for shape in ((16, 16), (5, 4, 16), (5, 4, 24))]
    sizes = []
    original = FrozenStack.dense

    def dense(self: FrozenStack, first: int, last: int, dtype: torch.dtype) -> Tensor:
        sizes.append(last - first)
        return original(self, first, last, dtype)

    monkeypatch.setattr(FrozenStack, "dense", dense)
    results = []
    for at_once in (5, experts_per_step):
        monkeypatch.setattr(FrozenStack, "experts_per_step", lambda *_, count=at_once: count)
        rows = ExpertRows.of(chosen.unsqueeze(1), 5, torch.float32, in_groups=at_once < 5)
        ends = None if rows.row_index.ends is None else rows.row_index.ends_on_host()
        assert ends == (None if at_once == 5 else [0, 5, 5, 14, 16])
        x, *factors = [leaf.clone().requires_grad_(True) for leaf in leaves]
        y = expert_matmul.expert_matmul(x, stack, rows.row_index, *(factors if has_lora else ()))
        (y**2).sum().backward()
        results.append([y, x.grad, *(factor.grad for factor in factors if has_lora)])
    for one, other in zip(*results, strict=True):
        assert error(one, other) < 1e-6
    # Forward and backward: all at once, then groups.
    assert sizes[:2] == [5, 5]
    assert max(sizes[2:]) == experts_per_step


def test_a_stack_in_codes_is_dense_in_groups_of_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    bf16 = torch.bfloat16
    shapes = {"Qwen3-30B-A3B": (128, 2048, 1536), "gpt-oss-120b": (128, 2880, 5760)}
    at_once = {}
    for name, (count, width, height) in shapes.items():
        shape = torch.Size((count, height, width))
        layer = ExpertStack(Nf4(bf16), shape, is_transposed=False, compute_dtype=bf16)
        stack = layer.frozen_stack()
        at_once[name] = stack.experts_per_step(bf16)
    assert at_once == {"Qwen3-30B-A3B": 128, "gpt-oss-120b": 32}
    weight = torch.empty(shape, dtype=bf16, device="meta")
    # A view takes no memory, a copy in another dtype does.
    assert dense_stack(weight, is_transposed=False).experts_per_step(bf16) == 128
    assert dense_stack(weight, is_transposed=False).experts_per_step(torch.float32) == 16
    monkeypatch.setattr(base, "DENSE_BYTES", 1)
    assert stack.experts_per_step(bf16) == 1


def test_experts_in_turns_are_dense_one_group_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: of three experts a group each, and no group beside another."""
    monkeypatch.setattr(expert_matmul, "is_cpu", lambda _: False)
    monkeypatch.setattr(FrozenStack, "experts_per_step", lambda *_: 3)
    alive: list[weakref.ref[Tensor]] = []
    groups = []

    def dense(self: FrozenStack, first: int, last: int, dtype: torch.dtype) -> Tensor:
        assert not any(reference() is not None for reference in alive)
        groups.append((first, last))
        weight = self.tensors[0][first:last].mT.clone()
        alive.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(FrozenStack, "dense", dense)
    stack = dense_stack(torch.randn(8, 24, 16), is_transposed=False)
    chosen = torch.tensor([[0], [0], [4], [5], [7], [7]])
    rows = ExpertRows.of(chosen, 8, torch.float32)
    x = torch.randn(6, 16, requires_grad=True)
    expert_matmul.expert_matmul(x, stack, rows.row_index).sum().backward()
    # Forward and backward.
    assert groups == 2 * [(0, 3), (3, 6), (6, 8)]


@pytest.mark.parametrize("limit", [1 << 30, 1])
@pytest.mark.slow
def test_a_model_on_one_kernel_is_the_model_one_expert_after_the_other(limit, monkeypatch):
    """With stacks in codes, which are dense all at once, or one by one."""
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


def test_two_passes_have_the_same_bits() -> None:
    def gradients() -> list[Tensor]:
        model = twin("qwen3_moe", torch.float32)
        lora.attach_lora(model, Adapter(rank=4, alpha=8), seed=0)
        _, dx = compute(model, {})
        return [dx, *(p.grad for p in model.parameters() if p.requires_grad)]

    assert all(map(torch.equal, gradients(), gradients()))


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
        (Adapter(target=("w1",)), "'w1'"),
    ],
)
def test_what_cannot_be_trained_is_refused(adapter: Adapter, name: str) -> None:
    with refuses(RecipeError, names=[name]):
        lora.attach_lora(twin("qwen3_moe", torch.float32), adapter, seed=0)


DBRX = {"attn_config": {"kv_n_heads": 8, "rope_theta": 5e5, "clip_qkv": 8}}


@pytest.mark.parametrize(
    ("model_type", "options", "target"),
    [("dbrx", DBRX, "w1"), ("longcat_flash", {}, "experts.gate_up_proj")],
)
def test_experts_without_the_interface_are_refused_by_name(model_type, options, target):
    model = build_tiny_model(AutoConfig.for_model(model_type, **options))
    for name in (target, "experts"):
        with refuses(RecipeError, names=[f"'{name}'", type(model).__name__]):
            lora.attach_lora(model, Adapter(target=(name,)), seed=0)
    lora.attach_lora(model, Adapter(), seed=0)
    assert lora.find_unreached(model).matrices


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


@pytest.mark.parametrize("model_type", ["gemma4_text", "granitemoe", "llama4_text", "zaya"])
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
