"""The type of each tensor and its bytes, which bands give in order."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from errors import refuses
from export.tiny_gguf import tensor_rows
from tunesmith.errors import ModelError
from tunesmith.tools.export.gguf import write
from tunesmith.tools.export.gguf.families import pair_neighbors
from tunesmith.tools.export.gguf.plan import GgufPlan, GgufTensor
from tunesmith.tools.export.gguf.quantize import quantize_rows
from tunesmith.tools.export.gguf.types import PlainTensor, plain_tensors, tensor_types
from tunesmith.tools.export.gguf.write import BandThreads, tensor_jobs, write_gguf

# Those of the extra gguf; a machine without its wheel has the others.
BLOCKED = ["Q8_0", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"]


def hard_rows() -> torch.Tensor:
    """Normal values, with zeros, large and tiny ones, and ties between two roundings."""
    torch.manual_seed(0)
    rows = torch.randn(40, 512)
    rows[1] = 0
    rows[2] *= 1e4
    rows[3] *= 1e-8
    rows[4] = (torch.arange(512) % 7 - 3) / 2
    return rows


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", *BLOCKED, "MXFP4"])
def test_bytes_are_those_of_gguf_in_bands_and_whole(kind: str) -> None:
    """gguf has its own numpy code, which llama.cpp's converter uses, and reads what it cannot write.

    The bound of what is read is half a step of a normal block, with room for its scale.
    """
    import gguf

    rows = hard_rows()
    whole = bytes(quantize_rows(rows, kind, "x"))
    bands = b"".join(bytes(quantize_rows(rows[i : i + 3], kind, "x")) for i in range(0, 40, 3))
    assert bands == whole
    ggml_type = gguf.GGMLQuantizationType[kind]
    if not kind.endswith("_K"):
        assert gguf.quants.quantize(rows.numpy(), ggml_type).tobytes() == whole
        return
    rows = rows[5:]
    data = np.frombuffer(quantize_rows(rows, kind, "x"), np.uint8).reshape(len(rows), -1)
    read = torch.from_numpy(gguf.quants.dequantize(data, ggml_type))
    assert (read - rows).norm() / rows.norm() < 1.5 / 2 ** int(kind[1])


@pytest.mark.parametrize(("kind", "value"), [("F16", 7e4), ("Q4_K", float("inf"))])
def test_a_value_that_is_not_finite_is_refused(kind: str, value: float) -> None:
    rows = torch.zeros(2, 256)
    rows[1, 3] = value
    with refuses(ModelError, names=["blk.0", kind], fix=["--quant bf16"]):
        quantize_rows(rows, kind, "blk.0")


@pytest.mark.parametrize("threads", [1, 4])
def test_bands_are_written_in_order(tmp_path: Path, monkeypatch, threads: int) -> None:
    monkeypatch.setattr(write, "BAND_VALUES", 256 * 16)
    plain, heads = torch.randn(100, 256), torch.randn(8 * 12, 256)
    tensors = (
        GgufTensor("token_embd.weight", (100, 256), "Q4_K", tensor_rows(plain)),
        GgufTensor("output_norm.weight", (7,), "F32", tensor_rows(torch.ones(7)), offset=1.0),
        GgufTensor("blk.0.attn_q.weight", (96, 256), "F16", tensor_rows(heads), heads=8),
    )
    plan, sizes = GgufPlan(b"H" * 64, tensors), []
    file = tmp_path / "x.gguf"
    write_gguf(plan, file, threads=threads, progress=lambda size, _: sizes.append(size))
    data = file.read_bytes()
    embedding = bytes(quantize_rows(plain, "Q4_K", ""))
    norm = np.full(7, 2.0, np.float32).tobytes().ljust(32, b"\0")
    permuted = bytes(quantize_rows(pair_neighbors(heads, 12).contiguous(), "F16", ""))
    assert data == b"H" * 64 + embedding + norm + permuted
    assert len(data) == plan.size == sizes[-1]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("kind", ["Q4_K", "BF16"])
def test_a_stack_of_experts_in_bands(monkeypatch, kind: str) -> None:
    """A transposed bf16 stack [3, 20, 256] in bands of at most 8 rows has the bytes of the whole."""
    monkeypatch.setattr(write, "BAND_VALUES", 256 * 8)
    stack = torch.randn(3, 256, 20, dtype=torch.bfloat16).transpose(1, 2)
    whole = bytes(quantize_rows(stack.float().contiguous(), kind, "x"))
    jobs = list(tensor_jobs(stack, kind, "x"))
    assert len(jobs) == 3 * 3
    with BandThreads(2) as workers:
        assert b"".join(workers.run(jobs)) == whole


# Written by benchmarks/parity/gguf_types.py.
QUANTIZED = json.loads(Path(__file__).with_name("gguf_types.json").read_text())


@pytest.mark.parametrize("model", QUANTIZED)
def test_types_are_those_of_llama_model_quantize(model: str) -> None:
    for quant in ("q4_k_m", "q5_k_m", "q6_k", "q8_0"):
        tensors, expected = {}, {}
        for pattern, shape, plain, layers, by_quant in QUANTIZED[model]["groups"]:
            types = by_quant[quant].split()
            if len(types) == 1:
                types *= len(layers)
            for layer, ggml_type in zip(layers, types, strict=True):
                tensors[pattern.format(layer)] = PlainTensor(shape, plain)
                expected[pattern.format(layer)] = ggml_type
        assert tensor_types(tensors, quant, QUANTIZED[model]["header"]) == expected


def test_rows_that_are_not_whole_blocks_stay_in_16_bits() -> None:
    header = {"general.architecture": "llama", "llama.block_count": 16}
    for quant, kind in (("q8_0", "F16"), ("q4_k_m", "F16"), ("bf16", "BF16")):
        tensors = plain_tensors({"blk.4.attn_q.weight": (64, 100)}, quant)
        assert tensor_types(tensors, quant, header) == {"blk.4.attn_q.weight": kind}


def test_routers_single_rows_and_mxfp4_stay_as_they_are() -> None:
    tensors = {
        "output.weight": PlainTensor((64, 512), "BF16"),
        "blk.0.ffn_gate_inp.weight": PlainTensor((4, 512), "F32"),
        "blk.0.ffn_down_exps.weight": PlainTensor((4, 512, 512), "MXFP4"),
        "blk.0.ffn_up_exps.weight": PlainTensor((4, 512, 512), "BF16"),
        "blk.0.ffn_gate_shexp.weight": PlainTensor((1, 512), "BF16"),
    }
    header = {"general.architecture": "gpt-oss", "gpt-oss.block_count": 24}
    types = tensor_types(tensors, "q4_k_m", header | {"gpt-oss.expert_count": 32})
    assert list(types.values()) == ["Q6_K", "F32", "MXFP4", "Q4_K", "BF16"]
