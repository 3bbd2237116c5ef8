"""Frozen linear layers whose matmuls run in 8 bits, for speed; nf4 is for memory.

Weights, inputs and output gradients are e4m3; the matmuls give bf16. Only the frozen base is rounded: the
adapter's own matmuls and gradients stay in bf16.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product as pairs
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tunesmith.errors import ModelError, first_line
from tunesmith.model.weights import StoredTensor
from tunesmith.private import collective, local_slices
from tunesmith.quant.frozen_matmul import FrozenLinear
from tunesmith.quant.frozen_weight import DenseWeight, EightBitWeight, FrozenWeight
from tunesmith.quant.scaled_matmul import E4M3, KINDS, TENSOR_WISE, find_scale, round_to_e4m3
from tunesmith.sharded import local_part, sharding_groups

ALIGNED = 16  # the GPU's 8-bit matmuls take widths that are a multiple of 16
PIECE = 1 << 22  # weights rounded at a time: they are in fp32 then


class ScalingRecipe(NamedTuple):
    """How this machine scales 8-bit matmuls: one of KINDS, or None for none; and why."""

    kind: str | None
    why: str


def select_scaling(
    device: torch.device,
    shapes: Sequence[tuple[int, int]] = ((48, 32),),
    rows: Sequence[int] = (1, 16, 40),
) -> ScalingRecipe:
    """The first kind of `model.quantize: fp8` whose matmuls are right on this device: by trying, not by version.

    sm_120 and sm_121 have fp8 tensor-wise only. All layers take one kind.

    Args:
        shapes: (out_features, in_features) of the model's layers; rows: of x, each tried with each shape.
    """
    faults: list[str] = []
    for kind in KINDS:
        trials = (matmul_fault(kind, device, shape, n) for shape, n in pairs(shapes, rows))
        fault = next(filter(None, trials), "")
        if not fault:
            return ScalingRecipe(kind, "; ".join([f"{kind} matmuls run here", *faults]))
        faults.append(f"{kind} does not: {fault}")
    return ScalingRecipe(None, f"this device has no fp8 matmuls: {'; '.join(faults)}")


@torch.no_grad()
def matmul_fault(
    kind: str,
    device: torch.device,
    shape: tuple[int, int],
    n: int,
    dtype: torch.dtype = torch.bfloat16,
) -> str:
    """What is wrong with a forward and two added backwards of one frozen layer and its adapter on n rows, or "".

    Rows and columns are different powers of two, so that scales that are swapped or shifted change the result.
    """

    def powers(count: int, period: int) -> Tensor:
        return torch.arange(count, device=device).remainder(period).float().exp2()

    (n_out, n_in), of_x, of_out, of_in = shape, powers(n, 7), powers(shape[0], 5), powers(shape[1], 3)
    of_y, of_dx = of_out * of_in.sum(), of_in * of_out.sum()
    # xa and B, d_xa and A^T: a column each, which is as much again as the frozen product.
    sides = ((of_x, n_in), (of_x, n_out), (of_x, 1), (of_y, 1), (of_dx, 1))
    x, dy, xa, b, a = (left.outer(torch.ones(width, device=device)).to(dtype) for left, width in sides)
    try:
        weight = EightBitWeight.from_dense(kind, of_out.outer(of_in).to(dtype))
        y = weight.forward_matmul(x, weight.quantize_input(x), (xa, b))
        dy8 = weight.quantize_gradient(dy)
        dx = weight.backward_matmul(dy, dy8, weight.backward_matmul(dy, dy8, None, (xa, a)))
        expected = (2 * of_x.outer(of_y), 3 * of_x.outer(of_dx))
        # The powers are e4m3 numbers: only bf16 rounds.
        right = all(torch.allclose(*pair, rtol=0.02) for pair in zip((y.float(), dx.float()), expected, strict=True))
        fault = "" if right else "a wrong result"
    except Exception as error:  # whatever torch and the driver raise for products that they do not have
        fault = first_line(error)
    return fault and f"{n} rows times [{n_in}, {n_out}]: {fault}"


class EightBitLinear(FrozenLinear):
    """A linear layer with W in 8 bits; empty until `quantize`.

    Attributes (frozen):
        weight: uint8 [out_features, in_features], the e4m3 codes: torch and FSDP move integers as they are.
        scale: fp32 [out_features, 1] or [1, 1], whole on every rank.
        stored: the dense weight in the file that it was read from; None where it was drawn or given.
        read_dense: gives the dense weight, which the layer then computes with instead; None: it computes in 8 bits.
    """

    scale: Tensor
    stored: StoredTensor | None = None
    read_dense: Callable[[], Tensor] | None = None

    def __init__(self, base: nn.Linear, kind: str) -> None:
        """An empty layer in the place of one on meta, else one with its weight. The bias is taken over."""
        super().__init__()
        self.in_features, self.out_features, self.bias = base.in_features, base.out_features, base.bias
        self.kind, self.compute_dtype = kind, torch.bfloat16
        self.allocate(base.weight.device)
        if not base.weight.is_meta:
            self.quantize(base.weight)

    def allocate(self, device: torch.device) -> None:
        codes = torch.empty(self.out_features, self.in_features, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        scales = 1 if self.kind == TENSOR_WISE else self.out_features
        # Not persistent: a checkpoint of the base holds dense weights.
        self.register_buffer("scale", torch.empty(scales, 1, device=device), persistent=False)

    def load(self, stored: Mapping[str, StoredTensor | Tensor], name: str) -> None:
        dense = stored[""]
        if len(stored) > 1:
            more = ", ".join(f"{name}.{suffix}" for suffix in stored if suffix)
            why = "model.quantize: fp8 takes a dense one"
            raise ModelError(f"its weight is stored with {more}", where=name, why=why)
        self.quantize(dense)
        self.stored = dense if isinstance(dense, StoredTensor) else None

    @torch.no_grad()
    def quantize(self, dense: Tensor | StoredTensor) -> None:
        """Store the whole layer's `dense` [out_features, in_features], rounded to bf16 first.

        A rank reads and rounds the rows that it holds, a piece at a time. Where ranks share the layer it is a collective
        call.
        """
        first, end = local_slices(self.weight)[0].start, local_slices(self.weight)[0].stop
        step = max(1, PIECE // self.in_features)
        parts = [slice(start, min(start + step, end)) for start in range(first, end, step)]
        pieces: Iterable[Tensor] = (self.read_rows(dense, part) for part in parts)
        scale = torch.zeros_like(self.scale)
        if self.kind == TENSOR_WISE:
            pieces = list(pieces)  # their one scale comes from all of them
            for piece in pieces:
                scale = scale.maximum(find_scale(self.kind, piece))
            scale = self.largest_of_ranks(scale)

        codes = local_part(self.weight)
        for part, piece in zip(parts, pieces, strict=True):
            if self.kind != TENSOR_WISE:
                scale[part] = find_scale(self.kind, piece)
            of_piece = scale if self.kind == TENSOR_WISE else scale[part]
            codes[part.start - first : part.stop - first] = round_to_e4m3(piece, of_piece).view(torch.uint8)
        if self.kind != TENSOR_WISE:
            scale = self.largest_of_ranks(scale)
        self.scale.copy_(scale)

    def read_rows(self, dense: Tensor | StoredTensor, rows: slice) -> Tensor:
        """Rows of the layer's part of `dense`, in bf16, where the matmuls are."""
        return self.part_of(dense, rows).to(self.scale.device, torch.bfloat16)

    def largest_of_ranks(self, scale: Tensor) -> Tensor:
        """The largest scales of the ranks that have shards of the weight; those of rows of other ranks are 0."""
        for group in sharding_groups(self.weight):
            scale = collective("all_reduce", scale, "max", group.group_name)
        return scale

    def frozen_weight(self) -> FrozenWeight:
        shape = (self.out_features, self.in_features)
        if self.read_dense is not None:
            return DenseWeight("dense", [self.read_dense()], shape)
        codes = local_part(self.weight).view(E4M3)
        return EightBitWeight(self.kind, [codes, self.scale], shape)
