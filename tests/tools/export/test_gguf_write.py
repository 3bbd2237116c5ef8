"""Bands give the bytes of whole tensors, in order, at a size that is known before."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from errors import refuses
from export.tiny_gguf import (
    byte_level,
    plan_of,
    random_model,
    structure_of,
    tensor_rows,
    write_model,
)
from tunesmith.errors import MachineError, ModelError
from tunesmith.tools.export.gguf import quantize, write
from tunesmith.tools.export.gguf.families import pair_neighbors
from tunesmith.tools.export.gguf.plan import GgufPlan, GgufTensor
from tunesmith.tools.export.gguf.quantize import quantize_rows
from tunesmith.tools.export.gguf.write import BandThreads, tensor_jobs, write_gguf

# Those of the extra gguf; a machine without its wheel has the others.
BLOCKED = ["Q8_0", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level(structure_of("gpt-2"))


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


@pytest.mark.parametrize(
    ("kind", "value"), [("F16", 7e4), ("F16", float("nan")), ("Q4_K", float("inf")), ("BF16", float("nan"))]
)  # fmt: skip
def test_a_value_that_is_not_finite_is_refused(kind: str, value: float) -> None:
    rows = torch.zeros(2, 256)
    rows[1, 3] = value
    with refuses(ModelError, names=["blk.0", kind], fix=["--quant bf16"]):
        quantize_rows(rows, kind, "blk.0")


def test_a_missing_library_is_told_before_a_file(monkeypatch, tokenizer) -> None:
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    quantize.ggml.cache_clear()
    model = random_model("llama", hidden_size=256)
    try:
        with refuses(MachineError, names=["ggml"], fix=["libggml-python"]):
            plan_of(model, tokenizer, "q4_k_m")
        plan_of(model, tokenizer, "bf16")  # needs none
    finally:
        quantize.ggml.cache_clear()


@dataclass
class Watched:
    """Rows that count how many are in use at once, in values."""

    tensor: torch.Tensor
    reads: list[tuple[int, int]] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    def rows(self, first: int, last: int) -> torch.Tensor:
        self.reads.append((first, last))
        self.threads.add(threading.get_ident())
        return self.tensor[first:last].float()


def watched_plan() -> tuple[GgufPlan, Watched, Watched]:
    torch.manual_seed(0)
    plain = Watched(torch.randn(100, 256))
    heads = Watched(torch.randn(8 * 12, 256))
    tensors = (
        GgufTensor("token_embd.weight", (100, 256), "Q4_K", plain),
        GgufTensor("output_norm.weight", (7,), "F32", tensor_rows(torch.ones(7)), offset=1.0),
        GgufTensor("blk.0.attn_q.weight", (96, 256), "F16", heads, heads=8),
    )
    return GgufPlan(b"H" * 64, tensors), plain, heads


@pytest.mark.parametrize("threads", [1, 4])
def test_bands_are_written_in_order(tmp_path: Path, monkeypatch, threads: int) -> None:
    monkeypatch.setattr(write, "BAND_VALUES", 256 * 16)
    plan, plain, heads = watched_plan()
    sizes: list[int] = []
    write_gguf(
        plan, tmp_path / "x.gguf", threads=threads, progress=lambda size, _: sizes.append(size)
    )
    data = (tmp_path / "x.gguf").read_bytes()
    embedding = bytes(quantize_rows(plain.tensor, "Q4_K", ""))
    norm = np.full(7, 2.0, np.float32).tobytes().ljust(32, b"\0")
    permuted = bytes(quantize_rows(pair_neighbors(heads.tensor, 12).contiguous(), "F16", ""))
    assert data == b"H" * 64 + embedding + norm + permuted
    assert len(data) == plan.size == sizes[-1]
    assert sizes == sorted(sizes)
    assert max(last - first for first, last in plain.reads) <= 16
    assert {last - first for first, last in heads.reads} == {12}, "whole heads"
    assert threading.get_ident() not in plain.threads
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]
    plain.tensor[99, 0] = float("nan")
    before = torch.get_num_threads()
    with pytest.raises(ModelError, match=r"token_embd\.weight"):
        write_gguf(plan, tmp_path / "y.gguf", threads=threads)
    assert torch.get_num_threads() == before


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
        vector = torch.randn(7)
        assert b"".join(workers.run(tensor_jobs(vector, "F32", "x"))) == vector.numpy().tobytes()


@pytest.mark.slow
def test_gguf_reads_the_tensors_where_they_are(tokenizer, tmp_path: Path) -> None:
    import gguf

    model = random_model("qwen2", hidden_size=256)
    file = write_model(tmp_path / "x.gguf", model, tokenizer, "q4_k_m")
    assert file.stat().st_size == plan_of(model, tokenizer, "q4_k_m").size
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert tensors["blk.0.attn_q.bias"].tensor_type.name == "F32"
    down = model.model.layers[1].mlp.down_proj.weight.detach()
    stored = tensors["blk.1.ffn_down.weight"]
    assert bytes(stored.data) == bytes(quantize_rows(down, stored.tensor_type.name, ""))
