"""Which type each tensor gets, against files of llama.cpp's quantizer and counts of published ones."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tunesmith.tools.export.gguf.types import PlainTensor, plain_tensors, tensor_bytes, tensor_types

PARTS = {
    "attn_q": 4096, "attn_k": 4096, "attn_v": 4096, "attn_output": 4096, "ffn_gate": 4096,
    "ffn_up": 4096, "ffn_down": 11008,
}  # fmt: skip


# Written by benchmarks/parity/gguf_types.py.
QUANTIZED = json.loads(Path(__file__).with_name("gguf_types.json").read_text())


def header_of(arch: str, layers: int, **more: int) -> dict[str, object]:
    """The keys that types depend on."""
    header = {"general.architecture": arch, f"{arch}.block_count": layers}
    return header | {f"{arch}.{key.replace('__', '.')}": value for key, value in more.items()}


def types_of(shapes: dict, quant: str, header: dict) -> dict[str, str]:
    return tensor_types(plain_tensors(shapes, quant), quant, header)


def counts(layers: int, quant: str, arch: str = "llama", kv: int = 8) -> Counter:
    shapes = {"token_embd.weight": (32000, 4096), "output.weight": (32000, 4096)}
    shapes |= {"output_norm.weight": (4096,)}
    # In the wrong order: llama.cpp sorts them.
    for layer in reversed(range(layers)):
        for part, columns in PARTS.items():
            shapes[f"blk.{layer}.{part}.weight"] = (64, columns)
        shapes[f"blk.{layer}.attn_norm.weight"] = (4096,)
        shapes[f"blk.{layer}.ffn_norm.weight"] = (4096,)
    header = header_of(arch, layers, attention__head_count=64, attention__head_count_kv=kv)
    return Counter(types_of(shapes, quant, header).values())


# As the logs of published files of 7B and 70B say. 65B has values as large as queries, and Qwen 1.5
# 72B counts as 70B.
COUNTS: list[tuple[tuple, dict[str, int]]] = [
    ((32, "q4_k_m"), {"F32": 65, "Q4_K": 193, "Q6_K": 33}),
    ((32, "q5_k_m"), {"F32": 65, "Q5_K": 193, "Q6_K": 33}),
    ((80, "q4_k_m"), {"F32": 161, "Q4_K": 441, "Q5_K": 40, "Q6_K": 81}),
    ((80, "q4_k_m", "llama", 64), {"F32": 161, "Q4_K": 481, "Q6_K": 81}),
    ((80, "q4_k_m", "qwen2", 64), {"F32": 161, "Q4_K": 441, "Q5_K": 40, "Q6_K": 81}),
    ((80, "q4_k_m", "qwen3"), {"F32": 161, "Q4_K": 481, "Q6_K": 81}),
]


@pytest.mark.parametrize(("model", "expected"), COUNTS)
def test_a_file_has_the_published_counts(model: tuple, expected: dict[str, int]) -> None:
    assert counts(*model) == expected


def test_others_have_one_type() -> None:
    for quant in ("f32", "f16", "bf16", "q8_0", "q6_k"):
        assert counts(2, quant).keys() == {"F32", quant.upper()}


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


def recorded(groups: list, quant: str) -> Iterator[tuple[str, PlainTensor, str]]:
    """Name, plain tensor and type of each tensor of a recorded file."""
    for pattern, shape, plain, layers, by_quant in groups:
        types = by_quant[quant].split()
        if len(types) == 1:
            types *= len(layers)
        for layer, ggml_type in zip(layers, types, strict=True):
            yield pattern.format(layer), PlainTensor(shape, plain), ggml_type


@pytest.mark.parametrize("model", QUANTIZED)
def test_types_are_those_of_llama_model_quantize(model: str) -> None:
    for quant in ("q4_k_m", "q5_k_m", "q6_k", "q8_0"):
        tensors: dict[str, PlainTensor] = {}
        expected: dict[str, Any] = {}
        for name, tensor, ggml_type in recorded(QUANTIZED[model]["groups"], quant):
            tensors[name] = tensor
            expected[name] = ggml_type
        assert tensor_types(tensors, quant, QUANTIZED[model]["header"]) == expected


def test_what_stays_as_it_is() -> None:
    """Routers in F32, a single row, and experts in MXFP4, which `llama-quantize` refuses."""
    tensors = {
        "output.weight": PlainTensor((64, 512), "BF16"),
        "blk.0.ffn_gate_inp.weight": PlainTensor((4, 512), "F32"),
        "blk.0.ffn_down_exps.weight": PlainTensor((4, 512, 512), "MXFP4"),
        "blk.0.ffn_up_exps.weight": PlainTensor((4, 512, 512), "BF16"),
        "blk.0.ffn_gate_shexp.weight": PlainTensor((1, 512), "BF16"),
    }
    header = header_of("gpt-oss", 24, expert_count=32)
    types = tensor_types(tensors, "q4_k_m", header)
    assert list(types.values()) == ["Q6_K", "F32", "MXFP4", "Q4_K", "BF16"]


def test_layers_without_an_mlp_are_not_counted() -> None:
    """`llama-quantize` counts the MLPs of a dense hybrid, and compares with the count of layers."""
    layers = (1, 3, 5, 7, 8, 9, 11, 13, 15)
    shapes = {f"blk.{layer}.ffn_down.weight": (64, 256) for layer in layers}
    types = types_of(shapes, "q4_k_m", header_of("nemotron_h", 16))
    more_bits = [
        layer for layer, kind in zip(layers, types.values(), strict=True) if kind == "Q6_K"
    ]
    # The first two of 16, and every third after them: the fifth and the eighth.
    assert more_bits == [1, 3, 8, 13]


def test_sizes_are_those_of_whole_blocks() -> None:
    assert tensor_bytes("Q4_K", (3, 512)) == 3 * 2 * 144
