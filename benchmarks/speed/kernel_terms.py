"""The terms of a step's time, and the assignment of kernels to terms. Does not import torch.

    products          matmuls
    skinny products   matmuls with a dimension of at most 64, such as an adapter's; memory-bound
    attention         FlashAttention, forward and backward
    other kernels     norms, activations, quantization, loss, optimizer, copies

forecast.py computes these terms, and `terms_of` sums them from the trace of a GPU profile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PRODUCTS, SKINNY, OTHER, ATTENTION = "products", "skinny products", "other kernels", "attention"
TERMS = (PRODUCTS, SKINNY, OTHER, ATTENTION)
# Maximum dimension of a skinny product. It is half a tile of cuBLAS, and the usual ranks of
# adapters are not larger.
SKINNY_DIMENSION = 64
GROUPED = "_grouped_mm"  # one matmul per expert, with the expert's rows
PRODUCT_OPERATORS = ("mm", "bmm", "addmm", "addmm_", "_scaled_mm", GROUPED)

GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of events in a trace
# Parts of operator and kernel names, in lower case.
ATTENTION_NAMES = ("flash", "fmha", "varlen")
PRODUCT_KERNELS = ("nvjet", "cutlass", "gemm", "sm90_xmma", "cublas", "triton_tem")


def terms_of(events: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Sum the milliseconds of GPU work of all steps in a trace, by term.

    A kernel belongs to the operator that launched it, which has the same `External id`.

    Args:
        events: `traceEvents` of a torch trace that was recorded with `record_shapes=True`.
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
    """Return the term of a kernel.

    Args:
        kernel: the kernel's name.
        operator: the event of the operator that launched the kernel, if known.
    """
    kernel = kernel.lower()
    operator_name = operator["name"].lower() if operator else ""
    name = operator_name.removeprefix("aten::")
    if operator and name in PRODUCT_OPERATORS:
        shapes = operator["args"].get("Input Dims", [])
        return SKINNY if is_skinny(product_dimensions(name, shapes)) else PRODUCTS
    if kernel.startswith("triton_") and not kernel.startswith("triton_tem"):
        return OTHER  # Inductor's names of fused kernels contain the names of any fused operators
    if any(part in operator_name or part in kernel for part in ATTENTION_NAMES):
        return ATTENTION  # check before products, because FlashAttention's names contain "cutlass"
    return PRODUCTS if any(part in kernel for part in PRODUCT_KERNELS) else OTHER


def product_dimensions(name: str, shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return (m, k, n) of a matmul [m, k] x [k, n]. Return () if the shapes are unknown.

    The first input of addmm is the summand.

    Args:
        name: the name of the operator.
        shapes: the shapes of its inputs.
    """
    factors = shapes[1:3] if name.startswith("addmm") else shapes[:2]
    if len(factors) < 2 or any(len(shape) < 2 for shape in factors):
        return ()
    a, b = factors
    return (a[-2], a[-1], b[-1])


def is_skinny(dimensions: Sequence[int]) -> bool:
    """Return whether a matmul [m, k] x [k, n] is memory-bound because one dimension is small."""
    return bool(dimensions) and min(dimensions) <= SKINNY_DIMENSION
