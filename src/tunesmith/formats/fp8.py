"""Frozen weights in 8 bits for products in 8 bits, for speed; nf4 is for memory.

Weights, inputs and output gradients are e4m3; the matmuls give bf16. Only the frozen base is
rounded: the adapter's own matmuls and gradients stay in bf16.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tunesmith.distributed.torch_private import collective, local_slices
from tunesmith.distributed.vocab_parallel import local_part, sharding_groups
from tunesmith.errors import ModelError, first_line
from tunesmith.formats.base import (
    E4M3,
    E4M3_MAX,
    LEAST_SCALE,
    Format,
    Forms,
    FrozenWeight,
    TensorForm,
    Update,
)
from tunesmith.formats.scaled_matmul import (
    SCALING_RECIPES,
    TENSOR_WISE,
    find_largest,
    find_scale,
    quantize,
    round_to_e4m3,
    scaled_matmul,
)

if TYPE_CHECKING:
    from tunesmith.formats.base import Stored, StoredParts
    from tunesmith.formats.linear import FrozenLinear

MAX_FP8_ROUNDED_WEIGHTS = 1 << 22  # weights rounded at a time: they are in fp32 then
# A row or a column may be wrong by this share of its norm. Fast sums and bf16 lose 0.5 % of it; a
# scale of another row or column is wrong by half or more. No element is judged alone: of the
# sixteen million of a large product some lose a tenth, on an H200 that multiplies rightly.
WRONG_SHARE = 0.05


class Fp8(Format):
    """tensors: the e4m3 codes of W [out, in], and their scale: fp32 [out, 1], or [1, 1] of all.

    dx sums over the rows of W. Their scales are factors within that sum, where no matmul applies
    them, so they are multiplied into dy before it is rounded. So the layers of one input need one
    product: a longer sum. A GPU multiplies along contiguous rows only: the backward makes W^T of
    the codes.

    Attributes:
        recipe: one of `scaled_matmul.SCALING_RECIPES`.
        fast_sums: sums of the forward keep fewer bits. Hopper's cut each product to the 13 bits
            that the running sum has, which takes a tenth to a fifth off the time; sums of one sign
            lose 7.5 % over 4,096 products and 21.6 % over 14,336, others 0.3 % (measured on an
            H200).
    """

    name = "fp8"
    rounds = True

    def __init__(self, recipe: str, fast_sums: bool = False) -> None:
        super().__init__(recipe, fast_sums)
        self.recipe = recipe
        self.fast_sums = fast_sums

    def matrix_forms(self, rows: int, columns: int) -> Forms:
        scales = 1 if self.recipe == TENSOR_WISE else rows
        return {
            "weight": TensorForm((rows, columns), torch.uint8, is_shared=True, read_as=E4M3),
            # Not persistent: a checkpoint of the base holds dense weights.
            "scale": TensorForm((scales, 1)),
        }

    def round(self, dense: Tensor) -> FrozenWeight:
        """Quantize W [out, in] in the dtype of x."""
        return FrozenWeight(self, quantize(self.recipe, dense), (dense.shape[0], dense.shape[1]))

    def decode(self, weight: FrozenWeight, dtype: torch.dtype) -> Tensor:
        codes, scale = weight.tensors
        return (codes.float() * scale).to(dtype)

    # ---- products

    def quantize_input(self, x: Tensor) -> list[Tensor]:
        return list(quantize(self.recipe, x))

    def quantize_gradients(
        self, weights: Sequence[FrozenWeight], dys: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return the factors of the one product that sums dy_i W_i over all layers.

        Returns:
            The codes of the dy_i times the scales of W_i, side by side [n, sum of out_i], the one
            scale of all layers ([n, 1], or [1, 1]), and the codes of the W_i^T side by side
            [in, sum of out_i]. Codes are uint8 here.
        """
        layers = list(zip(weights, dys, strict=True))
        # [n, out_i] times [1, out_i], or times [1, 1]. Multiplied again below: kept, it would be
        # fp32 for all layers.
        of_layers = [find_largest(self.recipe, dy * weight.tensors[1].T) for weight, dy in layers]
        largest = functools.reduce(torch.maximum, of_layers).clamp(min=LEAST_SCALE * E4M3_MAX)
        # Not by the scale: Inductor writes a part of `torch.cat` where dy is made, and reads dy no
        # second time, only if that part reads a reduction. What the operator takes is none.
        factor = E4M3_MAX / largest
        codes = []
        transposed = []
        for weight, dy in layers:
            weight_codes, weight_scale = weight.tensors
            codes.append((dy * weight_scale.T * factor).to(E4M3).view(torch.uint8))
            # Contiguous: of a single part the compiler would drop the `cat`, and pass a view on.
            transposed.append(weight_codes.view(torch.uint8).t().contiguous())
        return [torch.cat(codes, 1), largest / E4M3_MAX, torch.cat(transposed, 1)]

    def forward_matmul(
        self, weight: FrozenWeight, x: Tensor, quantized: Sequence[Tensor], update: Update
    ) -> Tensor:
        y = scaled_matmul(self.recipe, quantized, weight.tensors, x.dtype, fast_sums=self.fast_sums)
        if update is not None:
            xa, b = update
            y.addmm_(xa, b.T)
        return y

    def backward_matmul(
        self,
        weights: Sequence[FrozenWeight],
        dys: Sequence[Tensor],
        quantized: Sequence[Tensor],
        update: Update,
    ) -> Tensor:
        codes, scale, transposed = quantized
        # The scales of W are in `codes`.
        ones = scale.new_ones(1 if self.recipe == TENSOR_WISE else len(transposed), 1)
        left, right = (codes.view(E4M3), scale), (transposed.view(E4M3), ones)
        dx = scaled_matmul(self.recipe, left, right, dys[0].dtype)
        if update is not None:
            d_xa, a_transposed = update
            dx.addmm_(d_xa, a_transposed.T)
        return dx

    # ---- loading

    def load_matrix(self, layer: FrozenLinear, stored: StoredParts, name: str) -> None:
        dense = stored[""]
        if len(stored) > 1:
            more = ", ".join(f"{name}.{suffix}" for suffix in stored if suffix)
            raise ModelError(
                f"its weight is stored with {more}",
                where=name,
                why="model.quantize: fp8 needs an unquantized one",
                fix="use the unquantized model, or model.quantize=none",
            )
        self.quantize(layer, dense)
        layer.rounded_from = None if isinstance(dense, Tensor) else dense

    @torch.no_grad()
    def quantize(self, layer: FrozenLinear, dense: Stored) -> None:
        """Store the whole layer's `dense` [out_features, in_features], rounded to bf16 first.

        A rank reads and rounds the rows that it holds, a piece at a time. Where ranks share the
        layer it is a collective call.
        """
        # FSDP2 shards dimension 0: `rows` below count from the first row of the layer's part,
        # `codes` from the first row of this rank.
        local_rows = local_slices(layer.weight)[0]
        codes = local_part(layer.weight)
        rows_per_piece = max(1, MAX_FP8_ROUNDED_WEIGHTS // layer.in_features)
        pieces = []
        for start in range(local_rows.start, local_rows.stop, rows_per_piece):
            pieces.append(slice(start, min(start + rows_per_piece, local_rows.stop)))

        def store(rows: slice, weight: Tensor, scale: Tensor) -> None:
            rounded = round_to_e4m3(weight, scale).view(torch.uint8)
            codes[rows.start - local_rows.start : rows.stop - local_rows.start] = rounded

        # Zeros: the maximum over ranks leaves alone what a rank does not hold.
        scale = torch.zeros_like(layer.get_buffer("scale"))
        if self.recipe == TENSOR_WISE:
            # Every piece stays until the one scale is there, which comes from all of them.
            weights = [read_bf16_rows(layer, dense, rows) for rows in pieces]
            for weight in weights:
                scale = scale.maximum(find_scale(self.recipe, weight))
            scale = _largest_of_ranks(layer, scale)
            for rows, weight in zip(pieces, weights, strict=True):
                store(rows, weight, scale)
        else:
            # A row's scale depends on that row alone, so one piece is in memory at a time.
            for rows in pieces:
                weight = read_bf16_rows(layer, dense, rows)
                scale[rows] = find_scale(self.recipe, weight)
                store(rows, weight, scale[rows])
            scale = _largest_of_ranks(layer, scale)
        layer.get_buffer("scale").copy_(scale)


def read_bf16_rows(layer: FrozenLinear, dense: Stored, rows: slice) -> Tensor:
    """Rows of the layer's part of `dense`, in bf16, where the matmuls are."""
    return layer.part_of(dense, rows).to(layer.get_buffer("scale").device, torch.bfloat16)


def _largest_of_ranks(layer: FrozenLinear, scale: Tensor) -> Tensor:
    """The largest scales of the ranks that have shards of the weight.

    The scales of rows of other ranks are 0.
    """
    for group in sharding_groups(layer.weight):
        scale = collective("all_reduce", scale, "max", group.group_name)
    return scale


# ---- which recipe a machine takes


class Scaling(NamedTuple):
    """This machine's scaling of 8-bit matmuls: one of SCALING_RECIPES, or None; and why."""

    recipe: str | None
    why: str


def select_scaling(
    device: torch.device,
    shapes: Sequence[tuple[int, int]] = ((48, 32),),
    rows: Sequence[int] = (1, 16, 40),
) -> Scaling:
    """The first scaling recipe whose matmuls are right on this device: by trying, not by version.

    sm_120 and sm_121 have fp8 tensor-wise only. All layers take one recipe.

    Args:
        shapes: (out_features, in_features) of the model's layers.
        rows: of x, each tried with each shape.
    """
    faults: list[str] = []
    for recipe in SCALING_RECIPES:
        fault = ""
        # Few and many rows take different kernels, and one that is wrong rules the recipe out.
        for shape, n_rows in product(shapes, rows):
            fault = matmul_fault(recipe, device, shape, n_rows)
            if fault:
                break
        if not fault:
            return Scaling(recipe, "; ".join([f"{recipe} matmuls run here", *faults]))
        faults.append(f"{recipe} does not: {fault}")
    return Scaling(None, f"this device has no fp8 matmuls: {'; '.join(faults)}")


def _wrong_share(result: Tensor, expected: Tensor, sizes: Tensor) -> float:
    """Find how much the worst row or column is off; sizes: of the elements, [n, m]."""
    wrong = (result.float() - expected.float()) / sizes
    # Beside the usual element and not the row's or column's own: that of one element may be 0.
    usual = (expected.float() / sizes).square().mean().sqrt()
    worst = [wrong.square().mean(dim).max().sqrt() for dim in (1, 0)]
    return float(torch.stack(worst).max() / usual)


@torch.no_grad()
def matmul_fault(
    recipe: str,
    device: torch.device,
    shape: tuple[int, int],
    n_rows: int,
    dtype: torch.dtype = torch.bfloat16,
) -> str:
    """Find what is wrong with a frozen layer on n rows, or return "".

    One forward and the backward of a group of two layers are tried. Rows and columns are different
    powers of two, so that scales that are swapped or shifted change the result. Signs are drawn: a
    sum of one sign tells of fast sums rather than of a fault.
    """
    generator = torch.Generator(device).manual_seed(0)

    def powers(count: int, period: int) -> Tensor:
        return torch.arange(count, device=device).remainder(period).float().exp2()

    def signed(sizes: Tensor) -> Tensor:
        signs = torch.randint(2, sizes.shape, generator=generator, device=device)
        return (sizes * (2 * signs - 1)).to(dtype)

    row_powers = powers(n_rows, 7)
    out_powers = powers(shape[0], 5)
    in_powers = powers(shape[1], 3)
    dense = signed(out_powers.outer(in_powers))
    x = signed(row_powers.outer(torch.ones_like(in_powers)))
    dys = [signed(row_powers.outer(torch.ones_like(out_powers))) for _ in range(2)]
    fault = ""
    try:
        kind = Fp8(recipe, fast_sums=device.type == "cuda")
        weights = [kind.round(dense), kind.round(dense / 2)]
        y = kind.forward_matmul(weights[0], x, kind.quantize_input(x), None)
        dx = kind.backward_matmul(weights, dys, kind.quantize_gradients(weights, dys), None)
        # The powers are e4m3 numbers: only the sums and bf16 round.
        expected_dx = dys[0] @ dense + dys[1] @ (dense / 2)
        shares = [
            _wrong_share(y, x @ dense.T, row_powers.outer(out_powers)),
            _wrong_share(dx, expected_dx, row_powers.outer(in_powers)),
        ]
        if not all(share <= WRONG_SHARE for share in shares):  # NaN is wrong too
            fault = f"a wrong result: off by {shares[0]:.1%} forward, {shares[1]:.1%} backward"
    except Exception as error:  # whatever torch and the driver raise for matmuls that they lack
        fault = first_line(error)
    if not fault:
        return ""
    return f"{n_rows} rows times [{shape[1]}, {shape[0]}]: {fault}"
