"""Rows of a layer's experts, sorted by expert. A row is a copy of a token for one expert."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Major compute capabilities for which `grouped_mm` is one kernel in torch 2.13: Hopper and
# data-center Blackwell. On other GPUs, for example the GB10 of a DGX Spark, it is a loop
# (pytorch#184334).
GROUPED_CAPABILITIES = (9, 10)
# Compute capabilities of the GPUs on which `row_kernels` was measured: H100 and H200.
ROW_CAPABILITIES = ((9, 0),)


class RowIndex(NamedTuple):
    """Indices between tokens and the rows of their copies, which are sorted by expert.

    Attributes:
        tokens: int64 [rows], the token of each row.
        places: int64 [n, k], the row of each copy of each token.
        offsets: int32 [experts] on the device, the end of each expert's rows.
        ends: the same as `offsets`, on the host. None if the host does not need the values and
            should not wait for the GPU.
    """

    tokens: Tensor
    places: Tensor
    offsets: Tensor
    ends: Tensor | None = None

    def slots(self) -> Tensor:
        """Return for each row: token index * number of experts + expert index. int64 [rows]."""
        offsets = self.offsets
        numbers = torch.arange(len(self.tokens), dtype=offsets.dtype, device=offsets.device)
        experts = torch.searchsorted(offsets, numbers, right=True)
        return self.tokens * len(offsets) + experts

    def ends_on_host(self) -> list[int]:
        """Return the end of each expert's rows as integers on the host."""
        assert self.ends is not None
        ends: list[int] = self.ends.tolist()
        return ends

    def split(self, rows: Tensor) -> Sequence[Tensor]:
        """Split a tensor of all rows by expert.

        Return an empty list on the meta device, where the row ranges are not known.
        """
        if rows.is_meta:
            return []
        # Use one `split` call, because slicing the rows of one expert takes as long as launching a
        # small matmul.
        edges = [0, *self.ends_on_host()]
        counts = [end - first for first, end in pairwise(edges)]
        return rows.split(counts)

    def tensors(self) -> list[Tensor]:
        """Return all tensors as a list. `RowIndex(*tensors)` creates the index again."""
        return [tensor for tensor in self if tensor is not None]


class ExpertRows(NamedTuple):
    """Sorted order of the rows of a layer's experts, computed from the router's choices.

    Attributes:
        copies: int64 [rows], the index of each row among the n * k copies of all tokens.
        experts: int64 [rows], the expert of each row.
        row_index: the indices that the matmuls use.
    """

    copies: Tensor
    experts: Tensor
    row_index: RowIndex

    @classmethod
    def of(
        cls, chosen: Tensor, experts: int, dtype: torch.dtype, *, in_groups: bool = False
    ) -> "ExpertRows":
        """Sort the copies of all tokens by expert.

        Args:
            chosen: int64 [n, k], the experts of each token, each below `experts`.
            dtype: dtype of the matmuls.
            in_groups: whether a stack of experts is dequantized in groups of experts.
        """
        device = chosen.device
        per_token = chosen.shape[1]
        sorted_experts, copies = torch.sort(chosen.flatten(), stable=True)
        places = torch.empty_like(copies)
        places[copies] = torch.arange(len(copies), device=device)
        numbers = torch.arange(experts, device=device)
        offsets = torch.searchsorted(sorted_experts, numbers, right=True, out_int32=True)
        ends = None
        host_reads = in_groups or not uses_grouped_mm(device, dtype)
        if host_reads and device.type != "meta":
            ends = offsets.cpu()
        tokens = copies // per_token
        places = places.view(-1, per_token)
        return cls(copies, sorted_experts, RowIndex(tokens, places, offsets, ends))


@torch.compiler.assume_constant_result
def uses_grouped_mm(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether one kernel multiplies all experts on this device."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(device)[0] in GROUPED_CAPABILITIES


def _has_kernels(x: Tensor) -> bool:
    """Return whether `row_kernels` supports x: bf16, on a GPU where the kernels were measured."""
    if torch.compiler.is_compiling() or not x.is_cuda or x.dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(x.device) in ROW_CAPABILITIES


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Return x[rows] for int64 `rows`."""
    if _has_kernels(x):
        from tunesmith.quant import row_kernels

        return row_kernels.copy_rows(x.contiguous(), rows)
    return x.index_select(0, rows)


def sum_of_rows(x: Tensor, places: Tensor) -> Tensor:
    """Return the sum of the k rows of each token: [n, width]. `places` [n, k] holds the row
    indices.
    """
    if _has_kernels(x):
        from tunesmith.quant import row_kernels

        return row_kernels.add_chosen_rows(x.contiguous(), places)
    # embedding_bag is one kernel that reads each row once and sums a token's rows in order.
    return F.embedding_bag(places, x, mode="sum")


def add_low(y: Tensor, low: Tensor, factors: Tensor, offsets: Tensor) -> None:
    """Add the product `low N_e` to the rows of each expert e of y, in place.

    Args:
        y: [rows, width].
        low: [rows, rank].
        factors: N [experts, rank, width].
        offsets: int32 [experts], the end of each expert's rows.
    """
    if _has_kernels(y):
        from tunesmith.quant import row_kernels

        if low.shape[1] <= row_kernels.MAX_RANK:
            row_kernels.add_low_product(y, low.contiguous(), factors.contiguous(), offsets)
            return
    y += F.grouped_mm(low, factors, offs=offsets)
