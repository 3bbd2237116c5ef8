"""The gradients of a LoRA update from one reading of dy, in Triton: d_xa = dy B and dB = dy^T xa.

Both products are bound by reading dy [n, out], which is as large as all of a layer's outputs; two matmuls read it twice.
A block of the kernel takes SPAN rows by COLUMNS columns, and writes its share of either sum; the shares are added up
afterwards in a fixed order, so that results are the same in every run. They are 1/8 to 1/5 of the bytes of dy for rank 8.

Import it where the kernel is to run: Triton comes with torch's CUDA builds only. On a CPU it runs in Triton's
interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tunesmith.errors import first_line

ROWS, COLUMNS, SPAN = 64, 256, 512  # of a tile; SPAN: rows of a block
LEAST_RANK = 16  # of a product on tensor cores; a smaller one is padded with zeros inside the kernel


@triton.jit
def gradient_kernel(  # type: ignore[no-untyped-def]
    dy, b, xa, d_xa, d_b, n, m, xa_step,
    RANK: tl.constexpr, PADDED_RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    rank = tl.arange(0, PADDED_RANK)
    of_column = (columns[:, None] < m) & (rank[None, :] < RANK)
    b_tile = tl.load(b + columns[:, None] * RANK + rank[None, :], mask=of_column, other=0.0)
    d_b_tile = tl.zeros((COLUMNS, PADDED_RANK), dtype=tl.float32)
    for start in range(0, SPAN, ROWS):
        rows = (tl.program_id(0) * SPAN + start + tl.arange(0, ROWS)).to(tl.int64)
        inside = (rows[:, None] < n) & (columns[None, :] < m)
        dy_tile = tl.load(dy + rows[:, None] * m + columns[None, :], mask=inside, other=0.0)
        of_row = (rows[:, None] < n) & (rank[None, :] < RANK)
        xa_tile = tl.load(xa + rows[:, None] * xa_step + rank[None, :], mask=of_row, other=0.0)
        d_xa_tile = tl.dot(dy_tile, b_tile)
        at = d_xa + (tl.program_id(1) * n + rows[:, None]) * RANK + rank[None, :]
        tl.store(at, d_xa_tile, mask=of_row)
        d_b_tile = tl.dot(tl.trans(dy_tile), xa_tile, d_b_tile)
    tl.store(d_b + (tl.program_id(0) * m + columns[:, None]) * RANK + rank[None, :], d_b_tile, mask=of_column)


def kernel_fault(device: torch.device, dtype: torch.dtype) -> str:
    """What is wrong with the kernel on this device, or "": found by trying."""
    shapes = ((70, 48), (48, 8), (70, 8))
    dy, b, xa = (torch.linspace(-1, 1, n * m, device=device).view(n, m).to(dtype) for n, m in shapes)
    try:
        got = lora_gradients(dy, b, xa)
    except Exception as error:  # Triton raises what its compiler, its assembler and the driver raise
        return f"its kernel does not run here: {first_line(error)}"
    expected = (dy.double() @ b.double(), dy.double().T @ xa.double())
    near = all((g - e).norm() <= 0.01 * e.norm() for g, e in zip(got, expected, strict=True))  # bf16 rounds by 2^-9
    return "" if near else "its kernel gives wrong results here"


def lora_gradients(dy: Tensor, b: Tensor, xa: Tensor) -> tuple[Tensor, Tensor]:
    """dy B [n, rank] and dy^T xa [out, rank], summed in fp32 and rounded once to the dtype of dy.

    dy: [n, out], contiguous; b: [out, rank], contiguous; xa: [n, rank], or such columns of a wider matrix. One dtype.
    """
    (n, m), rank = dy.shape, b.shape[1]
    blocks = (triton.cdiv(n, SPAN), triton.cdiv(m, COLUMNS))
    d_xa = dy.new_empty(blocks[1], n, rank, dtype=torch.float32)
    d_b = dy.new_empty(blocks[0], m, rank, dtype=torch.float32)
    padded = max(LEAST_RANK, triton.next_power_of_2(rank))
    gradient_kernel[blocks](
        dy, b, xa, d_xa, d_b, n, m, xa.stride(0),
        RANK=rank, PADDED_RANK=padded, ROWS=ROWS, COLUMNS=COLUMNS, SPAN=SPAN, num_warps=4, num_stages=2,
    )  # fmt: skip
    return d_xa.sum(0).to(dy.dtype), d_b.sum(0).to(dy.dtype)
