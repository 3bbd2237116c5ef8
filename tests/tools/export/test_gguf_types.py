"""Which type each tensor gets, against counts of published files and llama.cpp's fallbacks."""

from __future__ import annotations

from collections import Counter

import pytest

from tunesmith.tools.export.gguf.types import (
    plain_tensors,
    tensor_bytes,
    tensor_types,
)

PARTS = {
    "attn_q": 4096, "attn_k": 4096, "attn_v": 4096, "attn_output": 4096, "ffn_gate": 4096,
    "ffn_up": 4096, "ffn_down": 11008,
}  # fmt: skip


def header_of(arch: str, layers: int, **more: int) -> dict[str, object]:
    """The keys that types depend on."""
    header = {"general.architecture": arch, f"{arch}.block_count": layers}
    return header | {f"{arch}.{key.replace('__', '.')}": value for key, value in more.items()}


def types_of(shapes: dict, quant: str, header: dict) -> dict[str, str]:
    return tensor_types(plain_tensors(shapes, quant), quant, header)


def counts(layers: int, quant: str, arch: str = "llama", heads: int = 64, kv: int = 8) -> Counter:
    shapes = {"token_embd.weight": (32000, 4096), "output.weight": (32000, 4096)}
    shapes |= {"output_norm.weight": (4096,)}
    # In the wrong order: llama.cpp sorts them.
    for layer in reversed(range(layers)):
        for part, columns in PARTS.items():
            shapes[f"blk.{layer}.{part}.weight"] = (64, columns)
        shapes[f"blk.{layer}.attn_norm.weight"] = (4096,)
        shapes[f"blk.{layer}.ffn_norm.weight"] = (4096,)
    header = header_of(arch, layers, attention__head_count=heads, attention__head_count_kv=kv)
    return Counter(types_of(shapes, quant, header).values())


def test_a_7b_file_has_the_published_counts() -> None:
    """`llama_model_loader: - type q4_K: 193 tensors`, as every log of a 7B Q4_K_M says."""
    assert counts(32, "q4_k_m") == {"F32": 65, "Q4_K": 193, "Q6_K": 33}
    assert counts(32, "q5_k_m") == {"F32": 65, "Q5_K": 193, "Q6_K": 33}


def test_a_70b_file_has_the_published_counts() -> None:
    assert counts(80, "q4_k_m") == {"F32": 161, "Q4_K": 441, "Q5_K": 40, "Q6_K": 81}
    assert counts(80, "q4_k_m", kv=64)["Q5_K"] == 0, "65B has values as large as queries"
    assert counts(80, "q4_k_m", "qwen2", kv=64)["Q5_K"] == 40, "Qwen 1.5 72B counts as 70B"
    assert counts(80, "q4_k_m", "qwen3")["Q5_K"] == 0


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
    parts = ("blk.4.attn_q.weight", "token_embd.weight")
    shapes = dict.fromkeys(parts, (64, columns))
    header = header_of("llama", 16)
    tied = types_of(shapes, quant, header)
    untied = types_of({**shapes, "output.weight": (64, columns)}, quant, header)
    assert tied == {parts[0]: body, parts[1]: head}
    assert untied == {parts[0]: body, parts[1]: body, "output.weight": head}


def test_sizes_are_those_of_whole_blocks() -> None:
    assert tensor_bytes("Q4_K", (3, 512)) == 3 * 2 * 144
