"""Facts from a config alone, beside the models that Transformers builds from it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from errors import refuses
from tunesmith.adapter.lora import attach_lora, count_adapter_parameters
from tunesmith.config.schema import Adapter
from tunesmith.errors import ModelError, RecipeError
from tunesmith.model.arch import spec

from . import families


def test_a_config_without_its_text_model_is_refused() -> None:
    stated = {"model_type": "gemma3", "vision_config": {"hidden_size": 64}}
    with refuses(ModelError, where="config.json", names=["text_config"], fix=["tunesmith fetch"]):
        spec.check_supported(stated, "config.json")
    # Qwen2-VL's files on the Hub have the sizes at the top.
    spec.check_supported({"model_type": "qwen2_vl", "vocab_size": 64, "vision_config": {}}, "x")


ADAPTERS = [
    Adapter(),
    Adapter(rank=3, target=("o_proj", "lm_head"), modules_to_save=("embed_tokens",)),
]


@pytest.mark.parametrize("family", families.VARIANTS)
def test_counts_are_those_of_the_built_model(family: str) -> None:
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(families.tiny_config(family))
    raw = json.loads(built.config.to_json_string(use_diff=True))
    found = spec.read_spec(built.config.to_dict(), where="config.json")
    assert spec.read_spec(raw, where="config.json") == found
    assert found.parameters == sum(p.numel() for p in built.parameters())
    layers = built.model.layers
    matrices = [m for m in layers[0].modules() if isinstance(m, nn.Linear)]
    assert found.layers[0].matmul == sum(m.weight.numel() for m in matrices)
    assert found.head_matmul == built.lm_head.weight.numel()
    assert found.tied == (built.lm_head.weight is built.model.embed_tokens.weight)
    for adapter in ADAPTERS[: 2 if family == "llama" else 1]:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(built.config)
        attach_lora(model, adapter, seed=0)
        counted = count_adapter_parameters(model, adapter)
        assert spec.adapter_parameters(found, adapter) == counted > 0


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("gemma2", {"sliding_window": 8}),
        ("gemma3_text", {"sliding_window": 8, "num_hidden_layers": 14}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("qwen3", {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1}),
    ],
)
def test_windows_without_layer_types_are_the_config_classes(
    kind: str, extra: dict[str, Any]
) -> None:
    theirs = AutoConfig.for_model(kind, **{**families.SMALL, **extra})
    expected = [8 if t == "sliding_attention" else None for t in theirs.layer_types]
    found = spec.read_spec({**families.SMALL, "model_type": kind, **extra}, where="config.json")
    assert [layer.window for layer in found.layers] == expected


def test_flops_agree_with_a_counter_that_watches_the_products() -> None:
    shape = {**families.SMALL, "num_key_value_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="eager"))
    found = spec.read_spec({"model_type": "llama", **shape}, where="")
    length, batch = 64, 2
    ids = torch.randint(0, 128, (batch, length))
    counter = FlopCounterMode(display=False)
    with counter:
        model(ids).logits.float().sum().backward()
    everything = 12 * batch * length * length * 3 * 64  # the counter sees all pairs
    causal = spec.flops(found, [length] * batch, batch * length, trained="full")
    attention = 12 * batch * (length * (length + 1) // 2) * 3 * 64
    assert counter.get_total_flops() == pytest.approx(causal - attention + everything, rel=1e-3)


def test_flops_of_parts() -> None:
    found = spec.read_spec({"model_type": "llama", **families.SMALL}, where="")
    matmul, pairs = found.layer_matrices, 12 * 3 * 64

    def flops(length: int, labels: int, trained: str = "full", **more: int) -> float:
        return spec.flops(found, [length], labels, trained=trained, **more)

    assert flops(1, 0) == 6 * matmul + pairs
    assert flops(1, 1) - flops(1, 0) == 6 * found.head_matmul
    assert flops(1, 0, "lora") == 4 * matmul + pairs
    assert flops(1, 0, "lora", adapter_parameters=10) == 4 * matmul + pairs + 60
    assert flops(20, 0) - 2 * flops(10, 0) == pairs * (210 - 2 * 55)


def rope(kind: str, key: str = "rope_scaling", **values: float) -> dict[str, Any]:
    return {key: {"rope_type": kind, **values}}


# What config.json says beside 512 positions, and how long documents may be.
LIMITS: list[tuple[dict[str, Any], int | None]] = [
    ({}, 512),
    ({"max_position_embeddings": None}, None),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 2048),
    (rope("yarn", factor=4.0, original_max_position_embeddings=512), 2048),
    (rope("yarn", "rope_parameters", factor=4.0, original_max_position_embeddings=128), 512),
    (rope("llama3", factor=32.0, original_max_position_embeddings=128), 512),
    (rope("llama3", factor=8.0, original_max_position_embeddings=512), 4096),
    (
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}, "b": {}}},
        4096,
    ),
    ({"model_type": "mistral", "sliding_window": 64}, None),
    ({"model_type": "mistral", "sliding_window": 4096}, 512),
]


@pytest.mark.parametrize(("changes", "limit"), LIMITS)
def test_the_positions_of_a_config_with_its_scaling(
    changes: dict[str, Any], limit: int | None
) -> None:
    stated = {"model_type": "llama", **families.SMALL, **changes}
    found = spec.read_spec(stated, where="config.json")
    assert found.position_limit == limit
    spec.check_seq_len(found, limit or 1 << 40, where="config.json")
    if limit is not None:
        fix = f"data.seq_len={limit}"
        with refuses(RecipeError, where="data.seq_len", names=[f"{limit:,}"], fix=[fix]):
            spec.check_seq_len(found, limit + 1, where="config.json")
