"""The terms of a step's time, and which of them a kernel belongs to. Importable without torch.

    products          matrix products
    skinny products   those with a dimension of at most 64, such as an adapter's: bound by memory
    attention         FlashAttention, forward and backward
    other kernels     norms, activations, quantization, loss, optimizer, copies

forecast.py counts these terms, and `terms_of` sums them from the trace of a GPU profile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PRODUCTS, SKINNY, OTHER, ATTENTION = "products", "skinny products", "other kernels", "attention"
TERMS = (PRODUCTS, SKINNY, OTHER, ATTENTION)
SKINNY_DIMENSION = 64  # half a tile of cuBLAS, and no smaller than the usual ranks of an adapter
GROUPED = "_grouped_mm"  # of the rows of each expert
PRODUCT_OPERATORS = ("mm", "bmm", "addmm", "addmm_", "_scaled_mm", GROUPED)

GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace
# Parts of names, in lower case.
ATTENTION_NAMES = ("flash", "fmha", "varlen")
PRODUCT_KERNELS = ("nvjet", "cutlass", "gemm", "sm90_xmma", "cublas", "triton_tem")


def terms_of(events: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Milliseconds of GPU work by term, of all steps in a trace.

    events: `traceEvents` of a torch trace recorded with `record_shapes=True`. A kernel belongs to
    the operator that launched it, which has the same `External id`.
    """
    operators = {}
    for event in events:
        if event.get("cat") == "cpu_op":
            operators[event["args"].get("External id")] = event
    milliseconds = dict.fromkeys(TERMS, 0.0)
    for event in events:
        if event.get("cat") in GPU_WORK:
            operator = operators.get(event["args"].get("External id"))
            milliseconds[term_of(event["name"], operator)] += event["dur"] / 1e3
    return milliseconds


def term_of(kernel: str, operator: Mapping[str, Any] | None) -> str:
    """The term of a kernel, by the operator that launched it (its event, if known) and its name."""
    kernel = kernel.lower()
    operator_name = operator["name"].lower() if operator else ""
    name = operator_name.removeprefix("aten::")
    if operator and name in PRODUCT_OPERATORS:
        shapes = operator["args"].get("Input Dims", [])
        return SKINNY if is_skinny(product_dimensions(name, shapes)) else PRODUCTS
    if kernel.startswith("triton_") and not kernel.startswith("triton_tem"):
        return OTHER  # Inductor names a fused kernel after operators, which may be any
    if any(part in operator_name or part in kernel for part in ATTENTION_NAMES):
        return ATTENTION  # before products: FlashAttention's kernels have cutlass in their names
    return PRODUCTS if any(part in kernel for part in PRODUCT_KERNELS) else OTHER


def product_dimensions(name: str, shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """(m, k, n) of a product by the shapes of its operator's inputs; empty where they are unknown.

    The first input of addmm is the summand.
    """
    factors = shapes[1:3] if name.startswith("addmm") else shapes[:2]
    if len(factors) < 2 or any(len(shape) < 2 for shape in factors):
        return ()
    a, b = factors
    return (a[-2], a[-1], b[-1])


def is_skinny(dimensions: Sequence[int]) -> bool:
    """Whether a product [m, k] x [k, n] reads and writes long before it computes."""
    return bool(dimensions) and min(dimensions) <= SKINNY_DIMENSION
