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


@pytest.mark.parametrize("kind", [*BLOCKED, "MXFP4"])
def test_rows_in_bands_are_the_rows_of_the_whole(kind: str) -> None:
    rows = hard_rows()
    whole = bytes(quantize_rows(rows, kind, "x"))
    bands = b"".join(bytes(quantize_rows(rows[i : i + 3], kind, "x")) for i in range(0, 40, 3))
    assert bands == whole


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q5_0", "Q5_1", "MXFP4"])
def test_bytes_are_those_of_gguf(kind: str) -> None:
    """The package's own numpy code, which llama.cpp's converter uses."""
    import gguf

    rows = hard_rows()
    expected = gguf.quants.quantize(rows.numpy(), gguf.GGMLQuantizationType[kind])
    assert bytes(quantize_rows(rows, kind, "x")) == expected.tobytes()


@pytest.mark.parametrize("kind", BLOCKED)
def test_values_come_back_within_the_step_of_their_type(kind: str) -> None:
    """gguf's numpy reader; the bound is half a step of a normal block, with room for its scale."""
    import gguf

    torch.manual_seed(1)
    rows = torch.randn(16, 512)
    data = np.frombuffer(quantize_rows(rows, kind, "x"), np.uint8).reshape(16, -1)
    read = torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]))
    error = ((read - rows).norm() / rows.norm()).item()
    bits = int(kind[1])
    assert error < 1.5 / 2**bits


@pytest.mark.parametrize(
    ("kind", "value"), [("F16", 7e4), ("F16", float("nan")), ("Q4_K", float("inf")), ("BF16", float("nan"))]
)  # fmt: skip
def test_a_value_that_is_not_finite_is_refused(kind: str, value: float) -> None:
    rows = torch.zeros(2, 256)
    rows[1, 3] = value
    with refuses(ModelError, names=["blk.0", kind], fix=["--quant bf16"]):
        quantize_rows(rows, kind, "blk.0")


def test_values_of_mxfp4_stay_exact() -> None:
    """Decoded experts of gpt-oss get back into the file without a loss."""
    from gguf import GGMLQuantizationType, dequantize

    codes = np.random.default_rng(0).integers(0, 256, (64, 9, 17), dtype=np.uint8)
    codes[..., 0] = codes[..., 0] % 40 + 100  # exponents of scales
    values = dequantize(codes.reshape(64, -1), GGMLQuantizationType.MXFP4)
    data = quantize_rows(torch.from_numpy(values.copy()), "MXFP4", "x")
    again = dequantize(np.frombuffer(data, np.uint8).reshape(64, -1), GGMLQuantizationType.MXFP4)
    assert np.array_equal(again, values)


def test_a_missing_library_is_told_before_a_file(monkeypatch, tokenizer) -> None:
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    quantize.ggml.cache_clear()
    model = random_model("llama", hidden_size=256)
    try:
        with pytest.raises(MachineError, match="ggml") as error:
            plan_of(model, tokenizer, "q4_k_m")
        assert "libggml-python" in error.value.fix
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


def test_bands_in_memory_are_few(tmp_path: Path, monkeypatch) -> None:
    """What waits to be written is bounded by the threads, two bands more than they are."""
    monkeypatch.setattr(write, "BAND_VALUES", 256)
    written: list[int] = []
    ahead = []

    class Slow(Watched):
        def rows(self, first: int, last: int) -> torch.Tensor:
            ahead.append(last - (written[-1] - 64) // 512 if written else 0)
            return super().rows(first, last)

    source = Slow(torch.zeros(500, 256))
    plan = GgufPlan(b"H" * 64, (GgufTensor("x", (500, 256), "F16", source),))
    write_gguf(plan, tmp_path / "x.gguf", threads=4, progress=lambda size, _: written.append(size))
    assert len(ahead) == 500
    assert max(ahead) <= 4 + 2 + 1  # threads, two more, and one whose progress is not noted yet


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


def test_an_error_is_raised_and_threads_are_as_before(tmp_path: Path) -> None:
    plan, plain, _ = watched_plan()
    plain.tensor[99, 0] = float("nan")
    before = torch.get_num_threads()
    with pytest.raises(ModelError, match=r"token_embd\.weight"):
        write_gguf(plan, tmp_path / "x.gguf", threads=2)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("quant", ["f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"])
def test_the_size_is_known_before(tokenizer, tmp_path: Path, quant: str) -> None:
    model = random_model("llama", hidden_size=256)
    plan = plan_of(model, tokenizer, quant)
    file = write_model(tmp_path / "x.gguf", model, tokenizer, quant)
    assert file.stat().st_size == plan.size


def test_gguf_reads_the_tensors_where_they_are(tokenizer, tmp_path: Path) -> None:
    import gguf

    model = random_model("qwen2", hidden_size=256)
    file = write_model(tmp_path / "x.gguf", model, tokenizer, "q4_k_m")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert tensors["blk.0.attn_q.bias"].tensor_type.name == "F32"
    down = model.model.layers[1].mlp.down_proj.weight.detach()
    stored = tensors["blk.1.ffn_down.weight"]
    assert bytes(stored.data) == bytes(quantize_rows(down, stored.tensor_type.name, ""))
