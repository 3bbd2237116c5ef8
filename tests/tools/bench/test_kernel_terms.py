"""Which term of a step a kernel of a trace belongs to."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_terms import ATTENTION, OTHER, PRODUCTS, SKINNY, terms_of
from torch.profiler import ProfilerActivity, profile

# (kernel, operator, shapes of its inputs, term). Names of kernels are cuBLAS's, CUTLASS's,
# FlashAttention's and torch's, as traces of torch on Hopper have them.
LAUNCHES = [
    ("nvjet_tst_256x128_64x4_1x2_h_bz_TNT", "aten::mm", [[16384, 4096], [4096, 4096]], PRODUCTS),
    ("nvjet_tst_64x8_64x16_1x2_h_bz_TNT", "aten::mm", [[16384, 4096], [4096, 8]], SKINNY),
    ("nvjet_tst_8x64_64x16_h_bz_splitK_NNT", "aten::mm", [[8, 16384], [16384, 4096]], SKINNY),
    ("splitKreduce_kernel", "aten::mm", [[8, 16384], [16384, 4096]], SKINNY),
    # The summand comes first, the output of `out=` last.
    ("nvjet_tst_128x256_64x4_h_bz_TNN", "aten::addmm_", [[16384, 4096], [16384, 8], [8, 4096], [], []], SKINNY),
    ("sm90_xmma_gemm_bf16bf16_bf16f32", "aten::addmm", [[4096], [512, 4096], [4096, 4096], [], [], [512, 4096]], PRODUCTS),
    ("nvjet_qqtst_128x256_128x5_NNT", "aten::_scaled_mm", [[16384, 4096], [4096, 1024]], PRODUCTS),
    ("cutlass::device_kernel<rowwise>", "aten::_scaled_mm", [[64, 4096], [4096, 1024]], SKINNY),
    ("ampere_bf16_s16816gemm", "aten::bmm", [[1, 64, 1], [1, 1, 2048]], SKINNY),
    ("flash::flash_fwd_kernel<cutlass::bfloat16_t>", "torch_attn::_varlen_attn", [], ATTENTION),
    ("void at::native::elementwise_kernel", "aten::_flash_attention_backward", [], ATTENTION),
    ("flash::flash_bwd_dq_dk_dv_loop", None, [], ATTENTION),
    ("triton_red_fused_mul_varlen_attn_1", "triton_red_fused_mul_varlen_attn_1", [], OTHER),
    ("void at::native::multi_tensor_apply_kernel", "aten::_fused_adamw_", [[]], OTHER),
    ("kDequantizeBlockwise", "bitsandbytes::dequantize_4bit", [[1024, 1]], OTHER),
    ("nvjet_tst_256x128_64x4_1x2_h_bz_TNT", None, [], PRODUCTS),
    ("Memcpy DtoD (Device -> Device)", "aten::copy_", [[4096], [4096], []], OTHER),
]  # fmt: skip


def trace_events(launches: list[tuple[str, str | None, list[list[int]], str]]) -> Iterator[dict]:
    """In the form of torch's traces (Kineto): `dur` in microseconds, `External id` in both."""
    for number, (kernel, operator, shapes, _) in enumerate(launches):
        if operator is not None:
            inputs = {"External id": number, "Input Dims": shapes}
            yield {"ph": "X", "cat": "cpu_op", "name": operator, "ts": 0, "dur": 3, "args": inputs}
        category = "gpu_memcpy" if kernel.startswith("Memcpy") else "kernel"
        args = {"External id": number, "device": 0, "stream": 7}
        yield {"ph": "X", "cat": category, "name": kernel, "ts": 9, "dur": 2**number, "args": args}


def test_every_kernel_is_in_its_term() -> None:
    expected = dict.fromkeys((PRODUCTS, SKINNY, OTHER, ATTENTION), 0.0)
    for number, (_, _, _, term) in enumerate(LAUNCHES):
        expected[term] += 2**number / 1e3  # powers of two: a sum tells which ones are in it
    unrelated = {"ph": "i", "name": "[memory]", "args": {"Total Allocated": 8}}
    assert terms_of([unrelated, *trace_events(LAUNCHES)]) == pytest.approx(expected)


def test_a_trace_without_a_gpu_has_no_terms() -> None:
    without_kernels = [e for e in trace_events(LAUNCHES) if e["cat"] == "cpu_op"]
    assert set(terms_of(without_kernels).values()) == {0.0}


def test_the_shapes_that_torch_writes_are_read(tmp_path: Path) -> None:
    """A trace of a CPU, with a kernel added to each product as a GPU's trace has it."""
    x, w, a = torch.ones(96, 128), torch.ones(80, 128), torch.ones(8, 128)
    y = torch.empty(96, 80)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        torch.mm(x, w.T, out=y)  # compiled graphs write into `out`
        torch.addmm(y[0], x, w.T)
        y.addmm_(x @ a.T, torch.ones(8, 80))
    file = tmp_path / "trace.json.gz"
    profiler.export_chrome_trace(str(file))
    with gzip.open(file, "rt", encoding="utf-8") as text:
        events: list[dict[str, Any]] = json.load(text)["traceEvents"]
    products = [e for e in events if e.get("name") in ("aten::mm", "aten::addmm", "aten::addmm_")]
    assert len(products) == 4
    for event in products:
        args = {"External id": event["args"]["External id"]}
        events.append({"cat": "kernel", "name": "nvjet", "ts": 0, "dur": 1000, "args": args})
    assert terms_of(events) == {PRODUCTS: 2.0, SKINNY: 2.0, OTHER: 0.0, ATTENTION: 0.0}
