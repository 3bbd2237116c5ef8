"""Triton kernels for the rows of experts. Each kernel reads and writes every byte only once.

They are used on GPUs that multiply all experts in one kernel. On an H200, the sum of rows takes
0.15 ms, and `embedding_bag` takes 0.73 ms. The other kernels were not timed separately. For
comparison, `index_select` reached half of the memory bandwidth, and `grouped_mm` followed by an
addition reads and writes the result rows twice.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 1024  # columns of a row per Triton program
TILE_ROWS, TILE_COLUMNS = 64, 128
MIN_RANK = 16  # minimum size that `tl.dot` supports
# Maximum rank. Larger ranks were not measured. Above 128, a tile of factors does not fit into the
# shared memory of a multiprocessor.
MAX_RANK = 16


def copy_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Return x[rows], [len(rows), width]. x is contiguous, [n, width]. rows is int64."""
    width = x.shape[1]
    out = x.new_empty(len(rows), width)
    grid = (len(rows), triton.cdiv(width, COLUMNS))
    _copy_rows[grid](x, rows, out, width, BLOCK=COLUMNS)
    return out


def add_chosen_rows(x: Tensor, places: Tensor) -> Tensor:
    """Return the sum of the rows x[places[i]] for each token i: [n, width] in the dtype of x.

    The rows are added in order and in fp32.

    Args:
        x: [rows, width], contiguous.
        places: int64 [n, k].
    """
    width = x.shape[1]
    n, k = places.shape
    out = x.new_empty(n, width)
    grid = (n, triton.cdiv(width, COLUMNS))
    _add_chosen_rows[grid](x, places, out, width, K=k, BLOCK=COLUMNS)
    return out


def add_low_product(y: Tensor, low: Tensor, factors: Tensor, offsets: Tensor) -> None:
    """Add the product `low N_e` to the rows of each expert e of y, in place.

    Args:
        y: [rows, width], contiguous.
        low: [rows, rank], contiguous.
        factors: N [experts, rank, width], contiguous.
        offsets: int32 [experts], the end of each expert's rows.
    """
    experts, rank, width = factors.shape
    # Upper bound of the number of tiles: only the last tile of each expert can be partial.
    grid = (triton.cdiv(len(y), TILE_ROWS) + experts,)
    _add_low_product[grid](
        y,
        low,
        factors,
        offsets,
        width,
        experts,
        rank,
        EXPERTS=triton.next_power_of_2(experts),
        RANK=max(MIN_RANK, triton.next_power_of_2(rank)),
        ROWS=TILE_ROWS,
        COLUMNS=TILE_COLUMNS,
    )


@triton.jit
def _copy_rows(x, rows, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    taken = tl.load(rows + row)
    values = tl.load(x + taken * width + columns, inside)
    tl.store(out + row * width + columns, values, inside)


@triton.jit
def _add_chosen_rows(x, places, out, width, K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(K):
        place = tl.load(places + row * K + i)
        values = tl.load(x + place * width + columns, inside, other=0.0)
        total += values.to(tl.float32)
    values = total.to(out.dtype.element_ty)
    tl.store(out + row * width + columns, values, inside)


@triton.jit
def _add_low_product(
    y, low, factors, offsets, width, experts, rank,
    EXPERTS: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    expert, first, count = _tile_of_expert(offsets, experts, EXPERTS, ROWS)
    # Use int64 only for the offsets of the tile. Offsets within the tile are small.
    y += first.to(tl.int64) * width
    low += first.to(tl.int64) * rank
    factors += expert.to(tl.int64) * rank * width
    row = tl.arange(0, ROWS)[:, None]
    is_row = row < count
    ranks = tl.arange(0, RANK)
    is_rank = ranks < rank
    low_rows = tl.load(low + row * rank + ranks[None, :], is_row & is_rank[None, :], other=0.0)
    for column in range(0, width, COLUMNS):
        columns = (column + tl.arange(0, COLUMNS))[None, :]
        is_column = columns < width
        factor_places = factors + ranks[:, None] * width + columns
        factor = tl.load(factor_places, is_rank[:, None] & is_column, other=0.0)
        inside = is_row & is_column
        places = y + row * width + columns
        total = tl.load(places, inside, other=0.0).to(tl.float32)
        total = tl.dot(low_rows, factor, total, input_precision="ieee")
        tl.store(places, total.to(y.dtype.element_ty), inside)


@triton.jit
def _tile_of_expert(offsets, experts, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """Return the expert of this program, the first row of its tile, and the number of rows from
    this row to the end of the expert.

    Tiles of ROWS rows are counted expert after expert. Programs after the last tile have no rows.
    """
    tile = tl.program_id(0)
    numbers = tl.arange(0, EXPERTS)
    is_expert = numbers < experts
    ends = tl.load(offsets + numbers, is_expert, other=0)
    starts = tl.load(offsets + numbers - 1, is_expert & (numbers > 0), other=0)
    tiles = tl.where(is_expert, (ends - starts + ROWS - 1) // ROWS, 0)
    last_tiles = tl.cumsum(tiles, 0)
    # The number of experts whose tiles all come before this tile is the index of its expert.
    is_before = is_expert & (last_tiles <= tile)
    expert = tl.sum(is_before.to(tl.int32), 0)
    is_own = numbers == expert
    first_tile = tl.sum(tl.where(is_own, last_tiles - tiles, 0), 0)
    start = tl.sum(tl.where(is_own, starts, 0), 0)
    first = start + (tile - first_tile) * ROWS
    end = tl.sum(tl.where(is_own, ends, 0), 0)
    count = tl.where(expert < experts, end - first, 0)
    return tl.minimum(expert, experts - 1), first, count
