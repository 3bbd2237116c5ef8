"""Triton kernels of experts and NF4 beside torch, in the interpreter and on a GPU; all compile for Hopper."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

import grouped_products
import pytest
import torch

from devices import gpu, run_interpreted
from tunesmith.formats import nf4
from tunesmith.formats.base import FrozenStack, FrozenWeight
from tunesmith.formats.linear import empty_tensors
from tunesmith.formats.nf4 import Nf4

WIDTH = 1100  # more than a program of the row kernels has columns
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]

BF16, FP32, INT32, INT64, UINT8 = "*bf16", "*fp32", "*i32", "*i64", "*u8"
ATTENTION = {"D": 64, "Q_HEADS": 8, "KV_HEADS": 4, "HEADS": 2, "ROWS": 64, "KEYS": 64}
DECODED = {"codes": UINT8, "values": FP32, "nested_scales": FP32, "scale_values": FP32}
DECODED |= {"offset": FP32, "out": BF16, "count": "i32"}
SIZES = {"n": "i32", "exponent": "fp32"}

# Module and kernel: types of the arguments, and values of the constants.
KERNELS: dict[str, tuple[Mapping[str, str], Mapping[str, int]]] = {
    "quant.row_kernels._copy_rows": (
        {"x": BF16, "rows": INT64, "out": BF16, "width": "i32"},
        {"BLOCK": 1024},
    ),
    "quant.row_kernels._add_chosen_rows": (
        {"x": BF16, "places": INT64, "out": BF16, "width": "i32"},
        {"K": 8, "BLOCK": 1024},
    ),
    "quant.row_kernels._add_low_product": (
        {"y": BF16, "low": BF16, "factors": BF16, "offsets": INT32}
        | dict.fromkeys(("width", "experts", "rank"), "i32"),
        {"EXPERTS": 128, "RANK": 16, "ROWS": 64, "COLUMNS": 128},
    ),
    "formats.nf4_kernel._decode": (
        DECODED | {"scales": UINT8},
        {"BLOCK": 64, "NESTED": 256, "BYTES": 1024},
    ),
    "model.layers.packed_kernels._forward": (
        dict.fromkeys("qkv", BF16) | {"out": BF16, "log_sum": FP32, "starts": INT32} | SIZES,
        ATTENTION,
    ),
    "model.layers.packed_kernels._query_gradients": (
        dict.fromkeys(("q", "k", "v", "out", "d_out", "dq"), BF16)
        | {"log_sum": FP32, "delta": FP32, "starts": INT32}
        | SIZES,
        ATTENTION,
    ),
    "model.layers.packed_kernels._key_gradients": (
        dict.fromkeys(("q", "k", "v", "d_out", "dk", "dv"), BF16)
        | {"log_sum": FP32, "delta": FP32, "ends": INT32}
        | SIZES,
        ATTENTION,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_compiles_for_hopper(name: str) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, constants = KERNELS[name]
    module_name, _, kernel_name = name.rpartition(".")
    kernel = getattr(import_module(f"tunesmith.{module_name}"), kernel_name)
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants))
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["ptx"]


def compare_row_kernels(device: str, dtype: torch.dtype) -> None:
    from tunesmith.quant import row_kernels

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        # Small whole numbers: their sums are exact, in any order and in bf16.
        return torch.randint(-3, 4, shape, generator=generator).to(device, dtype)

    x = draw(60, WIDTH)
    rows = torch.randint(60, (77,), generator=generator).to(device)
    assert torch.equal(row_kernels.copy_rows(x, rows), x[rows])
    places = torch.randperm(60, generator=generator).view(20, 3).to(device)
    assert torch.equal(row_kernels.add_chosen_rows(x, places), x[places].sum(1))
    # Experts without rows, with a tile, with more, with one row; a number that is no power of two.
    for ends in ([0, 128, 128, 301, 302], [7], [5, 5]):
        offsets = torch.tensor(ends, dtype=torch.int32, device=device)
        y, low, factors = draw(ends[-1], WIDTH), draw(ends[-1], 4), draw(len(ends), 4, WIDTH)
        expected = y.clone()
        start = 0
        for end, factor in zip(ends, factors, strict=True):
            expected[start:end] += low[start:end] @ factor
            start = end
        row_kernels.add_low_product(y, low, factors, offsets)
        assert torch.equal(y, expected), ends


def compare_nf4_kernel(device: str, dtype: torch.dtype, tolerance: float) -> None:
    """Matrices with and without double quantization, of an odd number of weights, and experts."""
    torch.manual_seed(0)
    functional = nf4.nf4_functions()
    for rows, columns, is_nested in ((96, 320, True), (7, 9, True), (64, 65, False)):
        dense = torch.randn(rows, columns).to(device, dtype)
        options = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": is_nested}
        codes, state = functional.quantize_4bit(dense, **options)
        tensors = [codes, state.absmax, state.code]
        if is_nested:
            tensors += [state.state2.absmax, state.state2.code, state.offset]
        kind = Nf4(dtype, 64, 256 if is_nested else 0)
        weight = FrozenWeight(kind, tensors, (rows, columns))
        expected = functional.dequantize_4bit(codes, state)
        found = kind._decode_by_kernel(*tensors[:3], tensors[3:], (rows, columns))
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()
        if device == "cuda":
            assert torch.equal(weight.dense(dtype), found)

    kind = Nf4(dtype)
    tensors = empty_tensors(kind.stack_forms(3, 24, 40, 1), torch.device(device))
    for tensor in tensors:
        tensor.random_(1, 200) if tensor.dtype == torch.uint8 else tensor.uniform_(0.5, 1)
    tensors[2].copy_(
        functional.get_4bit_type("nf4", device=device)
    )  # which bitsandbytes has built in
    stack = FrozenStack(kind, tensors, (3, 40, 24))
    results = []
    for has_kernel in (False, True):
        nf4._has_kernel = lambda _, answer=has_kernel: answer  # type: ignore[misc]
        results.append(kind.decode_experts(stack, slice(1, 3), dtype))
    assert (results[0] - results[1]).abs().max() <= tolerance * results[0].abs().max()


@pytest.mark.slow
def test_the_kernels_in_the_interpreter() -> None:
    pytest.importorskip("bitsandbytes")
    run_interpreted(__file__)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_the_kernels_on_a_gpu(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4, "_has_kernel", nf4._has_kernel)  # as it is afterwards
    compare_row_kernels(device, torch.bfloat16)
    compare_nf4_kernel(device, torch.bfloat16, 0.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.slow
def test_the_products_of_experts_by_one_kernel_are_those_of_one_after_the_other(device):
    differences = grouped_products.compare(torch.device(device))
    assert len(differences) == 10
    assert not grouped_products.too_large(differences), differences


if __name__ == "__main__":
    compare_row_kernels("cpu", torch.float32)  # in the interpreter a `tl.dot` of bf16 is wrong
    compare_nf4_kernel("cpu", torch.float32, 1e-6)
