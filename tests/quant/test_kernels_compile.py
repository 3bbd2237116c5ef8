"""Each Triton kernel compiles for a Hopper GPU. No GPU is needed.

The interpreter, in which the other tests of kernels run on a CPU, accepts some programs that the
compiler refuses, such as a variable that changes its shape in a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

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
        DECODED | {"scales": FP32},
        {"BLOCK": 64, "NESTED": 0, "BYTES": 1024},
    ),
    "formats.nf4_kernel._decode, nested": (
        DECODED | {"scales": UINT8},
        {"BLOCK": 64, "NESTED": 256, "BYTES": 1024},
    ),
    "model.packed_kernels._forward": (
        dict.fromkeys("qkv", BF16) | {"out": BF16, "log_sum": FP32, "starts": INT32} | SIZES,
        ATTENTION,
    ),
    "model.packed_kernels._query_gradients": (
        dict.fromkeys(("q", "k", "v", "out", "d_out", "dq"), BF16)
        | {"log_sum": FP32, "delta": FP32, "starts": INT32}
        | SIZES,
        ATTENTION,
    ),
    "model.packed_kernels._key_gradients": (
        dict.fromkeys(("q", "k", "v", "d_out", "dk", "dv"), BF16)
        | {"log_sum": FP32, "delta": FP32, "ends": INT32}
        | SIZES,
        ATTENTION,
    ),
}


def kernels_of(module_name: str) -> dict[str, Callable[..., object]]:
    from importlib import import_module

    module = import_module(f"tunesmith.{module_name}")
    return {name: value for name, value in vars(module).items() if hasattr(value, "arg_names")}


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_compiles_for_hopper(name: str) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, constants = KERNELS[name]
    module_name, _, kernel_name = name.partition(",")[0].rpartition(".")
    kernel = kernels_of(module_name)[kernel_name]
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants))
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["ptx"]


@pytest.mark.slow
def test_no_kernel_is_missing() -> None:
    """Functions that another kernel calls are compiled with this kernel, and are not in the list."""
    pytest.importorskip("triton")
    called = {"_tile_of_expert", "_places", "_load", "_store", "_query_tile", "_scores", "_mask"}
    listed = {name.partition(",")[0] for name in KERNELS}
    modules = {name.rpartition(".")[0] for name in listed}
    found = {f"{module}.{name}" for module in modules for name in kernels_of(module)}
    assert {name for name in found if name.rpartition(".")[2] not in called} == listed
