"""Which type each tensor gets, against counts of published files and llama.cpp's fallbacks."""

from __future__ import annotations

from collections import Counter

import pytest

from tunesmith.tools.export.gguf.types import (
    tensor_bytes,
    tensor_type,
)

PARTS = {
    "attn_q": 4096, "attn_k": 4096, "attn_v": 4096, "attn_output": 4096, "ffn_gate": 4096,
    "ffn_up": 4096, "ffn_down": 11008,
}  # fmt: skip


def counts(layers: int, quant: str, **config: object) -> Counter:
    config = {"model_type": "llama", "num_hidden_layers": layers, "num_attention_heads": 64,
              "num_key_value_heads": 8, **config}  # fmt: skip
    shapes = {"token_embd.weight": (32000, 4096), "output.weight": (32000, 4096)}
    shapes |= {"output_norm.weight": (4096,)}
    for layer in range(layers):
        for part, columns in PARTS.items():
            shapes[f"blk.{layer}.{part}.weight"] = (64, columns)
        shapes[f"blk.{layer}.attn_norm.weight"] = (4096,)
        shapes[f"blk.{layer}.ffn_norm.weight"] = (4096,)
    kinds = []
    for name, shape in shapes.items():
        kinds.append(tensor_type(name, shape, quant, config, tied=False))
    return Counter(kinds)


def test_a_7b_file_has_the_published_counts() -> None:
    """`llama_model_loader: - type q4_K: 193 tensors`, as every log of a 7B Q4_K_M says."""
    assert counts(32, "q4_k_m") == {"F32": 65, "Q4_K": 193, "Q6_K": 33}
    assert counts(32, "q5_k_m") == {"F32": 65, "Q5_K": 193, "Q6_K": 33}


def test_a_70b_file_has_the_published_counts() -> None:
    assert counts(80, "q4_k_m") == {"F32": 161, "Q4_K": 441, "Q5_K": 40, "Q6_K": 81}
    without_gqa = counts(80, "q4_k_m", num_key_value_heads=64)
    assert without_gqa["Q5_K"] == 0, "65B has values as large as queries"


@pytest.mark.parametrize("quant", ["f32", "f16", "bf16", "q8_0", "q6_k"])
def test_others_have_one_type(quant: str) -> None:
    kinds = counts(32, quant)
    assert kinds.keys() == {"F32", quant.upper()}


@pytest.mark.parametrize(
    ("quant", "columns", "body", "head"),
    [
        ("q4_k_m", 512, "Q4_K", "Q6_K"),
        ("q4_k_m", 576, "Q5_0", "Q8_0"),
        ("q5_k_m", 576, "Q5_1", "Q8_0"),
        ("q6_k", 576, "Q8_0", "Q8_0"),
        ("q8_0", 576, "Q8_0", "Q8_0"),
        ("q4_k_m", 100, "F16", "F16"),
        ("q8_0", 100, "F16", "F16"),
        ("bf16", 100, "BF16", "BF16"),
    ],
)
def test_rows_that_are_not_whole_blocks(quant: str, columns: int, body: str, head: str) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 16, "num_attention_heads": 8}

    def kind(name: str, tied: bool = False) -> str:
        return tensor_type(name, (64, columns), quant, config, tied=tied)

    assert kind("blk.4.attn_q.weight") == body
    assert kind("output.weight") == head
    assert kind("token_embd.weight", tied=True) == head
    assert kind("token_embd.weight") == body


def test_a_joined_projection_counts_as_values() -> None:
    config = {"model_type": "phi3", "num_hidden_layers": 32, "num_attention_heads": 32}
    kinds = []
    for part in ("attn_v", "attn_qkv", "attn_output"):
        name = f"blk.0.{part}.weight"
        kinds.append(tensor_type(name, (64, 512), "q4_k_m", config, tied=False))
    assert kinds == ["Q6_K", "Q6_K", "Q4_K"]


def test_sizes_are_those_of_whole_blocks() -> None:
    assert tensor_bytes("Q4_K", (3, 512)) == 3 * 2 * 144
