"""Frozen linear layers whose matmuls run in 8 bits, for speed; nf4 is for memory.

Weights, inputs and output gradients are e4m3; the matmuls give bf16. Only the frozen base is
rounded: the adapter's own matmuls and gradients stay in bf16.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tunesmith.distributed.torch_private import collective, local_slices
from tunesmith.distributed.vocab_parallel import local_part, sharding_groups
from tunesmith.errors import ModelError, first_line
from tunesmith.model.weights import StoredTensor
from tunesmith.quant.frozen_linear import FrozenLinear, linear_names
from tunesmith.quant.frozen_weight import DenseWeight, EightBitWeight, FrozenWeight
from tunesmith.quant.scaled_matmul import (
    E4M3,
    FAST_SUMS,
    SCALING_RECIPES,
    TENSOR_WISE,
    find_scale,
    round_to_e4m3,
)

ALIGNED = 16  # the GPU's 8-bit matmuls take widths that are a multiple of 16
PIECE = 1 << 22  # weights rounded at a time: they are in fp32 then
# An element may be wrong by this share of the usual size of a sum. Sums lose at most 0.3 % of it
# and bf16 rounds by 0.4 % of an element, of which the largest are of six times that size. A scale
# of another row or column is wrong by half or more.
WRONG = 0.1


class Scaling(NamedTuple):
    """How this machine scales 8-bit matmuls: one of SCALING_RECIPES, or None for none; and why."""

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


@torch.no_grad()
def matmul_fault(
    recipe: str,
    device: torch.device,
    shape: tuple[int, int],
    n_rows: int,
    dtype: torch.dtype = torch.bfloat16,
) -> str:
    """What is wrong with a frozen layer and its adapter on n rows, or "".

    One forward and two added backwards are tried. Rows and columns are different powers of two, so
    that scales that are swapped or shifted change the result. Signs are drawn: a sum of one sign
    tells of FAST_SUMS rather than of a fault.
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
    dy = signed(row_powers.outer(torch.ones_like(out_powers)))
    # A sum of signed numbers is of the size of their norm. A LoRA update of rank 1 adds as much.
    update = (signed(row_powers.outer(in_powers.norm().view(1))), signed(out_powers.view(-1, 1)))
    dx_update = (signed(row_powers.outer(out_powers.norm().view(1))), signed(in_powers.view(-1, 1)))

    def is_wrong(result: Tensor, expected: Tensor, column_powers: Tensor, summed: Tensor) -> bool:
        sizes = row_powers.outer(column_powers * summed.norm())
        return not bool(((result - expected).abs() <= WRONG * sizes).all())

    fault = ""
    try:
        encoding = recipe + FAST_SUMS if device.type == "cuda" else recipe
        weight = EightBitWeight.from_dense(encoding, dense)
        y = weight.forward_matmul(x, weight.quantize_input(x), update)
        quantized_dy = weight.quantize_gradient(dy)
        dx = weight.backward_matmul(dy, quantized_dy, None, dx_update)
        dx = weight.backward_matmul(dy, quantized_dy, dx)
        # The powers are e4m3 numbers: only the sums and bf16 round.
        expected_y = x @ dense.T + update[0] @ update[1].T
        expected_dx = 2 * (dy @ dense) + dx_update[0] @ dx_update[1].T
        if is_wrong(y, expected_y, out_powers, in_powers):
            fault = "a wrong result"
        if is_wrong(dx, expected_dx, in_powers, out_powers):
            fault = "a wrong result"
    except Exception as error:  # whatever torch and the driver raise for matmuls that they lack
        fault = first_line(error)
    if not fault:
        return ""
    return f"{n_rows} rows times [{shape[1]}, {shape[0]}]: {fault}"


