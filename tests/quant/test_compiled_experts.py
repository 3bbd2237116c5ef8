"""Experts inside torch.compile: one graph a layer, and the results of the layer without it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM, GptOssConfig, PretrainedConfig, Qwen3MoeConfig

from devices import gpu
from tunesmith.adapter import lora
from tunesmith.config.schema import Adapter
from tunesmith.distributed.torch_private import mark_varying
from tunesmith.formats import mxfp4
from tunesmith.formats.base import FrozenStack
from tunesmith.formats.form import ShippedForm
from tunesmith.formats.mxfp4 import Mxfp4
from tunesmith.formats.stack import ExpertStack
from tunesmith.model.experts import find_experts
from tunesmith.quant import expert_rows
from tunesmith.quant.replace import replace_by_codes

TOKENS = 40
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]


SIZES = {
    "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2,
}  # fmt: skip
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, moe_intermediate_size=48, num_experts=4),
    "gpt_oss": lambda: GptOssConfig(**SIZES, intermediate_size=64, num_local_experts=4),
}


def build(model_type: str, dtype: torch.dtype, device: str) -> Any:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(CONFIGS[model_type](), dtype=dtype)
    if model_type == "gpt_oss":  # as it ships
        dense = dict(model.named_parameters())
        replace_by_codes(model, Mxfp4(ShippedForm("mxfp4")), dtype, ShippedForm("mxfp4"))
        for name, stack in model.named_modules():
            if not isinstance(stack, ExpertStack):
                continue
            stack.allocate(torch.device("cpu"))
            stack.store(dense[name].detach())
    lora.attach_lora(model, Adapter(rank=4, alpha=8), seed=0)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if lora.is_adapter_weight(name):  # with B = 0 nothing is proved
            values = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.data.copy_(values)
    return model.to(device)


def results(model: Any) -> list[Tensor]:
    """Logits and gradients of two micro batches."""
    model.zero_grad()
    for start in (3, 7):
        ids = (torch.arange(TOKENS)[None] + start) % 60
        logits = model(input_ids=ids, use_cache=False).logits
        logits.float().square().mean().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [logits.detach(), *gradients]


def compile_whole(modules: Iterable[Any], backend: str) -> None:
    """Compile each forward; an error where it is not one graph."""
    compiled = torch.compile(
        lambda module, *args, **options: type(module).forward(module, *args, **options),
        backend=backend,
        fullgraph=True,
    )

    def forward_of(module: nn.Module) -> Callable[..., Any]:
        return lambda *args, **options: compiled(module, *args, **options)

    for module in modules:
        module.forward = forward_of(module)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "is_grouped"),
    [
        ("qwen3_moe", True),
        pytest.param("gpt_oss", False, marks=pytest.mark.nightly),
        pytest.param("qwen3_moe", False, marks=pytest.mark.nightly),
        pytest.param("gpt_oss", True, marks=pytest.mark.nightly),
    ],
)
def test_a_layer_is_one_graph_with_the_same_bits(model_type, is_grouped, monkeypatch):
    monkeypatch.setattr(expert_rows, "uses_grouped_mm", lambda *_: is_grouped)
    monkeypatch.setattr(mxfp4, "compiled_mxfp4", lambda: mxfp4.mxfp4_formula)
    torch.compiler.reset()
    model = build(model_type, torch.float32, "cpu")
    expected = results(model)
    compile_whole(model.model.layers, "aot_eager")
    assert all(map(torch.equal, results(model), expected))


@pytest.mark.slow
def test_numbers_of_tokens_share_one_graph() -> None:
    """Of tokens in the micro batch, and so of rows."""
    torch.compiler.reset()
    model = build("qwen3_moe", torch.bfloat16, "cpu")
    [module, *_] = find_experts(model).values()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(type(module).__call__, backend=counter)
    frames = []
    for tokens in (40, 48, 56, 64):
        hidden = torch.randn(tokens, 64, dtype=torch.bfloat16, requires_grad=True)
        chosen = torch.stack([torch.randperm(4)[:2] for _ in range(tokens)])
        weights = torch.rand(tokens, 2).bfloat16().requires_grad_()
        for tensor in (hidden, chosen, weights):
            mark_varying(tensor, 0)
        compiled(module, hidden, chosen, weights).sum().backward()
        assert hidden.grad is not None
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 4


@pytest.mark.nightly
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_in_kernels_of_the_compiler(dtype: torch.dtype, device: str) -> None:
    """Each layer's by themselves: in 16 bits another router might choose others."""
    torch.compiler.reset()
    model = build("gpt_oss", dtype, device)
    [module, *_] = find_experts(model).values()
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(TOKENS, 64, generator=generator).to(device, dtype).requires_grad_()
    chosen = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(TOKENS)])
    weights = torch.rand(TOKENS, 2, generator=generator).to(device, dtype).requires_grad_()
    leaves = [hidden, weights, *(p for p in module.parameters() if p.requires_grad)]

    def run() -> list[Tensor]:
        y = module(hidden, chosen.to(device), weights)
        gradients = torch.autograd.grad(y.float().square().mean(), leaves)
        return [y.detach(), *gradients]

    expected = run()
    compile_whole([module], "inductor")
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for one, other in zip(run(), expected, strict=True):
        assert (one - other).norm() < tolerance * other.norm()


def all_codes() -> tuple[Tensor, Tensor]:
    """Every byte of codes beside every exponent that is a number."""
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16)
    exponents = torch.arange(mxfp4.NAN_EXPONENT, dtype=torch.uint8).unsqueeze(1)
    return blocks.expand(mxfp4.NAN_EXPONENT, 16, 16).contiguous(), exponents.expand(
        -1, 16
    ).contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_formula_of_mxfp4_has_the_bits_of_the_look_up(dtype: torch.dtype) -> None:
    blocks, exponents = all_codes()
    found = mxfp4.mxfp4_formula(blocks, exponents, dtype)
    expected = mxfp4.decode_mxfp4(blocks, exponents, dtype)
    word = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(found.view(word), expected.view(word))


@pytest.mark.nightly
@pytest.mark.parametrize("device", DEVICES)
def test_a_compiled_stack_of_mxfp4(device: str) -> None:
    blocks, exponents = (tensor.to(device) for tensor in all_codes())
    tensors = [blocks.view(5, 51, 16, 16), exponents.view(5, 51, 16)]
    shape = (5, 512, 51)
    expected = FrozenStack(Mxfp4(ShippedForm("mxfp4")), tensors, shape).dense(1, 4, torch.bfloat16)
    stack = FrozenStack(Mxfp4(ShippedForm("mxfp4")), tensors, shape, is_compiled=True)
    assert torch.equal(stack.dense(1, 4, torch.bfloat16), expected)


@pytest.mark.parametrize(
    ("capability", "is_one_kernel"), [((9, 0), True), ((10, 3), True), ((12, 1), False)]
)
def test_grouped_products_are_one_kernel_on_hopper_and_large_blackwell(
    capability, is_one_kernel, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    device = torch.device("cuda", 0)
    assert expert_rows.uses_grouped_mm(device, torch.bfloat16) == is_one_kernel
    assert not expert_rows.uses_grouped_mm(device, torch.float32)
    assert not expert_rows.uses_grouped_mm(torch.device("cpu"), torch.bfloat16)
    # Rows are moved by kernels that were measured on Hopper alone.
    rows: Any = mock.Mock(is_cuda=True, dtype=torch.bfloat16)
    assert expert_rows._has_kernels(rows) == (capability == (9, 0))
