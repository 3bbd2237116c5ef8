"""Frozen weights in 8 bits for 8-bit matmuls. They make training faster. To save memory, nf4 is the
better format.

Weights, inputs and output gradients are rounded to e4m3, and the matmuls return bf16. Only the
frozen base is rounded: the matmuls and gradients of the adapter are in bf16.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tunesmith.distributed.torch_private import local_slices
from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.errors import ModelError, first_line
from tunesmith.formats.base import (
    E4M3,
    E4M3_MAX,
    MIN_SCALE,
    Format,
    Forms,
    FrozenWeight,
    TensorForm,
    Update,
    max_over_ranks,
    row_pieces,
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
from tunesmith.formats.stored import Stored, StoredParts
from tunesmith.units import count_of

if TYPE_CHECKING:  # these modules import the formats
    from tunesmith.formats.linear import FrozenLinear

MAX_FP8_ROUNDED_WEIGHTS = (
    1 << 22
)  # maximum number of weights that are rounded in one step; they are in fp32
# Maximum error of a row or column, as a fraction of its norm. `fast_sums` and rounding to bf16 give
# an error of 0.5 %. If a row or column has a wrong scale, the error is half the norm or more.
# Single elements are not checked: of the 16 million elements of a large product, some are off by a
# tenth even on an H200 that computes correctly.
MAX_RELATIVE_ERROR = 0.05


class Fp8(Format):
    """FP8 format. Its tensors are the e4m3 codes of W [out, in] and their scales, fp32 [out, 1] or
    [1, 1].

    dx is a sum over the rows of W. The scale of a row is a factor of one term of this sum, so a
    matmul cannot apply it. Therefore dy is multiplied by the scales before dy is rounded. Layers
    with the same input then need only one matmul, whose sum runs over the rows of all layers. A GPU
    can only multiply along contiguous rows, so the backward pass transposes the codes of W.

    Attributes:
        recipe: one of `scaled_matmul.SCALING_RECIPES`.
        fast_sums: whether the matmuls of the forward pass accumulate with fewer bits. Hopper GPUs
            then truncate each product to the 13 bits of the running sum, which saves 10 to 20 % of
            the time. If all products have the same sign, the error is 7.5 % for 4,096 products and
            21.6 % for 14,336. With mixed signs, the error is 0.3 % (measured on an H200).
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
            # The scale is not in `state_dict`: it is computed when a dense weight is loaded.
            "scale": TensorForm((scales, 1)),
        }

    def round(self, dense: Tensor) -> FrozenWeight:
        """Quantize W [out, in]. W has the dtype of x."""
        return FrozenWeight(self, quantize(self.recipe, dense), (dense.shape[0], dense.shape[1]))

    def decode(self, weight: FrozenWeight, dtype: torch.dtype) -> Tensor:
        codes, scale = weight.tensors
        return (codes.float() * scale).to(dtype)

    # ---- matmuls

    def quantize_input(self, x: Tensor) -> list[Tensor]:
        return list(quantize(self.recipe, x))

    def quantize_gradients(
        self, weights: Sequence[FrozenWeight], dys: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return the operands of one matmul that computes the sum of dy_i W_i over all layers.

        Returns:
            The codes of dy_i times the scales of W_i, concatenated to [n, sum of out_i]; the common
            scale of all layers ([n, 1] or [1, 1]); and the codes of W_i^T, concatenated to [in, sum
            of out_i]. The codes have dtype uint8.
        """
        layers = list(zip(weights, dys, strict=True))
        # Multiply dy [n, out_i] by the scales, [1, out_i] or [1, 1]. The product is computed again
        # below, because storing it for all layers would take more memory: it is fp32.
        layer_maxima = []
        for weight, dy in layers:
            _, weight_scale = weight.tensors
            layer_maxima.append(find_largest(self.recipe, dy * weight_scale.T))
        largest = functools.reduce(torch.maximum, layer_maxima)
        largest = largest.clamp(min=MIN_SCALE * E4M3_MAX)

        # Multiply by `factor` instead of dividing by the returned scale. Inductor fuses a part of
        # `torch.cat` into the kernel that produces dy only if the part reads the result of a
        # reduction. The returned scale is an input of the operator and does not count as a
        # reduction.
        factor = E4M3_MAX / largest

        codes = []
        transposed = []
        for weight, dy in layers:
            weight_codes, weight_scale = weight.tensors
            codes.append((dy * weight_scale.T * factor).to(E4M3).view(torch.uint8))
            # Make the codes contiguous. If there is only one layer, the compiler removes the `cat`
            # and would pass a view to the operator.
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
        # `codes` already includes the scales of W, so the second factor has scales of 1.
        scales = len(transposed)
        if self.recipe == TENSOR_WISE:
            scales = 1
        ones = scale.new_ones(scales, 1)
        left = (codes.view(E4M3), scale)
        right = (transposed.view(E4M3), ones)

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
                f"the weight is already quantized: it is stored with {more}",
                where=name,
                why="model.quantize: fp8 needs an unquantized model",
                fix="use the unquantized model, or set model.quantize=none",
            )
        self.quantize(layer, dense)
        layer.rounded_from = None if isinstance(dense, Tensor) else dense

    @torch.no_grad()
    def quantize(self, layer: FrozenLinear, dense: Stored) -> None:
        """Quantize and store the entire layer's `dense` [out_features, in_features].

        The weight is rounded to bf16 first. A rank reads and rounds only its own rows, in pieces.
        This is a collective call if the layer is sharded.
        """
        # FSDP2 shards dimension 0. Below, `rows` are relative to the first row of the layer's
        # tensor-parallel shard, but `codes` starts at the first row of this rank.
        local_rows = local_slices(layer.weight)[0]
        codes = local_part(layer.weight)
        first = local_rows.start
        pieces = row_pieces(first, local_rows.stop, layer.in_features, MAX_FP8_ROUNDED_WEIGHTS)

        def store(rows: slice, weight: Tensor, scale: Tensor) -> None:
            rounded = round_to_e4m3(weight, scale).view(torch.uint8)
            codes[rows.start - first : rows.stop - first] = rounded

        # Start with zeros: each rank fills in the scales of its own rows, and the maximum over all
        # ranks then gives the scales of all rows.
        scale = torch.zeros_like(layer.get_buffer("scale"))
        if self.recipe == TENSOR_WISE:
            # Keep all pieces in memory until their common scale is known.
            weights = [(rows, read_bf16_rows(layer, dense, rows)) for rows in pieces]
            for _, weight in weights:
                scale = scale.maximum(find_scale(self.recipe, weight))
            scale = max_over_ranks(scale, layer.weight)
            for rows, weight in weights:
                store(rows, weight, scale)
        else:
            # The scale of a row depends only on this row, so only one piece is in memory at a time.
            for rows in pieces:
                weight = read_bf16_rows(layer, dense, rows)
                scale[rows] = find_scale(self.recipe, weight)
                store(rows, weight, scale[rows])
            scale = max_over_ranks(scale, layer.weight)
        layer.get_buffer("scale").copy_(scale)


def read_bf16_rows(layer: FrozenLinear, dense: Stored, rows: slice) -> Tensor:
    """Return rows of the layer's shard of `dense` in bf16, on the device of the matmuls."""
    return layer.part_of(dense, rows).to(layer.get_buffer("scale").device, torch.bfloat16)


# ---- selection of the scaling recipe


class Scaling(NamedTuple):
    """The fp8 scaling recipe that was selected for this machine, and the reason.

    The recipe is None if fp8 matmuls do not work on this machine.
    """

    recipe: str | None
    why: str


def select_scaling(
    device: torch.device,
    shapes: Sequence[tuple[int, int]] = ((48, 32),),
    rows: Sequence[int] = (1, 16, 40),
) -> Scaling:
    """Return the first scaling recipe whose matmuls give correct results on this device.

    Each recipe is tested on the device: for example, sm_120 and sm_121 only support tensor-wise
    fp8. All layers use the same recipe.

    Args:
        shapes: (out_features, in_features) of the model's layers.
        rows: numbers of rows of x. Each number is tested with each shape.
    """
    faults: list[str] = []
    for recipe in SCALING_RECIPES:
        fault = ""
        # Small and large numbers of rows use different kernels. One wrong kernel excludes the
        # recipe.
        for shape, n_rows in product(shapes, rows):
            fault = matmul_fault(recipe, device, shape, n_rows)
            if fault:
                break
        if not fault:
            return Scaling(recipe, "; ".join([f"this device supports {recipe} matmuls", *faults]))
        faults.append(f"{recipe} fails for {fault}")
    return Scaling(None, f"this device has no fp8 matmuls: {'; '.join(faults)}")


def _relative_error(result: Tensor, expected: Tensor, sizes: Tensor) -> float:
    """Return the largest relative error of a row or column.

    Args:
        sizes: expected magnitude of each element, [n, m].
    """
    right = expected.float()
    squares = ((result.float() - right) / sizes).square()
    # Divide by the average over all elements. The average of a single row or column could be 0.
    usual = (right / sizes).square().mean().sqrt()
    worst_row = squares.mean(1).max().sqrt()
    worst_column = squares.mean(0).max().sqrt()
    return float(worst_row.maximum(worst_column) / usual)


@torch.no_grad()
def matmul_fault(
    recipe: str,
    device: torch.device,
    shape: tuple[int, int],
    n_rows: int,
) -> str:
    """Test the matmuls of a frozen layer on n rows. Return a description of the problem, or "" if
    the results are correct.

    The test runs one forward pass, and the backward pass of a group of two layers. The magnitudes
    of rows and columns are different powers of two, so that swapped or shifted scales change the
    result. The signs are random, because fast sums of products with the same sign have a large
    error, which the test would report as a problem.
    """
    generator = torch.Generator(device).manual_seed(0)

    def powers(count: int, period: int) -> Tensor:
        return torch.arange(count, device=device).remainder(period).float().exp2()

    def signed(sizes: Tensor) -> Tensor:
        signs = torch.randint(2, sizes.shape, generator=generator, device=device)
        return (sizes * (2 * signs - 1)).to(torch.bfloat16)

    row_powers = powers(n_rows, 7)
    out_powers = powers(shape[0], 5)
    in_powers = powers(shape[1], 3)
    dense = signed(out_powers.outer(in_powers))
    half = dense / 2
    x = signed(row_powers.outer(torch.ones_like(in_powers)))
    dys = [signed(row_powers.outer(torch.ones_like(out_powers))) for _ in range(2)]
    fault = ""
    try:
        kind = Fp8(recipe, fast_sums=device.type == "cuda")
        weights = [kind.round(dense), kind.round(half)]
        y = kind.forward_matmul(weights[0], x, kind.quantize_input(x), None)
        gradients = kind.quantize_gradients(weights, dys)
        dx = kind.backward_matmul(weights, dys, gradients, None)

        # The powers of two are exact in e4m3, so the only rounding is in the sums and in bf16.
        expected_dx = dys[0] @ dense + dys[1] @ half
        forward = _relative_error(y, x @ dense.T, row_powers.outer(out_powers))
        backward = _relative_error(dx, expected_dx, row_powers.outer(in_powers))
        # Use `not (... <= ...)` because it is also true if an error is NaN.
        if not (forward <= MAX_RELATIVE_ERROR and backward <= MAX_RELATIVE_ERROR):
            fault = f"a wrong result: off by {forward:.1%} forward, {backward:.1%} backward"
    except Exception as error:  # errors of torch and the driver for missing matmuls have many types
        fault = first_line(error)
    if not fault:
        return ""
    return f"{count_of(n_rows, 'row')} times [{shape[1]}, {shape[0]}]: {fault}"
