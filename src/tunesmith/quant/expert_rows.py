"""The copies of tokens that go to the experts of a layer: rows, sorted by expert."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Compute capabilities whose `grouped_mm` is one kernel in torch 2.13: Hopper, and Blackwell of data
# centers. For others, the GB10 of a DGX Spark among them, it is a loop (pytorch#184334).
GROUPED_CAPABILITIES = (9, 10)
# The compute capabilities on which `row_kernels` was measured: H100 and H200.
ROW_CAPABILITIES = ((9, 0),)


class RowIndex(NamedTuple):
    """The places of the copies of tokens that the products of experts read: rows, sorted by expert.

    Attributes:
        tokens: int64 [rows], the token of each row.
        places: int64 [n, k], the row of each copy of each token.
        offsets: int32 [experts], on the device: the end of each expert's rows.
        ends: the same on the host, on a CPU the same tensor; None where the host need not know, and
            wait for the GPU.
    """

    tokens: Tensor
    places: Tensor
    offsets: Tensor
    ends: Tensor | None

    def slots(self) -> Tensor:
        """The token of each row times the number of experts, plus its expert: int64 [rows]."""
        numbers = torch.arange(
            len(self.tokens), dtype=self.offsets.dtype, device=self.offsets.device
        )
        experts = torch.searchsorted(self.offsets, numbers, right=True)
        return self.tokens * len(self.offsets) + experts

    def ends_on_host(self) -> list[int]:
        """The end of each expert's rows."""
        assert self.ends is not None
        ends: list[int] = self.ends.tolist()
        return ends

    def split(self, rows: Tensor) -> Sequence[Tensor]:
        """Split a tensor of all rows by expert; into none on meta, where the edges are unknown."""
        if rows.is_meta:
            return []
        # All are cut at once: a slice takes as long as a small product takes to start.
        ends = self.ends_on_host()
        return rows.split([end - first for first, end in pairwise([0, *ends])])

    def tensors(self) -> list[Tensor]:
        """All of them, for `of_tensors`."""
        tensors = [self.tokens, self.places, self.offsets]
        return tensors if self.ends is None else [*tensors, self.ends]

    @classmethod
    def of_tensors(cls, tensors: Sequence[Tensor]) -> "RowIndex":
        tokens, places, offsets, *ends = tensors
        return cls(tokens, places, offsets, ends[0] if ends else None)


class ExpertRows(NamedTuple):
    """The rows of a layer's experts.

    Attributes:
        copies: int64 [rows], which of the n * k copies of all tokens each row is.
        experts: int64 [rows], the expert of each row.
        row_index: what the products read.
    """

    copies: Tensor
    experts: Tensor
    row_index: RowIndex

    @classmethod
    def of(
        cls, chosen: Tensor, experts: int, dtype: torch.dtype, *, in_groups: bool = False
    ) -> "ExpertRows":
        """The rows of all copies.

        Args:
            chosen: int64 [n, k], the experts of each token, each below `experts`.
            dtype: in which the products are computed.
            in_groups: a stack is dense for some experts at a time.
        """
        device = chosen.device
        per_token = chosen.shape[1]
        sorted_experts, copies = torch.sort(chosen.flatten(), stable=True)
        places = torch.empty_like(copies)
        places[copies] = torch.arange(len(copies), device=device)
        numbers = torch.arange(experts, device=device)
        offsets = torch.searchsorted(sorted_experts, numbers, right=True, out_int32=True)
        ends = None
        if device.type != "meta" and (in_groups or not uses_grouped_mm(device, dtype)):
            ends = offsets.cpu()
        index = RowIndex(copies // per_token, places.view(-1, per_token), offsets, ends)
        return cls(copies, sorted_experts, index)


@torch.compiler.assume_constant_result
def uses_grouped_mm(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether the products of all experts are one kernel."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(device)[0] in GROUPED_CAPABILITIES


def _has_kernels(x: Tensor) -> bool:
    """Return whether `row_kernels` moves the rows of x: bf16, on a GPU where it was measured."""
    if torch.compiler.is_compiling() or not x.is_cuda or x.dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(x.device) in ROW_CAPABILITIES


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows]; rows: int64."""
    if _has_kernels(x):
        from tunesmith.quant import row_kernels

        return row_kernels.copy_rows(x.contiguous(), rows)
    return x.index_select(0, rows)


def sum_of_rows(x: Tensor, places: Tensor) -> Tensor:
    """For each token the sum of its k rows of x, which lie at `places` [n, k]: [n, width]."""
    if _has_kernels(x):
        from tunesmith.quant import row_kernels

        return row_kernels.add_chosen_rows(x.contiguous(), places)
    # One kernel, which reads each row once and adds up a token's in their order.
    return F.embedding_bag(places, x, mode="sum")


def add_low(y: Tensor, low: Tensor, factors: Tensor, offsets: Tensor) -> None:
    """y += low N_e, in place, for the rows of each expert.

    y: [rows, width]; low: [rows, rank]; factors: N [experts, rank, width]; offsets: as in
    `RowIndex`.
    """
    if _has_kernels(y):
        from tunesmith.quant import row_kernels

        if low.shape[1] <= row_kernels.MAX_RANK:
            row_kernels.add_low_product(y, low.contiguous(), factors.contiguous(), offsets)
            return
    y += F.grouped_mm(low, factors, offs=offsets)
