"""Compiled layers answer as plain ones do, and all layers of a model share their graphs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from tunesmith.adapter import lora
from tunesmith.config.schema import Adapter
from tunesmith.model import attention, parts
from tunesmith.parallel.compiled import compile_layers, wanted
from tunesmith.parallel.recompute import recompute_layers


def build(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    lora.attach(model, Adapter(rank=2), seed=1)
    for _, layer in lora.loras(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    parts.fuse(model, project=lora.project)
    model.set_attn_implementation(attention.register())
    return model.double().train()


def run(model: LlamaForCausalLM, n: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(n)
    model.zero_grad()
    edges = torch.tensor([0, n], dtype=torch.int32)
    hidden = model.model(
        input_ids=torch.randint(0, 64, (1, n)),
        position_ids=torch.arange(n).unsqueeze(0),
        use_cache=False,
        documents=attention.Documents(edges, n),
    ).last_hidden_state
    (hidden * torch.randn_like(hidden)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def one_operator(q, k, v, documents, *, scale, **_):
    """Attention of a single document, as one operator: what varlen is on CUDA, and what a compiler can look through."""
    assert documents.cu_seqlens.shape == (2,)
    laid = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    out = F.scaled_dot_product_attention(*laid, is_causal=True, scale=scale, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_number_of_graphs_does_not_grow_with_layers_and_lengths(recompute, monkeypatch):
    monkeypatch.setattr(parts, "attend", one_operator)
    graphs = []
    for layers in (3, 6):
        torch.compiler.reset()
        count = 0

        def backend(module: torch.fx.GraphModule, _: Any) -> Any:
            nonlocal count
            count += 1
            return module

        plain = build(layers)
        compiled = copy.deepcopy(plain)
        if recompute:
            recompute_layers(compiled.model.layers)
        assert compile_layers(compiled.model.layers, backend=backend) == layers
        for n in (20, 24, 31):
            expected, got = run(plain, n), run(compiled, n)
            assert expected.keys() == got.keys()
            for name, reference in expected.items():
                assert reference.norm() > 0
                assert (got[name] - reference).norm() / reference.norm() < 1e-10, name
        graphs.append(count)
    torch.compiler.reset()
    assert 0 < graphs[0] == graphs[1]


def test_on_a_cpu_compiled_layers_with_packed_attention_answer_alike():
    """Attention by document stays outside the graphs there."""
    torch.compiler.reset()
    plain = build(2)
    compiled = copy.deepcopy(plain)
    compile_layers(compiled.model.layers, backend="eager")
    expected, got = run(plain, 20), run(compiled, 20)
    torch.compiler.reset()
    assert all((got[k] - v).norm() / v.norm() < 1e-10 for k, v in expected.items())


@pytest.mark.parametrize(
    ("choice", "device", "expected"),
    [("auto", "cuda", True), ("auto", "cpu", False), ("on", "cpu", True), ("off", "cuda", False)],
)
def test_where_layers_are_compiled(choice, device, expected):
    assert wanted(choice, torch.device(device)) is expected
