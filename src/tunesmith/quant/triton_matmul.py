"""A product of 8-bit factors with all that belongs to it in its epilogue: y = (a b^T) * scales + xa B^T + y, written once.

torch's products leave the LoRA update to a second pass over y, and those of int8 the scales too. Import it where a kernel
is to run: Triton comes with torch's CUDA builds only. On a CPU it runs in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

LEAST_RANK = 16  # of a product on tensor cores; a smaller one is padded with zeros inside the kernel
# (rows, columns, depth) of a tile, stages, warps: the first for Hopper and data-center Blackwell, the others also fit
# into the 100 KiB of shared memory that consumer Blackwell and GB10 have.
TILES = ((128, 256, 128, 3, 8), (128, 128, 128, 3, 8), (128, 128, 64, 4, 4), (64, 128, 128, 3, 4))
CONFIGS = [
    triton.Config({"ROWS": rows, "COLUMNS": columns, "DEPTH": depth}, num_stages=stages, num_warps=warps)
    for rows, columns, depth, stages, warps in TILES
]
GROUP = 8  # tiles of rows that go through all columns before the next, so that both factors stay in the L2 cache


# One configuration is not timed. Timing runs the kernel many times, so what it adds onto is put back.
@triton.autotune(CONFIGS if torch.cuda.is_available() else CONFIGS[2:3], key=["m", "k"], restore_value=["y"])
@triton.jit
def scaled_kernel(  # type: ignore[no-untyped-def]
    a, b, a_scale, b_scale, xa, update, y, n, m, k, b_row, a_step, b_step, xa_step, update_step, update_rank_step,
    INT8: tl.constexpr, RANK: tl.constexpr, PADDED_RANK: tl.constexpr, ADD: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row_tiles, column_tiles = tl.cdiv(n, ROWS), tl.cdiv(m, COLUMNS)
    in_group = GROUP * column_tiles
    first = tl.program_id(0) // in_group * GROUP
    height = min(row_tiles - first, GROUP)
    row_tile = first + tl.program_id(0) % in_group % height
    column_tile = tl.program_id(0) % in_group // height
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    # Rows beyond the end repeat the first ones; their results are not stored.
    a_tile = a + (rows % n).to(tl.int64)[:, None] * k + depth[None, :]
    b_tile = b + (columns % m).to(tl.int64)[None, :] * b_row + depth[:, None]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.int32 if INT8 else tl.float32)
    for at in range(0, k, DEPTH):
        left = tl.load(a_tile, mask=depth[None, :] < k - at, other=0.0)
        right = tl.load(b_tile, mask=depth[:, None] < k - at, other=0.0)
        total = tl.dot(left, right, total, out_dtype=tl.int32 if INT8 else tl.float32)
        a_tile += DEPTH
        b_tile += DEPTH
    by_row = tl.load(a_scale + rows * a_step, mask=rows < n, other=0.0)
    by_column = tl.load(b_scale + columns * b_step, mask=columns < m, other=0.0)
    result = total.to(tl.float32) * by_row[:, None] * by_column[None, :]
    if RANK > 0:
        rank = tl.arange(0, PADDED_RANK)
        left_mask = (rows[:, None] < n) & (rank[None, :] < RANK)
        left = tl.load(xa + rows[:, None] * xa_step + rank[None, :], mask=left_mask, other=0.0)
        right_mask = (columns[None, :] < m) & (rank[:, None] < RANK)
        right_at = update + columns[None, :] * update_step + rank[:, None] * update_rank_step
        result = tl.dot(left, tl.load(right_at, mask=right_mask, other=0.0), result)
    inside = (rows[:, None] < n) & (columns[None, :] < m)
    y_tile = y + rows.to(tl.int64)[:, None] * m + columns[None, :]
    if ADD:
        result += tl.load(y_tile, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_tile, result.to(y.dtype.element_ty), mask=inside)


def fused_matmul(
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    dtype: torch.dtype,
    update: tuple[Tensor, Tensor] | None = None,
    onto: Tensor | None = None,
) -> Tensor:
    """left [n, k] times the transpose of right [m, k], each as from `quantize`: [n, m] in `dtype`.

    The rows of `right` may lie apart, as those of a part of joined weights do.
    update: [n, rank] and [m, rank], whose product is added; the second may be a transposed view.
    onto: [n, m], contiguous, to which all is added in place; it is then the result.
    """
    (a, a_scale), (b, b_scale) = left, right
    y = a.new_empty(len(a), len(b), dtype=dtype) if onto is None else onto
    xa, other = update or (a_scale, b_scale)  # any tensor stands for none
    rank = xa.shape[1] if update else 0
    padded = max(LEAST_RANK, triton.next_power_of_2(rank))
    xa = xa if xa.stride(1) == 1 else xa.contiguous()
    scaled_kernel[lambda tile: (triton.cdiv(len(a), tile["ROWS"]) * triton.cdiv(len(b), tile["COLUMNS"]),)](
        a, b, a_scale, b_scale, xa, other, y, len(a), len(b), a.shape[1], b.stride(0),
        *(int(len(scale) > 1) for scale in (a_scale, b_scale)), xa.stride(0), other.stride(0), other.stride(1),
        INT8=a.dtype == torch.int8, RANK=rank, PADDED_RANK=padded, ADD=onto is not None, GROUP=GROUP,
    )  # fmt: skip
    return y