class EightBitLinear(FrozenLinear):
    """A linear layer with W in 8 bits; empty until `quantize`.

    Attributes (frozen):
        encoding: one of SCALING_RECIPES.
        fast_sums: whether sums of the forward keep fewer bits.
        weight: uint8 [out_features, in_features], the e4m3 codes: torch and FSDP move integers as
            they are.
        scale: fp32 [out_features, 1] or [1, 1], whole on every rank.
        stored: the dense weight in the file that it was read from; None where there is no file.
        read_dense: gives the dense weight, which the layer then computes with instead; None: it
            computes in 8 bits.
    """

    scale: Tensor
    fast_sums: bool = False
    stored: StoredTensor | None = None
    read_dense: Callable[[], Tensor] | None = None

    def __init__(self, base: nn.Linear, recipe: str) -> None:
        """A layer with the weight and bias of `base`; the weight is empty where that is on meta."""
        super().__init__()
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.bias = base.bias
        self.encoding = recipe
        self.compute_dtype = torch.bfloat16
        self.allocate(base.weight.device)
        if not base.weight.is_meta:
            self.quantize(base.weight)

    def allocate(self, device: torch.device) -> None:
        codes = torch.empty(self.out_features, self.in_features, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        scales = 1 if self.encoding == TENSOR_WISE else self.out_features
        # Not persistent: a checkpoint of the base holds dense weights.
        self.register_buffer("scale", torch.empty(scales, 1, device=device), persistent=False)

    def load(self, stored: Mapping[str, StoredTensor | Tensor], name: str) -> None:
        dense = stored[""]
        if len(stored) > 1:
            more = ", ".join(f"{name}.{suffix}" for suffix in stored if suffix)
            raise ModelError(
                f"its weight is stored with {more}",
                where=name,
                why="model.quantize: fp8 needs an unquantized one",
                fix="use the unquantized model, or model.quantize=none",
            )
        self.quantize(dense)
        self.stored = dense if isinstance(dense, StoredTensor) else None

    @torch.no_grad()
    def quantize(self, dense: Tensor | StoredTensor) -> None:
        """Store the whole layer's `dense` [out_features, in_features], rounded to bf16 first.

        A rank reads and rounds the rows that it holds, a piece at a time. Where ranks share the
        layer it is a collective call.
        """
        # FSDP2 shards dimension 0: `rows` below count from the first row of the layer's part,
        # `codes` from the first row of this rank.
        local_rows = local_slices(self.weight)[0]
        codes = local_part(self.weight)
        rows_per_piece = max(1, PIECE // self.in_features)
        pieces = []
        for start in range(local_rows.start, local_rows.stop, rows_per_piece):
            pieces.append(slice(start, min(start + rows_per_piece, local_rows.stop)))

        def store(rows: slice, weight: Tensor, scale: Tensor) -> None:
            rounded = round_to_e4m3(weight, scale).view(torch.uint8)
            codes[rows.start - local_rows.start : rows.stop - local_rows.start] = rounded

        # Zeros: the maximum over ranks leaves alone what a rank does not hold.
        scale = torch.zeros_like(self.scale)
        if self.encoding == TENSOR_WISE:
            # Every piece stays until the one scale is there, which comes from all of them.
            weights = [self.read_rows(dense, rows) for rows in pieces]
            for weight in weights:
                scale = scale.maximum(find_scale(self.encoding, weight))
            scale = self.largest_of_ranks(scale)
            for rows, weight in zip(pieces, weights, strict=True):
                store(rows, weight, scale)
        else:
            # A row's scale depends on that row alone, so one piece is in memory at a time.
            for rows in pieces:
                weight = self.read_rows(dense, rows)
                scale[rows] = find_scale(self.encoding, weight)
                store(rows, weight, scale[rows])
            scale = self.largest_of_ranks(scale)
        self.scale.copy_(scale)

    def read_rows(self, dense: Tensor | StoredTensor, rows: slice) -> Tensor:
        """Rows of the layer's part of `dense`, in bf16, where the matmuls are."""
        return self.part_of(dense, rows).to(self.scale.device, torch.bfloat16)

    def largest_of_ranks(self, scale: Tensor) -> Tensor:
        """The largest scales of the ranks that have shards of the weight.

        The scales of rows of other ranks are 0.
        """
        for group in sharding_groups(self.weight):
            scale = collective("all_reduce", scale, "max", group.group_name)
        return scale

    def frozen_weight(self) -> FrozenWeight:
        shape = (self.out_features, self.in_features)
        if self.read_dense is not None:
            return DenseWeight("dense", [self.read_dense()], shape)
        # The bytes are e4m3 already: a view, nothing is converted.
        codes = local_part(self.weight).view(E4M3)
        encoding = self.encoding + FAST_SUMS if self.fast_sums else self.encoding
        return EightBitWeight(encoding, [codes, self.scale], shape)


def eight_bit_names(model: nn.Module, skip: Collection[nn.Module] = ()) -> list[str]:
    """Full names of the linear layers that can be converted to 8 bits; without the output layer.

    These are dense and frozen, and of widths that the matmuls take.

    Args:
        skip: layers that will be trained in full, which a model on meta does not tell.
    """
    names = []
    for name in linear_names(model, head=False):
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear) or layer.weight.requires_grad or layer in skip:
            continue
        if layer.in_features % ALIGNED == 0 and layer.out_features % ALIGNED == 0:
            names.append(name)
    return names


def eight_bit_shapes(model: nn.Module) -> list[tuple[int, int]]:
    """(out_features, in_features) of the layers of `eight_bit_names`, each once; on meta or not."""
    shapes = set()
    for name in eight_bit_names(model):
        out_features, in_features = model.get_parameter(f"{name}.weight").shape
        shapes.add((out_features, in_features))
    return sorted(shapes)
