"""Run by test_triton_matmul.py in a process of its own: the Triton kernel in Triton's interpreter, on the CPU.

The interpreter multiplies the bits of bf16 as integers, so what is bf16 on a GPU is fp32 here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.quant.eight_bit import matmul_fault
from tunesmith.quant.frozen_matmul import grouped_matmul
from tunesmith.quant.frozen_weight import EightBitWeight
from tunesmith.quant.scaled_matmul import FUSED, KINDS, hadamard, quantize, scaled_matmul
from tunesmith.quant.triton_matmul import fused_matmul

CPU = torch.device("cpu")


def main() -> None:
    checked, signs = 0, hadamard(CPU, torch.float32)
    for kind in FUSED.values():
        for shape in ((48, 32), (144, 96), (16, 272)):
            for n in (1, 16, 130):
                fault = matmul_fault(kind, CPU, shape, n, dtype=torch.float32)
                assert not fault, f"{kind}: {fault}"
                checked += 1
    for plain in [kind for kinds in KINDS.values() for kind in kinds]:
        for n, m, k, rank in ((1, 48, 64, 1), (130, 144, 96, 12), (129, 80, 288, 24)):
            x, w, xa, a, onto = (torch.randn(*size) for size in ((n, k), (m, k), (n, 40), (rank, m), (n, m)))
            left, right = (quantize(plain, t, *([signs] if "int8" in plain else [])) for t in (x, w))
            right = (torch.cat([right[0], right[0]], 1)[:, :k], right[1])  # rows that lie apart
            expected = (left[0].double() * left[1]) @ (right[0].double() * right[1]).T
            xa = xa[:, 3 : 3 + rank]  # a view into the stacked xa of a group
            for update, y in ((None, None), ((xa, a.T), None), ((xa, a.T.contiguous()), onto), (None, onto)):
                got = fused_matmul(left, right, torch.float32, update, None if y is None else y.clone())
                whole = expected + (xa.double() @ a.double() if update else 0) + (y.double() if y is not None else 0)
                # fp32 sums of a few hundred products; the interpreter's fp8 products are added up in fp32 too.
                assert float((got.double() - whole).norm() / whole.norm()) < 1e-6, (plain, n, m, k, rank)
                checked += 1
    rows = quantize(KINDS["int8"][0], torch.randn(40, 64), signs)
    assert torch.allclose(
        fused_matmul(rows, rows, torch.float32), scaled_matmul(KINDS["int8"][0], rows, rows, torch.float32)
    )
    checked += 1
    plain, fused = (operator(kind) for kind in (KINDS["int8"][0], FUSED["int8"]))
    for a, b in zip(plain, fused, strict=True):
        assert a.norm() > 0
        assert (a - b).norm() / a.norm() < 1e-5  # equal integers and scales; sums of fp32 in another order
        checked += 1
    print(f"{checked} checks")


def operator(kind: str) -> list[Tensor]:
    """Outputs and gradients of q, k and v as a layer computes them, with weights of this kind."""
    torch.manual_seed(0)
    weights = [EightBitWeight.from_dense(kind, torch.randn(m, 96)) for m in (144, 48, 48)]
    x, *lora = (torch.randn(*size).requires_grad_() for size in ((70, 96), *[(4, 96)] * 3, (144, 4), (48, 4), (48, 4)))
    ys = grouped_matmul(x, weights, [None] * 3, lora[:3], lora[3:])
    return [*ys, *torch.autograd.grad(sum((y * torch.randn_like(y)).sum() for y in ys), [x, *lora])]


if __name__ == "__main__":
    main()
